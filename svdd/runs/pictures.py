"""Pictures on disk: those of a run folder, or all of any folder, with what is known about each."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svdd import UserError
from svdd.runs.tar import read_image

__all__ = ["Picture", "find_pictures", "pixels_of", "read_pictures", "read_rows"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Picture:
    """A picture on disk.

    Args:
        folder: The folder that was asked for.
        file: The file in it, or a member of one of its tar shards.
        prompt_index: The index of its prompt; where prompts are unknown, its own position.
        prompt: The prompt's text; empty where it is unknown.
    """

    folder: Path
    file: str
    prompt_index: int
    prompt: str = ""

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / self.file


def find_pictures(folder: Path) -> list[Picture]:
    """Returns the pictures of a run, in the order of its rows, or those of any folder, by name, with its subfolders.

    Numbers in names count as numbers: 2.png comes before 10.png.

    Raises:
        UserError: If there are none.
    """
    if (folder / "results.jsonl").is_file():
        found = [Picture(folder, row["file"], row["prompt_index"], row["prompt"]) for row in read_rows(folder)]
    elif folder.is_dir():
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
        files = sorted((str(path.relative_to(folder)) for path in paths), key=_natural)
        found = [Picture(folder, file, k) for k, file in enumerate(files)]
    else:
        raise UserError(f"{folder} is no folder; expected a run folder or one of pictures")
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def _natural(name: str) -> tuple[list[str | int], str]:
    """Returns the texts and numbers that a name alternates between, text first; equal ones are in order of the name."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))], name


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a finished run.

    Raises:
        UserError: If the folder is no finished run.
    """
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no results.jsonl; give the --output folder of a finished `svdd predict`")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is no JSON; run the same `svdd predict` again") from error


def read_pictures(pictures: Sequence[Picture], count: int) -> Iterator[tuple[list[Picture], Tensor]]:
    """Yields pictures of equal size, at most `count` at once: float32 [n, 3, h, w] in [0, 1].

    Raises:
        UserError: If a file is no picture.
    """
    batch: list[Picture] = []
    pixels: list[Tensor] = []
    for picture in pictures:
        tensor = torch.from_numpy(pixels_of(picture.folder, picture.file)).permute(2, 0, 1).float() / 255
        if batch and (len(batch) == count or tensor.shape != pixels[0].shape):
            yield batch, torch.stack(pixels)
            batch, pixels = [], []
        batch.append(picture)
        pixels.append(tensor)
    if batch:
        yield batch, torch.stack(pixels)


def pixels_of(folder: Path, file: str) -> np.ndarray:
    """Returns a picture's pixels, uint8 [h, w, 3].

    Args:
        folder: A run folder, or any other.
        file: The file in it, or a member of a tar shard, as a row's `file` says.

    Raises:
        UserError: If it is no picture.
    """
    try:
        with Image.open(io.BytesIO(read_image(folder, file))) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / file} cannot be read as a picture: {error}") from error
