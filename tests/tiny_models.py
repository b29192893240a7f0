"""Small random models with the component classes and scheduler configurations of the published ones."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from tests.tiny_families.autoencoder import small_autoencoder

TOKENS = 77
SD15_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
SD21_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}


def tiny_tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def _text_config(tokenizer: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 8,
    }


def save_tiny_pipeline(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(2, 4) if kind == "sd21" else 2,
        norm_num_groups=8,
        use_linear_projection=kind == "sd21",
    )
    vae = small_autoencoder(
        4,
        scaling_factor=0.18215,
    )
    checker = None
    if kind == "sd15":
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
        checker = StableDiffusionSafetyChecker(config)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer))),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler() if kind == "sd15" else DDIMScheduler(),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor() if kind == "sd15" else None,
        requires_safety_checker=kind == "sd15",
    ).save_pretrained(folder)
    path = folder / "scheduler" / "scheduler_config.json"  # published files have keys unknown to the class
    name = json.loads(path.read_text())["_class_name"]
    path.write_text(json.dumps({"_class_name": name, **(SD15_SCHEDULER if kind == "sd15" else SD21_SCHEDULER)}))
    return str(folder)


def save_tiny_clip(folder: Path) -> str:
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    config = CLIPConfig(text_config=_text_config(tokenizer), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def save_tiny_open_clip(folder: Path) -> str:
    """Saves a random open_clip model and returns its name for open_clip."""
    import open_clip

    torch.manual_seed(2)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    (folder / "tiny-open-clip.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder / "tiny-open-clip.json")
    model = open_clip.create_model("tiny-open-clip", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def save_tiny_aesthetic_head(folder: Path, width: int) -> str:
    """Saves a random head with the published parameter names."""
    from svdd.rewards.aesthetic import AestheticHead

    torch.manual_seed(3)
    torch.save(AestheticHead(width).state_dict(), folder / "head.pth")
    return str(folder / "head.pth")
