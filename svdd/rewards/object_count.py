"""How far the number of a named object in an image, counted by a detector, is from the wanted number.

Sources of the detectors: Liu et al., Grounding DINO, 2023, arXiv 2303.05499; Minderer et al., Scaling Open-Vocabulary
Object Detection, 2023, arXiv 2306.09683 (OWLv2).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdd import UserError
from svdd.rewards.columns import column
from svdd.rewards.models.detectors import Detector, read_detector
from svdd.rewards.models.number_words import counted_object
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["ObjectCount", "soft_count"]

_REACH = 4  # softness below the threshold, where a box counts for less than 0.02 and is left out


@dataclass(eq=False, repr=False)
class ObjectCount(PretrainedReward):
    r"""Minus the distance of the number of an object in the image from the wanted number, at most 0.

    A detector finds boxes with the scores p_i. The score is -|c - wanted| with the soft count
    c = sum over i of sigmoid((p_i - threshold) / softness), so that a box at the threshold counts half, and a clear one
    almost 1; boxes more than 4 softness below the threshold are left out.

    Args:
        pretrained: A zero-shot detector (Grounding DINO, OWLv2), a closed-set detector or an instance segmenter of
            transformers: a folder or a hub name.
        object: What is counted. Default: the prompt file's column `object`, else what the prompt counts.
        count: The wanted number. Default: the column `count`, else the number in the prompt: `three red apples`.
        threshold: Score of a box that counts half.
        softness: Distance from the threshold, in scores, over which a box fades in; 0 counts whole boxes.
        overlap: Of two boxes with a larger intersection over union the better is kept; 1 keeps all.
        batch_size: Images per batch.
        label: Ends the reward's name, as several in one run need.

    Raises:
        UserError: If an argument is out of range.
    """

    pretrained: str = "IDEA-Research/grounding-dino-tiny"
    object: str | None = None
    count: int | None = None
    threshold: float = 0.3
    softness: float = 0.05
    overlap: float = 0.5
    batch_size: int = 8
    label: str = field(default="", kw_only=True)
    range = (-math.inf, 0.0)
    optional_columns = ("object", "count")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.object is not None and not self.object.strip():
            raise UserError("object must be the name of what is counted, got a blank")
        if self.count is not None:
            _number(self.count, "count")
        if not 0 <= self.threshold <= 1 or not 0 <= self.overlap <= 1:
            raise UserError(f"threshold and overlap must be in [0, 1], got {self.threshold} and {self.overlap}")
        if not self.softness >= 0 or self.batch_size < 1:
            problem = f"got {self.softness} and {self.batch_size}"
            raise UserError(f"softness must be >= 0 and batch_size >= 1, {problem}")
        self.variant = "-".join(filter(None, (self.object, self.label)))

    def read(self) -> Detector:
        """Returns the detector."""
        return read_detector(self.pretrained, self.options)

    def wanted(self, prompt: str) -> tuple[str, int]:
        """Returns the object that is counted for a prompt and its wanted number; raises UserError if one is unknown."""
        given = self.object if self.object is not None else column(prompt, "object")
        count = self.count if self.count is not None else column(prompt, "count")
        if given is None or count is None:
            counted = counted_object(prompt)
            if counted is None:
                lacking = "object" if given is None else "number of it"
                ways = "give object and count, or columns of these names in the prompt file"
                raise UserError(f"{self.name}: the prompt {str(prompt)!r} counts no {lacking} clearly; {ways}")
            count, given = counted[0] if count is None else count, counted[1] if given is None else given
        return str(given), _number(count, f"the column count of the prompt {str(prompt)!r}")

    def check_prompt(self, prompt: str) -> None:
        """Raises UserError if object or number are unknown for the prompt."""
        self.wanted(prompt)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the score of each image for its own prompt, float32 [n]."""
        wanted = [self.wanted(prompt) for prompt in prompts]
        least = max(self.threshold - _REACH * self.softness, 0.0)
        names = [[name] for name, _ in wanted]
        found = self.network.detect(images, names, least, self.overlap, self.batch_size)
        counts = [soft_count((one.score for one in objects), self.threshold, self.softness) for objects in found]
        return images.new_tensor([-abs(c - n) for c, (_, n) in zip(counts, wanted, strict=True)], dtype=torch.float32)


def soft_count(scores: Iterable[float], threshold: float, softness: float) -> float:
    """Returns the sum of sigmoid((score - threshold) / softness); with softness 0, how many reach the threshold."""
    if softness == 0:
        return float(sum(score >= threshold for score in scores))
    return math.fsum((1 + math.tanh((score - threshold) / (2 * softness))) / 2 for score in scores)


def _number(value: object, what: str) -> int:
    """Returns a wanted number, from an argument or a prompt file, as an integer; raises UserError if it is none."""
    if not re.fullmatch(r"\d{1,6}(\.0*)?", text := str(value).strip()):
        raise UserError(f"{what} must be a whole number >= 0, got {value!r}")
    return int(float(text))
