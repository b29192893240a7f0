"""Refuses NaN and infinity where they arise, before a reward or a selection sees them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdd import NotFinite, RewardError

__all__ = ["Finiteness", "require_finite"]


@dataclass
class Finiteness:
    """What a batch computed, checked for NaN and infinity where the run waits for the device anyway.

    On a CPU, which has computed what it returns, a check raises at once. On other devices it leaves a flag per row
    there, and `settle` reads all of them at once and raises what the first would have raised.
    """

    late: bool = False  # whether the device computes asynchronously
    _flags: list[tuple[Tensor, Callable[[], None]]] = field(default_factory=list)

    def require(self, part: str, source: Tensor, *found: Tensor, where: str, prompt: Callable[[int], str]) -> None:
        """Raises NotFinite, now or in `settle`; arguments as in `require_finite`."""
        if not self.late:
            return require_finite(part, source, *found, where=where, prompt=prompt)
        bad, before = _rows(*found), _rows(source)
        reason = _reason(source)
        self.check(bad, lambda: _raise(part, bad, before, reason, where, prompt))

    def check(self, bad: Tensor, refuse: Callable[[], None]) -> None:
        """Calls `refuse`, which raises an error, if an entry of `bad`, bool [n], is true: now or in `settle`."""
        if self.late:
            self._flags.append((bad, refuse))
        elif bool(bad.any()):
            refuse()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Settles at the end of a block that waits for the device, and before a RewardError from within it."""
        try:
            yield
        except RewardError:
            self.settle()
            raise
        self.settle()

    def settle(self) -> None:
        """Raises the error of the first check since the last call that failed; waits for the device once."""
        flags, self._flags = self._flags, []
        if flags and bool(torch.cat([bad for bad, _ in flags]).any()):
            for bad, refuse in flags:
                if bool(bad.any()):
                    refuse()


def require_finite(
    part: str, source: Tensor, *found: Tensor, where: str = "", prompt: Callable[[int], str] | None = None
) -> None:
    """Raises NotFinite if a row of `found`, [n, ...] each, has NaN or infinity; waits for the device.

    Args:
        part: What computed `found`; the sampler is named instead if rows of `source` are not finite either.
        source: What `found` was computed from, [n, ...].
        found: Tensors with one row per row of `source`.
        where: The step, for the message.
        prompt: Returns the prompt of a row.
    """
    if bool((bad := _rows(*found)).any()):
        _raise(part, bad, _rows(source), _reason(source), where, prompt)


def _raise(
    part: str, bad: Tensor, before: Tensor, reason: str, where: str, prompt: Callable[[int], str] | None
) -> None:
    part = "sampler" if bool(before.any()) else part
    first = "" if prompt is None else f", first for the prompt {prompt(int(bad.nonzero()[0]))!r}"
    count = f"{int(bad.sum())} of {len(bad)} rows{where}{first}"
    raise NotFinite(f"the {part} returned NaN or infinity for {count}; {reason}")


def _reason(source: Tensor) -> str:
    """Returns what may help, by the precision in which the rows were computed."""
    kind = source.device.type
    if torch.float16 in (source.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None):
        return (
            "float16 overflows above 65504: set --trainer.precision to bf16-true or 32-true (in Python: model.float())"
        )
    return "check the model's weights, its guidance_scale, and the scale of a sampler with gradients"


def _rows(*tensors: Tensor) -> Tensor:
    """Returns whether the sum of each row, over all tensors, is not finite, bool [n]."""
    sums = [tensor.detach().flatten(1).sum(1, dtype=torch.float32) for tensor in tensors]
    return ~sum(sums[1:], start=sums[0]).isfinite()
