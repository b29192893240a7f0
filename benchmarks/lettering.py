"""Words drawn letter by letter, so that the share of readable letters is known."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

__all__ = ["DAMAGES", "as_tensor", "draw_word", "offsets"]

DAMAGES = ("removed", "covered", "blurred", "replaced")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def offsets(word: str, size: int) -> list[float]:
    """Returns the left edge of each letter and the right edge of the last in PIL's own font, in pixels."""
    font = ImageFont.load_default(size)
    return [font.getlength(word[:k]) for k in range(len(word) + 1)]


def draw_word(
    word: str,
    size: int,
    damaged: Collection[int] = (),
    damage: str = "removed",
    shape: tuple[int, int] | None = None,
    ink: Sequence[int] = (20, 20, 20),
    paper: Sequence[int] = (250, 250, 250),
) -> Image.Image:
    """Returns a picture of a word in the middle, of which the letters at the places `damaged` cannot be read.

    Args:
        word: The word.
        size: Font size in pixels.
        damaged: Places in the word.
        damage: `removed` leaves the letter out, `covered` draws a box of ink over it, `blurred` blurs it beyond
            recognition, `replaced` draws another letter.
        shape: Width and height; by default those of the word and a margin.
        ink: Colour of the letters.
        paper: Colour of the background.
    """
    font, edges = ImageFont.load_default(size), offsets(word, size)
    width, height = shape or (round(edges[-1] + 2 * size), 3 * size)
    picture = Image.new("RGB", (width, height), tuple(paper))
    pen = ImageDraw.Draw(picture)
    left, middle = (width - edges[-1]) / 2, height / 2
    for k, letter in enumerate(word):
        if k in damaged and damage in ("removed", "covered"):
            continue
        if k in damaged and damage == "replaced":
            letter = _LETTERS[(_LETTERS.index(letter.upper()) + 7) % len(_LETTERS)]
        pen.text((left + edges[k], middle), letter, fill=tuple(ink), font=font, anchor="lm")
    for k in damaged:
        box = [
            round(left + edges[k]),
            round(middle - 0.5 * size),
            round(left + edges[k + 1]),
            round(middle + 0.5 * size),
        ]
        if damage == "covered":
            pen.rectangle(box, fill=tuple(ink))
        elif damage == "blurred":
            picture.paste(picture.filter(ImageFilter.GaussianBlur(0.5 * size)).crop(tuple(box)), tuple(box[:2]))
    return picture


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns pictures of one size as float [n, 3, h, w] in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
