"""`svdd compare`: a table of runs with differences to one of them, and a picture of their images."""

import argparse
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from svdd import UserError, say
from svdd.commands.options import Options
from svdd.evaluation.comparison import comparison_table, differing_settings, distinct_names
from svdd.evaluation.pairing import incomparable, mismatches, pair, require_pairs, same_prompts
from svdd.evaluation.rendering import render
from svdd.evaluation.sides import Positions, Side, read_side
from svdd.runs.config import read_config
from svdd.runs.files import write_atomically

__all__ = ["compare", "compare_parser"]

_DESCRIPTION = """\
Compares runs: what differs between their settings, then a row for each run with the mean of every reward, its standard
error over prompts, and the difference to the baseline. Images are paired by prompt, image index and random seed; runs
of other prompts, seeds, steps or models are refused, unless --unpaired. A run that is still being drawn is compared on
the images that it has."""
_ADVICE = "draw both with the same settings, or compare without pairs by --unpaired true"
_SUBSET = "draw both from the same prompts, or compare only the images that all runs have by --shared true"
_HELP = {
    "baseline": "the run with which the others are compared (default: the first RUN)",
    "unpaired": "compare all images without pairs, also of other prompts, seeds, steps or models",
    "shared": "leave out images that only some of the runs have",
    "format": "form of the table; all but `text` leave everything else to stderr (default: text)",
    "output": "also draw a picture: a PNG file with one row per run and one column per image, wrapped after 8",
    "limit": "at most this many images in the picture (default: 8)",
}


def compare_parser() -> Options:
    """Returns the parser of `svdd compare`."""
    parser = Options("svdd compare", _DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help=_HELP["baseline"])
    for name in ("unpaired", "shared"):
        parser.add_flag(f"--{name}", _HELP[name])
    parser.add_argument("--format", choices=("text", "md", "csv", "tex"), default="text", help=_HELP["format"])
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help=_HELP["output"])
    parser.add_argument("--limit", type=int, default=8, help=_HELP["limit"])
    return parser


def compare(words: list[str]) -> None:
    """Runs `svdd compare` with the command line after its name.

    Raises:
        UserError: If a folder holds no run or a damaged one, runs cannot be paired, or the output cannot be written.
    """
    parser = compare_parser()
    options = parser.parse_args(parser.spelled_out(words))
    output: Path | None = options.output
    if options.limit < 1:
        raise UserError(f"--limit must be >= 1, got {options.limit}")
    if output is not None:
        _check_output(output)
    runs, base = _runs(options)
    sides = [read_side(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]
    others = [side for side in sides if side is not sides[base]]
    quiet = options.format != "text"
    headers, rows = differing_settings(sides)
    if rows:
        say(render(headers, rows, "text"), error=quiet)
    positions: list[Positions] | None = None
    if options.unpaired:
        notes = [found for other in others for found in mismatches(sides[base], other)]
    else:
        notes = _require(sides[base], others, options.shared)
        positions = pair(sides)
        if not len(positions[0]):
            raise UserError(f"the runs {', '.join(side.name for side in sides)} share no image; {_ADVICE}")
    for other in others:
        for name in sorted(incomparable(sides[base], other)):
            what = f"{name} was measured with other weights or settings in {other.name} than in {sides[base].name}"
            notes.append(f"{what}: no difference")
    headers, rows = comparison_table(sides, base, positions, options.format)
    say(_heading(sides, base, positions, notes), error=quiet)
    say(render(headers, rows, options.format).rstrip("\n"))
    if output is not None:
        _draw(output, options.limit, runs, sides, positions)
        say(f"wrote {output}", error=quiet)


def _runs(options: argparse.Namespace) -> tuple[list[Path], int]:
    """Returns the distinct runs and the position of the baseline, which joins them if it is none of them."""
    runs: list[Path] = options.runs
    places = [os.path.realpath(run) for run in runs]
    if len({*places}) < len(places):
        twice = next(run for run, place in zip(runs, places, strict=True) if places.count(place) > 1)
        raise UserError(f"{twice} is given twice; give each run once")
    if options.baseline is None:
        return runs, 0
    if (place := os.path.realpath(options.baseline)) not in places:
        return [options.baseline, *runs], 0
    return runs, places.index(place)


def _require(base: Side, others: list[Side], shared: bool) -> list[str]:
    """Returns why some images are left out; a UserError if the runs cannot be paired."""
    if not shared:
        return require_pairs([base, *others], _ADVICE, _SUBSET)
    for other in others:
        if found := mismatches(base, other):
            raise UserError(f"{'; '.join(found)}; {_ADVICE}")
    return []


def _heading(sides: list[Side], base: int, positions: list[Positions] | None, notes: list[str]) -> str:
    """Returns what the numbers of the table are."""
    lines, compared = [], len(sides) - 1
    if positions is None:
        lines.append(f"means over all images of each run{''.join(f'; {note}' for note in notes)}")
        others = [side for k, side in enumerate(sides) if k != base]
        same = {same_prompts(side.texts, sides[base].texts) for side in others}
        ways = {True: "means of each prompt, by Student's t over prompts", False: "means of all, by Welch's t"}
        how = f"no pairs of images; {'; or, of other prompts, '.join(ways[each] for each in sorted(same)[::-1])}"
    else:
        texts = [np.unique(side.texts[at]) for side, at in zip(sides, positions, strict=True)]
        everything = len(np.unique(np.concatenate([side.texts for side in sides])))
        of = f" of {everything}" if everything > len(texts[0]) else ""
        why = "".join(f"; {note}" for note in notes)
        lines.append(f"means over {len(positions[0])} images of {len(texts[0])}{of} prompts{why}")
        how = "paired by prompt, image and seed, by Student's t over prompts"
    lines.append("± standard error over prompts; denoiser rows, network rows and seconds per image")
    if compared:
        level = f"95 % intervals together for {compared} comparisons (Bonferroni)" if compared > 1 else "95 % intervals"
        lines.append(f"differences to {sides[base].name}: {how}; {level}")
    return "\n".join(lines)


def _check_output(output: Path) -> None:
    """Refuses a file in an output folder of svdd, and one that exists and that `svdd compare` has not written."""
    from svdd.evaluation.contact_sheet import is_contact_sheet  # needs torch, which takes seconds

    if output.suffix.lower() != ".png" or os.path.isdir(output):
        raise UserError(f"--output must be a file whose name ends in .png, got {output}")
    for folder in (Path(os.path.realpath(output.parent)), *Path(os.path.realpath(output.parent)).parents):
        with suppress(OSError):
            if read_config(folder) is not None:
                raise UserError(f"--output {output} lies in the output folder {folder}; choose another --output")
    if os.path.lexists(output) and not is_contact_sheet(output):
        raise UserError(f"{output} exists and was not written by `svdd compare`; choose another --output")


def _draw(output: Path, limit: int, runs: list[Path], sides: list[Side], positions: list[Positions] | None) -> None:
    """Writes the picture: of paired runs the first pairs, of others the first images of each."""
    from svdd.evaluation.contact_sheet import contact_sheet

    count = min([limit, *(len(side.keys) for side in sides)])
    places = [np.arange(count)] * len(sides) if positions is None else [each[:limit] for each in positions]
    images = [[image for _, image in side.shown(at)] for side, at in zip(sides, places, strict=True)]
    same = all(len({image.prompt for image in column}) == 1 for column in zip(*images, strict=True))
    rows = {side.name: (run, shown) for side, run, shown in zip(sides, runs, images, strict=True)}
    if os.path.abspath(output) in {
        os.path.abspath(run / image.file) for run, shown in rows.values() for image in shown
    }:
        raise UserError(f"--output {output} is an image of a run; choose another file")
    rewards = list(dict.fromkeys(name for side in sides for name in side.rewards))
    picture = contact_sheet(rows, rewards, same)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, picture)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {output}: {reason}; choose another --output") from error
