"""Weights from a folder, a single file or the hub, read only as data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from svdd import UserError

__all__ = ["LOAD_ERRORS", "find_file", "fit_weights", "is_local", "offline", "read_weights"]

LOAD_ERRORS = (OSError, KeyError, ValueError, RuntimeError, ImportError, SafetensorError)  # of a model's folder


def is_local(source: str) -> bool:
    """Whether a name means a folder of this machine rather than `owner/name` on a hub."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


@contextmanager
def offline() -> Iterator[None]:
    """Lets the hub's client find what the disk holds, and reach nothing else."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find_file(source: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Returns a file of weights: a path of this machine, or `owner/name/file` on the hub, through its cache.

    Raises:
        UserError: If there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") < 2:
        raise UserError(f"there is no file {source!r}; expected a path, or owner/name/file of a model on the hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, name, file = source.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision, local_files_only=local_files_only))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source!r} is not on this machine and cannot be fetched: {reason}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from safetensors, or from a checkpoint of torch without running anything in it.

    A checkpoint may hold it under `state_dict`, and its names may begin with `module.`.

    Raises:
        UserError: If the file holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and file errors of many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{str(path)!r} cannot be read as weights: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{str(path)!r} holds no weights by name; expected a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def fit_weights(network: nn.Module, state: dict[str, Tensor], source: str, ignore: tuple[str, ...] = ()) -> None:
    """Loads weights, after checking that every name and shape is the network's.

    Args:
        network: What they are loaded into.
        state: The weights by name.
        source: Where they come from, for the message.
        ignore: Ends of names that need not be there and may be there: buffers that are computed.

    Raises:
        UserError: If a name is missing, unknown, or has another shape.
    """
    own = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or not name.endswith(ignore or ("\0",))}
    wrong = {name for name in own.keys() ^ state.keys() if not (ignore and name.endswith(ignore))}
    wrong |= {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    if wrong:
        first = sorted(wrong)[0]
        shapes = [list(part[first].shape) if first in part else "missing" for part in (state, own)]
        raise UserError(
            f"{source!r} holds weights of another architecture: {len(wrong)} names differ, first {first} "
            f"(there {shapes[0]}, expected {shapes[1]})"
        )
    network.load_state_dict(state, strict=False)
