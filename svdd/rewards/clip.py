"""Alignment of image and prompt: the cosine of their CLIP embeddings.

Sources: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020;
Hessel et al., CLIPScore, 2021, arXiv 2104.08718 (without its factor 2.5 and its clipping at 0); Cherti et al.,
Reproducible scaling laws for contrastive language-image learning, 2022, arXiv 2212.07143 (open_clip).
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from svdd import UserError
from svdd.rewards.models.clip_models import EMBEDDED, ClipModel, OpenClipModel, TransformersClip
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["CLIPScore"]


class CLIPScore(PretrainedReward):
    """Cosine similarity of image and prompt under a CLIP model, -1 .. 1.

    Args:
        pretrained: `emoji`, `emoji-judge` (small CLIPs that ship with svdd; the second, trained separately, is for
            held-out evaluation), a folder, or a hub name such as `openai/clip-vit-large-patch14`. With an
            architecture: one of open_clip's tags for it, such as `laion2b_s32b_b79k`, or a weights file.
        architecture: A model of open_clip: `ViT-H-14`, `hf-hub:owner/name`, `local-dir:/folder`. Default: transformers.
        revision: Branch, tag or commit of a hub model; not with an architecture.
        local_files_only: Use local files and the hub's cache only.
    """

    differentiable = True
    range = (-1.0, 1.0)

    def __init__(
        self,
        pretrained: str = "emoji",
        architecture: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(revision, local_files_only)
        if architecture and revision:
            raise UserError(f"{revision=} is for models of transformers; open_clip loads the latest {architecture!r}")
        self.pretrained, self.architecture = pretrained, architecture

    @property
    def name(self) -> str:
        """`CLIPScore`, followed by the model's name unless it is the embedded one."""
        label = self.pretrained.removeprefix("emoji").lstrip("-") if self.pretrained in EMBEDDED else self.pretrained
        label = Path(self.architecture.split(":")[-1] if self.architecture else label).name
        return f"CLIPScore-{label}" if label else "CLIPScore"

    def read(self) -> ClipModel:
        """Returns the model."""
        if self.architecture is not None:
            return OpenClipModel(self.architecture, self.pretrained, self.options["local_files_only"])
        return TransformersClip(self.pretrained, self.options)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image with its own prompt, float32 [n]."""
        return self.network.cosines(images, prompts)

    def image_features(self, images: Tensor) -> Tensor:
        """Returns the embedding of each image, of length 1, float32 [n, d]."""
        return self.network.image_features(images)
