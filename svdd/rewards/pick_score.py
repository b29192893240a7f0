"""PickScore: which of two images people prefer for a prompt.

Source: Kirstain et al., Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation, 2023,
arXiv 2305.01569.
"""

from dataclasses import dataclass

from torch import Tensor

from svdd.rewards.models.clip_models import TransformersClip
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["PickScore"]


@dataclass(eq=False, repr=False)
class PickScore(PretrainedReward):
    """The logit scale times the cosine of a CLIP ViT-H/14 fine-tuned on human choices; about 16 to 26.

    Args:
        pretrained: A folder or a hub name.
        processor: Folder or hub name of the tokenizer and the image processor; null for `pretrained` itself.
    """

    pretrained: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    differentiable = True

    def read(self) -> TransformersClip:
        """Returns the CLIP."""
        return TransformersClip(self.pretrained, self.options, self.processor)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the score of each image for its own prompt, float32 [n]."""
        return self.network.scale * self.network.cosines(images, prompts)
