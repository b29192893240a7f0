"""HPSv2: the Human Preference Score, version 2.1.

Source: Wu et al., Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis, 2023, arXiv 2306.09341.
"""

from dataclasses import dataclass

from torch import Tensor

from svdd.assets.hub import find_file
from svdd.rewards.models.clip_models import ClipModel, OpenClipModel
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["HPSv2"]


@dataclass(eq=False, repr=False)
class HPSv2(PretrainedReward):
    """Cosine under a CLIP ViT-H/14 fine-tuned on human preferences; about 0.2 to 0.35.

    Args:
        pretrained: The fine-tuned weights: a file, or owner/name/file on the hub.
        architecture: The model of open_clip that they belong to.
    """

    pretrained: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    architecture: str = "ViT-H-14"
    differentiable = True
    range = (-1.0, 1.0)

    def read(self) -> ClipModel:
        """Returns the CLIP."""
        weights = find_file(self.pretrained, **self.options)
        return OpenClipModel(self.architecture, str(weights), self.local_files_only)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the cosine of each image with its own prompt, float32 [n]."""
        return self.network.cosines(images, prompts)
