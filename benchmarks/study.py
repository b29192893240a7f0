"""A study against one `svdd predict` for each of its runs: wall time, and whether all folders are equal.

The study draws `--devices` runs at once in processes that last; the single commands are started `--processes` at a
time. Both divide the cores of the machine, or use `OMP_NUM_THREADS` if it is set. With `--kills N`, the study is killed
N times at random times, all its processes at once, or after half of these times one of its workers.

    python -m benchmarks.study configs/studies/emoji.yaml --devices 16 --processes 16
    python -m benchmarks.study configs/studies/emoji.yaml --devices 16 --kills 2 --only-study
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from svdd.commands.drawing import Drawing
from svdd.evaluation.studies.specification import Cell
from svdd.runs.peaks import PEAK_MEMORY

__all__ = ["differences", "main"]


def contents(folder: Path) -> dict[str, Any]:
    """Returns what a run folder holds, by file, without times, memory and the name of the folder."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            found[name] = [_reproducible(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = _reproducible(json.loads(path.read_text()))
        elif path.name == "config.yaml":
            found[name] = [line for line in path.read_text().splitlines() if not line.startswith("output:")]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _reproducible(tree: Any) -> Any:
    if isinstance(tree, dict):
        left = {name: value for name, value in tree.items() if "seconds" not in name and name != PEAK_MEMORY}
        return {name: _reproducible(value) for name, value in left.items()}
    return [_reproducible(value) for value in tree] if isinstance(tree, list) else tree


def differences(one: Path, other: Path) -> list[str]:
    """Returns the files in which two run folders differ."""
    first, second = contents(one), contents(other)
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


def run_study(words: list[str], environment: dict[str, str], kills: list[float], seed: int) -> float:
    """Runs a study to its end and returns the seconds; it is killed after each of `kills` seconds and continued."""
    begin, choose = time.monotonic(), random.Random(seed)
    for number, seconds in enumerate([*kills, None]):
        process = subprocess.Popen([sys.executable, "-m", "svdd", "study", *words], env=environment, process_group=0)
        try:
            code = process.wait(seconds)
            if code != 0:
                raise SystemExit(f"the study ended with exit code {code}")
            break
        except subprocess.TimeoutExpired:
            workers = [*_children(process.pid)]
            if number % 2 and workers:
                victim = choose.choice(workers)
                print(f"killed worker {victim} after {seconds:.1f} s", flush=True)
                os.kill(victim, signal.SIGKILL)
                time.sleep(choose.uniform(1, 5))
            print(f"killed the study after {seconds:.1f} s", flush=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return time.monotonic() - begin


def _children(parent: int) -> Iterator[int]:
    """Yields the worker processes of a study (Linux)."""
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child


def run_singles(cells: list[Cell], root: Path, environment: dict[str, str], processes: int) -> float:
    """Runs `svdd predict` for each cell, several at a time, and returns the seconds."""

    def run(cell: Cell) -> None:
        words = [*cell.words[:-1], str(root / cell.name)]
        command = [sys.executable, "-m", "svdd", "predict", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{cell.name} failed: {done.stderr[-500:]}", flush=True)

    begin = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, cells))
    return time.monotonic() - begin


def main() -> None:
    """Runs both and prints times and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="the study's file")
    parser.add_argument("--folder", type=Path, default=Path("build/study"), help="of study and single runs")
    parser.add_argument("--devices", type=int, default=1, help="processes of the study")
    parser.add_argument("--processes", type=int, default=1, help="single commands at once")
    parser.add_argument("--kills", type=int, default=0, help="how often the study is killed")
    parser.add_argument("--longest", type=float, default=240.0, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--name", default="study", help="of the study's folder")
    parser.add_argument("--only-study", action="store_true", help="compare with single runs that exist already")
    options, more = parser.parse_known_args()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // options.processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    folder, singles = options.folder / options.name, options.folder / "singles"
    words = [options.study, "--output", str(folder), "--devices", str(options.devices), *more]
    choose = random.Random(options.seed)
    kills = [choose.uniform(options.longest / 8, options.longest) for _ in range(options.kills)]
    print(f"study, {options.devices} processes: {run_study(words, environment, kills, options.seed):.1f} s", flush=True)
    settings = dict(zip([word.removeprefix("--") for word in more[::2]], more[1::2], strict=True))
    with Drawing(options.study, settings, str(folder), 1) as drawing:
        cells = drawing.study().cells
    if not options.only_study:
        seconds = run_singles(cells, singles, environment, options.processes)
        print(f"{len(cells)} commands, {options.processes} at once: {seconds:.1f} s", flush=True)
    found = {cell.name: differences(cell.folder, singles / cell.name) for cell in cells}
    for name, files in found.items():
        print(f"{name}: {'equal' if not files else 'differs in ' + ', '.join(files[:5])}")
    print(f"{sum(not files for files in found.values())} of {len(cells)} folders are equal")


if __name__ == "__main__":
    main()
