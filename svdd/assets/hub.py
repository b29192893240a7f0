"""Model weights from a folder, a single file or the hub; files are read as data, code in them is never run."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from logging import CRITICAL
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants, errors, hf_hub_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from svdd import UserError, first_line

__all__ = [
    "ASSETS",
    "check_loaded",
    "check_tokenizer",
    "fetch",
    "find_file",
    "fit_weights",
    "is_local",
    "loading",
    "locate",
    "offline",
    "read_auto",
    "read_model",
    "read_tokenizer",
    "read_weights",
    "unreachable",
]

ASSETS = Path(__file__).parent  # the models that ship with svdd
_SPARE = r"position_ids$|inv_freq$|(^|\.)(pooler|lm_head)\."  # in published files, and without effect
_SENTENCE = "a photo of a red apple on a table"  # a usable tokenizer knows some of it


def is_local(source: str) -> bool:
    """Returns whether a name means a path on this machine rather than `owner/name` on the hub."""
    return source.startswith((".", "/", "~")) or source.rstrip("/").count("/") != 1 or Path(source).exists()


def locate(
    what: str, source: str, marker: str, expected: str, revision: str | None = None, local_files_only: bool = False
) -> tuple[str, dict[str, Any]]:
    """Returns a folder with the file `marker`, or a hub name of which it was fetched; and options to read more of it.

    Raises:
        UserError: If there is no such folder, or no such file in it, or it cannot be fetched; it begins with `what`.
    """
    if not is_local(source):
        return source, fetch(what, source, marker, revision, local_files_only)[1]
    folder = Path(source).expanduser()
    if not (folder / marker).is_file():
        problem = f"has no {marker}" if folder.is_dir() else "is not a folder"
        raise UserError(f"{what} {problem}; expected {expected}")
    return str(folder), {"local_files_only": True}


def fetch(
    what: str, name: str, file: str, revision: str | None = None, local_files_only: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Returns a file of a hub model, from the cache or downloaded, and options to read more of the model.

    Raises:
        UserError: If it is neither in the cache nor can be downloaded; the message begins with `what`.
    """
    down = "" if local_files_only else unreachable()
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only or bool(down)}
    with loading(what, down=down):
        return Path(hf_hub_download(name, file, **options)), options


def unreachable() -> str:
    """Returns why the hub cannot be reached, or an empty string; its own client would try for 20 s for each file."""
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the client's HTTP library, which depends on its version
        return first_line(error)
    return ""


@contextmanager
def loading(what: str, folder: str | Path | None = None, down: str = "") -> Iterator[None]:
    """Turns the errors of libraries that load models into a UserError of one line that begins with `what`.

    If a file of `folder` is damaged, the message names it; `down` is why the hub cannot be reached. The libraries print
    nothing meanwhile.
    """
    try:
        with quiet("transformers"):
            yield
    except UserError:
        raise
    except Exception as error:  # of many types
        raise UserError(f"{what} cannot be loaded: {_reason(error, folder, down)}") from error


def _reason(error: BaseException, folder: str | Path | None, down: str) -> str:
    """Returns one line on why loading failed, from the error or from those that led to it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def first(*kinds: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, kinds)), None)

    if first(errors.GatedRepoError):
        return "its owner restricts access: accept the terms on its page on the hub, and run `hf auth login`"
    if first(errors.RepositoryNotFoundError):
        return "the hub has no model of that name, or it is private: check the name, or run `hf auth login`"
    if first(errors.RevisionNotFoundError):
        return "the hub has the model, but not this revision"
    if found := first(errors.RemoteEntryNotFoundError):
        return f"the hub has the model, but not this file: {str(found).splitlines()[-1]}"
    if found := first(errors.HfHubHTTPError):
        return f"the hub refused: {first_line(found)}; run `hf auth login` if it asks for access, or try again later"
    if first(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        off = "downloads are off (local_files_only, HF_HUB_OFFLINE): allow them once"
        why = f"the hub at {constants.ENDPOINT} cannot be reached ({down}): check the connection" if down else off
        return f"it is not, or not completely, in the hub's cache, and {why}, or give a path on this machine"
    if first(SafetensorError, UnpicklingError, EOFError):
        return f"{_damaged(folder)}; copy or download it again"
    return first_line(error).split(" If you want to instead")[0]


def _damaged(folder: str | Path | None) -> str:
    """Returns which of a folder's weights files is damaged."""
    for path in sorted(Path(folder).rglob("*.safetensors")) if folder is not None else []:
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:  # of several types
            pointer = path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
            return f"{path} is {'a pointer of Git LFS, not the file' if pointer else f'damaged ({first_line(error)})'}"
    return "a file of it is damaged"


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Restricts the hub's client to its cache, where `local_files_only` cannot be passed on."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = wanted or before
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Hides loading bars, warnings and reports of `transformers` or `diffusers`."""
    with ExitStack() as restore:
        for log in (import_module(f"{library}.utils.logging") for library in libraries):
            restore.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity(CRITICAL)  # an error is raised as well
            if log.is_progress_bar_enabled():
                restore.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield


def read_auto(auto: Any, pretrained: str, what: str = "", **options: Any) -> Any:
    """Returns `auto.from_pretrained` of a folder or a hub name, or raises UserError; code in it is never run.

    The options include `revision` and `local_files_only`; `what` begins the error's message.
    """
    what, expected = what or f"pretrained={pretrained!r}", "a folder saved by save_pretrained or a hub name"
    hub: dict[str, Any] = {name: options.pop(name) for name in ("revision", "local_files_only") if name in options}
    source, hub = locate(what, pretrained, "config.json", expected, **hub)
    with loading(what, source):
        return auto.from_pretrained(source, trust_remote_code=False, **hub, **options)


def read_model(
    auto: Any, pretrained: str, dtype: torch.dtype, what: str = "", spare: str = _SPARE, **options: Any
) -> Any:
    """Returns a model, its weights in `dtype`; raises UserError unless the files hold its weights and no others.

    Args:
        auto: A model class of transformers or diffusers, or an Auto class.
        pretrained: A folder or a hub name.
        dtype: Of the weights.
        what: The beginning of the error's message.
        spare: A regular expression of the names that may remain unused.
        options: As in `read_auto`.
    """
    if auto.__module__.startswith("transformers"):  # whose own error would name no weight
        options["ignore_mismatched_sizes"] = True
    model, info = read_auto(auto, pretrained, what, dtype=dtype, output_loading_info=True, **options)
    check_loaded(type(model).__name__, info, what or f"pretrained={pretrained!r}", spare)
    return model


def check_loaded(kind: str, info: Mapping[str, Any], what: str, spare: str = _SPARE) -> None:
    """Raises UserError unless a model's files held all its weights, in its shapes, and no others.

    Args:
        kind: The name of the model's class.
        info: What transformers or diffusers return with `output_loading_info`.
        what: The beginning of the error's message.
        spare: A regular expression of the names that may remain unused.
    """
    if missing := sorted(info["missing_keys"]):
        problem = f"lacks {len(missing)} weights of {kind}, first {missing[0]}"
    elif wrong := sorted(info["mismatched_keys"]):
        name, found, own = wrong[0]
        problem = f"holds {len(wrong)} weights of other shapes than its config.json states, first {name}: "
        problem += f"{list(found)} instead of {list(own)}"
    elif unknown := sorted(name for name in info["unexpected_keys"] if not re.search(spare, name)):
        problem = f"holds {len(unknown)} weights that {kind} does not use, first {unknown[0]}"
    else:
        return
    raise UserError(f"{what} {problem}; expected the complete files of one model, trained for this task")


def read_tokenizer(kind: Any, source: str, what: str, words: int | None, **options: Any) -> Any:
    """Returns the tokenizer in a folder or of a hub name; raises UserError if files are missing, or it is unusable."""
    files, folder = dict(kind.vocab_files_names), Path(source).expanduser()
    pieces = files.get("vocab_file", "")
    alone = pieces.endswith(".model") and (folder / pieces).is_file() and not (folder / "tokenizer.json").is_file()
    if alone and find_spec("sentencepiece") is None:
        needs = "which needs the sentencepiece package: pip install 'svdd[t5]'"  # transformers would ask for tiktoken
        raise UserError(f"{what} has its tokens in {pieces} alone, {needs}")
    with loading(what, source):
        tokenizer = kind.from_pretrained(source, trust_remote_code=False, **options)
    if folder.is_dir() and not (folder / files.pop("tokenizer_file", "")).is_file():  # without one file with all
        missing = [file for file in files.values() if not (folder / file).is_file()]
        if missing:
            expected = "expected tokenizer.json, or all of " + ", ".join(files.values())
            raise UserError(f"{what} is incomplete: {source!r} lacks {', '.join(missing)}; {expected}")
    check_tokenizer(tokenizer, what, words)
    return tokenizer


def check_tokenizer(tokenizer: Any, what: str, words: int | None) -> None:
    """Raises UserError if a tokenizer knows no token of an English sentence, or more tokens than a model's `words`."""
    tokens = tokenizer(_SENTENCE, add_special_tokens=False).input_ids
    if all(token == tokenizer.unk_token_id for token in tokens):
        raise UserError(f"{what} knows no token of {_SENTENCE!r}: files are missing or damaged; download them again")
    if words is not None and (last := max(tokenizer.get_vocab().values())) >= words:
        raise UserError(f"{what} has tokens up to number {last}, but the model only {words}; expected the model's own")


def find_file(source: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Returns a weights file: a local path, or `owner/name/file` on the hub, downloaded; or raises UserError."""
    if (path := Path(source).expanduser()).is_file():
        return path
    *repository, file = source.split("/", 2)
    name = "/".join(repository)
    if is_local(name):
        raise UserError(f"there is no file {source!r}; expected a path, or owner/name/file of a model on the hub")
    return fetch(repr(source), name, file, revision, local_files_only)[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file or a PyTorch checkpoint; raises UserError if it holds none."""
    try:
        safetensors = path.suffix == ".safetensors"
        state: Any = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and file errors of many types
        refused = "it is damaged, or holds objects that could run code; expected tensors by name"
        reason = refused if isinstance(error, UnpicklingError) else first_line(error)
        raise UserError(f"{str(path)!r} cannot be read as weights: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
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
