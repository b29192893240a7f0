"""Numbers in the answers of language models."""

import math
import re

from svdd.rewards.models.http_client import shorten
from svdd.rewards.models.vlm_endpoint import Answer

__all__ = ["expected_score", "find_score"]

_LEAST_MASS = 0.5  # of the marks among the first tokens, for their mean to count
_NUMBER = r"(?<![\w.])([-+]?\d+(?:\.\d+)?)(?![\w%])(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
_ANY_LABEL = "(?:final |overall )?(?:score|rating|mark|grade|answer)"


def find_score(answer: Answer, lowest: float, highest: float, label: str = "") -> float:
    """Returns the score in an answer: the last number after a label (`Score: 4`, `4/5`), else the only number.

    Reasoning in `<think>` and emphasis are ignored.

    Args:
        answer: The answer.
        lowest: The lowest score.
        highest: The highest score, on whose scale the number must be.
        label: The words before the number; by default score, rating, mark, grade or answer, or none.

    Raises:
        ValueError: If there is no such number, several different ones, or one outside the scale.
    """
    wanted = f"{label or 'score'} from {lowest:g} to {highest:g}"
    if answer.refusal:
        raise ValueError(f"the model refused to answer: {shorten(answer.refusal)}")
    text = re.sub(r"<think>.*?(</think>|$)", "", answer.text, flags=re.S)
    text = re.sub(r"[*_`#]", "", text).strip()
    cut = f"; it was cut off after max_tokens={answer.max_tokens} tokens" if answer.cut_off else ""
    found = f"the answer {shorten(text)}" if text or not answer.text else f"the reasoning {shorten(answer.text)}"
    words = re.escape(label) if label else _ANY_LABEL
    numbers = re.findall(rf"\b{words}\s*(?:\([^)\n]*\))?\s*(?:[:=]|is|of)\s*{_NUMBER}", text, re.I)[-1:]
    if not numbers and not label:
        numbers = list(dict.fromkeys(re.findall(_NUMBER, text)))
    if len(numbers) != 1:
        raise ValueError(f"{found} holds {'several numbers' if numbers else 'no'} {wanted}{cut}")
    ((number, scale),) = numbers
    if (scale and float(scale) != highest) or not lowest <= float(number) <= highest:
        raise ValueError(f"{found} holds no {wanted}{cut}")
    return float(number)


def expected_score(answer: Answer, lowest: int, highest: int) -> float | None:
    """Returns the mean of the marks under the first token's probabilities, sum p_k k / sum p_k.

    It is None if the endpoint gives no probabilities, if marks have less than half of them, or if a mark may have
    several characters, so that the first token does not determine it.
    """
    if lowest < 0 or highest > 9:
        return None
    marks = {str(mark): mark for mark in range(lowest, highest + 1)}
    found = [(marks[token], math.exp(logprob)) for token, logprob in answer.first if token in marks]
    mass = sum(share for _, share in found)
    return sum(mark * share for mark, share in found) / mass if mass >= _LEAST_MASS else None
