"""Pipelines of published shapes with random weights, built from their configurations without a download."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from svdd.assets.hub import ASSETS
from svdd.diffusion.auto import families
from svdd.diffusion.latent import LatentDiffusion
from tests.tiny_families import flux, sd3, sdxl
from tests.tiny_families.tokenizers import t5_tokenizer, tiny_tokenizer
from tests.tiny_models import SD15_SCHEDULER

__all__ = ["SHAPES", "Shape", "clip", "diffusion", "kl", "qwen3", "qwen25_vl", "sd15_unet", "sd35_transformer"]
__all__ += ["leaves", "random", "sdxl_unet", "t5"]

_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def clip(large: bool, projection: bool, **tokens: int) -> nn.Module:
    """The text towers of CLIP ViT-L/14 and of OpenCLIP ViT-bigG/14; `tokens` are the ids of special tokens."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    sizes |= {"num_hidden_layers": 12, "projection_dim": 768}
    if large:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
        sizes |= {"num_hidden_layers": 32, "hidden_act": "gelu"}
    config = CLIPTextConfig(**sizes, **tokens)
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5() -> nn.Module:
    """The encoder of T5 v1.1 XXL."""
    shape = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **shape))


def qwen3() -> nn.Module:
    """Qwen3 4B, without its head."""
    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    return Qwen3Model(Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, **shape))


def qwen25_vl() -> nn.Module:
    """Qwen2.5-VL 7B, with its vision tower and its head, as Qwen-Image holds it."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def sd15_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1.5."""
    return UNet2DConditionModel(
        sample_size=64,
        down_block_types=(*[_CROSS[0]] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *[_CROSS[1]] * 3),
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def sdxl_unet() -> nn.Module:
    """The UNet of SDXL."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", *[_CROSS[0]] * 2),
        up_block_types=(*[_CROSS[1]] * 2, "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd35_transformer() -> nn.Module:
    """The transformer of Stable Diffusion 3.5 Large."""
    return SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def kl(channels: int, **settings: Any) -> nn.Module:
    """The autoencoder of Stable Diffusion 1.5 and SDXL (4 channels), and of SD3, FLUX.1 and Z-Image (16)."""
    quantised = channels == 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
        **{"sample_size": 1024, **settings},
    )


class Shape(NamedTuple):
    """A published pipeline; SD 3.5 is the Large one, FLUX.1 the dev one."""

    name: str
    pixels: int  # height and width of its pictures
    pipeline: str  # class of diffusers
    scheduler: Callable[[], Any]
    parts: Mapping[str, Callable[[], nn.Module]]
    tokenizers: Mapping[str, Callable[[], Any]]

    @property
    def emoji(self) -> bool:
        """Whether it is the embedded model, whose weights are real."""
        return not self.parts

    @property
    def flow(self) -> bool:
        """Whether it is a flow model with a transformer."""
        return "transformer" in self.parts

    def build(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """Returns the pipeline with random weights, which are made on the device and in the type at once."""
        kind: Any = getattr(diffusers, self.pipeline)
        if self.emoji:
            return kind.from_pretrained(ASSETS / "emoji-sd", safety_checker=None, dtype=dtype).to(device)
        parts: dict[str, Any] = {name: random(make, device, dtype) for name, make in self.parts.items()}
        parts |= {name: make() for name, make in self.tokenizers.items()}
        if self.pipeline == "StableDiffusionPipeline":
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return kind(scheduler=self.scheduler(), **parts)


def random(make: Callable[[], nn.Module], device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Builds a module with weights of the scale that PyTorch begins with; no weight exists elsewhere or in float32."""
    with init_empty_weights(include_buffers=False):
        module = make().eval()
    generator = torch.Generator(device).manual_seed(0)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()

    def weight(name: str, parameter: Tensor) -> nn.Parameter:
        kind = torch.float32 if kept & {*name.split(".")} else dtype
        tensor = torch.empty_like(parameter, device=device, dtype=kind)
        if tensor.ndim < 2:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            bound = tensor[0].numel() ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
        return nn.Parameter(tensor)

    with torch.no_grad():
        for prefix, part in module.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = weight(f"{prefix}.{name}", parameter)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module.to(device)


def diffusion(pipe: Any, device: str | torch.device, **arguments: Any) -> LatentDiffusion:
    """Returns the chain as it is when the pipeline's weights have been read from files, on the device.

    It takes the pipeline's own modules, and may change them (memory format, compilation).
    """
    family = families()[type(pipe).__name__]
    dtype = getattr(pipe, family.backbone).dtype
    with patch("svdd.diffusion.latent.load_pipeline", return_value=pipe):
        chain = family("random weights", **arguments)
    chain.anchor = chain.anchor.to(dtype)
    return chain.to(device)


def leaves(part: nn.Module) -> int:
    """Returns the number of layers that are compiled: in a transformer, those of one block of each kind."""
    lists = [layers for layers in part.children() if isinstance(layers, nn.ModuleList) and len(layers)]
    chosen = [part] if "Transformer" not in type(part).__name__ else [layers[0] for layers in lists]
    return sum(not any(layer.children()) for each in chosen for layer in each.modules())


def _clip(large: bool, projection: bool) -> Callable[[], nn.Module]:
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return partial(clip, large, projection, **special)


def _flow(settings: Mapping[str, Any]) -> Callable[[], Any]:
    return partial(diffusers.FlowMatchEulerDiscreteScheduler, **settings)


_CLIP_L, _CLIP_G = _clip(False, False), _clip(True, True)
_TWO = {"tokenizer": tiny_tokenizer, "tokenizer_2": tiny_tokenizer}
SHAPES = {
    "emoji": Shape("emoji-sd", 64, "StableDiffusionPipeline", diffusers.DDIMScheduler, {}, {}),
    "sd15": Shape(
        *("SD 1.5", 512, "StableDiffusionPipeline", partial(diffusers.PNDMScheduler.from_config, SD15_SCHEDULER)),
        {"unet": sd15_unet, "vae": partial(kl, 4, sample_size=512), "text_encoder": _CLIP_L},
        {"tokenizer": tiny_tokenizer},
    ),
    "sdxl": Shape(
        *("SDXL", 1024, "StableDiffusionXLPipeline"),
        partial(diffusers.EulerDiscreteScheduler.from_config, sdxl.SCHEDULER),
        {
            "unet": sdxl_unet,
            "vae": partial(kl, 4, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
        },
        _TWO,
    ),
    "sd35": Shape(
        *("SD 3.5 Large", 1024, "StableDiffusion3Pipeline", _flow(sd3.SCHEDULER)),
        {
            "transformer": sd35_transformer,
            "vae": partial(kl, 16, scaling_factor=1.5305, shift_factor=0.0609),
            "text_encoder": _clip(False, True),
            "text_encoder_2": _CLIP_G,
            "text_encoder_3": t5,
        },
        {**_TWO, "tokenizer_3": t5_tokenizer},
    ),
    "flux": Shape(
        *("FLUX.1-dev", 1024, "FluxPipeline", _flow(flux.SCHEDULER)),
        {
            "transformer": partial(FluxTransformer2DModel, guidance_embeds=True),
            "vae": partial(kl, 16, scaling_factor=0.3611, shift_factor=0.1159),
            "text_encoder": _CLIP_L,
            "text_encoder_2": t5,
        },
        {"tokenizer": tiny_tokenizer, "tokenizer_2": t5_tokenizer},
    ),
}
