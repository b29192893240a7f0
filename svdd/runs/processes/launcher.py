"""Whether the processes that a launcher has started are those that the Trainer expects."""

import os
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

from svdd import UserError

__all__ = ["check_processes"]


def check_processes(config: Any) -> None:
    """Refuses a Trainer that would take other processes for its own, or none, than a launcher has started.

    Without this each of the processes of `torchrun` would do all the work where `devices` was forgotten.

    Args:
        config: The Trainer's settings.

    Raises:
        UserError: If the numbers differ.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher, started = "torchrun", int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        launcher, started = "SLURM", int(os.environ.get("SLURM_NTASKS", 1))
    else:
        return
    strategy = config.strategy if isinstance(config.strategy, str) else "ddp"
    probe = L.Trainer(
        accelerator=config.accelerator,
        strategy=strategy,
        devices=config.devices,
        num_nodes=config.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    planned = probe.num_devices * probe.num_nodes
    if planned != started:
        raise UserError(
            f"{launcher} started {started} processes, but trainer.devices={config.devices} and trainer.num_nodes="
            f"{config.num_nodes} stand for {planned}: give --trainer.devices the number of processes on each "
            "machine and --trainer.num_nodes the number of machines"
        )
