"""Alignment of image and prompt: the cosine of their CLIP embeddings.

Sources: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020;
Hessel et al., CLIPScore, 2021, arXiv 2104.08718 (without its factor 2.5 and its clipping at 0); Cherti et al.,
Reproducible scaling laws for contrastive language-image learning, 2022, arXiv 2212.07143 (open_clip).
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svdd import UserError
from svdd.rewards.models.clip_models import ClipModel, OpenClipModel, TransformersClip
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["CLIPScore"]


@dataclass(eq=False, repr=False)
class CLIPScore(PretrainedReward):
    """Cosine similarity of image and prompt under a CLIP model, -1 .. 1.

    Args:
        pretrained: `emoji`, `emoji-judge` (small CLIPs that ship with svdd; the second, trained separately, is for
            held-out evaluation), a folder, or a hub name such as `openai/clip-vit-large-patch14`. With an
            architecture: one of open_clip's tags for it, such as `laion2b_s32b_b79k`, or a weights file.
        architecture: A model of open_clip: `ViT-H-14`, `hf-hub:owner/name`, `local-dir:/folder`. Default: transformers.
    """

    pretrained: str = "emoji"
    architecture: str | None = None
    differentiable = True
    range = (-1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture is not None and self.revision is not None:
            problem = f"revision={self.revision!r} is for models of transformers"
            raise UserError(f"{problem}; open_clip loads the latest {self.architecture!r}")
        label = {"emoji": "", "emoji-judge": "judge"}.get(self.pretrained, self.pretrained)
        self.variant = Path(self.architecture.split(":")[-1] if self.architecture else label).name

    def read(self) -> ClipModel:
        """Returns the model."""
        if self.architecture is not None:
            return OpenClipModel(self.architecture, self.pretrained, self.local_files_only)
        return TransformersClip(self.pretrained, self.options)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the cosine of each image with its own prompt, float32 [n]."""
        return self.network.cosines(images, prompts)

    def image_features(self, images: Tensor) -> Tensor:
        """Returns the embedding of each image, of length 1, float32 [n, d]."""
        return self.network.image_features(images)
