"""Pictures read from a run folder or any other folder, with their prompts where these are known."""

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svdd import UserError
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image

__all__ = ["Picture", "find_pictures", "pixels_of", "read_pictures"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Picture:
    """A picture on disk."""

    folder: Path
    file: str  # path in the folder; a member of a tar shard is `images/00000-000000.tar/000012-00.png`
    prompt_index: int  # without prompts, its own position
    prompt: str = ""  # empty if it is unknown
    image: int = 0  # equal for all particles of an image
    weight: float = 1.0  # of the particle among those of its image


def find_pictures(folder: Path) -> list[Picture]:
    """Returns the pictures of a run in the order of its rows, or those of any folder and its subfolders by name.

    Numbers in names count as numbers: 2.png comes before 10.png. Raises a UserError if there are none.
    """
    run = RunFolder(folder)
    if os.path.isfile(run.results):
        found = [
            Picture(
                folder,
                row["file"],
                row["prompt_index"],
                row["prompt"],
                row["image_index"] - row.get("particle", 0),
                row.get("particle_weight", 1.0),
            )
            for row in run.rows(checked=True)
        ]
    elif os.path.isdir(folder):
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
        files = sorted((str(path.relative_to(folder)) for path in paths), key=_natural)
        found = [Picture(folder, file, k, image=k) for k, file in enumerate(files)]
    else:
        raise UserError(f"{folder} is no folder; expected a run folder or a folder of pictures")
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def _natural(name: str) -> tuple[list[str | int], str]:
    """Returns the alternating texts and numbers of a name, text first; then the name, for equal ones."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))], name


def read_pictures(pictures: Sequence[Picture], count: int) -> Iterator[tuple[list[Picture], Tensor]]:
    """Yields pictures of equal size, at most `count` at once: float32 [n, 3, h, w] in [0, 1]; see `pixels_of`."""
    read = ((picture, pixels_of(picture.folder, picture.file)) for picture in pictures)
    for _, same in groupby(read, lambda pair: pair[1].shape):
        while batch := list(islice(same, count)):
            pixels = torch.from_numpy(np.stack([array for _, array in batch]))
            yield [picture for picture, _ in batch], pixels.permute(0, 3, 1, 2).contiguous().float() / 255


def pixels_of(folder: Path, file: str) -> np.ndarray:
    """Returns the pixels of a file as in `Picture`, uint8 [h, w, 3]; raises a UserError if it is no picture."""
    try:
        with Image.open(io.BytesIO(read_image(folder, file))) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / file} cannot be read as a picture: {error}") from error
