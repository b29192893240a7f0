"""Any supported model: its family follows from its own files, or from a pipeline object."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from svdd import UserError, did_you_mean
from svdd.diffusion.flux import Flux
from svdd.diffusion.flux2_klein import Flux2Klein
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.model_index import INDEX, Source, read_index
from svdd.diffusion.pixart_sigma import PixArtSigma
from svdd.diffusion.qwen_image import QwenImage
from svdd.diffusion.sana import Sana
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.diffusion.stable_diffusion_3 import StableDiffusion3
from svdd.diffusion.stable_diffusion_xl import StableDiffusionXL
from svdd.diffusion.z_image import ZImage

__all__ = ["AutoDiffusion", "families", "from_pipeline"]

_BUILT_IN: tuple[type[LatentDiffusion], ...] = (
    *(StableDiffusion, StableDiffusionXL, StableDiffusion3),
    *(Flux, Flux2Klein, QwenImage, ZImage, Sana, PixArtSigma),
)
_LOADING = frozenset(
    {"pretrained", "config", "revision", "variant", "dtype", "local_files_only", "attention_backend"}
    | {"lora", "weight_name", "lora_scale", "compile", "offload", "vae_slicing", "vae_tiling"}
)
_OTHER_TASKS = {  # words in the name of a class: what such a pipeline does
    "Kontext|Edit|Pix2Pix|Redux|LEdits": "edits a picture",
    "Img2Img|Refiner|Depth2Img|Variation": "starts from a picture",
    "Inpaint|Fill": "fills a part of a picture",
    "Control|Adapter": "is controlled by another picture",
    "Upscale|SuperResolution": "enlarges a picture",
    "Video|Animate|Wan|LTX|Mochi|Cosmos": "makes films",
    "Audio|Music": "makes sound",
    "Prior|Decoder|Cascade": "is one stage of several",
}


def families() -> dict[str, type[LatentDiffusion]]:
    """Returns the families by class of pipelines: those that ship with svdd, and others that have been imported."""
    found: dict[str, type[LatentDiffusion]] = {}
    base: Any = LatentDiffusion  # which is abstract
    for family in (*_BUILT_IN, *_below(base)):
        if hasattr(family, "pipeline"):
            found.setdefault(family.pipeline, family)  # a family's own subclass does not replace it
    return found


def from_pipeline(pipe: Any, **arguments: Any) -> LatentDiffusion:
    """Returns the chain of a pipeline object, which stays as it is and can still be used.

    The chain has the pipeline's weights, with everything that was loaded into them (LoRA, textual inversion), its
    device, its precision, its hooks, and the settings of its scheduler. Nothing is copied, moved or changed.

    Args:
        pipe: A pipeline of diffusers.
        arguments: Of its family, but for those about loading.

    Raises:
        UserError: If no family has such pipelines, or the family has no such argument.
    """
    known, name = families(), type(pipe).__name__
    family = next((known[base.__name__] for base in type(pipe).__mro__ if base.__name__ in known), None)
    if family is None:
        raise UserError(f"a {name} {_refusal(name)}")
    if given := sorted(arguments.keys() & _LOADING):
        raise UserError(f"{', '.join(given)}: a pipeline object has been loaded already; set this on the pipeline")
    parts = {each: part for each, part in pipe.components.items() if hasattr(part, "config")}
    configs = {each: {"_class_name": type(part).__name__, **_plain(part.config)} for each, part in parts.items()}
    if problem := family.misfit(configs):
        raise UserError(f"a {name} {problem}")
    return family(**_for_family(family, {"pretrained": pipe} | arguments))


class AutoDiffusion(LatentDiffusion):
    """Any supported model; its family follows from its files."""

    encode_texts: Any = None  # an instance is always of a family, which has its own
    network: Any = None
    decode: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns an instance of the model's family."""
        arguments = _SIGNATURE.bind(*args, **kwargs).arguments
        if not isinstance(arguments.get("pretrained", ""), str):
            return from_pipeline(arguments.pop("pretrained"), **arguments)
        family = _find(arguments)
        return family(**_for_family(family, arguments))

    @classmethod
    def examine(cls, arguments: Mapping[str, Any]) -> None:
        """Raises UserError if the model is of no known family, or its family refuses it or has no such argument."""
        family = _find(arguments)
        family.examine(_for_family(family, arguments))


def _plain(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _find(arguments: Mapping[str, Any]) -> type[LatentDiffusion]:
    """Returns the family of the model that constructor arguments name."""
    source = Source.of(arguments)
    index, known = read_index(source), families()
    if index.pipeline in known:
        return known[index.pipeline]
    kind = f"names no class of pipelines in {INDEX}; it" if index.pipeline is None else f"is a {index.pipeline}, which"
    raise UserError(f"{source.what} {kind} {_refusal(index.pipeline or '')}")


def _refusal(name: str) -> str:
    """Returns why a class of pipelines is refused, and which are not."""
    known = families()
    task = next((does for words, does in _OTHER_TASKS.items() if re.search(words, name)), "has no family here")
    return f"{task}; expected text to image: {', '.join(known)}{did_you_mean(name, known)}"


def _for_family(family: type[LatentDiffusion], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that are given, not None; UserError if the family has no such argument."""
    given = {name: value for name, value in arguments.items() if value is not None}
    own = {**_COMMON, **inspect.signature(family).parameters}
    if unknown := [name for name in given if name not in own]:
        raise UserError(f"{family.__name__} has no argument {unknown[0]!r}{did_you_mean(unknown[0], own)}")
    return given


def _below(kind: type[LatentDiffusion]) -> Iterator[type[LatentDiffusion]]:
    """Yields all subclasses, nearer ones first."""
    level = kind.__subclasses__()
    while level:
        yield from level
        level = [below for each in level for below in each.__subclasses__()]


def _all_arguments() -> inspect.Signature:
    """Returns the arguments of all families and, with None as their default, those that only some families have."""
    some = {
        name: parameter.replace(default=None, annotation=parameter.annotation | None)
        for family in families().values()
        for name, parameter in inspect.signature(family).parameters.items()
        if name not in _COMMON and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return inspect.Signature([*_COMMON.values(), *some.values()])


def _all_descriptions() -> str:
    """Returns the section `Args:` of all families; what only some families have begins with their names."""
    described: dict[str, str] = {}
    kinds: list[Any] = [LatentDiffusion, *dict.fromkeys(families().values())]
    for kind in kinds:
        lines = inspect.cleandoc(str(vars(kind).get("__doc__"))).partition("Args:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE):
            of = "" if name in _COMMON else f"{kind.__name__}: "
            described[name] = f"{described[name]} {of}{text}" if name in described else f"{of}{text}"
    return "Args:\n" + "\n".join(f"    {name}: {' '.join(text.split())}" for name, text in described.items())


# For the parser: an instance is always of a family, and takes the arguments of any.
_COMMON = inspect.signature(LatentDiffusion).parameters
_SIGNATURE = _all_arguments()
_CLS = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)
_new: Any = AutoDiffusion.__new__
_new.__signature__ = _SIGNATURE.replace(parameters=[_CLS, *_SIGNATURE.parameters.values()])
AutoDiffusion.__doc__ = _new.__doc__ = f"{AutoDiffusion.__doc__}\n\n{_all_descriptions()}"
