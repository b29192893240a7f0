"""Pictures read from a run folder or any other folder, with their prompts where these are known."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from svdd import UserError, first_line
from svdd.assets.pictures import decode
from svdd.runs.bounds import MAX_PIXELS_AT_ONCE
from svdd.runs.files import natural
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Picture", "find_pictures", "pixels_of", "read_pictures"]

_SUFFIXES = {".apng", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_HIDDEN = re.compile(r"\.|(__MACOSX|@eaDir)$")  # how the names of files and folders begin that no viewer shows


@dataclass(frozen=True)
class Picture:
    """A picture on disk."""

    folder: Path
    file: str  # path in the folder; a member of a tar shard is `images/00000-000000.tar/000012-00.png`
    prompt_index: int  # without prompts, its own position
    prompt: str = ""  # empty if it is unknown
    image: int = 0  # equal for all particles of an image
    weight: float = 1.0  # of the particle among those of its image
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # columns of the source that were asked for


def find_pictures(folder: Path, columns: Collection[str] = ()) -> list[Picture]:
    """Returns the pictures of a run in the order of its rows, or those of any folder and its subfolders by name.

    Those of a run have these columns of its prompts. Numbers in names count as numbers: 2.png comes before 10.png.
    Hidden files and folders are left out.

    Raises:
        UserError: If there are none, or a picture's name is that of a FIFO, a device or a broken link.
    """
    run = RunFolder(folder)
    if run.has_rows():
        found = [
            Picture(
                folder,
                row["file"],
                row["prompt_index"],
                row["prompt"],
                row["image_index"] - row.get("particle", 0),
                row.get("particle_weight", 1.0),
                {name: cast(Any, row)[name] for name in columns if name in row},
            )
            for row in run.rows(checked=True)
        ]
    elif os.path.isdir(folder):
        files = sorted((str(path.relative_to(folder)) for path in _files(folder)), key=natural)
        found = [Picture(folder, file, k, image=k) for k, file in enumerate(files)]
    else:
        raise UserError(f"{folder} is no folder; expected a run folder or a folder of pictures")
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _HIDDEN.match(name)]
        for path in (Path(place, name) for name in names if not _HIDDEN.match(name)):
            if path.suffix.lower() in _SUFFIXES:
                if not path.is_file():
                    raise UserError(f"{path} is no regular file but a FIFO, a device or a broken link; remove it")
                yield path


def read_pictures(pictures: Sequence[Picture], count: int) -> "Iterator[tuple[list[Picture], Tensor]]":
    """Yields pictures of equal size, at most `count` at once: float32 [n, 3, h, w] in [0, 1]; see `pixels_of`."""
    import torch  # here, because commands that only show pictures need none of it

    read = ((picture, pixels_of(picture.folder, picture.file)) for picture in pictures)
    for (height, width, _), same in groupby(read, lambda pair: pair[1].shape):
        most = max(1, min(count, MAX_PIXELS_AT_ONCE // (height * width)))
        while batch := list(islice(same, most)):
            pixels = torch.from_numpy(np.stack([array for _, array in batch]))
            yield [picture for picture, _ in batch], pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def pixels_of(folder: Path, file: str) -> np.ndarray:
    """Returns the pixels of a file as in `Picture`, uint8 [h, w, 3]: see `svdd.assets.pictures.decode`.

    Raises:
        UserError: If it is no picture, damaged or too large.
    """
    try:
        content = read_image(folder, file)
    except MemoryError:
        raise
    except Exception as error:  # damaged shards raise errors of any kind
        raise UserError(f"{folder / file} cannot be read as a picture: {first_line(error)}") from error
    return decode(content, str(folder / file))
