"""Images of several runs in one picture: a row for each run, a column for each image, scores below."""

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from svdd import UserError, printable
from svdd.evaluation.images import RunImage
from svdd.runs.files import regular_only
from svdd.runs.pictures import pixels_of

__all__ = ["contact_sheet", "is_contact_sheet"]

_SOFTWARE = "svdd compare"  # the text chunk of that name marks its own files
_COLUMNS = 8  # more images go to further rows
_MARGIN, _LINE, _LEAST_TILE, _LEAST_CELL = 12, 18, 128, 190
_INK, _FAINT = (20, 20, 20), (110, 110, 110)
_MOST_PIXELS, _MOST_LETTERS = 2**27, 200


def contact_sheet(rows: Mapping[str, tuple[Path, Sequence[RunImage]]], rewards: Sequence[str], same: bool) -> bytes:
    """Returns a PNG file; after eight columns it continues below.

    Args:
        rows: The folder and the images of each run, by its name; as many images of each, the k-th of all in a column.
        rewards: The scores to show below each image; a run without one has a dash.
        same: Whether the images of a column have the same prompt, which then stands above it, and else at each image.
    """
    count = len(next(iter(rows.values()))[1])
    folder, images = next(iter(rows.values()))
    first = pixels_of(folder, images[0].file)
    zoom = max(1, -(-_LEAST_TILE // first.shape[1]))
    width, height = first.shape[1] * zoom, first.shape[0] * zoom
    across, down = max(width, _LEAST_CELL) + _MARGIN, height + _LINE * (len(rewards) + 1 + (not same)) + _MARGIN
    block = down * len(rows) + 2 * _LINE * same
    size = (across * min(count, _COLUMNS) + _MARGIN, block * -(-count // _COLUMNS) + 2 * _MARGIN)
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(f"the picture would have {size[0]} x {size[1]} pixels; choose a smaller --limit, or fewer runs")
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(canvas)

    def write(x: int, y: int, text: str, ink: tuple[int, int, int]) -> None:
        text = " ".join(printable(text).split())[:_MOST_LETTERS]
        while pen.textlength(text, font) > across - _MARGIN and len(text) > 4:
            text = text[:-4] + "..."
        pen.text((x, y), text, ink, font)

    for k in range(count):
        x, top = _MARGIN + k % _COLUMNS * across, _MARGIN + k // _COLUMNS * block
        if same:
            write(x, top, images[k].prompt, _INK)
        for line, (name, (run, shown)) in enumerate(rows.items()):
            image, y = shown[k], top + 2 * _LINE * same + line * down
            picture = Image.fromarray(pixels_of(run, image.file))
            canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
            scores = [(reward, image.rewards.get(reward)) for reward in rewards]
            below = [f"{reward} {'-' if score is None else f'{score:.3f}'}" for reward, score in scores]
            inked = [(name, _INK)] + [(image.prompt, _INK)] * (not same) + [(text, _FAINT) for text in below]
            for number, (text, ink) in enumerate(inked):
                write(x, y + height + 2 + _LINE * number, text, ink)
    buffer = io.BytesIO()
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", _SOFTWARE)
    canvas.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def is_contact_sheet(path: Path) -> bool:
    """Whether a file was written by `svdd compare`."""
    damages = OSError, ValueError, SyntaxError, Image.DecompressionBombError
    with suppress(*damages), warnings.catch_warnings(), open(path, "rb", opener=regular_only) as file:
        warnings.simplefilter("ignore")  # about a large picture
        return Image.open(file, formats=["PNG"]).info.get("Software") == _SOFTWARE
    return False
