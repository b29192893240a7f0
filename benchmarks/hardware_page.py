"""The page of benchmarks/hardware.py: a section for each shape, device and precision that was measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES
from svdd.evaluation.rendering import Cell, render

__all__ = ["write"]

_KEY = ("shape", "device", "dtype")
_MODES = {"parity": "as loaded", "default": "svdd's order", "compiled": "compiled"}
_SHARES = ("denoiser", "decoder", "reward", "encoder", "rest")
_INTRODUCTION = """# Speed and memory by device

Pipelines of published shapes with random weights, made by `python -m benchmarks.hardware --shape NAME`. Each section is
one run of it, which replaces the section of its shape, device and precision. Ratios compare measurements of one run.

- A row of the network is a denoised latent; with classifier-free guidance it is two rows of the network's batch.
- `as loaded`: weights in the order in which diffusers loads them (`parity: true`); `svdd's order`: as svdd orders them
  by default, where they differ channels last; `compiled`: that with `compile: true`.
- Memory is that beyond what was taken before the call: allocated on a GPU, the resident size of the process on a CPU.
- The loops are those of benchmarks/plain_loops.py over the pipeline as loaded: for SVDD the network and the decoder on
  one candidate after another, or on all candidates of a step at once; for best of N, N calls of the pipeline, or one
  with `num_images_per_prompt`. `rows` are those that went through the network, guided ones twice.
"""


def write(page: Path, section: Mapping[str, Any]) -> str:
    """Puts a section in the place of that of its key, in the data file and on the page; returns it as text."""
    data = page.parent / "data" / f"{page.stem}.jsonl"
    lines = data.read_text().splitlines() if data.exists() else []
    kept = [each for each in map(json.loads, lines) if _key(each) != _key(section)]
    sections = sorted([*kept, section], key=lambda each: ([*SHAPES].index(each["shape"]), *_key(each)))
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{json.dumps(each)}\n" for each in sections))
    page.write_text("\n".join([_INTRODUCTION, *map(_shown, sections)]), encoding="utf-8")
    return _shown(section)


def _key(section: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(section[name] for name in _KEY)


def _shown(section: Mapping[str, Any]) -> str:
    """Returns a section in Markdown."""
    name, left_out = SHAPES[section["shape"]].name, section["left_out"]
    compiled = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in section["compile_seconds"].items())
    facts = [
        f"{section['pixels']} px, T = {section['steps']}, weights {section['weights_gib']:.2f} GiB, built in "
        f"{section['build_seconds']:.0f} s; torch {section['torch']}, diffusers {section['diffusers']}; "
        f"{section['minutes']:.1f} of {section['limit_minutes']:g} minutes.",
        f"First calls of what was compiled: {compiled}." if compiled else "",
        section["note"],
    ]
    return "\n".join(
        [
            f"## {name}, {section['dtype']}: {section['device']}",
            "",
            " ".join(fact for fact in facts if fact),
            "",
            _rows(section["rows"]),
            _runs(section["runs"]),
            *(["Left out:", "", *(f"- {what}" for what in left_out), ""] if left_out else []),
        ]
    )


def _rows(records: Sequence[Mapping[str, Any]]) -> str:
    table: list[list[Cell]] = []
    for part, n in dict.fromkeys((record["part"], record["rows"]) for record in records):
        of = {record["mode"]: record for record in records if (record["part"], record["rows"]) == (part, n)}
        base, line = of.get("parity", {}).get("seconds"), [part, n]
        for mode in _MODES:
            record = of.get(mode, {})
            seconds = record.get("seconds")
            line.append(record.get("error") if seconds is None else f"{n / seconds:.3g}")
            if mode != "parity":
                line.append(None if seconds is None or base is None else f"{base / seconds:.2f}")
        peaks = [record["gib"] for record in of.values() if "gib" in record]
        table.append([*line, f"{max(peaks):.2f}" if peaks else None])
    table.sort(key=lambda line: str(line[0]), reverse=True)
    first, *others = _MODES.values()
    heads = [f"{first}, rows/s", *(head for mode in others for head in (f"{mode}, rows/s", "speed-up"))]
    return render(["part", "rows", *heads, "peak, GiB"], table, "md")


def _runs(records: Sequence[Mapping[str, Any]]) -> str:
    table: list[list[Cell]] = []
    for record in records:
        mode = ", compiled" if record["mode"] == "compiled" else ""
        line: list[Cell] = [f"{record['sampler']}, {record['size']}{mode}", record["reward"]]
        if "error" in record:
            table.append([*line, record["error"]])
            continue
        line += [f"{record['network_rows']:g}", f"{record['decoded_images']:g}", f"{record['seconds']:.3g}"]
        line += [f"{1 / record['seconds']:.3g}", *(f"{100 * record['shares'][part]:.1f} %" for part in _SHARES)]
        line.append(f"{record['gib']:.2f}" if "gib" in record else None)
        for label in ("one by one", "at once"):
            loop = record.get(label, {})
            line.append(f"{loop['seconds'] / record['seconds']:.2f}" if "seconds" in loop else loop.get("error"))
        table.append(line)
    heads = ["sampler", "reward", "rows", "decoded", "s per image", "images/s", *_SHARES, "peak, GiB"]
    heads += ["loop, one by one / svdd", "loop, at once / svdd"]
    width = len(heads)
    return render(heads, [[*line, *[None] * (width - len(line))] for line in table], "md")
