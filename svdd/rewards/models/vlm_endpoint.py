"""A vision-language model behind OpenAI's chat API, as vLLM, SGLang and many services speak it."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from svdd.rewards.models.http_client import HTTPClient, shorten

__all__ = ["Answer", "Endpoint", "encoded"]

_TOP = 20  # most likely first tokens, the most that OpenAI's API and vLLM's default allow
_LEAST = 1e-7  # of the probability of all other tokens, as log-probabilities come in float32
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The whole answer; empty if there is none.
        first: The most likely first tokens, without space around them, and their log-probabilities; blank tokens at the
            beginning are passed over. Empty if the endpoint gives none.
        cut_off: Whether the answer ended because it reached `max_tokens`.
        refusal: The endpoint's words in place of an answer.
        max_tokens: The largest number of tokens, as asked for.
    """

    text: str
    first: tuple[tuple[str, float], ...] = ()
    cut_off: bool = False
    refusal: str = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions`; the arguments are those of `VLMJudge`."""

    address: str
    model: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int

    def __post_init__(self) -> None:
        _ = self.server

    @cached_property
    def server(self) -> HTTPClient:
        """Where the requests go."""
        label = f"endpoint {self.address.rstrip('/')}, model {self.model!r}"
        return HTTPClient(self.address, self.timeout, self.retries, self.backoff, self.concurrency, label=label)

    @property
    def identity(self) -> str:
        """The model, on which the answers depend."""
        return self.model

    def log_probabilities(
        self, images: Sequence[Image.Image], questions: Sequence[str], key: str | None, answer: str = "Yes"
    ) -> list[tuple[float, float, float, float]]:
        """Returns the log-probabilities of yes, no, the exact answer and another one for each image and question.

        Raises:
            RewardError: If a request fails or an answer is unusable.
        """
        return self.ask(images, questions, key, partial(read_log_probabilities, exact=answer), max_tokens=1)

    def ask(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        key: str | None,
        read: Callable[[Answer], T],
        max_tokens: int,
        logprobs: bool = True,
    ) -> list[T]:
        """Returns what `read` makes of the answer to each image and question, at temperature 0.

        Args:
            images: The images.
            questions: A question about each.
            key: The endpoint's key.
            read: Raises ValueError for an answer that is unusable.
            max_tokens: The largest number of tokens of an answer.
            logprobs: Ask for the log-probabilities of the most likely first tokens too, as not every endpoint allows.

        Raises:
            RewardError: If a request fails or an answer is unusable.
        """
        pairs = zip(images, questions, strict=True)
        bodies = [partial(request_body, self.model, *pair, max_tokens, logprobs) for pair in pairs]
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.server.post(
            bodies, lambda content: read(read_answer(content, max_tokens)), headers, "/chat/completions"
        )


def encoded(image: Image.Image, format: str = "png", quality: int = 95) -> str:
    """Returns an image file in base64; `quality` is that of a JPEG. A PNG is compressed quickly rather than well."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **({"quality": quality} if format == "jpeg" else {"compress_level": 1}))
    return base64.b64encode(buffer.getvalue()).decode()


def request_body(model: str, image: Image.Image, question: str, max_tokens: int, logprobs: bool) -> dict[str, Any]:
    """Returns a request about an image."""
    url = "data:image/png;base64," + encoded(image)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    options = {"max_tokens": max_tokens, "temperature": 0}
    options |= {"logprobs": True, "top_logprobs": _TOP} if logprobs else {}
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


def read_answer(content: bytes, max_tokens: int) -> Answer:
    """Returns an answer in the form of OpenAI's chat completions; raises ValueError for something else."""
    try:
        told = json.loads(content)
    except ValueError:
        raise ValueError("the answer is not JSON; is this the address of the API, with its /v1?") from None
    try:
        choice = told["choices"][0]
        message = choice.get("message") or {}
        text, refusal = message.get("content") or "", message.get("refusal") or ""
        first: tuple[tuple[str, float], ...] = ()
        if places := (choice.get("logprobs") or {}).get("content"):
            place = next((each for each in places if _word(each["token"])), places[0])
            tokens = place.get("top_logprobs") or [place]
            first = tuple((_word(token["token"]), max(float(token["logprob"]), -1e4)) for token in tokens)
        return Answer(str(text), first, choice.get("finish_reason") == "length", str(refusal), max_tokens)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        found = shorten(content.decode(errors="replace"))
        raise ValueError(f"the answer is no chat completion with a choice and logprobs: {found}") from None


def _word(token: object) -> str:
    """Returns a token without space around it, which tokenizers also write as ▁ and Ġ."""
    return str(token).strip(" \n▁Ġ")


def read_log_probabilities(answer: Answer, exact: str) -> tuple[float, float, float, float]:
    """Returns log p of yes and no in any spelling, of the exact answer, and of all but that.

    An answer that is not among the most likely tokens gets the lowest log-probability of these, an upper bound; if the
    endpoint gives one token only, that of all others together.

    Raises:
        ValueError: If there are no log-probabilities, or neither yes nor no is among the most likely tokens.
    """
    if not (tokens := answer.first):
        raise ValueError("the answer has no logprobs; the model must be served with top_logprobs")
    if not {token.lower() for token, _ in tokens} & {"yes", "no"}:
        raise ValueError(f"neither yes nor no is among the {len(tokens)} most likely tokens; first {tokens[0][0]!r}")
    lowest = min(logprob for _, logprob in tokens)
    if len(tokens) == 1:
        lowest = float(np.log(max(-np.expm1(lowest), _LEAST)))

    def total(matches: Callable[[str], bool]) -> float:
        return float(np.logaddexp.reduce([logprob for token, logprob in tokens if matches(token)] or [lowest]))

    said = total(lambda token: token == exact)
    certain = said > -1e-3  # then 1 - p has few digits, and the other tokens have more
    spared = total(lambda token: token != exact) if certain else float(np.log1p(-np.exp(said)))
    return total(lambda token: token.lower() == "yes"), total(lambda token: token.lower() == "no"), said, spared
