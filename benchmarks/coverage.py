"""How often intervals cover the mean, and how often the over-optimisation check gives a false alarm: simulations.

Writes benchmarks/coverage.md: the intervals and the check of svdd beside those that they replaced.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from svdd.evaluation.baseline import over_optimised, paired
from svdd.evaluation.metrics.intervals import standard_error, t_interval, t_quantile

_LAWS = ("normal", "skewed", "two values")
_REWARDS = 10
_GUIDE = "guide"


def standardised(law: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns independent numbers of mean 0 and variance 1: normal, exponential minus 1, or -1 and 1."""
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if law == "normal":
        return normal
    uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (uniform < 0.5).double() * 2 - 1 if law == "two values" else -torch.log1p(-uniform) - 1


def coverage(law: str, prompts: int, images: int, correlation: float, data_sets: int) -> list[float]:
    """Returns how often each interval covers the mean, 0, of scores with an intraclass correlation.

    The intervals: 1.96 standard errors over images; the bootstrap of the prompts' means; Student's t over prompts.
    """
    generator = torch.Generator().manual_seed(prompts * images)
    between = standardised(law, (data_sets, prompts, 1), generator)
    within = standardised(law, (data_sets, prompts, images), generator)
    scores = correlation**0.5 * between + (1 - correlation) ** 0.5 * within
    mean, each = scores.mean((1, 2)), scores.mean(2)
    by_image = mean.abs() <= 1.96 * scores.flatten(1).std(1) / (prompts * images) ** 0.5
    chosen = torch.randint(prompts, (1000, prompts), generator=torch.Generator().manual_seed(0))
    times = torch.nn.functional.one_hot(chosen, prompts).sum(1).double()
    ends = (each @ times.T / prompts).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    by_bootstrap = (ends[0] <= 0) & (ends[1] >= 0)
    by_prompt = [_covers([[(score, 1.0) for score in group] for group in data]) for data in scores.tolist()]
    return [float(by_image.double().mean()), float(by_bootstrap.double().mean()), sum(by_prompt) / data_sets]


def uneven_coverage(law: str, prompts: int, correlation: float, data_sets: int) -> float:
    """Returns how often the interval covers the mean where the prompts have 1 to 4 images in turn."""
    generator = torch.Generator().manual_seed(prompts)
    between = standardised(law, (data_sets, prompts, 1), generator)
    within = standardised(law, (data_sets, prompts, 4), generator)
    scores = (correlation**0.5 * between + (1 - correlation) ** 0.5 * within).tolist()
    groups = ([[(score, 1.0) for score in group[: 1 + k % 4]] for k, group in enumerate(data)] for data in scores)
    return sum(map(_covers, groups)) / data_sets


def _covers(groups: list[list[tuple[float, float]]]) -> bool:
    scores = [score for group in groups for score, _ in group]
    low, high = t_interval(math.fsum(scores) / len(scores), standard_error(groups), len(groups))
    return low <= 0 <= high


def differences(law: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns prompts' differences of a held-out reward."""
    one, other = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return {
        "normal": one,
        "two values, -1 and 1": one.sign(),
        "skewed scores, equal laws": one.exp() - other.exp(),
        "heavy tails (Cauchy)": one / other,
        "skewed, mean 0 (lognormal)": one.exp() - math.exp(0.5),
        "skewed, mean 0 (exponential)": standardised("skewed", shape, generator),
        "a fall by 1 standard deviation": one - 1,
    }[law]


def alarms(law: str, prompts: int, runs: int) -> dict[int, tuple[float, float | None]]:
    """Returns the rates of alarms for 1, 3 and 10 held-out rewards, of the former check and of the present one.

    The guide has risen. The former check asked whether Student's t interval, Bonferroni-corrected, lies below 0.
    """
    data = differences(law, (runs, _REWARDS, prompts), torch.Generator().manual_seed(prompts))
    t = data.mean(2) / (data.std(2) / prompts**0.5)
    risen = paired([1.0 + 0.01 * k for k in range(prompts)])
    entries = [[paired(row) for row in run] for run in data.tolist()]
    found: dict[int, tuple[float, float | None]] = {}
    for count in (1, 3, _REWARDS):
        parts = range(0, _REWARDS - count + 1, count)  # with one reward, a run of ten makes ten runs
        critical = -t_quantile(1 - 0.05 / count, prompts - 1)
        former = torch.stack([(t[:, k : k + count] < critical).any(1) for k in parts]).double().mean()
        present = []
        for run in entries:
            for k in parts:
                held_out = {str(j): entry for j, entry in enumerate(run[k : k + count])}
                present.append(over_optimised({_GUIDE: risen} | held_out, _GUIDE, {}))
        untested = present[0] is None
        found[count] = (float(former), None if untested else sum(map(bool, present)) / len(present))
    return found


def main() -> None:
    """Simulates, prints and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_sets", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(p, k, c) for p in (5, 12, 40) for k in (1, 4) for c in (0.0, 0.3, 0.8) if k > 1 or c == 0]
    rows = [(cell, [coverage(law, *cell, options.data_sets) for law in _LAWS]) for cell in cells]
    uneven = [(p, [uneven_coverage(law, p, 0.3, options.data_sets) for law in _LAWS]) for p in (5, 12, 40)]
    flat = [numbers for _, by_law in rows for numbers in by_law]
    spans = [f"{min(column):.2f} to {max(column):.2f}" for column in zip(*flat, strict=True)]
    lines = [
        "# Coverage of intervals and false alarms",
        "",
        "Simulations. Made by `python -m benchmarks.coverage`.",
        "",
        "## How often a 95 % interval covers the mean",
        "",
        f"{options.data_sets} data sets in each cell (standard error at most {0.5 / options.data_sets**0.5:.3f}). A "
        "prompt's images have the given intraclass correlation, which has no effect on single images; prompts and "
        "images vary by a normal, a skewed (exponential) or a two-valued law. "
        "Each cell shows three intervals: mean +- 1.96 standard errors over "
        "images, as before; the percentile bootstrap over prompts, as before; Student's t over prompts, as now. Over "
        f"all cells they cover {spans[0]}, {spans[1]} and {spans[2]}.",
        "",
        f"| prompts | images | correlation | {' | '.join(_LAWS)} |",
        "|---:|---:|---:|" + "---:|" * len(_LAWS),
    ]
    for (prompts, images, correlation), by_law in rows:
        shown = " | ".join(", ".join(f"{number:.2f}" for number in numbers) for numbers in by_law)
        lines.append(f"| {prompts} | {images} | {correlation:g} | {shown} |")
    lines += [
        "",
        "Unequal numbers of images, 1 to 4 in turn, correlation 0.3, Student's t over prompts:",
        "",
        f"| prompts | {' | '.join(_LAWS)} |",
        "|---:|" + "---:|" * len(_LAWS),
        *(f"| {prompts} | {' | '.join(f'{number:.2f}' for number in numbers)} |" for prompts, numbers in uneven),
        "",
        "## How often the over-optimisation check gives an alarm",
        "",
        f"The guide has risen, held-out rewards are independent. {options.runs * _REWARDS} runs with 1 reward, "
        f"{options.runs * 3} with 3, {options.runs} with 10 (standard error at 2.5 %: "
        f"{(0.025 * 0.975 / options.runs / _REWARDS) ** 0.5:.3f}, {(0.025 * 0.975 / options.runs / 3) ** 0.5:.3f}, "
        f"{(0.025 * 0.975 / options.runs) ** 0.5:.3f}). Each cell: the former check (Student's t), the present one "
        "(sign flips and a t corrected for skewness); a dash where it says that nothing can be said. At most 0.025 is "
        "promised for differences that are symmetric around 0. No test can promise it for skewed differences of mean "
        "0 (Bahadur and Savage, 1956); these do not arise if guidance leaves the reward's law alone. The last rows "
        "are true alarms.",
        "",
        "| differences | prompts | 1 reward | 3 rewards | 10 rewards |",
        "|---|---:|---:|---:|---:|",
    ]
    for law in (
        "normal",
        "two values, -1 and 1",
        "skewed scores, equal laws",
        "heavy tails (Cauchy)",
        "skewed, mean 0 (lognormal)",
        "skewed, mean 0 (exponential)",
        "a fall by 1 standard deviation",
    ):
        for prompts in (2, 5, 6, 8, 12, 40):
            found = alarms(law, prompts, options.runs).values()
            shown = " | ".join(f"{a:.3f}, {'-' if b is None else format(b, '.3f')}" for a, b in found)
            lines.append(f"| {law} | {prompts} | {shown} |")
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
