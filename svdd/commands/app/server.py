"""The server of the page: which requests it answers, and where it listens."""

import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdd import UserError
from svdd.runs.processes.signals import signals

__all__ = ["LOCAL", "listen", "private_folder", "serve"]

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
_USER = "svdd"
_BODY = 2**18  # bytes of a request
_ANSWERED = re.compile(  # what the page itself asks for: no files, no uploads, no interface for programs
    r"/|/config/?|/favicon\.ico|/manifest\.json|/(gradio_api/)?theme\.css|/(assets|static)/[\w./@-]+|/(login|logout)/?"
    r"|/(gradio_api/)?(user|token|login_check|app_id|startup-events)/?"
    r"|/gradio_api/(run/predict|queue/(join|data)|cancel|reset|heartbeat/[\w-]+)/?"
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Has gradio keep its temporary files in a folder that only this user can read, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="svdd-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        yield Path(folder)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket at an address; UserError if it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port") from error
    return opened


def serve(page: Any, opened: socket.socket, hosts: Collection[str], password: str | None, **looks: Any) -> None:
    """Answers requests for a page of gradio until a signal comes.

    Args:
        page: The page.
        opened: Where to listen.
        hosts: The names under which browsers may ask, which keeps other sites' pages out; empty for any.
        password: What a visitor must know, if anything.
        looks: Theme and style of the page.
    """
    import fastapi
    import gradio
    import uvicorn

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    auth: Any = None if password is None else (_USER, password)
    gradio.mount_gradio_app(
        app, page, path="", auth=auth, footer_links=[], run_history=False, show_error=True, ssr_mode=False,
        max_file_size=1, enable_monitoring=False, pwa=False, mcp_server=False, **looks,
    )  # fmt: skip
    config = uvicorn.Config(_Guard(app, hosts), log_level="warning", timeout_graceful_shutdown=2, server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="svdd-server", daemon=True)
    signals.deferred, signals.unit = True, "step"
    thread.start()
    try:
        while thread.is_alive() and signals.exit_code is None:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        server.should_exit = True
        thread.join(timeout=5)


class _Guard:
    """Refuses all requests but those of the page, and tells browsers to ask no other host."""

    def __init__(self, app: Any, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = _host(headers.get("host", ""))
        raw = scope.get("raw_path", b"").decode("latin-1").partition("?")[0]
        known = _ANSWERED.fullmatch(raw) is not None and ".." not in raw
        length = headers.get("content-length", "0")
        small = "transfer-encoding" not in headers and length.isdecimal() and int(length) <= _BODY
        foreign = (self._hosts and host not in self._hosts) or _host(headers.get("origin", "")) not in ("", host)
        if foreign or not known or not small:
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not part of this page\n"})
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message["headers"] if k.lower() != b"content-security-policy"]
                added = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
                added |= {"x-content-type-options": "nosniff"}
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in added.items()]
            await send(message)

        await self._app(scope, receive, answer)


def _host(address: str) -> str:
    """Returns the name in an address, without protocol and port."""
    return re.sub(r":\d+$", "", address.rpartition("//")[2]).strip("[]").lower()
