"""Writes a report: its template, style, script and data in one HTML file."""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from svdd import UserError, __version__
from svdd.evaluation.comparison import differing_settings
from svdd.evaluation.pairing import mismatches
from svdd.evaluation.reports.data import ReportImage, ReportRun, differences
from svdd.evaluation.reports.thumbnails import Thumbnail, full_picture, link, read_thumbnails
from svdd.runs.files import regular_only, replacing

__all__ = ["Written", "check_page", "write_page"]

_EMBEDDED = 20 * 2**20  # bytes of thumbnails in the page; the others become files
_SCRIPTS = ("charts.js", "page.js", "tables.js", "detail.js")
_MARK = '<meta name="generator" content="svdd report">'  # in the first lines of every page
_OWN_FILE = re.compile(r"\d{6,}\.(webp|jpeg|png)")
_COSTS = {  # entry of the ledger: its label
    "denoiser_rows": "Denoiser rows per picture",
    "network_rows": "Network rows per picture",
    "gradient_rows": "Gradient rows per picture",
    "decoded_images": "Decoded images per picture",
    "reward_calls": "Reward calls per picture",
    "denoiser_seconds": "Seconds in the network per picture",
    "decoder_seconds": "Seconds in the decoder per picture",
    "reward_seconds": "Seconds in the reward per picture",
    "total_seconds": "Seconds per picture",
}


class Written(NamedTuple):
    """What `write_page` wrote."""

    bytes: int
    files: int  # thumbnails beside the page
    faults: list[str]  # why pictures could not be read


def check_page(output: Path) -> None:
    """Raises a UserError if a page, or the folder beside it, exists and was not written as a report."""
    mine = False
    with suppress(OSError), open(output, "rb", opener=regular_only) as file:
        mine = _MARK.encode() in file.read(1024)
    if os.path.lexists(output) and not mine:
        raise UserError(f"{output} exists and was not written by `svdd report`; choose another --output")
    folder = _folder_of(output)
    if os.path.lexists(folder) and not mine and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}, for thumbnails, exists and is not part of a report; choose another --output")


def write_page(runs: Sequence[ReportRun], output: Path, baseline: int | None = None, embed: bool = False) -> Written:
    """Writes the report on these runs, and thumbnails that are too many for the page into a folder beside it.

    Args:
        runs: The runs, in the order in which they are shown.
        output: The HTML file.
        baseline: Index of the run with which the others are compared when the page opens.
        embed: Put the full pictures into the page, which then needs no run folder.
    """
    folder, written, faults = _folder_of(output), 0, []
    for path in folder.glob("*") if folder.is_dir() else ():
        if _OWN_FILE.fullmatch(path.name):
            path.unlink()
    before, _, after = _template(runs).partition("<!--data-->")
    images = [(run, image) for run in runs for image in run.images]
    thumbnails = read_thumbnails([(run.folder, image.file) for run, image in images])
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as page:
        page.write(before.encode())
        page.write(_block("data", _overview(runs, baseline)))
        embedded = 0
        shown = tqdm(images, "pictures", disable=None, leave=False)
        for k, ((run, image), thumbnail) in enumerate(zip(shown, thumbnails, strict=True)):
            where = thumbnail.uri if thumbnail.data else ""
            if embedded + len(thumbnail.data) > _EMBEDDED:
                folder.mkdir(exist_ok=True)
                (path := folder / f"{k:06d}.{thumbnail.suffix}").write_bytes(thumbnail.data)
                where, written = link(path, output), written + 1
            else:
                embedded += len(thumbnail.data)
            faults += [thumbnail.fault] if thumbnail.fault else []
            page.write(_block(f"i{k}", _about(run, image, thumbnail, where, output, embed), image.trace))
        page.write(after.encode())
    if folder.is_dir() and not written:
        with suppress(OSError):
            folder.rmdir()
    return Written(output.stat().st_size, written, faults)


def _folder_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}_files")


def _template(runs: Sequence[ReportRun]) -> str:
    """Returns the page without its data. Only the script and the style in it are allowed to act."""
    here = files("svdd.evaluation.reports")
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(here.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS) + "\nbegin();\n"
    policy = f"default-src 'none'; img-src 'self' data: file:; style-src {_digest(style)}; script-src {_digest(script)}"
    names = [run.side.name for run in runs]
    title = f"svdd report: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
    parts = {"style": style, "script": script, "policy": policy, "title": html.escape(_ascii(title))}
    page = here.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _ascii(text: str) -> str:
    """Returns a text without what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _block(name: str, content: dict[str, Any], trace: str = "") -> bytes:
    """Returns JSON as an element of the page; as ASCII without "<", it can neither end the element nor be misread."""
    text = json.dumps(content, allow_nan=False)
    if trace:
        text = f'{text[:-1]}, "trace": {json.dumps(json.loads(trace), allow_nan=False)}}}'
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{safe}</script>\n'.encode()


def _overview(runs: Sequence[ReportRun], baseline: int | None) -> dict[str, Any]:
    """Returns the page's main data: settings, means and costs of the runs, and the images as columns."""
    rewards = list(dict.fromkeys(name for run in runs for image in run.images for name in image.rewards))
    prompts: dict[str, int] = {}
    table = [
        (k, prompts.setdefault(image.prompt, len(prompts)), image) for k, run in enumerate(runs) for image in run.images
    ]
    columns = {
        "run": [run for run, _, _ in table],
        "prompt": [prompt for _, prompt, _ in table],
        "index": [image.prompt_index for _, _, image in table],
        "number": [image.number for _, _, image in table],
        "particle": [image.particle for _, _, image in table],
        "weight": [image.weight for _, _, image in table],
        "seed": [None if image.seed is None else str(image.seed) for _, _, image in table],  # above 2^53 too
        "scores": [[image.rewards.get(name) for _, _, image in table] for name in rewards],
        "rows": [image.ledger.get("denoiser_rows") for _, _, image in table],
        "seconds": [image.ledger.get("total_seconds") for _, _, image in table],
    }
    sides = [run.side for run in runs]
    heads, settings = differing_settings(sides)
    plain = sides[baseline or 0]
    return {
        "version": __version__,
        "rewards": rewards,
        "prompts": list(prompts),
        "baseline": baseline,
        "runs": [_about_run(run) for run in runs],
        "costs": {name: label for name, label in _COSTS.items() if any(run.cost().get(name) for run in runs)},
        "settings": {"heads": heads, "rows": settings},
        "differences": differences(runs),
        "notes": [found for side in sides if side is not plain for found in mismatches(plain, side)],
        "images": columns,
    }


def _about_run(run: ReportRun) -> dict[str, Any]:
    return {
        "name": run.side.name,
        "folder": str(run.folder),
        "sampler": run.sampler,
        "images": len({(image.prompt_index, image.number) for image in run.images}),
        "pictures": len(run.images),
        "prompts": len({image.prompt_index for image in run.images}),
        "hidden": run.hidden,
        "unfinished": run.side.unfinished,
        "means": run.means(),
        "cost": run.cost(),
        "config": run.config,
    }


def _about(
    run: ReportRun, image: ReportImage, thumbnail: Thumbnail, where: str, output: Path, embed: bool
) -> dict[str, Any]:
    """Returns what the page says about one picture; entries that say nothing are left out."""
    path = run.folder / image.file
    in_tar = path.parent.suffix == ".tar"
    full = full_picture(run.folder, image.file) if embed else "" if in_tar else link(path, output)
    entries = {
        "thumb": where,
        "full": full if thumbnail.data else "",
        "width": thumbnail.width,
        "height": thumbnail.height,
        "file": image.file,
        "negative": image.negative_prompt,
        "selection": dict(image.selection),
        "ledger": dict(image.ledger),
        "kl": image.path_kl,
        "columns": image.columns,
    }
    return {name: entry for name, entry in entries.items() if entry not in (None, "", {}, 0)}
