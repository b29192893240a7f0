"""A vision-language model's mark by a rubric: the mean of the marks under the model's own probabilities.

Sources: Liu et al., G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment, 2023, arXiv 2303.16634; Wu et al.,
Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels, 2023, arXiv 2312.17090.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svdd import UserError, is_integer
from svdd.rewards.columns import column
from svdd.rewards.endpoint_reward import EndpointReward, is_weighting
from svdd.rewards.models.answers import expected_score, find_score
from svdd.rewards.models.vlm_endpoint import Answer

__all__ = ["RubricJudge"]

_PLACE = re.compile(r"\{(\w+)\}")
_FILE = re.compile(r"\S+\.(txt|md)")


@dataclass(eq=False, repr=False, kw_only=True)
class RubricJudge(EndpointReward):
    """A vision-language model's mark for an image by a rubric of yours, from a server with OpenAI's chat API.

    The score is the mean of the marks under the probabilities of the answer's first token, sum p_k k / sum p_k, if the
    scale lies within 0 to 9 and the endpoint gives the probabilities; otherwise it is the mark in the answer.

    Args:
        rubric: What to judge and how, as a text or a .txt or .md file; `{prompt}` stands for the prompt, `{criterion}`
            for a criterion, and any other `{name}` for that column of the prompt file.
        criteria: Criteria with weights: each is asked for alone, and the score is the weighted mean.
        lowest: The lowest mark, a whole number.
        highest: The highest mark.
        logprobs: Ask for the probabilities; some endpoints refuse to give them.
    """

    rubric: str
    criteria: dict[str, float] | None = None
    lowest: int = 1
    highest: int = 5
    logprobs: bool = True
    from_files = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_integer(self.lowest) and is_integer(self.highest) and self.lowest < self.highest):
            raise UserError(f"the scale needs whole numbers lowest < highest, got {self.lowest} and {self.highest}")
        self.range = (float(self.lowest), float(self.highest))
        self.text = _read_text(self.rubric)
        criteria = self.criteria or {"": 1.0}
        if not is_weighting(criteria.values()):
            raise UserError(f"weights of criteria must be >= 0, and one of them > 0, got {[*criteria.values()]}")
        names = dict.fromkeys(_PLACE.findall(self.text))
        self.columns = tuple(name for name in names if name not in ("prompt", "criterion"))
        if ("criterion" in names) != bool(self.criteria):
            raise UserError("criteria and {criterion} in the rubric belong together; got only one of the two")
        self.weights = {name: weight for name, weight in criteria.items() if weight}

    @property
    def identity(self) -> Any:
        """What the scores depend on, with the rubric's text."""
        return super().identity | {"rubric": self.text}

    def questions(self, prompt: str) -> Sequence[str]:
        """Returns the rubric with a request for one mark, for each criterion."""
        end = f"\n\nAnswer with a whole number from {self.lowest} (worst) to {self.highest} (best), and nothing else."
        known = {name: column(prompt, name) for name in self.columns} | {"prompt": prompt}
        return [_fill(self.text, {**known, "criterion": name}) + end for name in self.weights]

    def read(self, answer: Answer) -> float:
        """Returns the expected mark, or else the mark in the answer."""
        mean = expected_score(answer, self.lowest, self.highest)
        return find_score(answer, self.lowest, self.highest) if mean is None else mean

    def combine(self, scores: Tensor) -> Tensor:
        """Returns the weighted mean over the criteria."""
        weights = scores.new_tensor([*self.weights.values()])
        return scores @ weights / weights.sum()


def _fill(text: str, values: Mapping[str, Any]) -> str:
    """Returns a text with values in place of their names in braces."""
    return _PLACE.sub(lambda match: str(values[match[1]]), text)


def _read_text(rubric: str) -> str:
    """Returns the text of a rubric, from its file if it is the name of one."""
    if not rubric.strip():
        raise UserError("rubric must be a text or a file, got nothing")
    if not _FILE.fullmatch(rubric):
        return rubric
    try:
        return Path(rubric).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rubric={rubric!r} cannot be read as a text file: {error}") from None
