"""Rows at once: SVDD with M = 20 at the size of Stable Diffusion 1.5 within a CPU's memory, and after memory errors.

Writes benchmarks/chunks.md. Each run is a process of its own, with a limit of its address space or without; `--run`
repeats one of them, the others are read from benchmarks/data/chunks.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.shapes import SHAPES, diffusion
from svdd.diffusion.chunking import Chunker
from svdd.diffusion.memory import PeakMemory, free_memory
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.evaluation.rendering import render
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards import Compressibility
from svdd.samplers import SVDD

DATA = Path(__file__).parent / "data" / "chunks.jsonl"
CANDIDATES, STEPS = 20, 2
MOST_ROWS = 7  # from which an error is raised
PROMPTS = ["red apple", "blue car", "panda"]
RUNS: dict[str, dict[str, Any]] = {
    "float32, several images in a call": {"dtype": "float32", "reproducible": False, "limit": None},
    "bfloat16, reproducible mode, ulimit -v": {"dtype": "bfloat16", "reproducible": True, "limit": 5.0},
}
ERRORS: dict[str, BaseException] = {
    "torch.OutOfMemoryError (CUDA, XPU)": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "RuntimeError of MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    "RuntimeError of PyTorch's CPU allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "RuntimeError of oneDNN": RuntimeError("could not create a primitive"),
    "MemoryError": MemoryError(),
    "OSError of the system": OSError(12, "Cannot allocate memory"),
}
LATER = (
    "The second run is older than the rule that a part of the reproducible mode becomes smaller before it is tried, if "
    "one measured row says that it does not fit; by it, it would take about 10 rows at once. One row overestimates "
    "what a row of many takes: 20 rows took 3.3 GB, not 20 x 337 MB. Both runs shared the machine with other work."
)
ABOUT = (
    f"SVDD with M = {CANDIDATES} and `PosteriorMean`, T = {STEPS}, {len(PROMPTS)} prompts at once, guidance scale 7.5, "
    "JPEG size, `chunk_size: auto`, at the size of Stable Diffusion 1.5 with random weights and 512 x 512 pixels: "
    f"{2 * CANDIDATES * len(PROMPTS)} rows of the network's batch, if all were computed at once. "
    "Made by `python -m benchmarks.chunks`."
)


class Recorder(Chunker):
    """Counts the rows of each call, by the part of the model."""

    def __init__(self, chunker: Chunker) -> None:
        self.__dict__.update(vars(chunker))
        self.calls: dict[str, Counter[int]] = defaultdict(Counter)

    def map(self, function: Callable[..., Any], images: int, *arguments: Any, work: Any = (), **options: Any) -> Any:
        """Does what `Chunker.map` does."""

        def recorded(*parts: Any) -> Any:
            result = function(*parts)
            self.calls[str(work[0])][len(parts[0])] += 1
            return result

        return super().map(recorded, images, *arguments, work=work, **options)


def draw(dtype: str, reproducible: bool, limit: float | None) -> dict[str, Any]:
    """Draws the batch in this process; `limit` is what it may take of the address space, once it is loaded, in GB."""
    pipe = SHAPES["sd15"].build("cpu", getattr(torch, dtype))
    size = {"num_inference_steps": STEPS, "height": 512, "width": 512}
    chain = diffusion(pipe, "cpu", reproducible=reproducible, **size)
    model = GuidedDiffusion(Compressibility(), chain, SVDD(CANDIDATES)).eval()
    if limit is not None:
        bytes = int(psutil.Process().memory_info().vms + limit * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (bytes, bytes))
    chain.chunker = recorder = Recorder(chain.chunker)
    device, began = torch.device("cpu"), time.perf_counter()
    memory, free = PeakMemory(device), free_memory(device)
    with torch.inference_mode():
        final = model.draw(PROMPTS, [1, 2, 3])
    peak = memory.peak()
    assert final.images.isfinite().all()
    ledger = final.context.ledger.per_image(len(PROMPTS))
    return {
        "free": free,
        "before": memory.before,
        "peak": peak,
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "ulimit": None if limit is None else bytes,
        "calls": {part: dict(counts) for part, counts in recorder.calls.items()},
        "ledger": {name: number for name, number in ledger.items() if "seconds" not in name},
    }


def errors() -> list[Sequence[Any]]:
    """Returns what each kind of error in each part leads to, on the embedded model."""
    rows: list[Sequence[Any]] = []
    for part in ("network", "decoder", "reward"):
        plain = _scores(None, "", MOST_ROWS - 1 if part == "network" else "auto")[0]  # of others no bit depends on it
        for name, error in ERRORS.items():
            scores, calls, drawn = _scores(error, part)
            change = max(abs(one / two - 1) for one, two in zip(scores, plain, strict=True))
            rows.append((part, name, max(calls[part]), drawn, f"{change:.1e}"))
    return rows


class _Failing(Recorder):
    """Raises an error in large calls of one part."""

    error, part, raised = None, "", 0

    def map(self, function: Callable[..., Any], images: int, *arguments: Any, work: Any = (), **options: Any) -> Any:
        def failing(*parts: Any) -> Any:
            if self.error is not None and work[0] == self.part and len(parts[0]) >= MOST_ROWS:
                self.raised += 1
                raise self.error
            return function(*parts)

        return super().map(failing, images, *arguments, work=work, **options)


def _scores(
    error: BaseException | None, part: str, chunk_size: int | str = "auto"
) -> tuple[list[float], dict[str, Counter[int]], int]:
    chain = StableDiffusion("emoji", 4, guidance_scale=3.0, reproducible=False, chunk_size=chunk_size)
    model = GuidedDiffusion(_OnDevice(), chain, SVDD(8)).eval()
    chain.chunker = failing = _Failing(chain.chunker)
    failing.error, failing.part = error, part
    with torch.inference_mode():
        final = model.draw(PROMPTS, [1, 2, 3])
    return Compressibility().score(final.images, final.prompts).tolist(), failing.calls, failing.raised


class _OnDevice(Compressibility):
    """The JPEG size, called on the device's thread."""

    threads = 0


def page(records: dict[str, dict[str, Any]], failures: list[Sequence[Any]]) -> str:
    """Returns the page."""
    rows = []
    for name, found in records.items():
        calls = "; ".join(f"{part} {_calls(found['calls'][part])}" for part in ("network", "decoder"))
        limit = "none" if found["ulimit"] is None else f"{found['ulimit'] / 1e9:.1f}"
        memory = [f"{found[key] / 1e9:.1f}" for key in ("free", "before", "peak")]
        rows.append([name, limit, *memory, calls, f"{found['seconds'] / 60:.0f}", found["threads"]])
    heads = [
        "run",
        "address space, GB",
        "free, GB",
        "process before, GB",
        "at most, GB",
        "calls x rows",
        "minutes",
        "threads",
    ]
    said = "\n".join(f"{name}:\n\n```\n{found['said'].strip()}\n```\n" for name, found in records.items())
    lost = [
        "part",
        f"error, raised from {MOST_ROWS} rows on",
        "rows at once in the end",
        "errors",
        "largest change of a score",
    ]
    return (
        f"# Rows at once\n\n{ABOUT}\n\n{render(heads, rows, 'md')}\n{said}\n{LATER}\n\n"
        "The same sampler with M = 8 and T = 4 on the embedded model, where a part raises an error of each kind, "
        "compared with a run that computes as many rows at once from the beginning:\n\n"
        f"{render(lost, failures, 'md')}"
    )


def _calls(counts: dict[str, int]) -> str:
    return ", ".join(f"{times} x {rows}" for rows, times in sorted(counts.items(), key=lambda each: -int(each[0])))


def main() -> None:
    """Draws what is asked for, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=RUNS, action="append", help="draw it anew; default: those without a record")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        print(json.dumps(draw(**RUNS[settings.child])))
        return
    records = {}
    if DATA.exists():
        records = {line["run"]: line for line in map(json.loads, DATA.read_text().splitlines())}
    for name in settings.run or [name for name in RUNS if name not in records]:
        command = [sys.executable, "-m", "benchmarks.chunks", "--child", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("svdd:"))
        records[name] = {"run": name, **json.loads(done.stdout.splitlines()[-1]), "said": said}
        lines = [json.dumps(records[each]) + "\n" for each in RUNS if each in records]
        DATA.write_text("".join(lines))
    ordered = {name: records[name] for name in RUNS if name in records}
    (DATA.parents[1] / "chunks.md").write_text(page(ordered, errors()))


if __name__ == "__main__":
    main()
