"""Yes or no from a vision-language model behind OpenAI's chat API; keys are never shown or redirected."""

import asyncio
import base64
import io
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from svdd import RewardError, UserError, first_line

__all__ = ["Endpoint"]

_MOST_BYTES = 2**20  # of an answer, which holds the logarithms of 20 probabilities


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
        try:
            url = urlsplit(self.address)
            valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            valid = False
        if (
            not valid or url.query or url.fragment or re.search("@|%40", self.address)
        ):  # not shown: it may hold a password
            problem = "endpoint must be an address such as http://localhost:8000/v1, without a query, user or password"
            raise UserError(f"{problem} (a run saves it); give a key in the variable that api_key_env names")
        for name, least in (("retries", 0), ("backoff", 0), ("concurrency", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"timeout must be > 0, got {self.timeout}")

    @property
    def identity(self) -> str:
        """The model, on which the answers depend."""
        return self.model

    def log_odds(self, images: Sequence[Image.Image], questions: Sequence[str], key: str | None) -> list[float]:
        """Returns log p(yes) - log p(no) for each image and question; raises RewardError if an answer is unusable."""
        failed: list[RewardError] = []

        def ask(image: Image.Image, question: str) -> float:
            if failed:  # send no more requests
                raise failed[0]
            try:
                return read_log_odds(self._post(request_body(self.model, image, question), key))
            except ValueError as error:
                failed.append(RewardError(f"endpoint {self.address.rstrip('/')}, model {self.model!r}: {error}"))
                raise failed[0] from None

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, images, questions))

    def _post(self, body: Any, key: str | None) -> bytes:
        """Returns the answer; raises ValueError if there is none after all attempts, or a refusal or redirect."""
        headers = {"User-Agent": "svdd"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        address = self.address.rstrip("/") + "/chat/completions"
        for attempt in range(self.retries + 1):
            wait, transient = self.backoff * 2**attempt, True
            try:
                answer = asyncio.run(asyncio.wait_for(_send(address, body, headers), self.timeout))
                if answer.is_success:
                    return answer.content
                problem, transient = _refusal(answer, key), answer.status_code in (408, 429) or answer.is_server_error
                after = answer.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else wait
            except asyncio.TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except (httpx.HTTPError, OSError) as error:
                problem = _reason(error)
            if not transient or attempt == self.retries:
                break
            time.sleep(min(wait, 30.0))
        raise ValueError(problem + (f" after {attempt + 1} attempts" if attempt else ""))


def _reason(error: BaseException) -> str:
    """Returns the system's reason for a failed connection, or the first line of the message if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


async def _send(address: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    """Returns the whole answer; asynchronous, so that it can be cancelled even while bytes arrive one by one."""
    content = bytearray()
    async with (
        httpx.AsyncClient(timeout=None) as client,
        client.stream("POST", address, json=body, headers=headers | {"Accept-Encoding": "identity"}) as answer,
    ):
        async for part in answer.aiter_raw():
            content += part
            if len(content) > _MOST_BYTES:
                raise ValueError(f"the answer is larger than {_MOST_BYTES} bytes")
    kept = {name: value for name, value in answer.headers.items() if name == "retry-after"}
    return httpx.Response(answer.status_code, headers=kept, content=bytes(content), extensions=answer.extensions)


def _refusal(answer: httpx.Response, key: str | None) -> str:
    """Returns the status and the service's message, except for messages about a key."""
    message = ""
    if answer.status_code not in (401, 403, 407):
        with suppress(ValueError, AttributeError):
            told = answer.json()
            told = told.get("error", told.get("detail", told.get("message", "")))
            message = str(told.get("message", "") if isinstance(told, dict) else told).strip()
    message = message.replace(key, "***") if key else message
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    return f"{status}: {first_line(message)[:300]}" if message else status


def request_body(model: str, image: Image.Image, question: str) -> dict[str, Any]:
    """Returns a request for the most likely first tokens of the answer."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


def read_log_odds(answer: bytes) -> float:
    """Returns log p(yes) - log p(no), with the lowest log-probability for a missing word; or raises ValueError."""
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
    words = ([logprob for token, logprob in tokens if token == word] or [lowest] for word in ("yes", "no"))
    yes, no = map(np.logaddexp.reduce, words)
    return float(yes - no)
