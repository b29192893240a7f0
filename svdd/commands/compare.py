"""`svdd compare`: images and rewards of several runs with the same prompts, in one picture."""

import argparse
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from PIL import Image, ImageDraw, ImageFont

from svdd import UserError
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import pixels_of

__all__ = ["compare"]

_MARGIN, _LINE, _LEAST_TILE, _LEAST_CELL = 12, 18, 128, 190
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `svdd compare --help` lists all settings")


def compare(words: list[str]) -> None:
    """Runs `svdd compare` with the command line after its name: a row per run, a column per image, a table of means.

    Raises:
        UserError: If a folder holds no finished run, or the runs share no image.
    """
    parser = _Parser(prog="svdd compare", description="Runs of the same prompts in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one row each")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="PNG file (default: compare.png)")
    parser.add_argument("--limit", type=int, default=8, help="at most this many images (default: 8)")
    options = parser.parse_args(words)
    tables = [{(row["prompt_index"], row["image_index"]): row for row in RunFolder(run).rows()} for run in options.runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise UserError(
            f"the runs {', '.join(map(str, options.runs))} share no prompt; compare runs of the same prompts"
        )
    rows = [(run, [table[key] for key in shared]) for run, table in zip(options.runs, tables, strict=True)]
    rewards, shown = list(tables[0][shared[0]]["rewards"]), shared[: max(1, options.limit)]
    pictures = [[Image.fromarray(pixels_of(run, row["file"])) for row in line[: len(shown)]] for run, line in rows]
    zoom = max(1, -(-_LEAST_TILE // pictures[0][0].width))
    width, height = pictures[0][0].width * zoom, pictures[0][0].height * zoom
    across, down = max(width, _LEAST_CELL) + _MARGIN, height + _LINE * (len(rewards) + 1) + _MARGIN
    size = (across * len(shown) + _MARGIN, down * len(rows) + 2 * _LINE + _MARGIN)
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(canvas)
    for column, key in enumerate(shown):
        x, prompt = _MARGIN + column * across, tables[0][key]["prompt"]
        while pen.textlength(prompt, font) > across - _MARGIN and len(prompt) > 4:
            prompt = prompt[:-4] + "..."
        pen.text((x, _MARGIN), prompt, _INK, font)
        for line, (run, chosen) in enumerate(rows):
            row, y = chosen[column], 2 * _LINE + line * down
            canvas.paste(pictures[line][column].resize((width, height), Image.Resampling.BICUBIC), (x, y))
            pen.text((x, y + height + 2), run.name, _INK, font)
            for k, reward in enumerate(rewards, 1):
                label = f"{reward} {row['rewards'].get(reward, float('nan')):.3f}"
                pen.text((x, y + height + 2 + _LINE * k), label, _FAINT, font)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(options.output)
    print(f"means over {len(shared)} images")
    print("".join(f"{name:>24}" for name in ("run", *rewards, "denoiser rows/image")))
    for run, chosen in rows:
        means = "".join(f"{fmean(row['rewards'][reward] for row in chosen):>24.4f}" for reward in rewards)
        print(f"{run.name:>24}{means}{fmean(row['ledger']['denoiser_rows'] for row in chosen):>24.0f}")
    print(f"wrote {options.output}")
