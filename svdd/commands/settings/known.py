"""All settings of a command, in the order of its help."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from svdd.commands.registry import KINDS, catalogue
from svdd.commands.settings.own import COMMANDS
from svdd.commands.settings.signatures import parameters, words_of

__all__ = ["Setting", "appended", "class_settings", "kind_of", "section_of", "settings_of"]


class Setting(NamedTuple):
    """A setting by its dotted name, with its type in words, its help and its default, `...` if it is required."""

    name: str
    kind: str
    help: str
    default: Any


_COMMON = (
    Setting("config", "NAME|FILE", "A shipped configuration or a YAML file with settings. Later ones win.", None),
    Setting("print_config", "", "Print the whole configuration as YAML, and do nothing else.", None),
    Setting(
        "seed_everything", "INT", "Seed of random numbers outside of the samplers, such as those of a training.", False
    ),
)


@cache
def settings_of(command: str) -> tuple[Setting, ...]:
    """Returns the settings of a command on a configuration: those of its model and prompts, its own, the Trainer's."""
    about = COMMANDS[command]
    found: dict[str, list[Setting]] = {
        part: [
            Setting(name, each.kind, each.help, about.defaults.get(name, each.default))
            for each in parameters(path)
            if (name := f"{part}.{each.name}") not in about.left_out
        ]
        for part, path in about.parts.items()
    }
    own = [Setting(option.name, words_of(_text(option.kind)), option.help, option.default) for option in about.options]
    own += _COMMON if "model" in found else _COMMON[:2]
    trainer = found.pop("trainer", [])
    return tuple(setting for part in (*found.values(), own, trainer) for setting in part)


def kind_of(setting: str) -> str:
    """Returns the kind of class that a setting names, such as sampler; empty if it names none."""
    word = setting.rpartition(".")[2].removeprefix("eval_")
    return next((kind for kind in KINDS if word in (kind, f"{kind}s")), "")


def section_of(setting: str) -> str:
    """Returns the first part of a dotted name; empty for a command's own option."""
    return setting.partition(".")[0] if "." in setting else ""


def appended(setting: Setting) -> bool:
    """Whether a setting is a list of classes or of known words, to which a single name is appended."""
    return "[" in setting.kind and not {"TEXT", "INT", "true"} & {*re.split(r"\W+", setting.kind)}


@cache
def class_settings(command: str) -> tuple[str, ...]:
    """Returns the dotted names of all arguments of the built-in classes that a command takes, each once."""
    return tuple(dict.fromkeys(_class_settings(command)))


def _class_settings(command: str) -> Iterator[str]:
    default = COMMANDS[command].classes
    for setting in settings_of(command):
        if kind := kind_of(setting.name):
            names = [entry.name for entry in catalogue(plug_ins=False) if entry.kind == kind]
            paths = [f"{KINDS[kind][0]}.{name}" for name in names]
            for path in (*([default[kind]] if kind in default else []), *paths):
                yield from (f"{setting.name}.{each.name}" for each in parameters(path))


def _text(kind: Any) -> str:
    return (
        kind
        if isinstance(kind, str)
        else kind.__name__
        if isinstance(kind, type) and not hasattr(kind, "__args__")
        else str(kind)
    )
