"""Human preference, learned from ranked images of the same prompt.

Sources: Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation, 2023, arXiv
2304.05977; Li et al., BLIP: Bootstrapping Language-Image Pre-training, 2022, arXiv 2201.12086 (the network).
"""

import re
from typing import Any

from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import find_file, fit_weights, locate, read_tokenizer, read_weights
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, fit_square, normalise
from svdd.rewards.pretrained import Precision, PretrainedReward, linear_head

__all__ = ["GroundedText", "ImageReward"]

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' validation images
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


class ImageReward(PretrainedReward):
    """ImageReward of image and prompt, about -2.3 .. 2 with mean near 0.

    Args:
        pretrained: The weights: a file, or owner/name/file on the hub.
        tokenizer: A BERT tokenizer: a hub name or a folder.
        revision: Branch, tag or commit of the weights on the hub.
        local_files_only: Use local files and the hub's cache only.
        dtype: Precision of the network, whatever that of the Trainer.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "zai-org/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(revision=revision, local_files_only=local_files_only, dtype=dtype)
        self.pretrained, self.tokenizer = pretrained, tokenizer

    def read(self) -> nn.Module:
        """Returns BLIP with the head."""
        from transformers import BertTokenizer

        network = read_grounded_text(read_weights(find_file(self.pretrained, **self.options)), self.pretrained)
        words, what = network.text.config.vocab_size, f"tokenizer={self.tokenizer!r}"
        expected, local = "a folder saved by BertTokenizer.save_pretrained or a hub name", self.local_files_only
        source, options = locate(what, self.tokenizer, "tokenizer_config.json", expected, None, local)
        self.words = read_tokenizer(BertTokenizer, source, what, words, **options)
        size = len(self.words)
        if not words - 2 <= size <= words:  # the weights have two more special words
            raise UserError(f"tokenizer={self.tokenizer!r} has {size} words; expected {words - 2}")
        return network

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the reward of each image under its own prompt, float32 [n]."""
        network = self.network
        weights = next(network.parameters())
        pixels = normalise(fit_square(images, network.vision.config.image_size, rounded=True), CLIP_MEAN, CLIP_STD)
        tokens = self.words(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        tokens = tokens.to(weights.device)
        return (network(pixels.to(weights), tokens.input_ids, tokens.attention_mask).float() - _MEAN) / _STD


class GroundedText(nn.Module):
    """BLIP's text encoder: a ViT, a BERT with cross-attention to it, and linear layers on BERT's first token."""

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


def read_grounded_text(state: dict[str, Tensor], source: str) -> GroundedText:
    """Returns the network with the authors' weights, sized by their shapes; raises UserError if they do not fit."""
    for pattern, new in _NAMES.items():
        state = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name.startswith(("vision.", "text.", "head."))}

    def transformer(width: int, inner: int, stem: str) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": len({name[len(stem) :].split(".")[0] for name in state if name.startswith(stem)}),
            "num_attention_heads": width // 64,  # in every BERT and ViT of BLIP
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
    vision = transformer(width, vision_inner, "vision.encoder.layers.")
    vision |= {"image_size": patch * round((places - 1) ** 0.5), "patch_size": patch}
    text = transformer(text_width, text_inner, "text.encoder.layer.")
    text |= {"vocab_size": words, "encoder_hidden_size": width, "max_position_embeddings": longest}
    network = GroundedText(vision, text)
    fit_weights(network, state, source)
    return network
