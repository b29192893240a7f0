"""`svdd compare`: images and rewards of several runs with the same prompts, in one picture."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from svdd import UserError
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image
from svdd.runs.rows import ResultRow

__all__ = ["compare", "draw"]

_MARGIN, _LINE, _LEAST_TILE, _LEAST_CELL = 12, 18, 128, 190
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


def compare(words: Sequence[str]) -> None:
    """Runs `svdd compare` with the command line after its name."""
    parser = argparse.ArgumentParser(prog="svdd compare", description="Runs of the same prompts in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one row each")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="PNG file (default: compare.png)")
    parser.add_argument("--limit", type=int, default=8, help="at most this many images (default: 8)")
    options = parser.parse_args(words)
    print(draw(options.runs, options.output, max(1, options.limit)))
    print(f"wrote {options.output}")


def draw(runs: Sequence[Path], output: Path, limit: int = 8) -> str:
    """Draws one row per run and one column per image, and returns a table of mean rewards.

    Args:
        runs: Folders of finished runs, from top to bottom.
        output: The PNG file to write.
        limit: At most this many images of each run.

    Raises:
        UserError: If a folder holds no finished run, or the runs share no image.
    """
    tables = [{(row["prompt_index"], row["image_index"]): row for row in RunFolder(run).rows()} for run in runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise UserError(f"the runs {', '.join(map(str, runs))} share no prompt; compare runs of the same prompts")
    rows = [[table[key] for key in shared] for table in tables]
    rewards = list(rows[0][0]["rewards"])
    first = _open(runs[0], rows[0][0])
    zoom = max(1, -(-_LEAST_TILE // first.width))
    width, height = first.width * zoom, first.height * zoom
    across, down = max(width, _LEAST_CELL) + _MARGIN, height + _LINE * (len(rewards) + 1) + _MARGIN
    size = (across * len(shared[:limit]) + _MARGIN, down * len(runs) + 2 * _LINE + _MARGIN)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column in range(len(shared[:limit])):
        x = _MARGIN + column * across
        pen.text((x, _MARGIN), _fit(pen, rows[0][column]["prompt"], font, across - _MARGIN), _INK, font)
        for line, run in enumerate(runs):
            row, y = rows[line][column], 2 * _LINE + line * down
            canvas.paste(_open(run, row).convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y))
            pen.text((x, y + height + 2), run.name, _INK, font)
            for k, reward in enumerate(rewards, 1):
                words = f"{reward} {row['rewards'].get(reward, float('nan')):.3f}"
                pen.text((x, y + height + 2 + _LINE * k), words, _FAINT, font)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(output)
    lines = [f"means over {len(shared)} images"]
    lines.append("".join(f"{name:>24}" for name in ("run", *rewards, "denoiser rows/image")))
    for run, chosen in zip(runs, rows, strict=True):
        means = "".join(f"{fmean(row['rewards'][reward] for row in chosen):>24.4f}" for reward in rewards)
        lines.append(f"{run.name:>24}{means}{fmean(row['ledger']['denoiser_rows'] for row in chosen):>24.0f}")
    return "\n".join(lines)


def _open(run: Path, row: ResultRow) -> Image.Image:
    return Image.open(io.BytesIO(read_image(run, row["file"])))


def _fit(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    while pen.textlength(text, font) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text
