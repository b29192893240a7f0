"""BLIP's image-grounded text encoder with a head of linear layers, from the authors' weights.

Source: Li et al., BLIP: Bootstrapping Language-Image Pre-training, 2022, arXiv 2201.12086. The parts are those of
transformers, which have other parameter names; the sizes are read from the weights.
"""

import re
from typing import Any

from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import fit_weights
from svdd.rewards.models.networks import linear_head

__all__ = ["GroundedText", "read_grounded_text", "rename"]

_HEAD_WIDTH = 64  # of an attention head, in every BERT and ViT of BLIP
_NAMES = {  # the authors' names, as regular expressions, and ours; in this order
    r"^blip\.visual_encoder\.": "vision.",
    r"^blip\.text_encoder\.": "text.",
    r"^mlp\.layers\.": "head.",
    r"^vision\.cls_token": "vision.embeddings.class_embedding",
    r"^vision\.pos_embed": "vision.embeddings.position_embedding",
    r"^vision\.patch_embed\.proj": "vision.embeddings.patch_embedding",
    r"^vision\.blocks": "vision.encoder.layers",
    r"^vision\.norm": "vision.post_layernorm",
    r"^(vision\..*)\.norm(\d)\.": r"\1.layer_norm\2.",
    r"^(vision\..*)\.attn\.qkv\.": r"\1.self_attn.qkv.",
    r"^(vision\..*)\.attn\.proj\.": r"\1.self_attn.projection.",
}


class GroundedText(nn.Module):
    """A ViT, a BERT with cross-attention to it, and linear layers on BERT's first token.

    Args:
        vision: Arguments of BlipVisionConfig.
        text: Arguments of BlipTextConfig.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6))
        self.text = BlipTextModel(BlipTextConfig(**text, layer_norm_eps=1e-12), add_pooling_layer=False)
        self.head = linear_head(text["hidden_size"])

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the head's output [n] for normalised pixels [n, 3, side, side] and tokens [n, length]."""
        seen = self.vision(pixels).last_hidden_state
        read = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False)
        return self.head(read.last_hidden_state[:, 0])[:, 0]


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights that the score uses, under the names of `GroundedText`."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in _NAMES.items():
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if name.startswith(("vision.", "text.", "head."))}


def read_grounded_text(state: dict[str, Tensor], source: str) -> GroundedText:
    """Returns the network with the authors' weights; its sizes are read from their shapes.

    Raises:
        UserError: If they belong to another network; the message names the source.
    """
    state = rename(state)

    def transformer(width: int, inner: int, stem: str) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": len({name[len(stem) :].split(".")[0] for name in state if name.startswith(stem)}),
            "num_attention_heads": width // _HEAD_WIDTH,
        }

    try:
        width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
        _, places, _ = state["vision.embeddings.position_embedding"].shape
        words, text_width = state["text.embeddings.word_embeddings.weight"].shape
        vision_inner, _ = state["vision.encoder.layers.0.mlp.fc1.weight"].shape
        text_inner, _ = state["text.encoder.layer.0.intermediate.dense.weight"].shape
        longest, _ = state["text.embeddings.position_embeddings.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{source!r} holds weights of another architecture; expected ImageReward.pt") from error
    if width % _HEAD_WIDTH or text_width % _HEAD_WIDTH:
        raise UserError(f"{source!r} has widths {width} and {text_width}; expected multiples of {_HEAD_WIDTH}")
    vision = transformer(width, vision_inner, "vision.encoder.layers.")
    vision |= {"image_size": patch * round((places - 1) ** 0.5), "patch_size": patch}
    text = transformer(text_width, text_inner, "text.encoder.layer.")
    text |= {"vocab_size": words, "encoder_hidden_size": width, "max_position_embeddings": longest}
    network = GroundedText(vision, text)
    fit_weights(network, state, source)
    return network
