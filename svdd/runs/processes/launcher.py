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

from svdd import UserError
from svdd.runs.processes.group import Group
from svdd.runs.processes.signals import AGENT, STOP_EXIT_CODES, signals

__all__ = ["join"]

_FINAL = (2, 3, *STOP_EXIT_CODES)  # exit codes that a restart would only repeat


def join(trainer: Any, max_restarts: int, words: Sequence[str]) -> Group | None:
    """Returns the processes that this one works with; where several are wanted and none are started, starts them.

    Args:
        trainer: The Trainer's settings.
        max_restarts: How often the processes are started again after one has died.
        words: The command line, which each started process repeats.

    Returns:
        The group that this process has joined, None for a single process.

    Raises:
        UserError: If the launcher has started another number of processes than the Trainer expects, or there are
            several machines and no launcher.
        SystemExit: With the exit code of the run, in the process that has started the others.
    """
    if max_restarts < 0:
        raise UserError(f"max_restarts must be >= 0, got {max_restarts}")
    probe = L.Trainer(
        accelerator=trainer.accelerator,
        strategy=trainer.strategy if isinstance(trainer.strategy, str) else "auto",
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    environment: ClusterEnvironment
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher, environment = "torchrun", TorchElasticEnvironment()
    elif SLURMEnvironment.detect():
        launcher, environment = "SLURM", SLURMEnvironment()
    elif probe.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={probe.num_nodes} needs a launcher: start the command with torchrun on each machine, "
            "or with srun (docs/scale.md)"
        )
    elif probe.num_devices > 1:
        raise SystemExit(_launch(words, probe.num_devices, max_restarts))
    else:
        return None
    planned, started = probe.num_devices * probe.num_nodes, environment.world_size()
    if planned != started:
        raise UserError(
            f"{launcher} started {started} processes, but trainer.devices={trainer.devices} and trainer.num_nodes="
            f"{trainer.num_nodes} stand for {planned}: give --trainer.devices the number of processes on each "
            "machine and --trainer.num_nodes the number of machines"
        )
    if started == 1:
        return None
    return Group(environment, "nccl" if probe.strategy.root_device.type == "cuda" else "gloo")


def _launch(words: Sequence[str], count: int, max_restarts: int) -> int:
    """Runs `svdd` in several processes on this machine under a torchelastic agent, and reports how they end.

    The agent passes SIGTERM on for either signal and waits for the batches at work; a second SIGINT ends all at once.
    After the death of a process it gives the others 30 seconds. torchelastic would restart the processes whatever the
    reason, so the attempts are counted here, where the exit code tells whether a restart can help.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stopped = 0

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        if not stopped:
            stopped = 128 + number
            raise SignalException(f"stopped by {number}", signal.SIGTERM)

    logging.disable(logging.ERROR)  # torchelastic's remarks; what there is to say is printed below
    os.environ |= {AGENT: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(10**6)}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        signals.deferred = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        for attempt in range(max_restarts + 1):
            try:
                _run_agent(words, count)
                return 0
            except ChildFailedError as error:
                code, reason = _explain(error)
                if reason:
                    print(f"svdd: {reason}", file=sys.stderr, flush=True)
            if code in _FINAL or attempt == max_restarts:
                break
            print(f"svdd: restart {attempt + 1} of {max_restarts}", file=sys.stderr, flush=True)
        return code
    except SignalException:
        signals.say(f"ended: {STOP_EXIT_CODES[stopped]}; finished images are kept, and the same command continues")
        return stopped


def _run_agent(words: Sequence[str], count: int) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="svdd-") as folder:  # each process may leave its error there
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="svdd",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder),
        )
        config.signals_to_handle = "SIGHUP"  # the other two are handled in `_launch`
        escaped = (word.replace("$", "$$") for word in words)  # torchelastic substitutes ${local_rank}
        elastic_launch(config, sys.executable)("-m", "svdd", *escaped)


def _explain(error: Any) -> tuple[int, str]:
    """Returns the exit code of the process that failed first, and why, in one line if that is not said yet."""
    rank, failure = error.get_first_failure()
    if failure.error_file_data.get("svdd"):
        return failure.exitcode, failure.message
    if failure.exitcode < 0:
        return 1, f"process {rank} was killed by {failure.signal_name()}; finished images are kept"
    if failure.exitcode in STOP_EXIT_CODES:
        return failure.exitcode, f"ended: {STOP_EXIT_CODES[failure.exitcode]} to process {rank}"
    return failure.exitcode, "" if failure.exitcode == 3 else f"process {rank} ended with exit code {failure.exitcode}"
