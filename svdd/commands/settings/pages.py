"""The help of the commands with a configuration: what most runs set comes first, the Trainer's options last."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator

from svdd.commands.registry import catalogue, plugins
from svdd.commands.settings.known import Setting, appended, kind_of, section_of, settings_of
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.short_forms import SHORT_FORMS
from svdd.commands.settings.signatures import parameters

__all__ = ["help_page"]

_USAGES = {  # positional arguments, and an example
    "predict": ("", "svdd predict -r Compressibility -p emoji -s SVDD -o runs/first"),
    "fit": ("", "svdd fit -r Compressibility -p emoji -o runs/value"),
    "calibrate": ("", "svdd calibrate -r Compressibility -p emoji -o runs/calibration"),
    "score": ("", "svdd score -r Compressibility --images runs/first"),
    "score --benchmark": (" NAME RUN", "svdd score --benchmark geneval runs/first"),
    "test-reward": (" [REWARD]", "svdd test-reward my_rewards.Redness"),
}
_HEADINGS = {  # by section
    "model": "model, reward and value",
    "data": "prompts",
    "": "the command itself",
    "evaluation": "measurements of the finished pictures",
    "trainer": "options of Lightning's Trainer",
}
_TRAINER = "The first sentences of its documentation: https://lightning.ai/docs/pytorch/stable/common/trainer.html"
_LEAST, _LONGEST = 40, 120  # characters: less is followed by a further sentence, more is not
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?([\w.]+)`")
_DEFAULT = re.compile(r" ?Default: (``.*?``|\S+?)\.?(?= |$)")


def help_page(command: str) -> str:
    """Returns the help of a command, as wide as the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    commands = [command, *(["score --benchmark"] if command == "score" else [])]
    return "\n\n".join(part for each in commands for part in _parts(each, width))


def _parts(command: str, width: int) -> Iterator[str]:
    """Yields the paragraphs of a page."""
    about, settings, (positional, example) = COMMANDS[command], settings_of(command), _USAGES[command]
    yield f"usage: svdd {command}{positional} [--config FILE] [--SETTING VALUE ...]"
    yield f"{about.purpose}\n\n  {example}"
    short = {name: f"{key}, {form}" for key, (form, name) in SHORT_FORMS.get(command, {}).items()}
    if "diffusion" in about.classes:
        pretrained = next(each for each in parameters(about.classes["diffusion"]) if each.name == "pretrained")
        settings = (Setting("model.diffusion.pretrained", *pretrained[1:]), *settings)
    order = [*short, *(each.name for each in settings if each.default is ... and each.name not in short)]
    first = sorted((each for each in settings if each.name in order), key=lambda each: order.index(each.name))
    yield _section("used most", (_entry(each, short.get(each.name, ""), width) for each in first))
    if command != "score --benchmark":  # which follows `score` on its page
        yield _section("classes and lists", _classes(command, settings, width))
    for section, heading in _HEADINGS.items():
        own = [each for each in settings if each not in first and section_of(each.name) == section]
        if own:
            about_it = [_wrapped(_TRAINER, width)] if section == "trainer" else []
            yield _section(heading, [*about_it, *(_entry(each, "", width) for each in own)])


def _section(heading: str, lines: Iterable[str]) -> str:
    return "\n".join((f"{heading}:", *lines))


def _wrapped(text: str, width: int, indent: int = 2) -> str:
    first, more = " " * indent, " " * 6
    wrapper = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=more, break_on_hyphens=False, break_long_words=False
    )
    return wrapper.fill(text)


def _entry(setting: Setting, short: str, width: int) -> str:
    """Returns the lines about a setting: its names and type, then its help and default."""
    names = short if short.endswith(f"--{setting.name}") else f"{short}, --{setting.name}".removeprefix(", ")
    head, text = f"  {names} {setting.kind}".rstrip(), _help(setting)
    one_line = f"{head:<34}  {text}"
    return one_line if len(one_line) <= width else f"{head}\n{_wrapped(text, width, 6)}"


def _help(setting: Setting) -> str:
    """Returns the help of a setting with its default; of an option of the Trainer only the first sentences."""
    text, default = setting.help, setting.default
    if section_of(setting.name) == "trainer":
        if default is None and (found := _DEFAULT.search(text)) and "None" not in found[1]:
            default = found[1].strip("`")
        text = _ROLE.sub(r"\1", _DEFAULT.sub("", text)).replace("``", "`")
        whole, *more = re.split(r"(?<=[.)]) (?=[A-Z`])", text)
        for sentence in more:
            if len(whole) >= _LEAST and len(whole) + len(sentence) > _LONGEST:
                break
            whole += f" {sentence}"
        text = whole
    if default is ...:
        return f"{text} [required]"
    stated = "default" in text.lower() and str(default) in text
    shown = default is not None and default is not False and default != [] and not stated
    return f"{text} [default: {default}]" if shown else text


def _classes(command: str, settings: Iterable[Setting], width: int) -> Iterator[str]:
    """Yields how classes are named and set, which there are of each kind, and how lists are given."""
    entries, default = catalogue(plug_ins=False), COMMANDS[command].classes
    by_kind = {kind: each.name for each in reversed([*settings]) if (kind := kind_of(each.name))}
    others = ", ".join(plugin.name for plugin in plugins())
    also = f", also those of {others}" if others else ""
    yield _wrapped(f"`svdd list` describes the classes{also}; a class of your own is my_file.MyClass.", width)
    for kind in [kind for kind in ("reward", "sampler", "value", "diffusion") if kind in by_kind]:
        names = ", ".join(entry.name for entry in entries if entry.kind == kind)
        yield _wrapped(f"--{by_kind[kind]}: {names}.", width)
    example = next(kind for kind in ("sampler", "value", "reward") if kind in by_kind)
    shown = f"`svdd {command.partition(' ')[0]} --{by_kind[example]}.help NAME`"
    of_default = " Those of the default classes:" if default else ""
    yield _wrapped(f"The own settings of a class follow its name and a dot; {shown} explains them.{of_default}", width)
    for kind, path in default.items():
        names = ", ".join(each.name for each in parameters(path))
        yield _wrapped(f"--model.{kind}.NAME ({path.rpartition('.')[2]}): {names}.", width)
    if lists := [f"--{each.name}" for each in settings if appended(each)]:
        yield _wrapped(f"A single name is appended to, and a list '[A, B]' replaces, {', '.join(lists)}.", width)
