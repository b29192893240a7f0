"""Requests of JSON over HTTP: concurrent, bounded, and repeated after a passing failure; keys are never shown."""

import asyncio
import json
import os
import random
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from svdd import RewardError, UserError, first_line, say

__all__ = ["HTTPClient", "from_environment", "shorten"]

_MOST_BYTES = 2**20  # of an answer
_TRANSIENT = (408, 425, 429)  # and all 5xx but these, which say that the server has no such method or version:
_FINAL = (501, 505)
_LONGEST_WAIT, _LONGEST_ASKED_WAIT = 30.0, 120.0  # seconds before a repetition
_LEAST_KEY = 8  # characters
_random = random.SystemRandom()  # leaves the global generator alone
T = TypeVar("T")


@dataclass(frozen=True)
class HTTPClient:
    """A server that takes and returns JSON.

    A request is repeated after a failed connection, a time-out, and the statuses 408, 425, 429 and 5xx. Redirects are
    not followed, since they could send a key elsewhere.

    Args:
        address: Where the requests go, without a query, a user or a password.
        timeout: Seconds for a whole answer.
        retries: How often a request is repeated.
        backoff: Seconds before the first repetition; doubled each time, up to 30, plus up to a quarter at random. The
            server's `Retry-After` takes precedence, up to 120.
        concurrency: Number of simultaneous requests.
        setting: The name of the setting that holds the address, for messages.
        label: What messages call the server; by default the setting and the address.
    """

    address: str
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    setting: str = "endpoint"
    label: str = ""

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.address)
            valid = url.scheme in ("http", "https") and url.hostname and url.port != 0 and httpx.URL(self.address)
        except (ValueError, httpx.InvalidURL):
            valid = False
        if not valid or url.query or url.fragment or re.search("@|%40", self.address):  # not shown: may hold a password
            example = f"http://localhost:8000/{'v1' if self.setting == 'endpoint' else 'score'}"
            problem = f"{self.setting} must be an address such as {example}, without a query, user or password"
            problem += " (a run saves it)"
            raise UserError(f"{problem}; give a key in the variable that api_key_env names")
        for name, least in (("retries", 0), ("backoff", 0), ("concurrency", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"timeout must be > 0, got {self.timeout}")

    @property
    def name(self) -> str:
        """What messages call the server."""
        return self.label or f"{self.setting} {self.address.rstrip('/')}"

    def post(
        self,
        bodies: Sequence[Callable[[], Any]],
        read: Callable[[bytes], T],
        headers: Mapping[str, str],
        path: str = "",
    ) -> list[T]:
        """Sends requests and returns what `read` makes of each answer, in their order.

        Args:
            bodies: Functions that return a request's JSON, called when it is about to be sent.
            read: Raises ValueError for an answer that is unusable.
            headers: Sent with each request; their values are secret.
            path: What follows the address.

        Raises:
            RewardError: For the first request without a usable answer; the others are abandoned.
        """
        sender = _Sender(self, headers)

        async def ask_all() -> list[T]:
            limit, connections = anyio.CapacityLimiter(self.concurrency), httpx.Limits(max_connections=self.concurrency)
            async with httpx.AsyncClient(timeout=None, limits=connections, verify=_certificates()) as client:

                async def ask(body: Callable[[], Any]) -> T:
                    async with limit:
                        content = await anyio.to_thread.run_sync(lambda: json.dumps(body()).encode())
                        return read(await sender.request(client, "POST", path, content))

                return await asyncio.gather(*map(ask, bodies))

        return self._run(ask_all)

    def get(self, headers: Mapping[str, str]) -> bytes | None:
        """Returns the answer to a request without a body, or None if the server refuses it."""
        sender = _Sender(self, headers)

        async def ask() -> bytes | None:
            async with httpx.AsyncClient(timeout=None, verify=_certificates()) as client:
                try:
                    return await sender.request(client, "GET", "", None)
                except _Refused:
                    return None

        return self._run(ask)

    def _run(self, ask: Callable[[], Any]) -> Any:
        """Runs a coroutine in a thread of its own, since that of a notebook has an event loop already."""
        try:
            with start_blocking_portal() as portal:
                return portal.call(ask)
        except RewardError:
            raise
        except ValueError as error:
            raise RewardError(f"{self.name}: {error}") from None


class _Refused(ValueError):
    """A status that another attempt would not change."""


class _Sender:
    """Sends the requests of one call, with repetitions that are announced once."""

    def __init__(self, server: HTTPClient, headers: Mapping[str, str]) -> None:
        self.server, self.announced = server, False
        self.headers = {"User-Agent": "svdd", "Accept-Encoding": "identity", **headers}
        self.secrets = [value.removeprefix("Bearer ") for value in headers.values()]

    def hide(self, content: bytes) -> bytes:
        """Returns an answer, which messages may quote, without keys; a short one could be a part of a number."""
        for secret in self.secrets:
            content = content.replace(secret.encode(), b"***") if len(secret) >= _LEAST_KEY else content
        return content

    async def request(self, client: httpx.AsyncClient, method: str, path: str, content: bytes | None) -> bytes:
        """Returns the answer; raises ValueError if there is none after all attempts, or a refusal or redirect."""
        server = self.server
        headers = self.headers | ({} if content is None else {"Content-Type": "application/json"})
        address = server.address.rstrip("/") + path if path else server.address
        for attempt in range(server.retries + 1):
            wait, transient = min(server.backoff * 2**attempt, _LONGEST_WAIT), True
            try:
                with anyio.fail_after(server.timeout):
                    answer = await _whole(client, method, address, content, headers)
                if answer.is_success:
                    return self.hide(answer.content)
                status = answer.status_code
                transient = status in _TRANSIENT or (answer.is_server_error and status not in _FINAL)
                problem = self.refusal(answer)
                if (after := answer.headers.get("Retry-After", "")).isdigit():
                    wait = min(float(after), _LONGEST_ASKED_WAIT)
            except TimeoutError:
                problem = f"no answer within {server.timeout:g} s"
            except (httpx.HTTPError, OSError) as error:
                problem = _reason(error)
            if not transient:
                raise _Refused(problem + _after(attempt))
            if attempt == server.retries:
                break
            if attempt and not self.announced:
                self.announced = True
                say(f"{server.name}: {problem}; attempt {attempt + 2} of {server.retries + 1} follows", error=True)
            await sleep(wait * _random.uniform(1, 1.25))
        raise ValueError(problem + _after(attempt))

    def refusal(self, answer: httpx.Response) -> str:
        """Returns the status and the service's message, except for messages about a key."""
        message = ""
        if answer.status_code not in (401, 403, 407):
            with suppress(ValueError, AttributeError):
                told = answer.json()
                told = told.get("error", told.get("detail", told.get("message", "")))
                message = str(told.get("message", "") if isinstance(told, dict) else told).strip()
        for secret in self.secrets:
            message = message.replace(secret, "***")
        status = f"{answer.status_code} {answer.reason_phrase}".strip()
        return f"{status}: {first_line(message)[:300]}" if message else status


@lru_cache(1)
def _certificates() -> ssl.SSLContext:
    """Returns httpx's default, which takes longer to read than a small request."""
    return httpx.create_ssl_context()


async def sleep(seconds: float) -> None:
    """Waits before a repetition."""
    await anyio.sleep(seconds)


async def _whole(
    client: httpx.AsyncClient, method: str, address: str, content: bytes | None, headers: dict[str, str]
) -> httpx.Response:
    """Returns the whole answer, which may be cancelled even while bytes arrive one by one."""
    received = bytearray()
    async with client.stream(method, address, content=content, headers=headers) as answer:
        async for part in answer.aiter_raw():
            received += part
            if len(received) > _MOST_BYTES:
                raise ValueError(f"the answer is larger than {_MOST_BYTES} bytes")
    kept = {name: value for name, value in answer.headers.items() if name == "retry-after"}
    return httpx.Response(answer.status_code, headers=kept, content=bytes(received), extensions=answer.extensions)


def _after(attempt: int) -> str:
    return f" after {attempt + 1} attempts" if attempt else ""


def _reason(error: BaseException) -> str:
    """Returns the system's reason for a failed connection, or the first line of the message if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return first_line(error).rstrip(".")


def from_environment(variable: str, setting: str = "api_key_env") -> str:
    """Returns a secret from an environment variable; raises UserError if it is not set or unprintable."""
    secret = os.environ.get(variable, "").strip()
    if not (secret and secret.isascii() and secret.isprintable()):
        problem = "holds no key" if secret else "is not set"
        shown = variable if re.fullmatch("[A-Z]+(_[A-Z0-9]+)+", variable) else f"that {setting} names"
        raise UserError(f"the environment variable {shown} {problem}")
    return secret


def shorten(text: str, most: int = 120) -> str:
    """Returns a text in quotes, in one line and of limited length, for a message."""
    return repr(text if len(text) <= most else f"{text[:most]} ...")
