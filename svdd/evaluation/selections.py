"""Whether a run's sampler made use of its candidates."""

import math
from typing import Any

from svdd.samplers.base import Sampler
from svdd.samplers.budget import current_count

__all__ = ["idle"]

_RANDOM = 0.98  # effective sample size as a share of the rows: choices at nearly equal weights


def idle(sampler: Sampler, summary: dict[str, Any]) -> str:
    """Returns why the selections of a finished run had no effect, and what to do; empty if they had one.

    Args:
        sampler: The sampler of the run.
        summary: The summary of the run, with the means of `svdd.state.trace.STATISTICS`.
    """
    name, count = type(sampler).__name__, current_count(sampler)
    if not count or "choices" not in summary:
        return ""  # a sampler without candidates
    spread, weighted = summary.get("spread"), summary.get("ess")
    if not summary["choices"]:
        alone = " and ".join(f"{key}=1" for key, number in count.items() if number == 1)
        cause = f"{alone} leaves nothing to choose from; raise it" if alone else "an image's rows had equal values"
        return f"{name} never had a choice: {cause}" if alone or spread is not None else ""
    moved = summary["resamplings"] or sampler.needs_gradient  # by selections, or by gradients
    if weighted is None or spread is None or (moved and weighted < _RANDOM):
        return ""
    effect = f"{name} chose almost at random" if summary["resamplings"] else f"{name} never resampled"
    alpha = summary["alpha"]["mean"] if "alpha" in summary else math.inf
    if alpha < spread or getattr(getattr(sampler, "weighing", sampler), "alpha", None) == "auto":
        return f"{effect}: its particles met at the end only, as in BestOfN; raise ess_threshold or widen the window"
    cause = f"alpha={alpha:.3g} is large against the spread of an image's values, {spread:.2g}"
    met = "" if summary["resamplings"] else ", so its particles met at the end only, as in BestOfN"
    return f"{effect}: {cause}{met}; use a lower one, or alpha: auto if {name} takes it"
