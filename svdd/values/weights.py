"""The files in which `svdd fit` stores a learned value: its weights, constructor arguments and what it is for."""

import io
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

CHECKPOINT_KEY = "svdd_value"  # of a Lightning checkpoint
_EXPECTED = "expected value.safetensors, best.ckpt or last.ckpt as written by `svdd fit`"


class Weights(NamedTuple):
    """A learned value on disk.

    Args:
        identity: The class, reward, diffusion model and inputs that the weights are for, as plain data.
        arguments: Constructor arguments of the class.
        tensors: What `LearnedValue.trained_state` returned.
    """

    identity: dict[str, Any]
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """Encodes a safetensors file; matrices in half precision, units and vectors as they are."""
        small = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in self.tensors.items()}
        header = {"identity": json.dumps(self.identity), "arguments": json.dumps(self.arguments)}
        return save({name: tensor.contiguous().cpu() for name, tensor in small.items()}, header)

    def to_checkpoint(self) -> dict[str, Any]:
        """Returns the entries of a Lightning checkpoint."""
        header = {"identity": self.identity, "arguments": self.arguments}
        return {
            "state_dict": {f"value.{name}": tensor for name, tensor in self.tensors.items()},
            CHECKPOINT_KEY: header,
        }

    @classmethod
    def from_checkpoint(cls, checkpoint: Any, source: str) -> "Weights":
        """Reads the entries of a Lightning checkpoint.

        Raises:
            UserError: If it was not written by `svdd fit`.
        """
        if not isinstance(checkpoint, dict) or not {CHECKPOINT_KEY, "state_dict"} <= checkpoint.keys():
            raise UserError(f"{source} holds no value of svdd; {_EXPECTED}")
        tensors = {name.removeprefix("value."): tensor for name, tensor in checkpoint["state_dict"].items()}
        return cls(**checkpoint[CHECKPOINT_KEY], tensors=tensors)


def weights_file(pretrained: str) -> Path:
    """Returns the file that `pretrained` names: one that ships with svdd, or a path."""
    built_in = Path(str(files("svdd") / "assets" / "values" / f"{pretrained}.safetensors"))
    return built_in if built_in.is_file() else Path(pretrained).expanduser()


def read_weights(pretrained: str) -> Weights:
    """Reads a safetensors file or a checkpoint; nothing in it is executed.

    Args:
        pretrained: A local file, or the name of a value that ships with svdd.

    Raises:
        UserError: If the file cannot be read, or was not written by `svdd fit`.
    """
    source, path = f"pretrained={pretrained!r}", weights_file(pretrained)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}; {_EXPECTED}") from error
    try:
        if path.suffix != ".safetensors":
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            with safe_open(path, framework="pt") as file:
                header = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{source} is not a weights file, or a damaged one; {_EXPECTED}") from error
    if path.suffix != ".safetensors":
        return Weights.from_checkpoint(checkpoint, source)
    if header.keys() != {"identity", "arguments"}:
        raise UserError(f"{source} holds no value of svdd; {_EXPECTED}")
    return Weights(**header, tensors=tensors)
