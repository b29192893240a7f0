"""The overhead of a run: memory, open files and seconds per prompt, from a hundred prompts up.

Writes benchmarks/scale.md. The model is a stub, so only the overhead is measured. With `--processes` it also compares
two one-thread processes with one, on the embedded model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import yaml

STUB = {
    "model": {
        "reward": "tests.faults.stub.StubReward",
        "diffusion": "tests.faults.stub.StubDiffusion",
        "sampler": {"class_path": "SVDD", "init_args": {"num_candidates": 2}},
    },
    "data": {"batch_size": 16},
    "trainer": {"accelerator": "cpu", "devices": 1},
}


class Peak(threading.Thread):
    """Records the maxima of this process's resident memory and open files until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.memory, self.files = 0, 0
        self._over = threading.Event()

    def run(self) -> None:
        """Samples ten times a second."""
        while not self._over.wait(0.1):
            self.memory = max(self.memory, resident())
            self.files = max(self.files, len(os.listdir("/proc/self/fd")))

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join()


def resident() -> int:
    """Returns this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(count: int) -> None:
    """Runs `count` prompts, then the same command again, and prints the costs of both as JSON."""
    from svdd.__main__ import main

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)

        def predict(prompts: int, run: str) -> dict[str, float]:
            (folder / f"{prompts}.txt").write_text("".join(f"a picture of the number {k}\n" for k in range(prompts)))
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(STUB))
            peak = Peak()
            before = resident()
            peak.start()
            start = time.perf_counter()
            prompts_file = str(folder / f"{prompts}.txt")
            assert main(["predict", "--config", str(config), "--data.prompts", prompts_file, "--output", run]) == 0
            seconds = time.perf_counter() - start
            peak.stop()
            return {"seconds": seconds, "memory": peak.memory - before, "total": peak.memory, "files": peak.files}

        predict(50, str(folder / "warm"))
        first = predict(count, str(folder / "run"))
        again = predict(count, str(folder / "run"))
        print(json.dumps({"count": count, "first": first, "again": again}))


def own_process(*words: str) -> str:
    """Runs this module in a separate process and returns the last line of its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.scale", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1]


class Speed(NamedTuple):
    """Seconds per prompt: wall time, and CPU time of all processes, which does not depend on other jobs."""

    wall: float
    processor: float


def speed(devices: int, prompts: int) -> Speed:
    """Returns the seconds per prompt of one-thread processes, without start-up.

    Start-up is the time of a run of two prompts; wall times are the runs' `wall_seconds`.
    """
    runs = []
    for limit in (2, prompts):
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "svdd", "predict", "--config", "configs/quickstart.yaml"]
            command += ["--data.prompts", "emoji", "--data.limit", str(limit)]
            command += ["--data.batch_size", "1", "--output", name, "--trainer.accelerator", "cpu"]
            command += ["--trainer.devices", str(devices), "--trainer.strategy", "ddp" if devices > 1 else "auto"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            wall = json.loads((Path(name) / "summary.json").read_text())["wall_seconds"]
            runs.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    short, long = runs
    return Speed(*((long[k] - short[k]) / (prompts - 2) for k in range(2)))


def table(results: list[dict]) -> list[str]:
    """Returns the lines of the page about the stub."""
    lines = [
        "| prompts | seconds per prompt | memory above start-up, MB | resident in total, MB | open files "
        "| the same command again, s | its memory, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        first, again = result["first"], result["again"]
        lines.append(
            f"| {result['count']:,} | {first['seconds'] / result['count']:.4f} | {first['memory'] / 1e6:.0f} "
            f"| {first['total'] / 1e6:.0f} | {first['files']} | {again['seconds']:.1f} | {again['memory'] / 1e6:.0f} |"
        )
    return lines


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--processes", type=int, default=0, metavar="PROMPTS", help="also compare two processes")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    results = [json.loads(own_process("--measure", str(count))) for count in options.counts]
    lines = [
        "# Overhead of a run",
        "",
        "A nearly free stub in place of the model, batches of 16 prompts, one CPU thread, files in memory.",
        "Made by `python -m benchmarks.scale`.",
        "",
        *table(results),
    ]
    if options.processes:
        load = os.getloadavg()[0]
        one, two = speed(1, options.processes), speed(2, options.processes)
        lines += [
            "",
            f"Two one-thread processes draw **{one.wall / two.wall:.2f} times** as many prompts a second as one, "
            "by wall time. Other jobs on the two cores lower this ratio: the machine had "
            f"{os.cpu_count()} cores and a load average of {load:.1f} before the measurement.",
            "",
            f"The embedded model, SVDD, M = 8, T = 25, {options.processes} prompts, without start-up:",
            "",
            "| processes | seconds per prompt | CPU seconds per prompt |",
            "|---:|---:|---:|",
            f"| 1 | {one.wall:.2f} | {one.processor:.2f} |",
            f"| 2 | {two.wall:.2f} | {two.processor:.2f} |",
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
