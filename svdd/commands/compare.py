"""`svdd compare`: images and rewards of several runs with the same prompts, in one picture."""

import argparse
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from svdd import UserError, printable, say
from svdd.evaluation.images import RunImage, read_images
from svdd.runs.config import read_config
from svdd.runs.files import regular_only, write_atomically
from svdd.runs.pictures import pixels_of

__all__ = ["compare"]

_MARGIN, _LINE, _LEAST_TILE, _LEAST_CELL = 12, 18, 128, 190
_INK, _FAINT = (20, 20, 20), (110, 110, 110)
_SOFTWARE = "svdd compare"  # the text chunk of that name marks its own files
_MOST_PIXELS, _MOST_LETTERS = 2**27, 200


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `svdd compare --help` lists all settings")


def compare(words: list[str]) -> None:
    """Runs `svdd compare` with the command line after its name: a row per run, a column per image, a table of means.

    Raises:
        UserError: If a folder holds no finished run or a damaged one, the runs share no image, or the output cannot be
            written.
    """
    parser = _Parser(prog="svdd compare", description="Runs of the same prompts in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one row each")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="PNG file (default: compare.png)")
    parser.add_argument("--limit", type=int, default=8, help="at most this many images (default: 8)")
    options = parser.parse_args(words)
    output: Path = options.output
    if options.limit < 1:
        raise UserError(f"--limit must be >= 1, got {options.limit}")
    if output.suffix.lower() != ".png" or os.path.isdir(output):
        raise UserError(f"--output must be a file whose name ends in .png, got {output}")
    _check_output(output)
    tables = [read_images(run) for run in options.runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise UserError(
            f"the runs {', '.join(map(str, options.runs))} share no prompt; compare runs of the same prompts"
        )
    rows = [(run, [table[key] for key in shared]) for run, table in zip(options.runs, tables, strict=True)]
    rewards = list(dict.fromkeys(name for _, images in rows for image in images for name in image.rewards))
    if os.path.abspath(output) in {os.path.abspath(run / image.file) for run, images in rows for image in images}:
        raise UserError(f"--output {output} is an image of a run; choose another file")
    canvas = _draw([(run, images[: options.limit]) for run, images in rows], rewards)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, canvas)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {output}: {reason}; choose another --output") from error
    say(f"means over {len(shared)} images")
    say(
        "".join(
            f"{name:>24}" for name in ("run", *map(_one_line, rewards), "denoiser rows/image", "network rows/image")
        )
    )
    for run, images in rows:
        means = "".join(_mean([image.rewards.get(reward) for image in images], ".4f") for reward in rewards)
        counts = ([image.denoiser_rows for image in images], [image.network_rows for image in images])
        say(f"{_one_line(run.name):>24}{means}{''.join(_mean(each, '.0f') for each in counts)}")
    say(f"wrote {output}")


def _check_output(output: Path) -> None:
    """Refuses a file in an output folder of svdd, and one that exists and that `svdd compare` has not written."""
    for folder in (Path(os.path.realpath(output.parent)), *Path(os.path.realpath(output.parent)).parents):
        with suppress(OSError):
            if read_config(folder) is not None:
                raise UserError(f"--output {output} lies in the output folder {folder}; choose another --output")
    if os.path.lexists(output):
        software = None
        damages = OSError, ValueError, SyntaxError, Image.DecompressionBombError
        with suppress(*damages), warnings.catch_warnings(), open(output, "rb", opener=regular_only) as file:
            warnings.simplefilter("ignore")  # about a large picture
            software = Image.open(file, formats=["PNG"]).info.get("Software")
        if software != _SOFTWARE:
            raise UserError(f"{output} exists and was not written by `svdd compare`; choose another --output")


def _draw(rows: list[tuple[Path, list[RunImage]]], rewards: list[str]) -> bytes:
    """Returns a PNG file with a row for each run and a column for each image."""
    columns = len(rows[0][1])
    first = pixels_of(rows[0][0], rows[0][1][0].file)
    zoom = max(1, -(-_LEAST_TILE // first.shape[1]))
    width, height = first.shape[1] * zoom, first.shape[0] * zoom
    across, down = max(width, _LEAST_CELL) + _MARGIN, height + _LINE * (len(rewards) + 1) + _MARGIN
    size = (across * columns + _MARGIN, down * len(rows) + 2 * _LINE + _MARGIN)
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(f"the picture would have {size[0]} x {size[1]} pixels; choose a smaller --limit, or fewer runs")
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(canvas)
    for column in range(columns):
        x, prompt = _MARGIN + column * across, _one_line(rows[0][1][column].prompt)[:_MOST_LETTERS]
        while pen.textlength(prompt, font) > across - _MARGIN and len(prompt) > 4:
            prompt = prompt[:-4] + "..."
        pen.text((x, _MARGIN), prompt, _INK, font)
        for line, (run, images) in enumerate(rows):
            image, y = images[column], 2 * _LINE + line * down
            picture = Image.fromarray(pixels_of(run, image.file))
            canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
            pen.text((x, y + height + 2), _one_line(run.name), _INK, font)
            for k, reward in enumerate(rewards, 1):
                score = image.rewards.get(reward)
                label = f"{_one_line(reward)} {'-' if score is None else f'{score:.3f}'}"
                pen.text((x, y + height + 2 + _LINE * k), label, _FAINT, font)
    buffer = io.BytesIO()
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", _SOFTWARE)
    canvas.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def _mean(numbers: list[float | None], form: str) -> str:
    """Returns the mean as a cell of the table, "-" if a number is missing."""
    known = [number for number in numbers if number is not None]
    return f"{format(fmean(known), form) if len(known) == len(numbers) else '-':>24}"


def _one_line(text: str) -> str:
    """Returns text on one line, with control characters escaped."""
    return " ".join(printable(text).split())
