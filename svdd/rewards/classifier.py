"""The probability of a label under an image classifier, as in classifier guidance.

Source: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError, nearest
from svdd.rewards.models.image_processing import Preprocessing
from svdd.rewards.models.networks import read_auto, read_model
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["Classifier"]


class Classifier(PretrainedReward):
    """Log-probability of a label under an image classifier of transformers; the prompt is not used.

    In a `multi_label_classification` model each label has its own probability.

    Args:
        pretrained: A folder, or a hub name such as `google/vit-base-patch16-224`.
        label: The label's name or one of its comma-separated names, in upper or lower case; or its index.
        logit: Return the logit, which is unbounded, instead of the log-probability.
        revision: Branch, tag or commit of a hub model.
        local_files_only: Use local files and the hub's cache only.
    """

    differentiable = True

    def __init__(
        self,
        pretrained: str,
        label: int | str,
        logit: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(revision, local_files_only)
        self.pretrained, self.label, self.logit = pretrained, label, logit
        self.range = (-math.inf, math.inf if logit else 0.0)

    @property
    def name(self) -> str:
        """`Classifier`, followed by the label."""
        return f"Classifier-{self.label}"

    def read(self) -> nn.Module:
        """Returns the classifier; raises UserError if it has no such label or cannot preprocess tensors."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        network = read_model(AutoModelForImageClassification, self.pretrained, torch.float32, **self.options)
        self.index = find_label(self.label, network.config.id2label)
        self.independent = network.config.problem_type == "multi_label_classification"
        if network.config.num_labels == 1 and not (self.logit or self.independent):
            raise UserError(f"pretrained={self.pretrained!r} has one label, whose probability is always 1; set logit")
        self.preprocess = Preprocessing(read_auto(AutoImageProcessor, self.pretrained, **self.options), self.pretrained)
        return network

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Returns the label's log-probability or logit in each image, float32 [n]."""
        network = self.network
        logits = network(pixel_values=self.preprocess(images).to(next(network.parameters()))).logits.float()
        if not self.logit:
            logits = F.logsigmoid(logits) if self.independent else logits.log_softmax(-1)
        return logits[:, self.index]


def find_label(label: int | str, names: dict[int, str]) -> int:
    """Returns the index of a label; raises UserError if no label or several labels have that name."""
    wanted = str(label).strip().lower()
    parts = {k: [part.strip() for part in name.split(",")] for k, name in names.items()}
    exact = [k for k, name in names.items() if (label == k if isinstance(label, int) else name.lower() == wanted)]
    found = exact or [k for k in names if wanted in map(str.lower, parts[k])]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"label={label!r} is the name of {len(found)} labels; give one of their indices: {found}")
    near = nearest(wanted, [part for several in parts.values() for part in several])
    some = ", ".join(repr(name) for name in list(names.values())[:5])
    guess = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"label={label!r} is none of the {len(names)} labels, such as {some}{guess}")
