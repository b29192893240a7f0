"""The files in which `svdd fit` stores a learned value: weights, constructor arguments and what they are valid for."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from svdd import UserError

__all__ = ["Weights", "read_weights", "weights_file"]

_KEY = "svdd_value"  # of the header, in safetensors files and checkpoints
_EXPECTED = "expected value.safetensors, best.ckpt or last.ckpt as written by `svdd fit`"


class Weights(NamedTuple):
    """A learned value as plain data.

    Args:
        identity: The class, reward, diffusion model and input that the weights are valid for.
        arguments: Constructor arguments of the class.
        tensors: What `LearnedValue.trained_state` returned.
    """

    identity: dict[str, Any]
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """Encodes a safetensors file; matrices in half precision."""
        small = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in self.tensors.items()}
        header = json.dumps({"identity": self.identity, "arguments": self.arguments})
        return save({k: v.contiguous().cpu() for k, v in small.items()}, {_KEY: header})

    def to_checkpoint(self) -> dict[str, Any]:
        """Returns the entries of a Lightning checkpoint."""
        state = {f"value.{name}": tensor for name, tensor in self.tensors.items()}
        return {"state_dict": state, _KEY: {"identity": self.identity, "arguments": self.arguments}}

    @classmethod
    def from_checkpoint(cls, checkpoint: Any, source: str) -> "Weights":
        """Reads the entries of a Lightning checkpoint; UserError if `svdd fit` did not write it."""
        header = checkpoint.get(_KEY) if isinstance(checkpoint, dict) else None
        if not isinstance(header, dict) or header.keys() != {"identity", "arguments"}:
            raise UserError(f"{source} holds no value of svdd; {_EXPECTED}")
        return cls(**header, tensors={k.removeprefix("value."): v for k, v in checkpoint["state_dict"].items()})


def weights_file(pretrained: str) -> Path:
    """Returns the file that `pretrained` names: one that ships with svdd, or a path."""
    built_in = Path(str(files("svdd") / "assets" / "values" / f"{pretrained}.safetensors"))
    return built_in if built_in.is_file() else Path(pretrained).expanduser()


def read_weights(pretrained: str) -> Weights:
    """Reads a safetensors file or a checkpoint as data; UserError if it cannot be read or is none of `svdd fit`."""
    source, path = f"pretrained={pretrained!r}", weights_file(pretrained)
    try:
        with open(path, "rb") as opened:
            if path.suffix != ".safetensors":
                return Weights.from_checkpoint(torch.load(opened, "cpu", weights_only=True), source)
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        return Weights.from_checkpoint({_KEY: header, "state_dict": state}, source)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}; {_EXPECTED}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{source} is not a weights file, or a damaged one; {_EXPECTED}") from error
