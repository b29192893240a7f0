"""Short forms of the settings that are used most: `-r CLIPScore` for `--model.reward CLIPScore`."""

import re
from collections.abc import Mapping, Sequence

__all__ = ["SHORT_FORMS", "spelled_out"]

_PREDICT = {
    "-r": ("--reward", "model.reward"),
    "-p": ("--prompts", "data.prompts"),
    "-s": ("--sampler", "model.sampler"),
    "-m": ("--pretrained", "model.diffusion.pretrained"),
    "-o": ("--output", "output"),
    "-c": ("--config", "config"),
}
_OTHERS = {short: forms for short, forms in _PREDICT.items() if short != "-s"}
_OWN = {short: (long, long[2:]) for short, (long, _) in _OTHERS.items() if short != "-m"}

SHORT_FORMS: Mapping[str, Mapping[str, tuple[str, str]]] = {  # by command: two short forms of a setting, and its name
    "predict": _PREDICT,
    "study": _PREDICT,
    "fit": _OTHERS,
    "calibrate": _OTHERS,
    "score": _OWN,
    "test-reward": {short: forms for short, forms in _OWN.items() if short != "-o"},
}


def spelled_out(command: str, words: Sequence[str]) -> list[str]:
    """Returns a command line with whole names in place of short forms; `=` or what follows a dot stays."""
    names = dict[str, str]()
    for short, (long, name) in SHORT_FORMS.get(command, {}).items():
        names |= {short: f"--{name}", long: f"--{name}"}
    found = list(words)
    for k, word in enumerate(words):
        form, rest = re.fullmatch(r"(-\w|--\w+|)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        if form in names and (not rest or rest[0] in "=.+"):
            found[k] = names[form] + rest
    return found
