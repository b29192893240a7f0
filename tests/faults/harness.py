"""Starts runs as real processes and inspects their output.

Imports take seconds, so most runs are forks of the test process; `fork` can set a launcher's environment variables.
Runs under torchrun or svdd's own agent are started as commands.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from svdd.__main__ import main
from svdd.runs.images import read_image
from svdd.runs.processes.signals import AGENT

REPOSITORY = Path(__file__).parents[2]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits until the condition holds; fails after the time limit."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


_cases: list["Case"] = []


def end_all() -> None:
    """Kills the processes that the cases of a test have left."""
    while _cases:
        _cases.pop().end()


class Case:
    """One run folder of the stub model and its processes."""

    def __init__(self, folder: Path, prompts: list[str]) -> None:
        self.folder, self.gate, self.count = folder / "run", folder / "gate", len(prompts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(prompts))
        self.config = folder / "stub.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model": {
                        "reward": {
                            "class_path": "tests.faults.stub.StubReward",
                            "init_args": {"gate": str(self.gate)},
                        },
                        "diffusion": {"class_path": "tests.faults.stub.StubDiffusion"},
                        "sampler": {"class_path": "SVDD", "init_args": {"num_candidates": 2}},
                    },
                    "data": {"prompts": str(folder / "prompts.txt"), "batch_size": 2},
                    "trainer": {"accelerator": "cpu", "devices": 1},
                }
            )
        )
        self.log = folder / "log.txt"
        self.processes: list[BaseProcess] = []
        self.commands: list[subprocess.Popen] = []
        _cases.append(self)

    def words(self, *options: str) -> list[str]:
        return ["predict", "--config", str(self.config), "--output", str(self.folder), *options]

    def run(self, *options: str) -> int:
        """Runs in this process and returns the exit code."""
        return main(self.words(*options))

    def fork(
        self,
        *options: str,
        environment: dict[str, str] | None = None,
        disk: int | None = None,
        output: int | None = None,
        operations: int | None = None,
    ) -> BaseProcess:
        """Starts a run in a fork of this process.

        Args:
            options: Command-line options.
            environment: Additional variables.
            disk: Maximum size of each file, in bytes.
            output: A file descriptor for standard output instead of the log; 1 or 2 closes that stream.
            operations: File operations in the run folder after which the process ends as if killed.
        """
        if operations is not None:
            environment = {**(environment or {}), "STUB_OPERATIONS": str(operations)}
        process = multiprocessing.get_context("fork").Process(
            target=_run, args=(self.words(*options), environment or {}, str(self.log), disk, output)
        )
        process.start()
        self.processes.append(process)
        return process

    def fork_ranks(
        self, world_size: int, *options: str, devices: int | None = None, environment: dict[str, str] | None = None
    ) -> list[BaseProcess]:
        """Starts the processes of one machine with torchrun's environment variables and `port` as MASTER_PORT."""
        self.port = free_port()
        several = ["--trainer.strategy", "ddp", "--trainer.devices", str(devices or world_size)]
        return [
            self.fork(*several, *options, environment={**(environment or {}), **torchrun(rank, world_size, self.port)})
            for rank in range(world_size)
        ]

    def fork_tasks(self, *options: str, environment: dict[str, str] | None = None) -> list[BaseProcess]:
        """Starts two processes with SLURM's environment variables."""
        slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "svdd", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_STEP_ID": str(len(self.processes))}
        slurm |= {"MASTER_PORT": str(free_port())}
        ranks = ({"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2))
        return [self.fork(*options, environment={**(environment or {}), **slurm, **rank}) for rank in ranks]

    def start(self, *options: str, launcher: tuple[str, ...] = ("-m", "svdd")) -> subprocess.Popen:
        """Starts a run as a command."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            command = subprocess.Popen(
                [sys.executable, *launcher, *self.words(*options)],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.commands.append(command)
        return command

    def waiting(self, count: int) -> list[int]:
        """Waits until `count` processes block on a prompt that waits; returns their ids."""
        until(lambda: len(list(self.gate.parent.glob("gate.*"))) == count, 120)
        return [int(path.suffix[1:]) for path in self.gate.parent.glob("gate.*")]

    def pids(self) -> list[int]:
        """Returns the ids of this folder's commands and of their child processes."""
        own = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder).encode() in (path / "cmdline").read_bytes().split(b"\0"):
                    own.append(int(path.name))
            except OSError:
                continue
        return own

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def finished(self) -> dict[str, tuple[str, int]]:
        """Returns the digest and modification time of each image with a complete row."""
        rows = {}
        for path in sorted(self.folder.glob("results*.jsonl")):  # shards first: rows move from them to results.jsonl
            try:
                lines = path.read_bytes().splitlines(keepends=True)
            except FileNotFoundError:
                continue
            for line in lines:
                if line.endswith(b"\n"):
                    row = json.loads(line)
                    path = self.folder / row["file"]
                    rows[row["file"]] = (row["sha256"], 0 if ".tar/" in row["file"] else path.stat().st_mtime_ns)
        return rows

    def resume(self, *options: str, before: dict[str, tuple[str, int]] | None = None) -> int:
        """Runs the same command to completion with the gate open.

        Args:
            options: Command-line options.
            before: Images finished before the fault; by default those finished now.

        Returns:
            The number of them that were drawn again, changed or lost.
        """
        self.gate.touch()
        before = self.finished() if before is None else before
        process = self.fork(*options)
        process.join(180)
        assert process.exitcode == 0, self.said()[-3000:]
        after = self.finished()
        return sum(after.get(name) != entry for name, entry in before.items())

    def content(self) -> tuple[dict[str, bytes], dict]:
        """Returns all images, loose or in shards, and the rest of the run without times and memory."""
        summary = json.loads((self.folder / "summary.json").read_text())
        rows = [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]
        traces = (self.folder / "trace.jsonl").read_text().splitlines()
        images = {Path(row["file"]).name: read_image(self.folder, row["file"]) for row in rows}
        del summary["wall_seconds"], summary["peak_memory_bytes"]
        for entry in (summary, *rows):
            entry["ledger"] = {name: n for name, n in entry["ledger"].items() if not name.endswith("seconds")}
        rows = [row | {"file": Path(row["file"]).name} for row in rows]
        others = {p.name for p in self.folder.iterdir()} - {"config.yaml", ".lock"}
        others |= {p.name for p in self.folder.glob("images/**/*.png")} - set(images)
        return images, {"summary": summary, "rows": rows, "traces": traces, "others": sorted(others)}

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for command in self.commands:
            command.kill()
            command.wait()
        for pid in self.pids():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns the variables that torchrun sets in one process of a single machine."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_in_two(words: list[str], log: Path) -> None:
    """Runs a command in two forks of this process, as under torchrun; fails unless both succeed."""
    words, port = [*words, "--trainer.strategy", "ddp", "--trainer.devices", "2"], free_port()
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_run, args=(words, torchrun(rank, 2, port), str(log), None, None), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], log.read_text()[-3000:]


def listens(port: int) -> bool:
    """Whether a process listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(words: list[str], environment: dict[str, str], log: str, disk: int | None, output: int | None) -> None:
    """The body of a fork: what a new interpreter does after its imports."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", AGENT):
        os.environ.pop(name, None)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor if output in (None, 1, 2) else output, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False, buffering=1)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    if output in (1, 2):
        os.close(output)
        setattr(sys, ("stdout", "stderr")[output - 1], None)
    if disk is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, resource.RLIM_INFINITY))
    os.chdir(REPOSITORY)
    os.setsid()
    if "STUB_OPERATIONS" in environment:
        _die_after(int(environment["STUB_OPERATIONS"]), words[words.index("--output") + 1])
    sys.argv = ["svdd", *words]
    sys.exit(main())


def _die_after(count: int, folder: str) -> None:
    """Ends this process, without a farewell, before file operation `count` + 1 below the folder."""
    left = count

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(137)

    def hear(event: str, arguments: tuple) -> None:
        changes = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if changes and str(arguments[0]).startswith(folder):
            tick()

    def counted(function: Callable) -> Callable:
        def wrapped(descriptor: int, *arguments: object) -> object:
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder):
                    tick()
            return function(descriptor, *arguments)

        return wrapped

    os.write, os.fsync, os.ftruncate = counted(os.write), counted(os.fsync), counted(os.ftruncate)
    sys.addaudithook(hear)
