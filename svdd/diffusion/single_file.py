"""A model in one `.safetensors` file: all of a pipeline, or its network alone, in the original or diffusers' layout."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from svdd import UserError
from svdd.assets.hub import loading, quiet

__all__ = ["Architecture", "architecture", "download_rest", "is_single_file", "parts_held", "read_parts"]

_PIPELINES = {  # by the beginning of diffusers' name of an architecture
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux-2": "Flux2KleinPipeline",
    "z-image-turbo": "ZImagePipeline",
    "sana": "SanaPipeline",
}
_LORA = re.compile(r"lora_(up|down|A|B|unet|te)\b|\.lora\.|lora_(unet|te\d?)_|\.hada_|\.lokr_")
_SCALED = re.compile(r"scaled_fp8$|\.(scale_weight|weight_scale)$|\.weight\.(absmax|quant_state)")


class Architecture(NamedTuple):
    """What a single file holds."""

    name: str  # in words
    pipeline: str | None  # the class of pipelines that it belongs to; None if it is unknown or of no use here
    repository: str | None  # of the hub, with its configuration


def is_single_file(pretrained: str) -> bool:
    """Returns whether a name means a file, or `owner/name/file` on the hub, rather than a folder or a hub name."""
    path = Path(pretrained).expanduser()
    return path.is_file() or (pretrained.count("/") > 1 and path.suffix == ".safetensors" and not path.is_absolute())


def architecture(what: str, path: Path) -> Architecture:
    """Returns what a file holds, by the names and shapes of its tensors; UserError if it is no model of its own."""
    from diffusers.loaders import single_file_utils as utils

    if path.suffix != ".safetensors":
        raise UserError(f"{what} is a file of another kind; expected a .safetensors file, or a folder")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of several types
        raise UserError(f"{what} is damaged, or no .safetensors file ({error}); copy or download it again") from error
    if any(_LORA.search(name) for name in shapes):
        raise UserError(f"{what} is a LoRA: give it as `lora`, and its base model as `pretrained`")
    if odd := next((name for name in shapes if _SCALED.search(name)), None):
        raise UserError(f"{what} has quantised weights with scales ({odd}); expected float32, bfloat16 or float16")
    kind = utils.infer_diffusers_model_type(shapes)
    if kind == "v1" and not any(name.startswith("model.diffusion_model.") for name in shapes):  # diffusers' default
        return Architecture("an unknown architecture", None, None)
    pipeline = next((_PIPELINES[begin] for begin in _PIPELINES if kind.startswith(begin)), None)
    if "controlnet" in kind:
        pipeline = None  # of Z-Image, which begins like the model
    if pipeline is None:
        raise UserError(f"{what} is a single file, of the architecture {kind}; expected text to image")
    repository = utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {}).get("pretrained_model_name_or_path")
    if kind.startswith("flux-2"):  # dev or klein
        repository = None
    words = f"Stable Diffusion {kind[1]}.x" if kind in ("v1", "v2") else f"the architecture {kind}"
    return Architecture(words, pipeline, repository)


def parts_held(path: Path, classes: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """Returns those modules of a pipeline, by name, of which a file holds the weights; always the network."""
    from diffusers.loaders import single_file_utils as utils

    with safe_open(path, "pt") as file:
        names = dict.fromkeys(file.keys())
    vae = any(name.startswith(("first_stage_model.", "vae.")) for name in names)

    def held(name: str, kind: type) -> bool:
        if kind.__module__.startswith("transformers"):
            t5 = "T5" in kind.__name__
            return utils.is_t5_in_single_file(names) if t5 else utils.is_clip_model_in_single_file(kind, names)
        return vae or name != "vae"

    return {name: kind for name, kind in classes.items() if issubclass(kind, nn.Module) and held(name, kind)}


def download_rest(repository: str, missing: Iterable[str], **options: Any) -> Path:
    """Returns a folder with the configurations of a model on the hub, and with the weights of some of its parts."""
    small = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model"]
    return Path(snapshot_download(repository, allow_patterns=[*small, *(f"{name}/*" for name in missing)], **options))


def read_parts(
    what: str, path: Path, folder: Path, held: Mapping[str, type[nn.Module]], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Returns parts of a pipeline whose weights are in a file, converted by diffusers.

    Args:
        what: The beginning of an error's message.
        path: The file.
        folder: A folder of a pipeline of the same architecture, of which only the configurations are read.
        held: Their names and classes.
        dtype: Of the weights.

    Raises:
        UserError: If the file lacks weights of a part, or cannot be converted.
    """
    from diffusers import pipelines
    from diffusers.loaders import single_file, single_file_utils

    parts = {}
    with loading(what, path.parent), quiet("diffusers"):
        checkpoint = single_file_utils.load_single_file_checkpoint(str(path))
        for name, kind in held.items():
            try:
                parts[name] = single_file.load_single_file_sub_model(
                    library_name=kind.__module__.partition(".")[0],
                    class_name=kind.__name__,
                    name=name,
                    checkpoint=dict(checkpoint),  # which the conversion changes
                    pipelines=pipelines,
                    is_pipeline_module=False,
                    cached_model_config_path=str(folder),
                    torch_dtype=dtype,
                    local_files_only=True,
                )
            except (NotImplementedError, LookupError) as error:  # some weights are on the meta device, some nowhere
                expected = "expected the file and the configuration (`config`) of one model"
                raise UserError(f"{what} lacks weights of {kind.__name__}; {expected}") from error
    return parts
