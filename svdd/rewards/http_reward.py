"""A reward that a server computes: images and prompts go out as JSON, and scores come back."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from svdd import RewardError, UserError, is_number, require_at_least
from svdd.rewards.base import Reward
from svdd.rewards.columns import column
from svdd.rewards.models.http_client import HTTPClient, from_environment, shorten
from svdd.rewards.models.pixels import to_pil
from svdd.rewards.models.vlm_endpoint import encoded

__all__ = ["HTTPReward"]

_OWN = ("images", "format", "prompts", "columns")  # fields of a request


class HTTPReward(Reward):
    """Scores from a server of your own, over HTTP.

    docs/how_to/reward_service.md states the protocol; examples/reward_server.py is a server.

    Args:
        url: Where the requests go, `http://localhost:8000/score`. Host and port may change when a run continues.
        label: Makes the name of the reward `HTTPReward-LABEL`, as several in one run need.
        arguments: Further fields of each request, the same in all.
        columns: Columns of the prompt file that are sent along; each prompt needs them.
        image_format: `png` keeps the 8-bit images as they are; `jpeg` is smaller.
        quality: Quality of JPEG images, 1 to 100.
        batch_size: Images in a request. With 1, the server cannot let a score depend on the other images of a call.
        higher_is_better: Whether a higher score is better.
        api_key_env: Name of the environment variable whose value is sent as `Authorization: Bearer`. It is never stored
            or shown.
        headers_env: Further headers, each with the name of the environment variable that holds its value.
        timeout: Seconds to wait for an answer.
        retries: How often a request is repeated after a failed connection, a time-out, or the status 408, 425, 429 or
            5xx. The default bridges an outage of two minutes.
        backoff: Seconds before the first repetition; doubled each time, up to 30.
        concurrency: Number of simultaneous requests.

    Raises:
        UserError: If an argument is out of range.
    """

    from_files, takes_bytes = ("served",), True
    threads = 1  # the client sends requests concurrently itself

    def __init__(
        self,
        url: str,
        label: str = "",
        arguments: dict[str, Any] | None = None,
        columns: list[str] | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        quality: int = 95,
        batch_size: int = 8,
        higher_is_better: bool = True,
        api_key_env: str | None = None,
        headers_env: dict[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 1.0,
        concurrency: int = 4,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, quality=quality)
        if quality > 100:
            raise UserError(f"quality must be at most 100, got {quality}")
        if image_format not in ("png", "jpeg"):
            raise UserError(f"image_format must be png or jpeg, got {image_format!r}")
        self.server = HTTPClient(url, timeout, retries, backoff, concurrency, "url", f"HTTPReward {url}")
        self.variant, self.arguments, self.columns = label, dict(arguments or {}), tuple(columns or ())
        self.image_format, self.quality, self.batch_size = image_format, quality, batch_size
        self.higher_is_better, self.one_call = higher_is_better, batch_size == 1
        self.api_key_env, self.headers_env = api_key_env, dict(headers_env or {})
        self.version: str | None = None  # as the server states it
        if bad := [name for name in self.headers_env if not re.fullmatch("[A-Za-z0-9-]+", name)]:
            raise UserError(f"headers_env takes names of headers, with letters, digits and hyphens, got {bad[0]!r}")
        if taken := sorted(set(self.arguments) & set(_OWN)):
            raise UserError(f"arguments must not contain {', '.join(taken)}, which each request has anyway")
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"arguments must be JSON data: {error}") from None

    @property
    def identity(self) -> Any:
        """What the scores depend on: of the address only the path, since a server may move."""
        form = [self.image_format] if self.image_format == "png" else [self.image_format, self.quality]
        asked = {"arguments": self.arguments, "columns": list(self.columns), "images": form}
        return {"name": self.name, "path": self.path, **asked}

    @property
    def path(self) -> str:
        """The path of the address."""
        return urlsplit(self.server.address).path

    @property
    def served(self) -> tuple[str, str | None]:
        """What of the server must stay the same when a run continues."""
        return self.path, self.version

    def headers(self) -> dict[str, str]:
        """Returns the secret headers; raises UserError if an environment variable is not set."""
        found = {name: from_environment(variable, "headers_env") for name, variable in self.headers_env.items()}
        bearer = {} if self.api_key_env is None else {"Authorization": f"Bearer {from_environment(self.api_key_env)}"}
        return found | bearer

    def load(self) -> None:
        """Asks the server for its version; a server that answers nothing useful to GET has none."""
        content, told = self.server.get(self.headers()), None
        with suppress(ValueError):
            told = json.loads(content or b"")
        self._accept(told.get("version") if isinstance(told, dict) else None)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the server's score of each image, float32 [n]."""
        pictures, size = to_pil(images), self.batch_size
        chunks = [slice(start, start + size) for start in range(0, len(pictures), size)]
        bodies = [partial(self.body, pictures[chunk], prompts[chunk]) for chunk in chunks]
        answers = self.server.post(bodies, _read, self.headers())
        for chunk, (scores, version) in zip(chunks, answers, strict=True):
            if len(scores) != len(prompts[chunk]):
                raise RewardError(f"{self.server.name}: sent {len(prompts[chunk])} images, got {len(scores)} scores")
            self._accept(version)
        return torch.tensor([score for scores, _ in answers for score in scores], dtype=torch.float32).to(images.device)

    def body(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Returns the JSON of a request."""
        files = [encoded(picture, self.image_format, self.quality) for picture in pictures]
        body = {"images": files, "format": self.image_format, "prompts": list(prompts), **self.arguments}
        columns = [{name: column(prompt, name) for name in self.columns} for prompt in prompts]
        return body | ({"columns": columns} if self.columns else {})

    def _accept(self, version: object) -> None:
        """Remembers the server's version, and refuses a change of it."""
        if version is not None and self.version not in (None, str(version)):
            now, before = shorten(str(version)), shorten(self.version or "")
            raise UserError(f"{self.server.name}: the server's version is {now}, but was {before} when the run began")
        self.version = self.version if version is None else str(version)


def _read(content: bytes) -> tuple[list[float], object]:
    """Returns the scores and the version of an answer; raises ValueError if it holds no scores."""
    found = shorten(content.decode(errors="replace"))
    try:
        told = json.loads(content)
    except ValueError:
        raise ValueError(f"the answer is not JSON: {found}") from None
    scores, version = (told.get("scores"), told.get("version")) if isinstance(told, dict) else (told, None)
    with suppress(OverflowError):
        if isinstance(scores, list) and all(map(is_number, scores)):
            return [float(score) for score in scores], version
    raise ValueError(f'expected {{"scores": [one number per image]}} or a list of numbers, got {found}')
