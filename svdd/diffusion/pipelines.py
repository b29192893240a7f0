"""Loads pipelines and decoders of diffusers from a folder or the hub, quietly, with one-line errors."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import fetch, is_local, loading, locate, quiet, read_model, read_tokenizer

__all__ = [
    "EMBEDDED",
    "Configs",
    "TinyDecoder",
    "check_length",
    "examine",
    "expand",
    "fingerprint",
    "load_pipeline",
    "to_images",
    "warn_of_cuts",
]

Configs = dict[str, dict[str, Any]]  # config.json by the name of the part
EMBEDDED = {"emoji": "emoji-sd"}  # the pipelines that ship with svdd: folders of assets by name
_INDEX = "model_index.json"
_WITH_BETAS = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")  # schedulers of DDPM's kind that need scipy, torchsde
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # pictures drawn from prompts alone need none


def examine(
    class_name: str,
    pretrained: str,
    check: Callable[[Configs], str],
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Checks what a model is by its small files: of a hub name by its model_index.json alone.

    Args:
        class_name: The class of pipelines that it must be of.
        pretrained: A folder or a hub name.
        check: Returns what is wrong with the configurations of the parts, or an empty string.
        revision: Branch, tag or commit of a hub name.
        local_files_only: Use local files and the hub's cache only.

    Returns:
        The folder or hub name, the index, and options to read more of it.

    Raises:
        UserError: If there is no such model, or it is not what is expected.
    """
    what = f"pretrained={pretrained!r}"
    saved = f"a folder saved by {class_name}.save_pretrained"
    expected = f"`emoji`, {saved}, or a hub name such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    if is_local(pretrained):
        folder = Path(pretrained).expanduser()
        if folder.exists() and not (file := folder / _INDEX).is_file():
            raise UserError(f"{what} {_describe(folder)}; expected {expected}")
        source, options = locate(what, pretrained, _INDEX, expected)
    else:
        source, (file, options) = pretrained, fetch(what, pretrained, _INDEX, revision, local_files_only)
    index = _read_json(what, file)
    if (found := index.get("_class_name")) != class_name:
        kind = f"is a {found}" if isinstance(found, str) else f"names no class of pipelines in {_INDEX}"
        raise UserError(f"{what} {kind}; this class takes a {class_name}: {expected}")
    configs: Configs = {}
    for name, (library, kind) in _parts(index):
        if library not in ("diffusers", "transformers"):
            problem = f"takes its {name} from {library}.{kind}, and code in a model is never run"
            raise UserError(f"{what} {problem}; expected classes of diffusers and transformers")
        if is_local(pretrained):
            if not (folder / name).is_dir():
                problem = f"is incomplete: it has no folder {name}, which {_INDEX} names"
                raise UserError(f"{what} {problem}; copy or download the whole model")
            if (file := folder / name / "config.json").is_file():
                configs[name] = _read_json(what, file)
    if configs and (problem := check(configs)):
        raise UserError(f"{what} {problem}")
    return source, index, options


def load_pipeline(
    class_name: str,
    pretrained: str,
    check: Callable[[Configs], str],
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """Returns a pipeline in float32, without a safety checker; arguments as in `examine`, and a variant of the files.

    Raises:
        UserError: If the model cannot be loaded, is incomplete, or is not what is expected.
    """
    import diffusers

    what, kind = f"pretrained={pretrained!r}", getattr(diffusers, class_name)
    folder, index, hub = examine(class_name, pretrained, check, revision, local_files_only)
    takes = inspect.signature(kind.__init__).parameters
    left_out = dict.fromkeys(name for name in _LEFT_OUT if name in takes)
    if not is_local(pretrained):
        with loading(what), quiet("diffusers"):
            folder = str(kind.download(pretrained, variant=variant, trust_remote_code=False, **left_out, **hub))
        examine(class_name, folder, check)
    found = [name for name, _ in _parts(index) if any(Path(folder, name).glob(f"*.{variant}[.-]*"))]
    if variant is not None and not found:
        raise UserError(f"{what} has no weights of variant={variant!r}; leave it out, or see the names of its files")
    parts: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}  # left out on saving
    later: dict[str, Any] = {}  # parts of another class than the index names, which from_pretrained refuses
    for name, (library, class_of_part) in sorted(_parts(index)):  # text encoders before tokenizers
        part = getattr(import_module(library), class_of_part, None)
        if part is None:
            raise UserError(f"{what} names the class {class_of_part}, which this version of {library} lacks; update it")
        its = f"{what}, its {name},"
        if issubclass(part, nn.Module):
            with quiet("diffusers"):
                of: dict[str, Any] = {"variant": variant} if name in found else {}
                parts[name] = read_model(part, str(Path(folder, name)), torch.float32, its, **of)
        elif isinstance(part, diffusers.utils.import_utils.DummyObject):
            later[name] = _without_its_library(what, part, Path(folder, name, "scheduler_config.json"))
            parts[name] = None
        elif hasattr(part, "vocab_files_names"):
            encoder: Any = parts.get(name.replace("tokenizer", "text_encoder"))
            words = None if encoder is None else encoder.get_input_embeddings().num_embeddings
            parts[name] = read_tokenizer(part, str(Path(folder, name)), its, words, local_files_only=True)
    with loading(what, folder), quiet("diffusers"):
        pipeline = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **left_out | parts)
    pipeline.register_modules(**later)
    return pipeline


def _without_its_library(what: str, part: Any, file: Path) -> Any:
    """Returns a DDPMScheduler of a saved configuration whose own class needs a library that is not installed."""
    from diffusers import DDPMScheduler

    if part.__name__ in _WITH_BETAS:
        return DDPMScheduler.from_config(_read_json(what, file))
    raise UserError(f"{what} has a {part.__name__}, which needs {' and '.join(part._backends)}; install them")


def check_length(what: str, limit: int, config: Any) -> None:
    """Raises UserError if a tokenizer returns more tokens than the text encoder of this configuration reads."""
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if limit > (positions or 10_000):  # transformers takes 1e30 if it is not stated
        stated = f"states a model_max_length of {limit}" if limit < 1e9 else "states no model_max_length"
        raise UserError(
            f"{what} {stated}, and the text encoder reads {positions} tokens; correct tokenizer_config.json"
        )


def _parts(index: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields the name of each part that is loaded, with its library and class."""
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and name not in _LEFT_OUT and None not in entry:
            yield name, (str(entry[0]), str(entry[1]))


def _read_json(what: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be loaded: {file} is damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} cannot be loaded: {file} is damaged; expected a JSON object")
    return found


def _describe(path: Path) -> str:
    """Returns what is at a path that is no folder of a pipeline."""
    if path.is_file():
        kind = _single_file(path) if path.suffix == ".safetensors" else "a model"
        hint = "load it with StableDiffusionPipeline.from_single_file, and save it with save_pretrained"
        return f"is a single file, of {kind}" + (f": {hint}" if kind.startswith("Stable Diffusion") else "")
    for name in ("config.json", "modular_model_index.json"):
        if (path / name).is_file():
            found = _read_json(f"pretrained={str(path)!r}", path / name)
            kind = found.get("_class_name") or found.get("model_type") or "model of unknown class"
            return f"is a {kind} alone and has no {_INDEX}"
    if files := sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt")):
        return f"has no {_INDEX}, but single files such as {files[0]}"
    return f"has no {_INDEX}"


def _single_file(path: Path) -> str:
    """Returns the architecture of a safetensors file by the names and shapes of its tensors."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        with safe_open(path, "pt") as file:
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
        kind = infer_diffusers_model_type(shapes)
    except Exception:  # a damaged file, or a function that is not part of diffusers' interface
        return "an unknown architecture, or damaged"
    if kind in ("v1", "v2"):
        known = any(name.startswith("model.diffusion_model.") for name in shapes)
        return f"Stable Diffusion {kind[1]}.x" if known else "an unknown architecture"
    return f"the architecture {kind}"


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny (TAESD) in a folder or on the hub; UserError if it does not fit the latents."""

    def __init__(self, source: str, latent_channels: int, dtype: torch.dtype, local_files_only: bool = False) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        what = f"decoder={source!r}"
        expected = "`tiny`, a folder written by AutoencoderTiny.save_pretrained, or a hub name: madebyollin/taesd"
        source, options = locate(what, source, "config.json", expected, None, local_files_only)
        with quiet("diffusers"):
            vae = read_model(AutoencoderTiny, source, dtype, what, **options)
        if (found := vae.config.latent_channels) != latent_channels:
            raise UserError(f"{what} is for latents of {found} channels; this model has {latent_channels}")
        self.decoder, self.scaling_factor = vae.decoder.eval(), float(vae.config.scaling_factor)

    def forward(self, x0: Tensor) -> Tensor:
        """Turns latents [n, c, h, w] into images, float32 [n, 3, H, W] in [0, 1]."""
        images = self.decoder(x0.to(next(self.parameters()).dtype) / self.scaling_factor)
        return to_images(images)


def to_images(decoded: Tensor) -> Tensor:
    """Turns a decoder's output in [-1, 1] into images, float32 in [0, 1]; infinity becomes NaN, which stays NaN."""
    return (decoded.nan_to_num(torch.nan, torch.nan, torch.nan) * 0.5 + 0.5).clamp(0, 1).float()


def fingerprint(*modules: nn.Module) -> str:
    """Returns a hash of some numbers of every parameter, in half precision, so a model's fp16 files have the same."""
    found = hashlib.sha256()
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        flat = parameter.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)]
        found.update(name.encode() + few.to("cpu", torch.float16).numpy().tobytes())
    return found.hexdigest()[:12]


def expand(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Returns texts in which a token of textual inversion with several vectors, `<toy>`, is `<toy> <toy>_1 ...`."""
    from diffusers.loaders import TextualInversionLoaderMixin

    return TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)


def warn_of_cuts(tokenizer: Any, texts: Sequence[str], limit: int) -> None:
    """Warns of each text of more than `limit` tokens, special ones included, and names the words that are cut off."""
    special = tokenizer.num_special_tokens_to_add()
    for text in dict.fromkeys(texts):
        expanded = expand(tokenizer, [text])[0]
        ids = tokenizer(expanded, truncation=False, add_special_tokens=False, verbose=False).input_ids
        if (count := len(ids) + special) > limit:
            lost = tokenizer.decode(ids[limit - special :], skip_special_tokens=True).strip()
            where = f"cut off: {lost!r} (prompt: {text if len(text) <= 60 else text[:57] + '...'!r})"
            warnings.warn(f"a prompt has {count} tokens and the text encoder reads {limit}; {where}", stacklevel=5)
