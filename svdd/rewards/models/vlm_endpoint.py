"""Yes or no from a vision-language model behind OpenAI's chat API."""

import base64
import io
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from svdd import RewardError, UserError
from svdd.rewards.models.http_service import Service, first_line

__all__ = ["Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions`.

    Args:
        service: The API, up to `/v1`.
        model: Its name for the model.
        concurrency: How many requests wait for answers at the same time.

    Raises:
        UserError: If there would be no request at a time.
    """

    service: Service
    model: str
    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UserError(f"concurrency must be >= 1, got {self.concurrency}")

    @property
    def identity(self) -> str:
        """What its answers depend on."""
        return self.model

    def log_odds(self, pictures: Sequence[Image.Image], questions: Sequence[str], key: str | None) -> list[float]:
        """Returns log p(yes) - log p(no) for each picture and question.

        Raises:
            RewardError: If there is no answer, or one that is of no use.
        """
        failed: list[RewardError] = []

        def ask(picture: Image.Image, question: str) -> float:
            if failed:  # no more requests after one of no use
                raise failed[0]
            try:
                body = request_body(self.model, picture, question)
                return read_log_odds(self.service.post("/chat/completions", body, key))
            except ValueError as error:
                place = f"endpoint {self.service.shown}, model {self.model!r}"
                failed.append(RewardError(f"{place}: {first_line(error)}"))
                raise failed[0] from None

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, pictures, questions))


def request_body(model: str, picture: Image.Image, question: str) -> dict[str, Any]:
    """Returns a request for the likeliest first tokens of the answer."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def read_log_odds(answer: bytes) -> float:
    """Returns log p(yes) - log p(no) from an answer; the least of its log-probabilities bounds one that is missing.

    Raises:
        ValueError: If the answer has no probabilities, or neither yes nor no is among them.
    """
    try:
        said = json.loads(answer)
    except ValueError:
        raise ValueError("the answer is no JSON; is this the address of the API, with its /v1?") from None
    try:
        first = said["choices"][0]["logprobs"]["content"][0]
        given = [(str(token["token"]), float(token["logprob"])) for token in first["top_logprobs"] or [first]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError("the answer has no logprobs; the model must be served with top_logprobs") from None
    given = [(token.strip(" \n▁Ġ").lower(), max(logprob, -1e4)) for token, logprob in given]
    if not {token for token, _ in given} & {"yes", "no"}:
        raise ValueError(f"neither yes nor no is among the {len(given)} likeliest tokens; first {given[0][0]!r}")
    least = min(logprob for _, logprob in given)
    return _log_sum(given, "yes", least) - _log_sum(given, "no", least)


def _log_sum(given: list[tuple[str, float]], word: str, least: float) -> float:
    found = [logprob for token, logprob in given if token == word] or [least]
    return max(found) + math.log(sum(math.exp(logprob - max(found)) for logprob in found))
