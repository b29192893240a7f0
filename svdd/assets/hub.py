"""Model weights from a folder, a single file or the hub; files are read as data, code in them is never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from svdd import UserError, first_line

__all__ = [
    "ASSETS",
    "find_file",
    "fit_weights",
    "loading",
    "locate",
    "offline",
    "read_auto",
    "read_model",
    "read_weights",
]

ASSETS = Path(__file__).parent  # the models that ship with svdd


def _is_local(source: str) -> bool:
    """Returns whether a name means a path on this machine rather than `owner/name` on the hub."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).exists()


def locate(argument: str, source: str, marker: str, expected: str) -> str:
    """Returns a hub name unchanged, or a folder with `~` expanded; raises UserError if that holds no file `marker`."""
    if not _is_local(source):
        return source
    folder = Path(source).expanduser()
    if not (folder / marker).is_file():
        problem = f"has no {marker}" if folder.is_dir() else "is not a folder"
        raise UserError(f"{argument}={source!r} {problem}; expected {expected}")
    return str(folder)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns the errors of libraries that load models into a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Restricts the hub's client to its cache, where `local_files_only` cannot be passed on."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = wanted or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_auto(auto: Any, pretrained: str, **options: Any) -> Any:
    """Returns `auto.from_pretrained` of a folder or a hub name, or raises UserError; code in it is never run."""
    source = locate("pretrained", pretrained, "config.json", "a folder saved by save_pretrained or a hub name")
    with loading(f"pretrained={pretrained!r}"):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


def read_model(auto: Any, pretrained: str, dtype: torch.dtype, **options: Any) -> Any:
    """Returns a model, its weights in `dtype`; raises UserError if it is of another kind or weights are missing."""
    model, info = read_auto(auto, pretrained, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        problem = f"lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}"
        raise UserError(f"pretrained={pretrained!r} {problem}; expected a model trained for this task")
    return model


def find_file(source: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Returns a weights file: a local path, or `owner/name/file` on the hub, downloaded; or raises UserError."""
    if (path := Path(source).expanduser()).is_file():
        return path
    *repository, file = source.split("/", 2)
    name = "/".join(repository)
    if _is_local(name):
        raise UserError(f"there is no file {source!r}; expected a path, or owner/name/file of a model on the hub")
    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=local_files_only))
    except (OSError, ValueError) as error:  # the client's own errors derive from these
        raise UserError(f"{source!r} is not on this machine and cannot be fetched: {first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a PyTorch checkpoint; raises UserError if it holds none."""
    try:
        safetensors = path.suffix == ".safetensors"
        state: Any = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and file errors of many types
        raise UserError(f"{str(path)!r} cannot be read as weights: {first_line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{str(path)!r} holds no weights by name; expected a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def fit_weights(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state dict; raises UserError if names or shapes differ, except for `position_ids`, which are computed."""
    own = network.state_dict()
    wrong = {name for name in own.keys() ^ state.keys() if not name.endswith("position_ids")}
    wrong |= {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    if wrong:
        first = min(wrong)
        there, expected = (list(part[first].shape) if first in part else "missing" for part in (state, own))
        problem = f"{len(wrong)} names differ, first {first} (there {there}, expected {expected})"
        raise UserError(f"{source!r} holds weights of another architecture: {problem}")
    network.load_state_dict(state, strict=False)
