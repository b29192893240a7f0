"""Trained values in files of `svdd fit`: a Lightning checkpoint, or the same as a safetensors file."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from svdd import UserError, values
from svdd.values.base import Value

__all__ = ["HEADER", "header", "learned_class", "load_value", "read_checkpoint", "to_safetensors", "weights_file"]

HEADER = "svdd_value"  # the entry, in both kinds of file, with the value's `identity` and `arguments`
_EXPECTED = "expected value.safetensors, best.ckpt or last.ckpt as written by `svdd fit`"


def load_value(pretrained: str) -> Value:
    """Returns the value in a file of `svdd fit`, or the shipped value of that name; `bind` loads its weights."""
    return learned_class(pretrained)(pretrained=pretrained)


def learned_class(pretrained: str) -> Any:
    """Returns the class of the value in a file; UserError if the file cannot be read, or its class is not imported."""
    name, classes = read_checkpoint(pretrained)[HEADER]["identity"]["value"], [Value]
    getattr(values, name, None)  # imports a class of svdd
    for known in classes:  # the list grows by the subclasses of each
        classes += known.__subclasses__()
        if known.__name__ == name:
            return known
    raise UserError(
        f"pretrained={pretrained!r} holds a value of class {name!r}, which is not imported; name the class, as in "
        f"--model.value my_file.{name}"
    )


def weights_file(pretrained: str) -> Path:
    """Returns the file that `pretrained` names: one that ships with svdd, or a path."""
    built_in = Path(str(files("svdd") / "assets" / "values" / f"{pretrained}.safetensors"))
    return built_in if built_in.is_file() else Path(pretrained).expanduser()


def read_checkpoint(pretrained: str) -> dict[str, Any]:
    """Reads either kind of file as data, without running code; UserError if it cannot be read or holds no value."""
    source, path = f"pretrained={pretrained!r}", weights_file(pretrained)
    try:
        with open(path, "rb") as opened:
            if path.suffix != ".safetensors":
                checkpoint = torch.load(opened, "cpu", weights_only=True)
            else:
                with safe_open(path, "pt") as file:
                    checkpoint = {HEADER: json.loads((file.metadata() or {}).get(HEADER, "null"))}
                    checkpoint["state_dict"] = {f"value.{k}": file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}; {_EXPECTED}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{source} is not a weights file, or a damaged one; {_EXPECTED}") from error
    header(checkpoint, source)
    return checkpoint


def header(checkpoint: Any, source: str) -> dict[str, Any]:
    """Returns `identity` and `arguments` of the value in a checkpoint; UserError if it holds none."""
    found = checkpoint.get(HEADER) if isinstance(checkpoint, dict) else None
    if not isinstance(found, dict) or found.keys() != {"identity", "arguments"}:
        raise UserError(f"{source} holds no value of svdd; {_EXPECTED}")
    return found


def to_safetensors(checkpoint: dict[str, Any]) -> bytes:
    """Encodes a value's checkpoint as a safetensors file; matrices in half precision."""
    state = {k.removeprefix("value."): v.contiguous().cpu() for k, v in checkpoint["state_dict"].items()}
    small = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    return save(small, {HEADER: json.dumps(checkpoint[HEADER])})
