"""LoRA weights in the formats of diffusers, kohya and PEFT: checked against the model, loaded and fused."""

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import fetch, is_local, loading, offline, quiet, read_weights, unreachable

__all__ = ["find_lora", "fuse_lora", "load_lora"]

_USUAL = [f"{name}.{end}" for end in ("safetensors", "bin") for name in ("pytorch_lora_weights", "adapter_model")]
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")  # PEFT's
_PEFT = "base_model.model."  # before all names of PEFT
_PAIRS = (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up"))  # names of the two matrices


class _Weights(NamedTuple):
    """What diffusers needs of a LoRA: tensors by part and name, and PEFT's settings."""

    state: dict[str, Tensor]
    settings: dict[str, Any] | None


def find_lora(lora: str, weight_name: str | None = None, local_files_only: bool = False) -> list[Path]:
    """Returns the weights files of a LoRA: mostly one; of a folder of PEFT adapters, one for each part.

    Args:
        lora: A file, a folder, or a hub name, `owner/name` or `owner/name/file`.
        weight_name: The file in a folder or hub model that holds several.
        local_files_only: Use the hub's cache only.

    Raises:
        UserError: If there is no such file, or one of several must be named.
    """
    what, path = f"lora={lora!r}", Path(lora).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        parts = [path / part / file for part in _PARTS for file in _USUAL[1::2]]
        if weight_name is None and any(part.is_file() for part in parts):
            return [part for part in parts if part.is_file()]
        return [path / _choose(what, weight_name, [file.name for file in path.iterdir() if file.is_file()])]
    *_, inner = hub = lora.split("/", 2)
    if not lora.startswith((".", "/", "~")) and len(hub) == 3 and "." in inner:
        lora, weight_name = "/".join(hub[:2]), inner
    if is_local(lora):
        raise UserError(
            f"{what} does not exist; expected a file, a folder, or a hub name: owner/name or owner/name/file"
        )
    options: dict[str, Any] = {"local_files_only": local_files_only}
    if weight_name is None:
        down = "" if local_files_only else unreachable()
        with loading(what, down=down), offline(local_files_only or bool(down)):
            cached = [name for name in _USUAL if isinstance(try_to_load_from_cache(lora, name), str)]
            names = cached or HfApi().list_repo_files(lora)
        weight_name = _choose(what, None, names)
    if Path(weight_name).stem == "adapter_model":
        fetch(what, lora, str(Path(weight_name).with_name("adapter_config.json")), **options)
    return [fetch(what, lora, weight_name, **options)[0]]


def _choose(what: str, wanted: str | None, names: Iterable[str]) -> str:
    """Returns the name of the weights file among the files of a folder or a hub model."""
    known = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")))
    usual = [name for name in _USUAL if name in known]
    if wanted is None and (usual or len(known) == 1):
        return (usual or known)[0]
    if wanted in known:
        return str(wanted)
    some = ", ".join(known[:5]) or "none"
    asked = "give weight_name, the one to load" if wanted is None else f"weight_name={wanted!r} is not among them"
    raise UserError(f"{what}: {asked}; its weights files: {some}")


def load_lora(pipeline: Any, lora: str, weight_name: str | None = None, local_files_only: bool = False) -> None:
    """Loads LoRA weights into the parts of a pipeline, without fusing them; arguments as in `find_lora`.

    Raises:
        UserError: If the weights cannot be loaded, do not fit the model, or change nothing in it.
    """
    what = f"lora={lora!r}"
    if find_spec("peft") is None:
        raise UserError(f"{what} needs the peft package: pip install 'svdd[lora]'")
    names = getattr(pipeline, "_lora_loadable_modules", [])
    models = {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}
    if not models:
        kind = type(pipeline).__name__
        raise UserError(f"{what}: diffusers loads no LoRA into a {kind}; merge it with PEFT, and save the pipeline")
    for file in find_lora(lora, weight_name, local_files_only):
        with loading(what, file.parent), quiet("diffusers"):
            weights = _read(pipeline, what, file, models)
            _check(what, weights, models)
            for part in {name.partition(".")[0] for name in weights.state}:
                options: dict[str, Any] = {"prefix": part, "network_alphas": None, "metadata": weights.settings}
                if part.startswith("text_encoder"):
                    options |= {"text_encoder": models[part], "low_cpu_mem_usage": True}
                    pipeline.load_lora_into_text_encoder(weights.state, **options)
                else:
                    models[part].load_lora_adapter(weights.state, low_cpu_mem_usage=True, **options)
    if not _changes(models):
        raise UserError(f"{what} changes no weight: all its updates are zero; expected a trained LoRA")


def fuse_lora(pipeline: Any, lora: str, scale: float = 1.0) -> None:
    """Adds `scale` times the updates of the loaded LoRA to the weights; UserError if one is not finite."""
    with loading(f"lora={lora!r}"):
        pipeline.fuse_lora(pipeline._lora_loadable_modules, lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


def _changes(models: dict[str, Any]) -> bool:
    """Returns whether any of the loaded updates, scale * B A, is other than zero."""
    from peft.tuners.lora import LoraLayer

    every: list[Any] = [layer for model in models.values() for layer in model.modules() if isinstance(layer, LoraLayer)]
    return any(
        bool(layer.scaling[name] and layer.lora_A[name].weight.any() and layer.lora_B[name].weight.any())
        for layer in every
        for name in layer.lora_A
    )


def _read(pipeline: Any, what: str, file: Path, models: dict[str, Any]) -> _Weights:
    """Reads a file into the names of diffusers, each with its part: `unet.`, `transformer.`, `text_encoder.`, ..."""
    try:
        raw = read_weights(file)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if other := sorted(name for name in raw if re.search(r"\.(hada|lokr|oft|boft|ia3|vera|dora_scale)", name)):
        raise UserError(f"{what} is an adapter of another kind (it holds {other[0]}); expected a plain LoRA")
    if not any("lora" in name for name in raw):
        raise UserError(f"{what} holds no LoRA weights, first {next(iter(raw), 'nothing')!r}; expected a LoRA")
    if any(name.startswith(_PEFT) for name in raw):
        return _read_peft(what, file, raw, models)
    raw = {re.sub(r"(lora_[AB])\.default\.", r"\1.", name): tensor for name, tensor in raw.items()}
    settings = None if _fold(raw) else _settings(what, file)
    layers = {name for part, model in models.items() for own in _layers(model) for name in (own, f"{part}.{own}")}
    for name in [name for name in raw if name.partition(".lora_")[0] in layers]:
        # Without alphas, diffusers does not convert these names of some models' layers.
        raw[name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")] = raw.pop(name)
    options = {"unet_config": pipeline.unet.config} if "unet" in models else {}  # for the block names of the first SDXL
    try:
        found = pipeline.lora_state_dict(dict(raw), **options)  # which empties the dictionary
    except (ValueError, KeyError) as error:  # names that diffusers' conversion does not know, all in one message
        raise UserError(f"{what} has names of weights that diffusers cannot read, such as {min(raw)!r}") from error
    state = found[0] if isinstance(found, tuple) else found  # some pipelines return alphas as well
    return _Weights({_with_part(name, tensor, models): tensor for name, tensor in state.items()}, settings)


def _fold(raw: dict[str, Tensor]) -> bool:
    """Multiplies the second matrix of each layer by alpha / rank and removes the alphas; returns whether there are any.

    A layer without alpha keeps the factor 1. Diffusers mixes up the alphas of some layers if they differ.
    """
    alphas = [name for name in raw if name.endswith(".alpha")]
    for name in alphas:
        for pair in _PAIRS:
            down, up = (name.removesuffix("alpha") + f"{matrix}.weight" for matrix in pair)
            if down in raw and up in raw:
                factor = float(raw.pop(name)) / len(raw[down])
                raw[down], raw[up] = raw[down].float(), raw[up].float() * factor
                break
    return bool(alphas)


def _settings(what: str, file: Path) -> dict[str, Any] | None:
    """Returns PEFT's settings by part and name, if diffusers saved them in the file."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    try:
        found = json.loads(text or "null")
    except ValueError as error:
        raise UserError(f"{what}: lora_adapter_metadata in its header is damaged ({error}); expected JSON") from error
    if isinstance(found, dict | None):
        return found
    raise UserError(f"{what}: lora_adapter_metadata in its header is {text}; expected a JSON object")


def _read_peft(what: str, file: Path, raw: dict[str, Tensor], models: dict[str, Any]) -> _Weights:
    """Reads a PEFT adapter, whose scale stands in adapter_config.json beside the weights."""
    try:
        config = json.loads((file.parent / "adapter_config.json").read_text())
        kind = config.get("peft_type", "LORA")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{what} is a PEFT adapter and needs a readable adapter_config.json beside {file}") from error
    if kind != "LORA":
        raise UserError(f"{what} is a {kind} adapter of PEFT; expected peft_type LORA")
    state = {_with_part(name.removeprefix(_PEFT), tensor, models): tensor for name, tensor in raw.items()}
    layers: dict[str, list[str]] = {}
    for name in state:
        part, _, rest = name.partition(".")
        layers.setdefault(part, []).append(_layer(rest))
    own = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
    own.setdefault("r", 8)  # PEFT's default
    settings = {f"{part}.{name}": value for part in layers for name, value in own.items()}
    for part, names in layers.items():
        there = dict(models[part].named_modules()) if part in models else names
        own_names = {name if name in there else name.removeprefix("text_model.") for name in names}
        settings[f"{part}.target_modules"] = sorted(own_names)
    return _Weights(state, settings)


def _with_part(name: str, tensor: Tensor, models: dict[str, Any]) -> str:
    """Returns a weight's name with its part, which some formats leave out: the one whose layer the weight fits."""
    if name.startswith("text_encoder"):  # diffusers does not know all of its old names if `to_out` is not among them
        name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora_linear_layer.", name)
    if name.partition(".")[0] in models:
        return name
    layer, axis = _layer(name), 0 if re.search(r"lora_B|[._]up\.", name) else 1
    owners = {part: found for part, model in models.items() if (found := _layers(model).get(layer)) is not None}
    fitting = [part for part, found in owners.items() if _width(found, axis) == tensor.shape[axis]]
    return f"{(fitting or [*owners])[0]}.{name}" if owners else name


def _width(layer: nn.Module, axis: int) -> int | None:
    """Returns the output (axis 0) or input (axis 1) size of a linear or convolutional layer."""
    weight = getattr(layer, "weight", None)
    return weight.shape[axis] if isinstance(weight, Tensor) and weight.ndim > axis else None


def _layer(name: str) -> str:
    """Returns the layer that a LoRA weight belongs to."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    (converted,) = convert_unet_state_dict_to_peft({name: None})
    return converted.split(".lora_")[0]


def _layers(model: Any) -> dict[str, nn.Module]:
    """Returns the layers by name; those of CLIP's text encoder also with the prefix of its earlier versions."""
    found = dict(model.named_modules())
    return found | {f"text_model.{name}": layer for name, layer in found.items()}


def _peft_names(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a part under the names of PEFT, as diffusers converts them when it loads them."""
    from diffusers import utils

    if not part.startswith("text_encoder"):
        return utils.convert_unet_state_dict_to_peft(tensors)
    return utils.convert_state_dict_to_peft(utils.convert_state_dict_to_diffusers(tensors))


def _check_settings(what: str, part: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Raises UserError if PEFT's settings of a part are no numbers, or state another rank than its tensors have."""
    for name in ("r", "lora_alpha"):
        value = settings.get(f"{part}.{name}", 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{what} states {name}={value!r} in its settings; expected a number")
    rank = settings.get(f"{part}.r")
    found = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    if rank is not None and not settings.get(f"{part}.rank_pattern") and found != {rank}:
        raise UserError(f"{what} has rank {sorted(found)}, but its settings state r={rank}")


def _check(what: str, weights: _Weights, models: dict[str, Any]) -> None:
    """Raises UserError if a tensor does not fit a layer, or the settings do not fit the tensors."""
    state, expected = weights.state, "expected a LoRA for this base model"
    layers = {part: _layers(model) for part, model in models.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    if unknown := sorted(parts.keys() - models.keys()):
        names = sorted(name for name in state if name.partition(".")[0] in unknown)
    else:
        parts = {part: _peft_names(part, tensors) for part, tensors in parts.items()}
        names = [f"{part}.{name}" for part in parts for name in parts[part] if _layer(name) not in layers[part]]
    if names:
        problem = f"{len(names)} of its {len(state)} weights belong to no layer of the model, first {names[0]}"
        raise UserError(f"{what} does not fit: {problem}; {expected}")
    for part, tensors in parts.items():
        _check_settings(what, part, tensors, weights.settings or {})
        for name, down in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            layer, up = _layer(name), tensors.get(name.replace(".lora_A.", ".lora_B."))
            if up is None:
                raise UserError(f"{what} is incomplete: {part}.{layer} has only one of its two matrices")
            weight: Any = layers[part][layer].weight
            own, found = [*weight.shape], [len(up), *down.shape[1:]]
            if own != found or up.shape[1] != len(down):
                raise UserError(f"{what} does not fit: {part}.{layer} has shape {own}, its update {found}; {expected}")
