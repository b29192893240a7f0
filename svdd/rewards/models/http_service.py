"""JSON requests to an HTTP service, with retries; API keys are never shown or redirected."""

import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from svdd import UserError, first_line

__all__ = ["Service", "ServiceError"]

_MAX_WAIT = 30.0  # seconds between two attempts
_TRANSIENT = (408, 429)


class ServiceError(ValueError):
    """The service did not answer or refused; the message is one line without keys."""


@dataclass(frozen=True)
class Service:
    """The address of a service and how long to wait for it.

    Args:
        address: The common start of all paths.
        timeout: Seconds to wait for an answer.
        retries: How often a request is repeated.
        backoff: Seconds before the first repetition; doubled each time.

    Raises:
        UserError: If an argument is out of range.
    """

    address: str
    timeout: float
    retries: int
    backoff: float

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.address)
            valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            valid = valid and not (url.query or url.fragment or "@" in self.address)
        except ValueError:
            valid = False
        if not valid:  # the address may contain a password, so the message does not repeat it
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
        """The address without a final slash."""
        return self.address.rstrip("/")

    def post(self, path: str, body: Any, key: str | None) -> bytes:
        """Sends a body as JSON and returns the answer; a redirect is an error, since the key belongs to one host.

        Raises:
            ServiceError: If there is no answer after all attempts, or a refusal.
        """
        headers = {"User-Agent": "svdd"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        for attempt in range(self.retries + 1):
            wait, transient = self.backoff * 2**attempt, True
            try:
                answer = httpx.post(self.shown + path, json=body, headers=headers, timeout=self.timeout)
                if answer.is_success:
                    return answer.content
                problem, transient = _refusal(answer, key), answer.status_code in _TRANSIENT or answer.is_server_error
                after = answer.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else wait
            except httpx.TimeoutException:
                problem = f"no answer within {self.timeout:g} s"
            except (httpx.HTTPError, OSError) as error:
                problem = first_line(error)
            if not transient or attempt == self.retries:
                break
            time.sleep(min(wait, _MAX_WAIT))
        raise ServiceError(problem + (f" after {attempt + 1} attempts" if attempt else ""))


def _refusal(answer: httpx.Response, key: str | None) -> str:
    """Returns the status and the service's message, except for messages about a key."""
    message = ""
    if answer.status_code not in (401, 403, 407):
        try:
            told = answer.json()
            told = told.get("error", told.get("detail", told.get("message", "")))
            message = str(told.get("message", "") if isinstance(told, dict) else told).strip()
        except (ValueError, AttributeError):
            pass
    message = message.replace(key, "***") if key else message
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    return f"{status}: {first_line(message)[:300]}" if message else status
