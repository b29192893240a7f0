"""Turns the argument parser's nested messages into one line that a user can act on."""

import re

from svdd import nearest
from svdd.commands.registry import KINDS, names_of

__all__ = ["explain"]

_NOISE = re.compile(
    r"Expected a <class 'NoneType'>|Expected a path but |Does not validate against|Given value|^\s*(Subtypes|Errors):"
)


def explain(message: str) -> str:
    """Returns the part of a parser's message that names the setting, what came and what was expected.

    Args:
        message: What jsonargparse reports: for a class setting a tree of every type that was tried.
    """
    setting = re.match(r'\s*Parser key "([^"]+)":?\s*', message)
    key, rest = (f"{setting[1]}: ", message[setting.end() :]) if setting else ("", message)
    name = setting[1] if setting else "model.CLASS"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", rest):
        return key + _unknown(name, unknown[1])
    if option := re.search(r"Option '([^']+)' is not accepted", rest):
        return f"{key}no argument {option[1]!r}; `svdd predict --{name}.help NAME` lists what class NAME takes"
    if path := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", rest):
        return (
            f"{key}class {path[1]!r} cannot be used: {path[2].strip()}; own files are sought in the working directory"
        )
    if inner := re.search(r'Parser key "([^"]+)":?\s*(.*)', rest):
        return f"{name}.{inner[1]}: {_plain(inner[2])}"
    reasons = [line.strip(" -") for line in rest.splitlines() if line.strip(" -") and not _NOISE.search(line)]
    return key + _plain(" ".join(reasons) or rest)


def _unknown(key: str, name: str) -> str:
    kind = key.rsplit(".", 1)[-1].removeprefix("eval_").rstrip("s")
    if kind not in KINDS:
        return f"{name!r} is not a class path such as package.module.Class"
    known = names_of(kind)
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known)}{hint} (a class of your own: my_file.MyClass)"


def _plain(text: str) -> str:
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", lambda match: "one of " + match[1].replace("'", ""), text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return " ".join(text.replace("Expected a ", "expected ").replace(". Got value:", ", got").split())
