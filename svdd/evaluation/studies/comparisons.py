"""Statistics of the rewards of a cell, and their differences to those of another one, clustered by prompt.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6 (standard errors by resampling); Field
and Welsh, Bootstrapping clustered data, 2007 (resampling of whole clusters).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from svdd.evaluation.baseline import paired
from svdd.evaluation.metrics.intervals import t_interval
from svdd.evaluation.metrics.reward_statistics import RewardStatistics
from svdd.evaluation.studies.measures import Drawn

__all__ = ["Difference", "Estimate", "Scores", "differences", "estimates", "scores_of"]

_RESAMPLES, _AT_ONCE = 1000, 2**20
_LEVELS = {"median": 0.5, "top10": 0.9, "top20": 0.8}


class Estimate(NamedTuple):
    """A statistic of a reward."""

    value: float
    error: float  # its standard error; NaN with one prompt


class Difference(NamedTuple):
    """The difference of a statistic to that of the baseline, over the images that both have drawn."""

    value: float
    error: float  # its standard error; this and the interval are NaN with one prompt
    low: float  # the interval is that of one of several comparisons, which hold together with 95 %
    high: float
    p_value: float  # not corrected; NaN where there is no test
    prompts: int


class Scores(NamedTuple):
    """One reward of a cell, an entry per picture."""

    scores: np.ndarray
    weights: np.ndarray
    prompts: np.ndarray
    images: np.ndarray
    starts: np.ndarray

    def only(self, chosen: np.ndarray) -> "Scores":
        """Returns some of the entries."""
        return Scores(*(column[chosen] for column in self))


def scores_of(drawn: Drawn, name: str) -> Scores | None:
    """Returns the scores of a reward, or of `path_kl_sample`; None if the cell has none."""
    scores = drawn.divergence if name == "path_kl_sample" else drawn.rewards.get(name)
    if scores is None or not (known := np.isfinite(scores)).any():
        return None
    return Scores(scores, drawn.weights, drawn.prompts, drawn.images, drawn.starts).only(known)


def estimates(scores: Scores, statistics: Sequence[str], higher_is_better: bool = True) -> dict[str, Estimate]:
    """Returns statistics as in `RewardStatistics`, of mean, median, top10 and top20.

    The standard error of the mean is the clustered one; that of a quantile comes from a bootstrap of the prompts.
    """
    found, quantiles = _values(scores, higher_is_better), [name for name in statistics if name in _LEVELS]
    errors = {"mean": found["standard_error"]}
    if quantiles:
        spread = _replicates(scores, np.unique(scores.prompts), quantiles, higher_is_better).std(0, ddof=1)
        errors |= dict(zip(quantiles, spread.tolist(), strict=True))
    return {name: Estimate(found[name], errors[name]) for name in statistics}


def differences(
    ours: Scores, baseline: Scores, statistics: Sequence[str], comparisons: int = 1, higher_is_better: bool = True
) -> dict[str, Difference]:
    """Returns the differences of statistics over the images that both have drawn; none if they share none.

    Images are the same if prompt, text, number and random seed are.

    That of means is `paired` by prompt. That of quantiles is the difference of the two quantiles; its error comes from
    a bootstrap that draws the same prompts for both, and its interval from Student's t, whose degrees of freedom are
    the prompts less one.
    """
    ours, baseline = _shared(ours, baseline)
    if not len(ours.scores):
        return {}
    found = {"mean": _paired(ours, baseline, comparisons)} if "mean" in statistics else {}
    if quantiles := [name for name in statistics if name in _LEVELS]:
        clusters = np.unique(ours.prompts)
        values = [_values(side, higher_is_better) for side in (ours, baseline)]
        resampled = [_replicates(side, clusters, quantiles, higher_is_better) for side in (ours, baseline)]
        errors = (resampled[0] - resampled[1]).std(0, ddof=1).tolist()
        for name, error in zip(quantiles, errors, strict=True):
            change = values[0][name] - values[1][name]
            ends = t_interval(change, error, len(clusters), 1 - 0.05 / comparisons)
            found[name] = Difference(change, error, *ends, math.nan, len(clusters))
    return {name: found[name] for name in statistics}


def _paired(ours: Scores, baseline: Scores, comparisons: int) -> Difference:
    """Returns the mean over prompts of the mean difference of their images."""
    (prompts, scores), (_, plain) = (_by_image(side) for side in (ours, baseline))
    starts = np.flatnonzero(np.diff(prompts, prepend=-1))
    means = np.add.reduceat(scores - plain, starts) / np.diff(starts, append=len(prompts))
    entry = paired(means.tolist(), comparisons=comparisons)
    ends = (entry["ci95_low"], entry["ci95_high"])
    return Difference(entry["difference"], entry["standard_error"], *ends, entry["p_value"], len(means))


def _values(scores: Scores, higher_is_better: bool) -> dict[str, float]:
    metric = RewardStatistics(higher_is_better, sync_on_compute=False)
    metric.update(*(torch.from_numpy(column) for column in (scores.scores, scores.prompts, scores.weights)))
    return {name: value.item() for name, value in metric.compute().items()}


def _shared(*sides: Scores) -> list[Scores]:
    """Returns both sides without the pictures of images that the other does not have, in the order of the images."""
    keys = [np.stack([side.prompts, side.starts, side.images], 1) for side in sides]
    codes = np.unique(np.concatenate(keys), axis=0, return_inverse=True)[1].reshape(-1)
    ours, others = np.split(codes, [len(keys[0])])
    both = (np.isin(ours, others), np.isin(others, ours))
    return [
        side.only(chosen).only(np.argsort(code[chosen], kind="stable"))
        for side, chosen, code in zip(sides, both, (ours, others), strict=True)
    ]


def _by_image(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompt and the weighted mean of each image; the pictures of an image follow each other."""
    new = np.diff(scores.prompts, prepend=-1).astype(bool) | np.diff(scores.images, prepend=-1).astype(bool)
    starts, image = np.flatnonzero(new), np.cumsum(new) - 1
    totals = np.add.reduceat(scores.weights, starts)
    weights = np.where(totals[image] > 0, scores.weights, 1.0)
    sums = np.add.reduceat(scores.scores * weights, starts)
    return scores.prompts[starts], sums / np.add.reduceat(weights, starts)


def _replicates(scores: Scores, clusters: np.ndarray, names: Sequence[str], higher_is_better: bool) -> np.ndarray:
    """Returns quantiles of resamples of the prompts `clusters`, [resamples, names], the same for equal numbers of them.

    A resample is a list in which the pictures of a prompt occur as often as the prompt was drawn; `RewardStatistics`
    defines its quantiles. The spread is scaled as that of a sample of unknown mean. With one prompt, all are NaN.
    """
    count = len(clusters)
    levels = [_LEVELS[name] if higher_is_better else 1 - _LEVELS[name] for name in names]
    weighted = np.flatnonzero(scores.weights > 0)
    order = weighted[np.lexsort((scores.weights[weighted], scores.scores[weighted]))]
    places = np.searchsorted(clusters, scores.prompts[order])
    columns = (scores.scores[order], scores.weights[order], places)
    found = _bootstrap(*(column.tobytes() for column in columns), count, tuple(levels))
    return found * math.sqrt(count / max(count - 1, 1))


@lru_cache(maxsize=64)  # a baseline is compared with many cells
def _bootstrap(values: bytes, weights: bytes, places: bytes, count: int, levels: tuple[float, ...]) -> np.ndarray:
    """Returns quantiles of resamples of sorted scores, [resamples, levels]; `places` count the prompts from 0."""
    numbers, shares, prompts = np.frombuffer(values), np.frombuffer(weights), np.frombuffer(places, np.intp)
    generator = np.random.default_rng(0)
    found, at_once = np.full((_RESAMPLES, len(levels)), np.nan), max(1, _AT_ONCE // max(len(numbers), count))
    for begin in range(0, _RESAMPLES if count > 1 else 0, at_once):
        part = found[begin : begin + at_once]
        drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in part]
        part[:] = _resampled(numbers, shares, np.stack(drawn)[:, prompts], np.array(levels))
    return found


def _resampled(values: np.ndarray, weights: np.ndarray, copies: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns quantiles of lists in which sorted values [n] occur in several copies [lists, n]; NaN for an empty list.

    Each value's copies lie their weight apart, so that they reach from one knot to another, and neighbours the mean of
    their weights. All lists lie on one axis, each beyond the one before.
    """
    ends = np.cumsum(copies * weights, 1)
    ends += np.arange(len(copies))[:, None] * (ends[:, -1].max() + 1)
    starts, half = ends - copies * weights + weights / 2, np.broadcast_to(weights / 2, copies.shape)
    present = copies > 0
    knots = np.stack([starts[present], (ends - half)[present]], 1).ravel()
    lengths = 2 * present.sum(1)
    if not lengths.all():  # a resample in which all weights are 0
        return np.full((len(copies), len(levels)), np.nan)
    last = np.cumsum(lengths) - 1
    first, heights = knots[last - lengths + 1], np.broadcast_to(values, copies.shape)[present].repeat(2)
    return np.interp(first[:, None] + levels * (knots[last] - first)[:, None], knots, heights)
