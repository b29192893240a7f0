"""Small random detectors of the published architectures."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ResNetConfig,
    SwinConfig,
)

from svdd.assets.hub import ASSETS
from tests.tiny_reward_models import bert_tokenizer

CLASSES = {0: "disc", 1: "tvmonitor", 2: "dog"}


def save_tiny_grounding_dino(folder: Path) -> str:
    """Saves a Grounding DINO with a tokenizer of single letters."""
    torch.manual_seed(8)
    tokenizer = bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=2, out_indices=[1, 2]),
        text_config=BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.3,
        ),
        num_queries=12,
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_feature_levels=2,
        max_text_len=64,
    )
    model = GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder)
    pixels = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


def save_tiny_owl(folder: Path) -> str:
    """Saves an OWLv2 with the tokenizer of the embedded CLIP."""
    torch.manual_seed(9)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "emoji-clip")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Owlv2Config(
        text_config={"hidden_size": 32, "max_position_embeddings": 16, **words, **layers},
        vision_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, **layers},
        projection_dim=32,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    pixels = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


def save_tiny_detr(folder: Path) -> str:
    """Saves a DETR with three classes."""
    torch.manual_seed(10)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_indices=[2])
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        num_queries=6,
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        id2label=CLASSES,
        init_std=0.3,
    )
    model = DetrForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.weight.normal_()
        model.class_labels_classifier.bias[-1] = -9.0  # no object
    model.save_pretrained(folder)
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def save_tiny_mask2former(folder: Path) -> str:
    """Saves a Mask2Former with three classes."""
    torch.manual_seed(11)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, out_indices=[1, 2, 3, 4]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=8,
        id2label=CLASSES,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_()
        model.class_predictor.bias[-1] = -9.0  # no object
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, num_labels=3).save_pretrained(folder)
    return str(folder)


TINY_DETECTORS = {
    "grounding_dino": save_tiny_grounding_dino,
    "owl": save_tiny_owl,
    "detr": save_tiny_detr,
    "mask2former": save_tiny_mask2former,
}
