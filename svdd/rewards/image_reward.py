"""Human preference, learned from ranked pictures of the same prompt.

Source: Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation, 2023,
arXiv 2304.05977.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdd import UserError
from svdd.assets.hub import LOAD_ERRORS, find_file, read_weights
from svdd.rewards.models.blip import GroundedText, read_grounded_text
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, fit_square, normalise
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["ImageReward"]

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's numbers over the authors' validation pictures
_TOKENS = 35


class ImageReward(PretrainedReward):
    """ImageReward of image and prompt: (head - 0.167) / 1.033, about -2.3 .. 2 and near 0 on average.

    Args:
        pretrained: The weights: `owner/name/file` on the hub, or a file of this machine.
        tokenizer: A BERT tokenizer: a hub name or a folder.
        revision: Branch, tag or commit of the weights on the hub.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If the weights or the tokenizer cannot be loaded, or are another model's.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "zai-org/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained, self.tokenizer_name = pretrained, tokenizer
        self.revision, self.local_files_only = revision, local_files_only

    def read(self) -> GroundedText:
        """Returns BLIP with the head."""
        from transformers import BertTokenizer

        try:
            tokenizer = BertTokenizer.from_pretrained(self.tokenizer_name, local_files_only=self.local_files_only)
        except LOAD_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"tokenizer={self.tokenizer_name!r} cannot be loaded: {reason}") from error
        path = find_file(self.pretrained, self.revision, self.local_files_only)
        network = read_grounded_text(read_weights(path), self.pretrained)
        words = network.text.config.vocab_size
        if not words - 2 <= len(tokenizer) <= words:  # the weights have two special words more
            raise UserError(f"tokenizer={self.tokenizer_name!r} has {len(tokenizer)} words; expected {words - 2}")
        self.tokenizer = tokenizer
        return network

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the reward of each image under its own prompt, float32 [n]."""
        network = self.network
        weights = next(network.parameters())
        pixels = normalise(fit_square(images, network.vision.config.image_size, rounded=True), CLIP_MEAN, CLIP_STD)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(weights.device)
        head: Tensor = network(pixels.to(weights), tokens.input_ids, tokens.attention_mask)
        return (head.to(torch.float32) - _MEAN) / _STD
