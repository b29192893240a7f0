"""Yes or no from a vision-language model behind OpenAI's chat API."""

import base64
import http.client
import io
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image

from svdd.errors import RewardError, UserError

__all__ = ["Endpoint"]

_LONGEST_WAIT = 30.0  # seconds between two attempts
_TRANSIENT = (408, 429)


class _NoRedirect(HTTPRedirectHandler):
    """Lets a redirection be an error: the key belongs to one host."""

    def redirect_request(self, *_: Any) -> None:
        """Returns nothing, which makes it an error."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind `/chat/completions`.

    Args:
        address: Up to `/v1`; a user's name and password in it are sent as such, and shown nowhere.
        model: The endpoint's name for the model.
        timeout: Seconds to wait for an answer.
        retries: How often a request is sent again.
        backoff: Seconds before it is sent again; twice as many each time.
        concurrency: How many requests wait at the same time.

    Raises:
        UserError: If one of them is out of its range.
    """

    address: str = field(repr=False)
    model: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or parts.query or parts.fragment:  # the message does not repeat it: it may hold a password
            raise UserError("endpoint must be an address such as http://localhost:8000/v1, with nothing after the path")
        for name, least in (("retries", 0), ("backoff", 0), ("concurrency", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"timeout must be > 0, got {self.timeout}")

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        parts = urlsplit(self.address)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

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
                return self._ask(picture, question, key)
            except RewardError as error:
                failed.append(error)
                raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, pictures, questions))

    def _ask(self, picture: Image.Image, question: str, key: str | None) -> float:
        body = json.dumps(request_body(self.model, picture, question)).encode()
        request = Request(f"{self.shown}/chat/completions", body, self._headers(key))
        opener = build_opener(_NoRedirect)
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    return read_log_odds(answer.read())
            except HTTPError as error:
                password = urlsplit(self.address).password or ""
                problem = _problem(error, [key, password, unquote(password)])
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else wait
                transient = error.code in _TRANSIENT or error.code >= 500
                error.close()
            except (URLError, OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem, transient = f"no answer within {self.timeout:g} s" if late else _line(str(reason)), True
            except ValueError as error:
                raise RewardError(f"endpoint {self.shown}: {_line(str(error))}") from None
            if not transient or attempt == self.retries:
                break
            time.sleep(min(wait, _LONGEST_WAIT))
        tries = f" after {attempt + 1} attempts" if attempt else ""
        raise RewardError(f"endpoint {self.shown}, model {self.model!r}: {problem}{tries}")

    def _headers(self, key: str | None) -> dict[str, str]:
        headers, parts = {"Content-Type": "application/json", "User-Agent": "svdd"}, urlsplit(self.address)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        elif parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        return headers


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


def _problem(error: HTTPError, secrets: list[str | None]) -> str:
    """Returns what the endpoint says is wrong, in one line; nothing that it says about a key."""
    said = ""
    if error.code not in (401, 403, 407):
        try:
            told = json.loads(error.read(65536))
            told = told.get("error", told.get("detail", told.get("message", "")))
            said = _line(str(told.get("message", "") if isinstance(told, dict) else told))
        except (ValueError, AttributeError, OSError, http.client.HTTPException):
            said = ""
    for secret in filter(None, secrets):
        said = said.replace(secret, "***")
    return f"{error.code} {http.client.responses.get(error.code, '')}".strip() + (f": {said}" if said else "")


def _line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else "no message"
