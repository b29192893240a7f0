"""Small pictures for a report: embedded in the page up to a total size, beyond it in files beside the page."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image, features

from svdd import UserError
from svdd.runs.images import read_image
from svdd.runs.pictures import pixels_of

__all__ = ["Thumbnail", "full_picture", "link", "read_thumbnails"]

_EDGE = 320  # pixels of the longer side of a thumbnail
_TINY = 128  # pictures with no longer side are kept without loss
_QUALITY = 80
_PNG = b"\x89PNG\r\n\x1a\n"


class Thumbnail(NamedTuple):
    """A small picture as a file's content; empty if the picture cannot be read."""

    data: bytes
    suffix: str  # `webp`, `jpeg` or `png`, also its type
    width: int  # of the picture itself, in pixels
    height: int
    fault: str  # why it cannot be read

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return _uri(self.data, self.suffix)


def read_thumbnails(pictures: Sequence[tuple[Path, str]]) -> Iterator[Thumbnail]:
    """Yields the thumbnails of pictures, given as run folder and file, in order; several threads make them."""
    waiting = iter(pictures)
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        while part := list(islice(waiting, 16 * workers)):  # bounds the memory
            yield from pool.map(_thumbnail, part)


def full_picture(run: Path, file: str) -> str:
    """Returns a picture of a run as a data URI, unchanged; empty if it is not readable as a PNG file."""
    with suppress(OSError):
        if (data := read_image(run, file)).startswith(_PNG):
            return _uri(data, "png")
    return ""


def link(target: Path, page: Path) -> str:
    """Returns the address of a file as seen from a page; an absolute one where no relative path leads to it."""
    target, start = Path(os.path.realpath(target)), os.path.realpath(page.parent)
    try:
        return quote(Path(os.path.relpath(target, start)).as_posix())
    except ValueError:  # another drive on Windows
        return target.as_uri()


def _thumbnail(picture: tuple[Path, str]) -> Thumbnail:
    try:
        image = Image.fromarray(pixels_of(*picture))
    except UserError as error:
        return Thumbnail(b"", "", 0, 0, str(error))
    width, height = image.size
    lossless, webp = max(image.size) <= _TINY, features.check("webp")
    image.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    suffix, buffer = "webp" if webp else "png" if lossless else "jpeg", io.BytesIO()
    if suffix == "webp" and lossless:
        image.save(buffer, suffix, lossless=True, method=0)  # a twentieth of the time of the default, for a fifth more
    else:
        image.save(buffer, suffix, quality=_QUALITY)
    return Thumbnail(buffer.getvalue(), suffix, width, height, "")


def _uri(data: bytes, suffix: str) -> str:
    return f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"
