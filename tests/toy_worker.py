"""A worker that draws numbers, in a module that a new process imports quickly."""

import os
import signal
from typing import Any

__all__ = ["toy"]


def toy(link: Any, number: int) -> None:
    """Draws batches of numbers; dies at the beginning of the job `fatal`."""
    while (order := link.ask("next")).kind != "stop":
        if order.name == "fatal":
            os.kill(os.getpid(), signal.SIGKILL)
        if order.kind == "draw":
            link.tell("begin", order.name, [[k] for k in range(4)], 1.0)
        batch: list[int] = []
        while batch := link.ask("take", order.name, batch)[0]:
            print(order.name, batch)
        link.tell("end", order.name, "refused" if order.name == "bad" else "")
