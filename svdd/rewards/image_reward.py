"""Human preference, learned from ranked images of the same prompt.

Source: Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation, 2023,
arXiv 2304.05977.
"""

from collections.abc import Sequence

from torch import Tensor

from svdd import UserError
from svdd.assets.hub import find_file, loading, read_weights
from svdd.rewards.models.blip import GroundedText, read_grounded_text
from svdd.rewards.models.pixels import CLIP_MEAN, CLIP_STD, fit_square, normalise
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["ImageReward"]

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' validation images
_TOKENS = 35


class ImageReward(PretrainedReward):
    """ImageReward of image and prompt, about -2.3 .. 2 with mean near 0.

    Args:
        pretrained: The weights: a file, or owner/name/file on the hub.
        tokenizer: A BERT tokenizer: a hub name or a folder.
        revision: Branch, tag or commit of the weights on the hub.
        local_files_only: Use local files and the hub's cache only.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "zai-org/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(revision, local_files_only)
        self.pretrained, self.tokenizer_name = pretrained, tokenizer

    def read(self) -> GroundedText:
        """Returns BLIP with the head."""
        from transformers import BertTokenizer

        with loading(f"tokenizer={self.tokenizer_name!r}"):
            self.tokenizer = BertTokenizer.from_pretrained(
                self.tokenizer_name, local_files_only=self.options["local_files_only"]
            )
        weights = read_weights(find_file(self.pretrained, **self.options))
        network = read_grounded_text(weights, self.pretrained)
        words = network.text.config.vocab_size
        if not words - 2 <= (size := len(self.tokenizer)) <= words:  # the weights have two more special words
            raise UserError(f"tokenizer={self.tokenizer_name!r} has {size} words; expected {words - 2}")
        return network

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the reward of each image under its own prompt, float32 [n]."""
        network = self.network
        weights = next(network.parameters())
        pixels = normalise(fit_square(images, network.vision.config.image_size, rounded=True), CLIP_MEAN, CLIP_STD)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(weights.device)
        return (network(pixels.to(weights), tokens.input_ids, tokens.attention_mask).float() - _MEAN) / _STD
