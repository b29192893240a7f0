"""PickScore: which of two pictures people would pick for a prompt.

Source: Kirstain et al., Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation, 2023,
arXiv 2305.01569.
"""

from collections.abc import Sequence

from torch import Tensor

from svdd.rewards.models.clip_models import TransformersClip
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["PickScore"]


class PickScore(PretrainedReward):
    """The logit scale times the cosine of a CLIP ViT-H/14 tuned on human choices; about 16 to 26.

    exp(PickScore) is the strength of a picture: A is preferred to B with probability sigmoid(A - B).

    Args:
        pretrained: A folder or a hub name.
        processor: Where tokenizer and image processor come from; null for `pretrained` itself.
        revision: Branch, tag or commit of the model on the hub.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If the model cannot be loaded or is no CLIP.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained, self.processor = pretrained, processor
        self.options = {"revision": revision, "local_files_only": local_files_only}

    def read(self) -> TransformersClip:
        """Returns the CLIP."""
        return TransformersClip(self.pretrained, self.options, self.processor)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the score of each image for its own prompt, float [n]."""
        features = self.network.image_features(images)
        cosines = (features * self.network.text_features(prompts).to(features)).sum(-1)
        return self.network.scale * cosines
