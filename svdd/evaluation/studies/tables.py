"""The tables of a study: one per guide, with a row per variant and budget."""

import math
from collections.abc import Callable, Sequence
from statistics import median

from svdd.evaluation.rendering import Bold, Cell, render, shown
from svdd.evaluation.studies.comparisons import Difference, Estimate
from svdd.evaluation.studies.fronts import standings
from svdd.evaluation.studies.results import Entry, Group, Key
from svdd.evaluation.studies.specification import Study

__all__ = ["write_csv", "write_markdown", "write_tex"]

_WORDS = {"mean": "mean", "median": "median", "top10": "top 10 %", "top20": "top 20 %"}
_STANDINGS = {"front": "yes", "open": "within noise", "dominated": "no"}
_WORK = ("denoiser_rows", "network_rows", "gradient_rows", "rows", "decoded_images", "reward_calls", "seconds")
_DIVERSITY = ("pairwise_within", "vendi_within", "pairwise", "vendi")


def write_csv(study: Study, groups: Sequence[Group]) -> str:
    """Returns all numbers in full, a line per cell."""
    rewards = list(dict.fromkeys(reward for group in groups for reward in group.rewards))
    keys = [(reward, key) for reward in rewards for key in dict.fromkeys(["mean", *study.statistics])]
    headers = ["cell", "guide", "variant", "budget", "status", "pictures", "expected", "baseline", "comparisons"]
    for reward, key in keys:
        headers += [f"{reward}.{key}", f"{reward}.{key}.standard_error"]
        parts = ("difference", "difference.standard_error", "low", "high", "p_value", "prompts")
        headers += [f"{reward}.{key}.{part}" for part in parts]
    headers += [f"diversity.{name}" for name in _DIVERSITY] + ["path_kl", "path_kl.standard_error"]
    headers += [*_WORK, "over_optimised"]
    return render(headers, [_line(group, each, keys) for group in groups for each in group.entries], "csv")


def _line(group: Group, entry: Entry, keys: Sequence[Key]) -> list[Cell]:
    drawn, cell = entry.drawn, entry.drawn.cell
    state = "finished" if drawn.finished else "unfinished" if len(drawn) else "missing"
    line: list[Cell] = [cell.name, cell.guide, cell.variant, cell.budget, state, len(drawn), drawn.expected]
    line += [entry.baseline, group.comparisons if entry.baseline else None]
    for key in keys:
        line += entry.values.get(key, (None, None))
        line += entry.differences.get(key, (None,) * len(Difference._fields))
    line += [entry.diversity.get(name) for name in _DIVERSITY]
    line += entry.path_kl or (None, None)
    line += [entry.work[name] for name in _WORK]
    return [*line, None if entry.over_optimised is None else "; ".join(entry.over_optimised)]


def write_markdown(study: Study, groups: Sequence[Group]) -> str:
    """Returns a page with a table and its notes for each guide."""
    parts = [f"# {shown(study.folder.resolve().name, 'md')}\n"]
    for group in groups:
        parts += [f"## {shown(_title(group), 'md')}\n", render(*_table(study, group), "md")]
        parts += ["".join(f"- {shown(note, 'md')}\n" for note in _notes(study, group))]
    return "\n".join(parts)


def write_tex(study: Study, groups: Sequence[Group]) -> str:
    """Returns a LaTeX table for each guide, for the packages booktabs and graphicx."""
    parts = ["% \\usepackage{booktabs,graphicx}\n"]
    for number, group in enumerate(groups, 1):
        caption = shown(f"{_title(group)}. {' '.join(_notes(study, group))}", "tex")
        parts += [
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{caption}}}\n  \\label{{tab:study-{number}}}\n"
            f"  \\resizebox{{\\linewidth}}{{!}}{{%\n{render(*_table(study, group), 'tex')}  }}\n\\end{{table}}\n"
        ]
    return "\n".join(parts)


def _title(group: Group) -> str:
    """Returns the heading of a group: the guide's name in the study, and its reward if that has another name."""
    reward = f" ({group.guide})" if group.name and group.guide and group.guide != group.name else ""
    return f"Guide {group.name or group.guide or '?'}{reward}"


def _table(study: Study, group: Group) -> tuple[list[str], list[list[Cell]]]:
    """Returns the headers and the rows; columns without any entry are left out."""
    entries = group.entries
    columns: list[tuple[str, list[Cell]]] = [
        ("variant", [each.drawn.cell.variant for each in entries]),
        ("budget", [_text(each.drawn.cell.budget, str) for each in entries]),
        ("images", [each.drawn.status for each in entries]),
    ]
    for key in ((reward, statistic) for reward in group.rewards for statistic in study.statistics):
        name = key[0] if study.statistics == ["mean"] else f"{key[0]}, {_WORDS[key[1]]}"
        values = [each.values.get(key) for each in entries]
        changes = [each.differences.get(key) for each in entries]
        texts, best = [_value(each, _digits(values)) for each in values], _best(group, key)
        columns += [(name, [Bold(text) if k in best and text else text for k, text in enumerate(texts)])]
        columns += [(f"\u2212 {study.baseline}", [_difference(each, _digits(changes)) for each in changes])]
    for x, y in study.fronts:
        found = standings(study, group, (x, y))
        columns += [(f"front {x} / {y}", [_STANDINGS.get(found.get(each.drawn.cell.name, "")) for each in entries])]
    columns += [("diversity", [_text(each.diversity.get(_diversity(group)), "{:.3f}".format) for each in entries])]
    columns += [("KL", [_value(each.path_kl, _digits([each.path_kl])) for each in entries])]
    for name, heading in (("rows", "rows"), ("decoded_images", "decoded"), ("seconds", "seconds")):
        columns += [(heading, [_text(each.work[name], _short) for each in entries])]
    kept = [(heading, cells) for heading, cells in columns if heading == "variant" or any(cells)]
    return [heading for heading, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]


def _notes(study: Study, group: Group) -> list[str]:
    """Returns what a reader needs to know about the numbers of a table, a sentence or two in each entry."""
    quantiles = [_WORDS[key] for key in study.statistics if key != "mean"]
    notes = ["Means over images \u00b1 standard errors clustered by prompt."]
    if quantiles:
        notes = [
            f"Statistics over images \u00b1 standard errors clustered by prompt; those of {' and '.join(quantiles)} "
            "are from a bootstrap of the prompts. Top 10 %: the score that the best tenth of the images reach."
        ]
    if lower := [reward for reward in group.rewards if reward in group.lower_is_better]:
        notes += [f"Lower is better for {', '.join(lower)}."]
    if group.comparisons:
        level = 100 * (1 - 0.05 / group.comparisons)
        notes += [
            f"Differences to {study.baseline} are over the images that both have drawn, paired by prompt. Their "
            f"intervals (Student's t) hold together with 95 % for the {group.comparisons} comparisons of each reward "
            f"(Bonferroni: {level:.5g} % each). Bold: the best of its budget, if its interval excludes 0."
        ]
    if study.fronts:
        notes += [
            "Front: yes if no run of its budget, and none without a budget, has better means of both rewards; no if "
            "one is better in both beyond doubt (one-sided paired t-tests over prompts at 2.5 %, divided by the number "
            "of rivals); else within noise."
        ]
    if any(each.diversity for each in group.entries):
        where = "pairs of images of a prompt" if _diversity(group).endswith("within") else "all pairs of images"
        notes += [f"Diversity: the mean of 1 - cosine of CLIP embeddings over {where}."]
    if any(each.path_kl for each in group.entries):
        notes += ["KL: an estimate of a bound on the divergence from the pretrained model, in nats."]
    per = "" if group.unit == 1 else f", {group.unit} network rows each"
    notes += [
        f"Rows: denoiser rows per image{per}; a backward pass counts as two more. Budgets match rows, not how many "
        "pictures are decoded per image, nor the seconds in the sampler per image."
    ]
    if unfinished := [each for each in group.entries if not each.drawn.finished]:
        notes += [f"{len(unfinished)} of {len(group.entries)} cells are unfinished; images: those drawn of all."]
    return notes + _over_optimisation(study, group)


def _over_optimisation(study: Study, group: Group) -> list[str]:
    """Returns in which cells a held-out reward fell while the guide rose, and in which this cannot be tested."""
    tested = [each for each in group.entries if (group.guide, "mean") in each.differences]
    notes = []
    for reward in group.rewards[1:]:
        found = [
            f"{_name(each)} ({_short(each.differences[reward, 'mean'].value, '+')})"
            for each in tested
            if reward in (each.over_optimised or ())
        ]
        if found:
            what = f"{group.guide} rose and the held-out {reward} became worse in {', '.join(found)}"
            notes += [f"Over-optimisation: {what} (sign-flip tests, corrected like the intervals)."]
    if len(group.rewards) > 1 and (unknown := [_name(each) for each in tested if each.over_optimised is None]):
        where = "" if len(unknown) == len(tested) else f" in {', '.join(unknown)}"
        notes += [f"Over-optimisation cannot be tested{where}: no change would be significant with so few prompts."]
    return notes


def _name(entry: Entry) -> str:
    cell = entry.drawn.cell
    return cell.variant if cell.budget is None else f"{cell.variant} at {cell.budget}"


def _diversity(group: Group) -> str:
    """Returns which entry of `Diversity` the table shows: within prompts if a prompt has several images."""
    within = any(each.diversity.get("pairwise_within") is not None for each in group.entries)
    return "pairwise_within" if within else "pairwise"


def _best(group: Group, key: Key) -> set[int]:
    """Returns the entries that are the best of their budget and better than the baseline beyond doubt."""
    sign, found = -1 if key[0] in group.lower_is_better else 1, set()
    budgets = {each.drawn.cell.budget for each in group.entries}
    for budget in budgets - {None} or budgets:
        rivals = [
            (sign * each.values[key].value, k)
            for k, each in enumerate(group.entries)
            if each.drawn.cell.budget == budget and each.drawn.finished and key in each.values
        ]
        if not rivals:
            continue
        for best in (k for score, k in rivals if score == max(rivals)[0]):
            change = group.entries[best].differences.get(key)
            if change is not None and (change.low > 0 if sign > 0 else change.high < 0):
                found.add(best)
    return found


def _digits(found: Sequence[Estimate | Difference | None]) -> int | None:
    """Returns the decimals with which a typical error has two significant digits; None if these would be too many."""
    errors = [each.error for each in found if each is not None and each.error > 1e-9 * abs(each.value)]
    digits = 1 - math.floor(math.log10(median(errors))) if errors else -99
    return max(0, digits) if -4 <= digits <= 7 else None


def _number(number: float, digits: int | None, sign: str = "") -> str:
    return f"{number:{sign}.4g}" if digits is None else f"{number:{sign}.{digits}f}"


def _value(estimate: Estimate | None, digits: int | None) -> str | None:
    """Returns a statistic and its error as text, without the error where the scores are equal up to rounding."""
    if estimate is None or not math.isfinite(estimate.value):
        return None
    known = math.isfinite(estimate.error) and estimate.error > 1e-9 * abs(estimate.value)
    error = f" \u00b1 {_number(estimate.error, digits)}" if known else ""
    return f"{_number(estimate.value, digits)}{error}"


def _difference(change: Difference | None, digits: int | None) -> str | None:
    if change is None or not math.isfinite(change.value):
        return None
    ends = ", ".join(_number(end, digits, "+") for end in (change.low, change.high))
    return f"{_number(change.value, digits, '+')}{f' [{ends}]' if math.isfinite(change.low) else ''}"


def _text(number: float | None, form: Callable[[float], str]) -> str | None:
    return None if number is None or not math.isfinite(number) else form(number)


def _short(number: float, sign: str = "") -> str:
    """Returns a number with three significant digits, or all before the point."""
    return f"{number:{sign}.0f}" if 100 <= abs(number) < 1e7 else f"{number:{sign}.3g}"
