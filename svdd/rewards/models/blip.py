"""BLIP's image-grounded text encoder with a head of linear layers, from weights under the names of BLIP's authors.

Source: Li et al., BLIP: Bootstrapping Language-Image Pre-training, 2022, arXiv 2201.12086. The network is made of the
parts in transformers, whose names differ; its sizes are read from the weights.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import fit_weights

__all__ = ["GroundedText", "read_grounded_text", "rename"]

_HEAD_WIDTH = 64  # of an attention head, in every BERT and ViT that BLIP was trained with
_PARTS = {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.layers.": "head."}
_VISION = {  # beginnings, then parts of a block
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.blocks.": "vision.encoder.layers.",
    "vision.norm.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


class GroundedText(nn.Module):
    """ViT, BERT with cross-attention to it, and linear layers on BERT's first token.

    Args:
        vision: Configuration of the ViT.
        text: Configuration of the BERT.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        self.text = BlipTextModel(BlipTextConfig(**text, layer_norm_eps=1e-12), add_pooling_layer=False)
        layers = [nn.Linear(*widths) for widths in pairwise((text["hidden_size"], 1024, 128, 64, 16, 1))]
        self.head = nn.ModuleDict(dict(zip("02467", layers, strict=True)))  # 1, 3 and 5 are dropouts

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the head's number for each image and text, [n].

        Args:
            pixels: Normalised, [n, 3, side, side].
            input_ids: Tokens, [n, length].
            attention_mask: 1 where there is a token, 0 where there is padding, [n, length].
        """
        seen = self.vision(pixels).last_hidden_state
        read = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False)
        features = read.last_hidden_state[:, 0]
        for layer in self.head.values():
            features = layer(features)
        return features[:, 0]


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights that are used, under the names of `GroundedText`."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in _PARTS.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                for authors, ours in _VISION.items() if new == "vision." else ():
                    name = name.replace(authors, ours)
                renamed[name] = tensor
                break
    return renamed


def read_grounded_text(state: dict[str, Tensor], source: str) -> GroundedText:
    """Returns the network whose sizes and weights these are.

    Args:
        state: The weights under the authors' names.
        source: Where they come from, for messages.

    Raises:
        UserError: If they are another network's.
    """
    state = rename(state)

    def shape(name: str, dimensions: int) -> list[int]:
        if name not in state or state[name].dim() != dimensions:
            raise UserError(f"{source!r} holds weights of another architecture; expected the file ImageReward.pt")
        return list(state[name].shape)

    def layers(stem: str) -> int:
        return len({name.removeprefix(stem).split(".")[0] for name in state if name.startswith(stem)})

    width, _, patch, _ = shape("vision.embeddings.patch_embedding.weight", 4)
    places = shape("vision.embeddings.position_embedding", 3)[1]
    words, text_width = shape("text.embeddings.word_embeddings.weight", 2)
    vision = {
        "hidden_size": width,
        "intermediate_size": shape("vision.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": layers("vision.encoder.layers."),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "image_size": patch * round((places - 1) ** 0.5),
        "patch_size": patch,
    }
    text = {
        "vocab_size": words,
        "hidden_size": text_width,
        "encoder_hidden_size": width,
        "intermediate_size": shape("text.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "num_hidden_layers": layers("text.encoder.layer."),
        "num_attention_heads": max(1, text_width // _HEAD_WIDTH),
        "max_position_embeddings": shape("text.embeddings.position_embeddings.weight", 2)[0],
    }
    if width % _HEAD_WIDTH or text_width % _HEAD_WIDTH:
        raise UserError(f"{source!r} has widths {width} and {text_width}; expected multiples of {_HEAD_WIDTH}")
    network = GroundedText(vision, text)
    fit_weights(network, state, source, ignore=("position_ids",))
    return network
