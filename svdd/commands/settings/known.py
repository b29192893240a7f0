"""All settings of a command, in the order of its help."""

import re
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
    Setting("seed_everything", "INT", "Seed of other random numbers than the samplers', such as a training's.", False),
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
def class_settings(command: str) -> dict[str, tuple[str, ...]]:
    """Returns the dotted names of the arguments of all built-in classes that a command takes, each with its classes."""
    found = dict[str, tuple[str, ...]]()
    default = COMMANDS[command].classes
    for setting in settings_of(command):
        if kind := kind_of(setting.name):
            names = [entry.name for entry in catalogue(plug_ins=False) if entry.kind == kind]
            chosen = default.get(kind, "").rpartition(".")[2]
            for name in sorted(names, key=lambda name: name != chosen):
                for each in parameters(f"{KINDS[kind][0]}.{name}"):
                    key = f"{setting.name}.{each.name}"
                    found[key] = (*found.get(key, ()), name)
    return found


def _text(kind: Any) -> str:
    """Returns a type as it is written."""
    if isinstance(kind, str):
        return kind
    return str(kind.__name__ if type(kind) is type else kind)
