"""A service that takes JSON over HTTP, asked with patience, and a key that is never shown."""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from svdd import UserError

__all__ = ["Service", "ServiceError", "first_line"]

_LONGEST_WAIT = 30.0  # seconds between two attempts
_TRANSIENT = (408, 429)


class ServiceError(ValueError):
    """There was no answer, or a refusal; the message is one line without keys."""


class _NoRedirect(HTTPRedirectHandler):
    """Lets a redirection be an error: the key belongs to one host."""

    def redirect_request(self, *_: Any) -> None:
        """Returns nothing, which makes it an error."""


@dataclass(frozen=True)
class Service:
    """Where requests are posted to.

    Args:
        address: What all paths begin with.
        timeout: Seconds to wait for an answer.
        retries: How often a request is sent again.
        backoff: Seconds before it is sent again; twice as many each time.

    Raises:
        UserError: If one of them is out of its range.
    """

    address: str
    timeout: float
    retries: int
    backoff: float

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            good = good and not (parts.query or parts.fragment)
        except ValueError:
            good = False
        if not good or "@" in self.address:  # the message does not repeat what may be a password
            raise UserError(
                "endpoint must be an address such as http://localhost:8000/v1, without a query, user or password (they "
                "would be written into the run's files); api_key_env names a variable that holds a key"
            )
        for name in ("retries", "backoff"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"timeout must be > 0, got {self.timeout}")

    @property
    def shown(self) -> str:
        """The address without a slash at its end."""
        return self.address.rstrip("/")

    def post(self, path: str, body: Any, key: str | None) -> bytes:
        """Returns the answer to a body sent as JSON.

        Raises:
            ServiceError: If there is none after all attempts, or a refusal.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "svdd"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.shown + path, json.dumps(body).encode(), headers)
        opener = build_opener(_NoRedirect)
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    return answer.read()
            except HTTPError as error:
                problem, transient = refusal(error, key), error.code in _TRANSIENT or error.code >= 500
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else wait
                error.close()
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem, transient = f"no answer within {self.timeout:g} s" if late else first_line(reason), True
            if not transient or attempt == self.retries:
                break
            time.sleep(min(wait, _LONGEST_WAIT))
        raise ServiceError(problem + (f" after {attempt + 1} attempts" if attempt else ""))


def refusal(error: HTTPError, key: str | None) -> str:
    """Returns what the service says is wrong; nothing that it says about a key."""
    said = ""
    if error.code not in (401, 403, 407):
        try:
            told = json.loads(error.read(65536))
            told = told.get("error", told.get("detail", told.get("message", "")))
            said = str(told.get("message", "") if isinstance(told, dict) else told)
        except (ValueError, AttributeError, OSError, http.client.HTTPException):
            said = ""
    said = said.replace(key, "***") if key else said
    name = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
    return f"{name}: {first_line(said)}" if said.strip() else name


def first_line(text: object) -> str:
    """Returns the first line of a message, cut to a length that can be read."""
    lines = str(text).strip().splitlines()
    return lines[0][:300] if lines else "no message"
