"""The numbers of a benchmark by category and overall, each with a 95 % interval over prompts.

Sources: Wilson, Probable Inference, 1927, with the effective sample size of a cluster sample (Korn and Graubard,
Confidence intervals for proportions with small expected number of positive counts, 1998); Zou and Donner, Construction
of confidence limits about effect measures, 2008 (the interval of a sum from those of its terms).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from svdd.evaluation.metrics.intervals import Weighted, clustered, mean_of, standard_error, t_interval, t_quantile

__all__ = ["OVERALL", "Line", "Score", "mean_over", "over_prompts", "summarise"]

OVERALL = "overall"


class Score(NamedTuple):
    """A number of one picture."""

    category: str
    metric: str
    value: float
    prompt: int  # index of the benchmark's prompt
    weight: float = 1.0  # of the picture among those of its image


class Line(NamedTuple):
    """A number of the benchmark, with its interval; the ends are NaN with a single prompt."""

    category: str
    metric: str
    mean: float
    low: float
    high: float
    prompts: int
    images: float


def summarise(
    scores: Iterable[Score], proportions: frozenset[str] = frozenset(), order: Sequence[str] = (), whole: str = ""
) -> list[Line]:
    """Returns a line for each metric and category, and one for each metric overall.

    Args:
        scores: Those of all pictures.
        proportions: Metrics that are 0 or 1 for each picture.
        order: Categories in the order of the lines; others follow in the order in which they come.
        whole: Category that holds a metric's overall number; if it has none, that is the mean over the categories.
    """
    table: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        table[score.metric][score.category].append(score)
    lines = []
    for metric, categories in table.items():
        names = [name for name in order if name in categories]
        names += [name for name in categories if name not in names]
        found = [over_prompts(name, metric, categories[name], metric in proportions) for name in names]
        lines += [line for line in found if line.category != whole]
        total = [line._replace(category=OVERALL) for line in found if whole and line.category == whole]
        lines += total or [mean_over(found)]
    return lines


def over_prompts(category: str, metric: str, scores: Sequence[Score], proportion: bool) -> Line:
    """Returns the mean over pictures, with an interval that treats the prompts as the sample.

    For a proportion it is Wilson's, with the number of independent pictures that the variance between prompts comes to,
    or the number of prompts if all pictures agree. Else it is Student's t.
    """
    pairs: list[Weighted] = [(score.value, score.weight) for score in scores]
    groups = clustered(pairs, [score.prompt for score in scores])
    mean, error, count = mean_of(pairs), standard_error(groups), len(groups)
    low, high = t_interval(mean, error, count)
    if proportion and count > 1:
        low, high = _wilson(mean, mean * (1 - mean) / error**2 if error else count, t_quantile(0.95, count - 1))
    return Line(category, metric, mean, low, high, count, math.fsum(weight for _, weight in pairs))


def mean_over(lines: Sequence[Line]) -> Line:
    """Returns the unweighted mean of categories whose prompts are different ones, with its interval."""
    mean = math.fsum(line.mean for line in lines) / len(lines)
    below, above = (
        math.sqrt(math.fsum((end - line.mean) ** 2 for line, end in zip(lines, ends, strict=True))) / len(lines)
        for ends in ([line.low for line in lines], [line.high for line in lines])
    )
    prompts, images = sum(line.prompts for line in lines), math.fsum(line.images for line in lines)
    return Line(OVERALL, lines[0].metric, mean, mean - below, mean + above, prompts, images)


def _wilson(mean: float, size: float, t: float) -> tuple[float, float]:
    centre, half = mean + t**2 / (2 * size), t * math.sqrt(mean * (1 - mean) / size + t**2 / (4 * size**2))
    return max((centre - half) / (1 + t**2 / size), 0.0), min((centre + half) / (1 + t**2 / size), 1.0)
