"""How often the intervals of differences between runs hold, and how often the over-optimisation check gives an alarm.

Writes benchmarks/paired_coverage.md. Simulated runs of several prompts with several images each, compared as `svdd
compare`, the tables of `svdd study` and `evaluation.baseline` do.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svdd.evaluation.baseline import independent, over_optimised, paired

PROMPTS = (6, 12, 30)
IMAGES = {"1": [1], "2": [2], "4": [4], "1 to 4": [1, 2, 3, 4]}  # of the prompts, in turn
LAWS = ("normal", "skewed", "heavy tails")
GAINS = ("none", "the same", "normal", "skewed")  # over prompts
_BETWEEN, _SHARED = 0.5, 0.3  # of the variance of a score: of the prompt, and of the seed, in all runs

Scores = npt.NDArray[np.float64]


def draw(law: str, shape: tuple[int, ...], random: np.random.Generator) -> Scores:
    """Returns numbers of mean 0 and variance 1: normal, exponential, or Student's t with 3 degrees of freedom."""
    if law == "normal":
        return random.normal(size=shape)
    return random.exponential(size=shape) - 1 if law == "skewed" else random.standard_t(3, size=shape) / 3**0.5


def gains(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> Scores:
    """Returns the gain of each prompt, of mean 0.5 unless there is none."""
    if kind == "normal":
        return 0.5 + 0.5 * random.normal(size=shape)
    return 0.5 * random.exponential(size=shape) if kind == "skewed" else np.full(shape, 0.5 * (kind != "none"))


def runs(law: str, prompts: int, count: int, sets: int, random: np.random.Generator) -> Scores:
    """Returns scores of `count` runs before any gain, [sets, runs, prompts, 4 images]."""
    between = draw(law, (sets, 1, prompts, 1), random)
    shared = draw(law, (sets, 1, prompts, 4), random)
    own = draw(law, (sets, count, prompts, 4), random)
    return _BETWEEN**0.5 * between + _SHARED**0.5 * shared + (1 - _BETWEEN - _SHARED) ** 0.5 * own


def means(scores: Scores, images: Sequence[int]) -> Scores:
    """Returns the mean of each prompt, [..., prompts], over the first images that it has."""
    counts = np.resize(images, scores.shape[-2])
    return (scores * (np.arange(4) < counts[:, None])).sum(-1) / counts


def coverage(law: str, gain: str, prompts: int, images: Sequence[int], others: int, sets: int) -> float:
    """Returns how often the intervals of all `others`, compared with one run, hold together."""
    random = np.random.default_rng([prompts, len(images), images[0], others, LAWS.index(law), GAINS.index(gain)])
    each = means(runs(law, prompts, 1 + others, sets, random), images)
    differences = each[:, 1:] - each[:, :1] + gains(gain, (sets, others, prompts), random)
    truth = 0.5 * (gain != "none")
    held = [_held(paired(row, None, others, False), truth) for rows in differences.tolist() for row in rows]
    return float(np.array(held).reshape(sets, others).all(1).mean())


def welch_coverage(law: str, gain: str, prompts: int, images: Sequence[int], sets: int) -> float:
    """Returns how often the interval holds for runs of other prompts, half as many in one of them."""
    random = np.random.default_rng([1, prompts, len(images), images[0], LAWS.index(law), GAINS.index(gain)])
    one, other = (means(runs(law, count, 1, sets, random)[:, 0], images) for count in (prompts, prompts // 2))
    one += gains(gain, one.shape, random)
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return float(np.mean([_held(independent(*pair), 0.5 * (gain != "none")) for pair in pairs]))


def alarms(law: str, gain: str, prompts: int, images: Sequence[int], rewards: int, sets: int) -> float | None:
    """Returns the rate of alarms: the guide rises, and the held-out rewards differ by gains of mean 0."""
    random = np.random.default_rng([2, prompts, len(images), images[0], rewards, LAWS.index(law), GAINS.index(gain)])
    risen, found = paired([1 + 0.01 * k for k in range(prompts)]), []
    held_out = []
    for _ in range(rewards):
        each = means(runs(law, prompts, 2, sets, random), images)
        shift = gains(gain, (sets, prompts), random)
        held_out.append(each[:, 1] - each[:, 0] + shift - 0.5 * (gain != "none"))
    for rows in zip(*(each.tolist() for each in held_out), strict=True):
        found.append(
            over_optimised({"guide": risen} | {str(k): paired(row) for k, row in enumerate(rows)}, "guide", {})
        )
    return None if found[0] is None else float(np.mean([bool(each) for each in found]))


def _held(entry: dict[str, float], truth: float) -> bool:
    return entry["ci95_low"] <= truth <= entry["ci95_high"]


def table(first: str, rows: dict[str, list[float | None]], columns: Sequence[str]) -> list[str]:
    """Returns the lines of a table of rates."""
    lines = ["", f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, rates in rows.items():
        lines.append(f"| {name} | {' | '.join('-' if rate is None else f'{rate:.3f}' for rate in rates)} |")
    print("\n".join(lines), flush=True)
    return lines


def span(rows: dict[str, list[float | None]], gain: str = "") -> str:
    """Returns the lowest and the highest rate of the rows whose name holds `gain`."""
    rates = [rate for name, each in rows.items() if name.endswith(gain) for rate in each if rate is not None]
    return f"{min(rates):.3f} to {max(rates):.3f}"


def main() -> None:
    """Simulates, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    cells = [(prompts, images) for prompts in PROMPTS for images in IMAGES]
    columns = [f"{prompts} x {images}" for prompts, images in cells]
    kinds = [(law, gain) for gain in GAINS for law in LAWS]
    sets = options.sets
    single = {
        f"{law}, {gain}": [coverage(law, gain, prompts, IMAGES[images], 1, sets) for prompts, images in cells]
        for law, gain in kinds
    }
    first = "scores, gain"
    tables = [table(first, single, columns)]
    several = {
        f"{law}, {gain}": [coverage(law, gain, p, IMAGES[images], 5, sets) for p in PROMPTS for images in ("1", "4")]
        for law, gain in kinds
    }
    few = [f"{prompts} x {images}" for prompts in PROMPTS for images in ("1", "4")]
    tables.append(table(first, several, few))
    welch = {
        f"{law}, {gain}": [welch_coverage(law, gain, p, IMAGES[images], sets) for p in PROMPTS for images in ("1", "4")]
        for law, gain in kinds
    }
    tables.append(table(first, welch, few))
    three = [(p, images) for p, images in cells if images != "2"]
    checks = {
        f"{law}, {gain}, {rewards} held out": [
            alarms(law, gain, p, IMAGES[images], rewards, sets // 2) for p, images in three
        ]
        for rewards in (1, 3)
        for law, gain in kinds
        if gain in ("none", "normal")
    }
    tables.append(table("scores, gain of mean 0", checks, [f"{p} x {i}" for p, i in three]))
    known = [rate for rates in checks.values() for rate in rates if rate is not None]
    mean = sum(known) / len(known)
    error, alarm = (0.95 * 0.05 / sets) ** 0.5, (0.025 * 0.975 / (sets // 2)) ** 0.5
    lines = [
        "# Coverage of differences between runs",
        "",
        f"Simulations, {sets} data sets in each cell: the standard error of a rate is {error:.4f} at 0.95. A score is "
        f"the sum of a part of its prompt ({_BETWEEN:g} of the variance), of its seed, in all runs ({_SHARED:g}), and "
        "of its own; all follow one law of variance 1: normal, skewed (exponential), or with heavy tails (Student's t "
        "with 3 degrees of freedom). The gain over the baseline is none, the same 0.5 for all prompts, or it varies "
        "over the prompts with mean 0.5 and standard deviation 0.5, by a normal or a skewed (exponential) law. "
        "Columns: prompts x images of a prompt, `1 to 4` in turn. Made by `python -m benchmarks.paired_coverage`.",
        "",
        "## One run compared with another, 95 % interval",
        "",
        f"By Student's t over the prompts' differences: {span(single, 'none')} without a gain, {span(single, 'same')} "
        f"with the same one, {span(single, ', normal')} and {span(single, ', skewed')} with one that varies. Without a "
        "gain, or with the same one, differences are symmetric, and the interval covers too much if anything. If few "
        "prompts gain much and most of them little, the interval misses more often than it states: its centre and its "
        "width rise and fall together.",
        *tables[0],
        "",
        "## Five runs compared with one, all five intervals together",
        "",
        f"Bonferroni: {span(several, 'none')} without a gain, {span(several, 'same')} with the same one, "
        f"{span(several, ', normal')} and {span(several, ', skewed')} with one that varies. As the five share the "
        "baseline, the correction is too strong rather than too weak; skewed gains miss more often than in one "
        "comparison, as they matter most in the tails.",
        *tables[1],
        "",
        "## Runs of other prompts (`--unpaired`)",
        "",
        f"By Welch's t; one run has the given number of prompts, the other half as many: {span(welch)}.",
        *tables[2],
        "",
        "## False alarms of the over-optimisation check",
        "",
        f"The guide has risen; held-out rewards do not change, or change by prompt around 0; {sets // 2} runs in each "
        f"cell (standard error {alarm:.4f} at 0.025), a dash where the check says that it cannot tell. At most 0.025 "
        f"is promised; found: {span(checks)}, on average {mean:.3f}.",
        *tables[3],
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
