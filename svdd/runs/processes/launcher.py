"""Starts the processes of a run under torchelastic, or joins those that torchrun or SLURM has started."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from svdd import UserError, first_line, say
from svdd.runs.processes.environment import launcher
from svdd.runs.processes.group import Group
from svdd.runs.processes.signals import AGENT, STOP_EXIT_CODES, signals

__all__ = ["join"]

# As `python -m svdd`, which would import a json.py in the working directory in place of Python's own.
_START = (
    "import sys; sys.path.append(sys.path.pop(0)); import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from svdd.__main__ import main; sys.exit(main())"
)
_FINAL = (2, 3, *STOP_EXIT_CODES)  # exit codes after which a restart does not help


def join(trainer: Any, max_restarts: int, words: Sequence[str]) -> Group | None:
    """Joins the processes that a launcher has started, or starts several and raises `SystemExit` when they end.

    Returns None for a single process.

    Args:
        trainer: The Trainer's settings.
        max_restarts: How often the processes are started again after one has died, >= 0.
        words: The command line, which each started process repeats.

    Raises:
        UserError: If the Trainer's settings do not fit what the launcher has started, or need a launcher.
    """
    if max_restarts < 0:
        raise UserError(f"max_restarts must be >= 0, got {max_restarts}")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(quiet, False)
    options |= {name: trainer[name] for name in ("accelerator", "devices", "num_nodes")}
    probe = L.Trainer(strategy=trainer.strategy if isinstance(trainer.strategy, str) else "auto", **options)
    environment: ClusterEnvironment
    started_by = launcher()
    if started_by == "torchrun":
        environment = TorchElasticEnvironment()
    elif started_by == "SLURM":
        environment = _slurm()
    elif probe.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={probe.num_nodes} needs a launcher: start the command with torchrun on each machine, "
            "or with srun (docs/how_to/many_gpus.md)"
        )
    elif probe.num_devices > 1:
        raise SystemExit(_launch(words, probe.num_devices, max_restarts))
    else:
        return None
    planned, started = probe.num_devices * probe.num_nodes, environment.world_size()
    if planned != started:
        raise UserError(
            f"{started_by} started {started} processes, but trainer.devices={trainer.devices} and trainer.num_nodes="
            f"{trainer.num_nodes} stand for {planned}: give --trainer.devices the number of processes on each "
            "machine and --trainer.num_nodes the number of machines"
        )
    if started == 1:
        return None
    return Group(environment, "nccl" if probe.strategy.root_device.type == "cuda" else "gloo")


def _slurm() -> SLURMEnvironment:
    try:
        return SLURMEnvironment()
    except RuntimeError as error:  # it needs --ntasks-per-node
        raise UserError(first_line(error)) from error


def _launch(words: Sequence[str], count: int, max_restarts: int) -> int:
    """Runs `svdd` in several processes on this machine under a torchelastic agent; returns the run's exit code.

    The agent answers either signal with SIGTERM to all and waits for the current batches; a second SIGINT ends all at
    once. After a death the others have 30 seconds. Attempts are counted here, not by torchelastic, which would also
    restart after errors that a restart only repeats.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    stopped = 0

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        if not stopped:
            stopped = 128 + number
            raise SignalException(f"stopped by {number}", signal.SIGTERM)

    logging.disable(logging.ERROR)  # torchelastic's own messages
    os.environ |= {AGENT: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(10**6)}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    options: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    options |= {"run_id": "svdd", "max_restarts": 0}
    escaped = [word.replace("$", "$$") for word in words]  # torchelastic substitutes ${local_rank}
    try:
        signals.deferred, signals.unit = True, "epoch" if words[0] == "fit" else "batch"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        for attempt in range(max_restarts + 1):
            if attempt == 1:
                escaped += ["--overwrite", "false"]  # a restart continues what the first attempt began
            try:
                with tempfile.TemporaryDirectory(prefix="svdd-") as folder:  # for the errors of the processes
                    config = LaunchConfig(1, 1, count, logs_specs=DefaultLogsSpecs(folder), **options)
                    config.signals_to_handle = "SIGHUP"  # the other two are handled here
                    elastic_launch(config, sys.executable)("-c", _START, *escaped)
                return 0
            except ChildFailedError as error:
                code = _report(error)
            except OSError as error:
                problem = f"the processes cannot be started: {first_line(error)}"
                raise UserError(f"{problem}; if the temporary folder is full, set TMPDIR to another") from error
            if code in _FINAL or attempt == max_restarts:
                break
            say(f"svdd: restart {attempt + 1} of {max_restarts}", error=True)
        return code
    except SignalException:
        signals.say(f"ended: {STOP_EXIT_CODES[stopped]}; what is finished is kept, and the same command continues")
        return stopped


def _report(error: Any) -> int:
    """Returns the exit code of the process that failed first, and prints the reason if it has not been printed."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if failure.error_file_data.get("svdd"):
        reason = failure.message
    elif code < 0:
        code, reason = 1, f"process {rank} was killed by {failure.signal_name()}; what is finished is kept"
    elif code in STOP_EXIT_CODES:
        reason = f"ended: {STOP_EXIT_CODES[code]} to process {rank}"
    else:
        reason = "" if code == 3 else f"process {rank} ended with exit code {code}"
    if reason:
        say(f"svdd: {reason}", error=True)
    return code
