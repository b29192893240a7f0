"""`svdd compare`: images and rewards of several runs with the same prompts, in one picture."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from svdd import UserError
from svdd.runs.folder import RunFolder
from svdd.runs.images import read_image
from svdd.runs.rows import ResultRow

__all__ = ["compare", "draw"]

_MARGIN, _LINE, _LEAST_TILE = 12, 18, 128
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


def compare(words: Sequence[str]) -> None:
    """Runs `svdd compare`.

    Args:
        words: The command line after `svdd compare`.
    """
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
    rows = {run: {(row["prompt_index"], row["image_index"]): row for row in RunFolder(run).rows()} for run in runs}
    shared = [key for key in rows[runs[0]] if all(key in table for table in rows.values())]
    if not shared:
        raise UserError(f"the runs {', '.join(map(str, runs))} share no prompt; compare runs of the same prompts")
    keys = shared[:limit]
    first = _open(runs[0], rows[runs[0]][keys[0]])
    zoom = max(1, -(-_LEAST_TILE // first.width))
    width, height = first.width * zoom, first.height * zoom
    rewards = list(rows[runs[0]][keys[0]]["rewards"])
    cell = (max(width, 190) + _MARGIN, height + _LINE * (len(rewards) + 1) + _MARGIN)
    canvas = Image.new("RGB", (cell[0] * len(keys) + _MARGIN, (cell[1]) * len(runs) + 2 * _LINE + _MARGIN), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, key in enumerate(keys):
        text = _fit(pen, rows[runs[0]][key]["prompt"], font, cell[0] - _MARGIN)
        pen.text((_MARGIN + column * cell[0], _MARGIN), text, _INK, font)
        for line, run in enumerate(runs):
            x, y = _MARGIN + column * cell[0], 2 * _LINE + line * cell[1]
            row = rows[run][key]
            tile = _open(run, row).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(tile, (x, y))
            pen.text((x, y + height + 2), run.name, _INK, font)
            for k, reward in enumerate(rewards):
                words = f"{reward} {row['rewards'].get(reward, float('nan')):.3f}"
                pen.text((x, y + height + 2 + _LINE * (k + 1)), words, _FAINT, font)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(output)
    return _table(runs, rows, shared, rewards)


def _open(run: Path, row: ResultRow) -> Image.Image:
    return Image.open(io.BytesIO(read_image(run, row["file"])))


def _fit(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    while pen.textlength(text, font) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text


def _table(
    runs: Sequence[Path], rows: dict[Path, dict], keys: Sequence[tuple[int, int]], rewards: Sequence[str]
) -> str:
    lines = [
        f"means over {len(keys)} images",
        "".join(f"{name:>24}" for name in ("run", *rewards, "denoiser rows/image")),
    ]
    for run in runs:
        chosen = [rows[run][key] for key in keys]
        means = [sum(row["rewards"][reward] for row in chosen) / len(chosen) for reward in rewards]
        spent = sum(row["ledger"]["denoiser_rows"] for row in chosen) / len(chosen)
        lines.append(f"{run.name:>24}" + "".join(f"{mean:>24.4f}" for mean in means) + f"{spent:>24.0f}")
    return "\n".join(lines)
