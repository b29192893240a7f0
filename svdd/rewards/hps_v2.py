"""HPSv2: the Human Preference Score, version 2.1.

Source: Wu et al., Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis, 2023, arXiv 2306.09341.
"""

from collections.abc import Sequence

from torch import Tensor

from svdd.assets.hub import find_file
from svdd.rewards.models.clip_models import ClipModel, OpenClipModel
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["HPSv2"]


class HPSv2(PretrainedReward):
    """Cosine under a CLIP ViT-H/14 tuned on human preferences; about 0.2 to 0.35.

    Needs `pip install 'svdd[open-clip]'`. Pictures that are not square lose their margins; the authors' code pads
    them in some versions.

    Args:
        pretrained: The tuned weights: a file, or owner/name/file on the hub.
        architecture: The model of open_clip that they are for.
        local_files_only: Never ask the hub; use what the disk holds.

    Raises:
        UserError: If open_clip is missing, or the weights cannot be loaded or are another model's.
    """

    differentiable = True
    range = (-1.0, 1.0)

    def __init__(
        self,
        pretrained: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained, self.architecture, self.local_files_only = pretrained, architecture, local_files_only

    def read(self) -> ClipModel:
        """Returns the CLIP."""
        weights = find_file(self.pretrained, local_files_only=self.local_files_only)
        return OpenClipModel(self.architecture, str(weights), self.local_files_only)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image with its own prompt, float [n]."""
        features = self.network.image_features(images)
        return (features * self.network.text_features(prompts).to(features)).sum(-1)
