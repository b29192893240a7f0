"""Loads pipelines and decoders of diffusers from a folder or the hub, quietly, with one-line errors."""

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import is_local, loading, locate, quiet, read_model, read_tokenizer
from svdd.diffusion.arithmetic import order_weights
from svdd.diffusion.model_index import LEFT_OUT, Configs, Source, examine, read_json
from svdd.diffusion.single_file import download_rest, parts_held, read_parts

__all__ = [
    "DTYPES",
    "Dtype",
    "TinyDecoder",
    "check_length",
    "expand",
    "fingerprint",
    "load_pipeline",
    "to_images",
    "warn_of_cuts",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WITH_BETAS = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")  # schedulers of DDPM's kind that need scipy, torchsde


def load_pipeline(
    source: Source, class_name: str, check: Callable[[Configs], str], dtype: torch.dtype = torch.float32
) -> Any:
    """Returns a pipeline of this class, without a safety checker; other arguments as in `examine`.

    Weights are read in `dtype`, part by part, so that no copy of them in another precision is ever held as a whole.

    Raises:
        UserError: If the model cannot be loaded, is incomplete, or is not what is expected.
    """
    import diffusers

    what, kind, index = source.what, getattr(diffusers, class_name), examine(source, class_name, check)
    takes = inspect.signature(kind.__init__).parameters
    left_out = dict.fromkeys(name for name in LEFT_OUT if name in takes)
    classes = {name: _class(what, *entry) for name, entry in sorted(index.parts())}  # text encoders before tokenizers
    held: dict[str, Any] = {} if index.file is None else parts_held(index.file, classes)
    folder = Path(index.source).expanduser()
    if not is_local(index.source):
        with loading(what), quiet("diffusers"):
            if index.file is None:
                options = {"variant": source.variant, **left_out, **index.options}
                folder = Path(kind.download(index.source, trust_remote_code=False, **options))
            else:
                folder = download_rest(index.source, classes.keys() - held.keys(), **index.options)
        local = Source(str(folder)) if index.file is None else source._replace(config=str(folder))
        examine(local, class_name, check)
    parts: dict[str, Any] = {name: None for name, entry in index.entries.items() if entry == [None, None]}
    if index.file is not None:
        parts |= read_parts(what, index.file, folder, held, dtype)
    later: dict[str, Any] = {}  # parts of another class than the index names, which from_pretrained refuses
    found = [name for name in classes if any(Path(folder, name).glob(f"*.{source.variant}[.-]*"))]
    if source.variant is not None and not found:
        problem = f"has no weights of variant={source.variant!r}"
        raise UserError(f"{what} {problem}; leave it out, or see the names of its files")
    for name, part in classes.items():
        its = f"{what}, its {name},"
        if name in parts:
            continue
        if issubclass(part, nn.Module):
            of: dict[str, Any] = {"variant": source.variant} if name in found else {}
            if not of and (others := _variants(Path(folder, name))):
                raise UserError(f"{its} has weights of a variant alone; give variant: {' or '.join(others)}")
            with quiet("diffusers"):
                parts[name] = read_model(part, str(Path(folder, name)), dtype, its, **of)
        elif isinstance(part, diffusers.utils.import_utils.DummyObject):
            later[name] = _without_its_library(what, part, Path(folder, name, "scheduler_config.json"))
            parts[name] = None
        elif hasattr(part, "vocab_files_names"):
            encoder: Any = parts.get(name.replace("tokenizer", "text_encoder"))
            words = None if encoder is None else encoder.get_input_embeddings().num_embeddings
            parts[name] = read_tokenizer(part, str(Path(folder, name)), its, words, local_files_only=True)
    with loading(what, folder), quiet("diffusers"):
        pipeline = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **left_out | parts)
    pipeline.register_modules(**later)
    return pipeline


def _class(what: str, library: str, name: str) -> Any:
    """Returns a class of diffusers or transformers."""
    if (found := getattr(import_module(library), name, None)) is None:
        raise UserError(f"{what} names the class {name}, which this version of {library} lacks; update it")
    return found


def _variants(folder: Path) -> list[str]:
    """Returns the variants of a part's weights, such as `fp16`, or none if it has weights that are of no variant."""
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    found = [re.search(r"^(?:model|pytorch_model|diffusion_pytorch_model)\.(\w+)[.-]", path.name) for path in weights]
    named = [match[1] for match in found if match and match[1] not in ("safetensors", "bin")]
    return sorted({*named}) if len(named) == len(weights) else []


def _without_its_library(what: str, part: Any, file: Path) -> Any:
    """Returns a DDPMScheduler of a saved configuration whose own class needs a library that is not installed."""
    from diffusers import DDPMScheduler

    if part.__name__ in _WITH_BETAS:
        return DDPMScheduler.from_config(read_json(what, file))
    raise UserError(f"{what} has a {part.__name__}, which needs {' and '.join(part._backends)}; install them")


def check_length(what: str, limit: int, config: Any) -> None:
    """Raises UserError if a tokenizer returns more tokens than the text encoder of this configuration reads."""
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if limit > (positions or 10_000):  # transformers takes 1e30 if it is not stated
        stated = f"states a model_max_length of {limit}" if limit < 1e9 else "states no model_max_length"
        raise UserError(
            f"{what} {stated}, and the text encoder reads {positions} tokens; correct tokenizer_config.json"
        )


class TinyDecoder(nn.Module):
    """The decoder of an AutoencoderTiny (TAESD) in a folder or on the hub; UserError if it does not fit the latents."""

    def __init__(
        self,
        source: str,
        latent_channels: int,
        dtype: torch.dtype,
        local_files_only: bool = False,
        parity: bool = False,
    ) -> None:
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
        self.parity = parity
        self._order()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TinyDecoder":
        """Moves and converts the decoder."""
        super()._apply(fn, recurse)
        self._order()
        return self

    def _order(self) -> None:
        if not self.parity:
            order_weights(self.decoder, next(self.parameters()).device, decodes=True)

    def forward(self, x0: Tensor) -> Tensor:
        """Turns latents [n, c, h, w] into images, float32 [n, 3, H, W] in [0, 1]."""
        images = self.decoder(x0.to(next(self.parameters()).dtype) / self.scaling_factor)
        return to_images(images)


def to_images(decoded: Tensor) -> Tensor:
    """Turns a decoder's output in [-1, 1] into images, float32 in [0, 1]; infinity becomes NaN, which stays NaN."""
    return (decoded.nan_to_num(torch.nan, torch.nan, torch.nan) * 0.5 + 0.5).clamp(0, 1).float()


def fingerprint(*modules: nn.Module, dtype: torch.dtype = torch.float16) -> str:
    """Returns a hash of some numbers of every parameter, rounded: the same for a model's files in this precision."""
    found = hashlib.sha256()
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        flat = parameter.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)]
        found.update(name.encode() + few.to("cpu", dtype).view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:12]


def expand(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Returns texts in which a token of textual inversion with several vectors, `<toy>`, is `<toy> <toy>_1 ...`."""
    from diffusers.loaders import TextualInversionLoaderMixin

    return TextualInversionLoaderMixin().maybe_convert_prompt(list(texts), tokenizer)


def warn_of_cuts(tokenizer: Any, texts: Sequence[str], limit: int, encoder: str) -> None:
    """Warns of each text of more tokens than the encoder reads, special ones included; names the words cut off."""
    special = tokenizer.num_special_tokens_to_add()
    for text in dict.fromkeys(texts):
        expanded = expand(tokenizer, [text])[0]
        ids = tokenizer(expanded, truncation=False, add_special_tokens=False, verbose=False).input_ids
        if (count := len(ids) + special) > limit:
            lost = tokenizer.decode(ids[limit - special :], skip_special_tokens=True).strip()
            where = f"cut off: {lost!r} (prompt: {text if len(text) <= 60 else text[:57] + '...'!r})"
            warnings.warn(f"a prompt has {count} tokens and {encoder} reads {limit}; {where}", stacklevel=5)
