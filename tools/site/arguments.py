"""An extension of griffe: documents the arguments that a class passes on to its base, and commented attributes."""

import re
from inspect import Parameter, formatannotation
from pkgutil import resolve_name
from typing import Any

import griffe
from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters

from tools.site.reference import public_classes

__all__ = ["Arguments"]

_MODULE = re.compile(r"\b(?:\w+\.)+(?=\w)")
_COMMENT = re.compile(r"  # (?!noqa|type:)(.+)")


class Arguments(griffe.Extension):
    """Documents the arguments that `--help` shows, and the attributes that have a comment for a docstring."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Adds to the sections of a public class of svdd."""
        known = public_classes()
        if cls.path in known and cls.docstring:
            sections = cls.docstring.parsed
            _complete_attributes(cls, sections)
            _complete_arguments(cls, sections, known)


def _complete_arguments(cls: griffe.Class, sections: list[Any], known: dict[str, str]) -> None:
    found = resolve_name(cls.path)
    parameters = [] if issubclass(found, BaseException) else get_signature_parameters(found, "__init__")
    others = sorted({known[owner] for each in parameters if (owner := _owner(each)) in known and owner != cls.path})
    rows = [_row(each) for each in parameters if each.doc and (_owner(each) not in known or _owner(each) == cls.path)]
    if rows:
        _section(sections, griffe.DocstringSectionParameters).value = rows
    if others:
        links = " and ".join(f"[`{name.rpartition('.')[2]}`][{name}]" for name in others)
        place = next((i for i, section in enumerate(sections) if section.kind.value == "parameters"), len(sections) - 1)
        sections.insert(place + 1, griffe.DocstringSectionText(f"Further arguments are those of {links}."))


def _owner(parameter: ParamData) -> str:
    """Returns the class whose constructor takes this argument."""
    function: Any = parameter.component
    return f"{function.__module__}.{function.__qualname__.rpartition('.')[0]}"


def _row(parameter: ParamData) -> griffe.DocstringParameter:
    required = parameter.default is Parameter.empty
    return griffe.DocstringParameter(
        parameter.name,
        annotation=_MODULE.sub("", formatannotation(parameter.annotation)),
        description=parameter.doc or "",
        value=None if required else repr(parameter.default),
    )


def _complete_attributes(cls: griffe.Class, sections: list[Any]) -> None:
    is_record = "dataclass" in cls.labels
    rows = [
        griffe.DocstringAttribute(name, annotation=each.annotation, description=comment)
        for name, each in cls.attributes.items()
        if not (name.startswith("_") or each.docstring or "property" in each.labels)
        and ((comment := _comment(each)) or is_record)
    ]
    if rows:
        section = _section(sections, griffe.DocstringSectionAttributes)
        written = {row.name for row in section.value}
        section.value += [row for row in rows if row.name not in written]


def _comment(attribute: griffe.Attribute) -> str:
    """Returns the comment after an attribute, or those right above it."""
    lines = attribute.lines_collection[attribute.filepath]  # type: ignore[index]
    first = attribute.lineno - 1  # type: ignore[operator]
    if found := _COMMENT.search(lines[first]):
        return found[1][0].upper() + found[1][1:]
    above: list[str] = []
    while lines[first - len(above) - 1].strip().startswith("# "):
        above.insert(0, lines[first - len(above) - 1].strip().removeprefix("# "))
    return " ".join(above)


def _section(sections: list[Any], kind: type) -> Any:
    """Returns the section of a kind, which is added if there is none."""
    for section in sections:
        if isinstance(section, kind):
            return section
    sections.append(kind([]))
    return sections[-1]
