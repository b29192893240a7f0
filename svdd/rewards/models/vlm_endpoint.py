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
from svdd.rewards.models.http_service import Service

__all__ = ["Endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions`.

    Args:
        service: The API, up to `/v1`.
        model: The endpoint's name for the model.
        concurrency: Number of simultaneous requests.

    Raises:
        UserError: If `concurrency` is below 1.
    """

    service: Service
    model: str
    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UserError(f"concurrency must be >= 1, got {self.concurrency}")

    @property
    def identity(self) -> str:
        """The model, on which the answers depend."""
        return self.model

    def log_odds(self, images: Sequence[Image.Image], questions: Sequence[str], key: str | None) -> list[float]:
        """Returns log p(yes) - log p(no) for each image and question.

        Raises:
            RewardError: If an answer is missing or unusable.
        """
        failed: list[RewardError] = []

        def ask(image: Image.Image, question: str) -> float:
            if failed:  # send no more requests
                raise failed[0]
            try:
                body = request_body(self.model, image, question)
                return read_log_odds(self.service.post("/chat/completions", body, key))
            except ValueError as error:
                failed.append(RewardError(f"endpoint {self.service.shown}, model {self.model!r}: {error}"))
                raise failed[0] from None

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, images, questions))


def request_body(model: str, image: Image.Image, question: str) -> dict[str, Any]:
    """Returns a request for the most likely first tokens of the answer."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def read_log_odds(answer: bytes) -> float:
    """Returns log p(yes) - log p(no); for a missing word, the lowest log-probability in the answer is the bound.

    Raises:
        ValueError: If the answer has no probabilities, or neither yes nor no is among them.
    """
    try:
        content = json.loads(answer)
    except ValueError:
        raise ValueError("the answer is not JSON; is this the address of the API, with its /v1?") from None
    try:
        first = content["choices"][0]["logprobs"]["content"][0]
        tokens = [(str(token["token"]), float(token["logprob"])) for token in first["top_logprobs"] or [first]]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError("the answer has no logprobs; the model must be served with top_logprobs") from None
    tokens = [(token.strip(" \n▁Ġ").lower(), max(logprob, -1e4)) for token, logprob in tokens]
    if not {token for token, _ in tokens} & {"yes", "no"}:
        raise ValueError(f"neither yes nor no is among the {len(tokens)} most likely tokens; first {tokens[0][0]!r}")
    lowest = min(logprob for _, logprob in tokens)

    def log_sum(word: str) -> float:
        found = [logprob for token, logprob in tokens if token == word] or [lowest]
        return max(found) + math.log(sum(math.exp(logprob - max(found)) for logprob in found))

    return log_sum("yes") - log_sum("no")
