"""Scores of image and prompt by UnifiedReward, a vision-language model trained to give them.

Source: Wang et al., Unified Reward Model for Multimodal Understanding and Generation, 2025, arXiv 2503.05236; the
questions are those that github.com/CodeGoat24/UnifiedReward publishes with the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from svdd import UserError
from svdd.rewards.endpoint_reward import EndpointReward, is_weighting
from svdd.rewards.models.answers import find_score
from svdd.rewards.models.vlm_endpoint import Answer

__all__ = ["UnifiedReward"]

_ASPECTS = """\
You are presented with a generated image and its associated text caption. Your task is to analyze the image across \
multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""

_FINAL = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: \
'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to \
5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""


@dataclass(eq=False, repr=False, kw_only=True)
class UnifiedReward(EndpointReward):
    """UnifiedReward's score from 1 to 5 of an image for its prompt, from a server such as vLLM or SGLang.

    Args:
        form: What is asked: `aspects`, as for versions 2.0, or the `final` score, as for the first versions.
        alignment: Weight of the agreement with the prompt in the mean of the aspects.
        coherence: Weight of the absence of distortions.
        style: Weight of the aesthetic appeal.
    """

    form: Literal["aspects", "final"] = "aspects"
    alignment: float = 1.0
    coherence: float = 1.0
    style: float = 1.0
    max_tokens: int = 1024
    range = (1.0, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("aspects", "final"):
            raise UserError(f"form must be aspects or final, got {self.form!r}")
        self.weights = {"Alignment": self.alignment, "Coherence": self.coherence, "Style": self.style}
        if not is_weighting(self.weights.values()):
            raise UserError(f"weights of aspects must be >= 0, and one of them > 0, got {[*self.weights.values()]}")

    def questions(self, prompt: str) -> Sequence[str]:
        """Returns the published question."""
        return [(_ASPECTS if self.form == "aspects" else _FINAL).replace("{prompt}", prompt)]

    def read(self, answer: Answer) -> float:
        """Returns the weighted mean of the aspects, or the final score."""
        if self.form == "final":
            return find_score(answer, 1, 5, "Final Score")
        scores = {name: find_score(answer, 1, 5, f"{name} Score") for name, weight in self.weights.items() if weight}
        return sum(self.weights[name] * score for name, score in scores.items()) / sum(self.weights.values())
