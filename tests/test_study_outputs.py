"""What a study leaves beside its runs: rows, tables and plots, compared with independent computations."""

import csv
import dataclasses
import io
import json
import math
import re
import sys
import warnings
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from PIL import Image

from svdd.evaluation.metrics import RewardStatistics
from svdd.evaluation.metrics.run_statistics import RunStatistics
from svdd.evaluation.sign_flips import p_value
from svdd.evaluation.studies.comparisons import _resampled
from svdd.evaluation.studies.outputs import write_outputs
from svdd.evaluation.studies.plots import looks_of
from svdd.evaluation.studies.specification import Cell, Study
from svdd.rewards.clip import CLIPScore
from svdd.runs.fingerprints import FINGERPRINTS
from svdd.runs.folder import RunFolder

GUIDE, JUDGE, ERROR = "G_%&$", "cell", "error"  # names that LaTeX or other columns also use
WORK = {"denoiser_rows": 10, "network_rows": 20, "gradient_rows": 0, "decoded_images": 7, "reward_calls": 6}
LEDGER = {**WORK, "total_seconds": 0.5}
PROMPTS = ["red apple, ripe", "=blue 'car'", "panda", "owl", "frog", "rocket", *"abcdef"]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(level).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def draw(cell: Cell, rewards: dict[str, np.ndarray], features: str | None = None, **options) -> None:
    """Writes a run with rewards [prompts, images, particles]; options: ledger, kl, weights, lower, of, prompts."""
    config = {"data": {"prompts": PROMPTS, "prompt_column": "prompt", "limit": options.get("of")}}
    config |= {"model": {"images_per_prompt": 2}, "evaluation": {"features": features}}
    folder, first = RunFolder(cell.folder), next(iter(rewards.values()))
    folder.claim(config)
    folder.open_shard(0)
    prompts, images, particles = first.shape
    for p in range(prompts):
        batch = []
        for k in range(images * particles):
            image, particle = divmod(k, particles)
            row = {"prompt_index": p, "image_index": k, "num_images": images * particles}
            row |= {"prompt": options.get("prompts", PROMPTS)[p], "seed": options.get("seed", 0) + 2 * p + image}
            if particles > 1:
                row |= {"particle": particle, "particle_weight": options["weights"][particle]}
            row["rewards"] = {name: float(scores[p, image, particle]) for name, scores in rewards.items()}
            row |= {"path_kl_sample": float(options["kl"][p, image])} if "kl" in options else {}
            batch.append(({**row, "ledger": options.get("ledger", LEDGER)}, png(31 * p + k + 1000 * len(cell.name))))
        folder.write(batch)
    drawn, total = folder.merge()[1], options.get("of", prompts)
    if prompts == total:
        lower = {"lower_is_better": options["lower"]} if "lower" in options else {}
        folder.write_summary({"images": drawn, "failed_prompts": 0, **lower})
    folder.close()


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def study_of(tmp_path, cells: list[tuple[str, str, int | None]], **options) -> Study:
    made = []
    for guide, variant, budget in cells:
        name = f"cell-{len(made)}"
        made.append(Cell(name, guide, variant, budget, {}, tmp_path / "cells" / name))
    return Study(made, options.get("baseline", "plain"), options.get("statistics", ["mean"]), tmp_path)


def table(study: Study) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader(io.StringIO((study.folder / "table.csv").read_text()))
    return {(row["variant"], row["budget"]): row for row in rows}


def t_quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, by summing its density."""
    t = np.linspace(0, 100, 400_001)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    density *= math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (t[1] - t[0]))])
    return float(np.interp(level, 2 * mass, t))


def scores(seed: int, shift: float = 0.0, prompts: int = 6, particles: int = 1, scale: float = 1.0) -> np.ndarray:
    own = np.random.default_rng(99).normal(0, 1, (12, 1, 1))[:prompts]
    return scale * (own + shift + np.random.default_rng(seed).normal(0, 0.1, (prompts, 2, particles)))


def test_every_number_of_the_table_is_that_of_another_computation(tmp_path, tiny_clip, no_plots, capsys):
    """Two budgets, particles, gradients, previews and a held-out error, of which less is better."""
    cells = [("", "plain", None), ("", "SVDD", 10), ("", "SVDD", 20), ("", "SMC", 20), ("", "DPS", None)]
    study = study_of(tmp_path, cells, statistics=["mean", "median", "top10"])
    shapes = [(0, 0.0, 1), (1, 1.0, 1), (2, 2.0, 1), (3, 1.5, 2), (4, 0.1, 1)]
    weights = (0.25, 0.75)
    ledgers = [LEDGER] * 5
    ledgers[2] = {"denoiser_rows": 18, "network_rows": 27.5, "gradient_rows": 0, "total_seconds": 1.5}  # previews
    ledgers[4] = {"denoiser_rows": 10, "network_rows": 20, "gradient_rows": 5, "total_seconds": 2}
    kl = np.random.default_rng(5).random((6, 2))
    data = []
    for k, (cell, (seed, shift, particles)) in enumerate(zip(study.cells, shapes, strict=True)):
        guide = scores(seed, shift, particles=particles)
        rewards = {GUIDE: guide, ERROR: scores(seed + 50, 0.3 * shift, particles=particles)}
        rewards |= {JUDGE: scores(seed + 70, -shift, particles=particles, scale=1e9)} if k != 3 else {}
        data.append(rewards)
        draw(cell, rewards, tiny_clip, kl=kl + k, weights=weights, ledger=ledgers[k], lower=[ERROR])
    paths = write_outputs(study)
    assert [path.name for path in paths] == ["study.csv", "table.csv", "table.md", "table.tex"]
    assert "no plots: they need matplotlib" in capsys.readouterr().out
    found = table(study)
    comparisons = 4 * 3
    half = t_quantile(1 - 0.05 / comparisons, 5)
    clip = CLIPScore(tiny_clip)
    clip.load()
    for k, (_, variant, budget) in enumerate(cells):
        row, particles = found[variant, "" if budget is None else str(budget)], shapes[k][2]
        share = np.array(weights) if particles == 2 else np.ones(1)
        assert row["status"] == "finished"
        assert (row["pictures"], row["baseline"]) == (str(12 * particles), "cell-0" if k else "")
        for name in (GUIDE, ERROR, JUDGE):
            if name not in data[k]:
                assert all(row[key] == "" for key in row if key.startswith(f"{name}."))
                continue
            images, plain = data[k][name] @ share, data[0][name][:, :, 0]
            by_prompt = images.mean(1).tolist()
            assert float(row[f"{name}.mean"]) == pytest.approx(fmean(by_prompt), rel=1e-12)
            assert float(row[f"{name}.mean.standard_error"]) == pytest.approx(stdev(by_prompt) / 6**0.5, rel=1e-12)
            if k == 1 and name != JUDGE:
                for key, level in [("top10", 0.1)] if name == ERROR else [("median", 0.5), ("top10", 0.9)]:
                    quantiles = [np.quantile(each, level) for each in (images, plain)]
                    error, change_error = bootstrap(images, plain, level)
                    assert float(row[f"{name}.{key}"]) == pytest.approx(quantiles[0], rel=1e-9)
                    assert float(row[f"{name}.{key}.standard_error"]) == pytest.approx(error, rel=1e-6)
                    check_difference(row, f"{name}.{key}", quantiles[0] - quantiles[1], change_error, half)
            if k:
                differences = (images - plain).mean(1).tolist()
                check_difference(row, f"{name}.mean", fmean(differences), stdev(differences) / 6**0.5, half)
                assert float(row[f"{name}.mean.p_value"]) == pytest.approx(p_value(differences))
                assert row[f"{name}.mean.prompts"] == "6"
        assert float(row["path_kl"]) == pytest.approx(kl.mean() + k)
        assert float(row["path_kl.standard_error"]) == pytest.approx(kl.mean(1).std(ddof=1) / 6**0.5)
        rows = {2: 27.5 / 2, 4: 10 + 2 * 5}.get(k, 10)
        assert float(row["rows"]) == pytest.approx(rows)
        assert float(row["seconds"]) == ledgers[k]["total_seconds"]
        if particles == 1:
            assert float(row["diversity.pairwise_within"]) == pytest.approx(distance(study.cells[k], clip), rel=1e-4)


def check_difference(row: dict[str, str], key: str, change: float, error: float, half: float) -> None:
    ends = {"difference": change, "difference.standard_error": error}
    ends |= {"low": change - half * error, "high": change + half * error}
    for part, number in ends.items():
        assert float(row[f"{key}.{part}"]) == pytest.approx(number, rel=1e-5), (key, part)


def bootstrap(images: np.ndarray, plain: np.ndarray, level: float) -> list[float]:
    """The standard errors of a quantile, and of its difference to another, over resamples of the six prompts."""
    generator, found = np.random.default_rng(0), []
    for _ in range(1000):
        chosen = generator.integers(6, size=6)
        value, other = np.quantile(images[chosen], level), np.quantile(plain[chosen], level)
        found.append((value, value - other))
    return [stdev(column) * (6 / 5) ** 0.5 for column in zip(*found, strict=True)]


def distance(cell: Cell, clip: CLIPScore) -> float:
    """The mean of 1 - cosine of the two images of each prompt."""

    found = []
    for p in range(6):
        images = [np.asarray(Image.open(cell.folder / f"images/{p:06d}-{k:02d}.png")) / 255 for k in range(2)]
        with torch.inference_mode():
            one, other = clip.image_features(torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float())
        found.append(1 - float(one @ other))
    return fmean(found)


def test_study_csv_holds_a_line_per_picture_with_all_that_its_row_says(tmp_path, no_plots):
    study = study_of(tmp_path, [("A", "plain", None), ("A", "SMC, 2", 10), ("B", "SMC, 2", 10), ("B", "plain", 10)])
    draw(study.cells[0], {GUIDE: scores(0)}, kl=np.ones((6, 2)))
    draw(study.cells[1], {JUDGE: scores(1, particles=2)}, weights=(0.0, 1.0))
    draw(study.cells[2], {GUIDE: -scores(2, scale=1e90), JUDGE: scores(3)}, of=6, ledger={"denoiser_rows": 3})
    write_outputs(study)
    lines = [*csv.DictReader(io.StringIO((tmp_path / "study.csv").read_text(), newline=""))]
    drawn = [(cell, row) for cell in study.cells[:3] for row in RunFolder(cell.folder).rows()]
    assert len(lines) == len(drawn) == 12 + 24 + 12
    for line, (cell, row) in zip(lines, drawn, strict=True):
        known = {"cell": cell.name, "guide": cell.guide, "variant": cell.variant, "budget": cell.budget}
        known |= {key: row[key] for key in ("prompt_index", "image_index", "prompt", "seed")}
        known |= {key: row.get(key) for key in ("particle", "particle_weight", "path_kl_sample")}
        known |= {f"reward.{name}": row["rewards"].get(name) for name in (GUIDE, JUDGE)}
        known |= {key: row["ledger"].get(key) for key in WORK}
        known["seconds"] = row["ledger"].get("total_seconds")
        assert (tmp_path / line.pop("file")).samefile(cell.folder / row["file"])
        assert line == {key: "" if value is None else str(value) for key, value in known.items()}


def test_unfinished_damaged_and_missing_cells_are_marked_and_count_with_what_they_have(tmp_path, no_plots, capsys):
    cells = [("A", "plain", None), ("A", "half", 10), ("A", "missing", 10), ("A", "damaged", 10), ("A", "other", 10)]
    study = study_of(tmp_path, cells)
    data = [scores(0), scores(1, 1.0, prompts=3), None, scores(3), scores(4)]
    for cell, each in zip(study.cells, data, strict=True):
        if each is not None:
            texts = [*PROMPTS[:4], "dog", "cat"] if cell.variant == "other" else PROMPTS
            draw(cell, {GUIDE: each}, of=6, prompts=texts)
    damaged = study.cells[3].folder / "results.jsonl"
    damaged.write_text("".join(line + "\n" for line in damaged.read_text().splitlines()[:4]) + '{"prompt_index": -1}\n')
    before = {path: path.read_bytes() for path in (tmp_path / "cells").rglob("*") if path.is_file()}
    write_outputs(study)
    assert before == {path: path.read_bytes() for path in (tmp_path / "cells").rglob("*") if path.is_file()}
    assert "svdd: warning: cell-3: only its first 4 rows count" in capsys.readouterr().err
    found = table(study)
    assert found["half", "10"]["status"] == "unfinished"
    assert (found["half", "10"]["pictures"], found["half", "10"]["expected"]) == ("6", "12")
    differences = (data[1] - data[0][:3])[:, :, 0].mean(1).tolist()
    assert float(found["half", "10"][f"{GUIDE}.mean.difference"]) == pytest.approx(fmean(differences))
    assert found["half", "10"][f"{GUIDE}.mean.prompts"] == "3"
    assert found["other", "10"][f"{GUIDE}.mean.prompts"] == "4"  # two of its prompts have other texts
    assert found["missing", "10"]["status"] == "missing"
    blank = {value for key, value in found["missing", "10"].items() if "." in key or "rows" in key}
    assert blank == {""}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[3].strip() for line in lines[6:11]] == ["12", "6 of 12", "0", "4 of 12", "12"]
    assert any("3 of 5 cells are unfinished" in line for line in lines)


def test_images_of_other_seeds_and_rewards_of_other_weights_are_not_compared(tmp_path, no_plots, capsys):
    study = study_of(tmp_path, [("A", "plain", None), ("A", "seeds", 10), ("A", "weights", 10)])
    for cell, seed in zip(study.cells, (0, 1000, 0), strict=True):
        draw(cell, {GUIDE: scores(1), JUDGE: scores(2)}, seed=seed)
        parts = {f"reward {GUIDE}": "one", f"reward {JUDGE}": "other" if cell.variant == "weights" else "one"}
        (cell.folder / FINGERPRINTS).write_text(json.dumps({"parts": parts}))
    write_outputs(study)
    found = table(study)
    assert [found["seeds", "10"][f"{name}.mean.difference"] for name in (GUIDE, JUDGE)] == ["", ""]
    assert [bool(found["weights", "10"][f"{name}.mean.difference"]) for name in (GUIDE, JUDGE)] == [True, False]
    printed = capsys.readouterr().err
    assert "images of other prompts or random seeds were drawn in cell-1 than in cell-0: no difference" in printed
    assert f"{JUDGE} was measured with other weights or settings in cell-2 than in cell-0: no difference" in printed


def test_a_diversity_is_measured_once_and_again_when_the_pictures_change(tmp_path, tiny_clip, no_plots):
    study = study_of(tmp_path, [("A", "plain", None)])
    draw(study.cells[0], {GUIDE: scores(0, prompts=1)}, tiny_clip)
    write_outputs(study)
    cache, measured = tmp_path / "diversity.json", table(study)["plain", ""]["diversity.pairwise_within"]
    assert float(measured) > 0
    (key, entry), *_ = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: {**entry, "pairwise_within": 0.125}}))
    write_outputs(study)
    assert table(study)["plain", ""]["diversity.pairwise_within"] == "0.125"
    results = study.cells[0].folder / "results.jsonl"
    results.write_text(results.read_text().replace('"sha256": "', '"sha256": "0'))
    write_outputs(study)
    assert table(study)["plain", ""]["diversity.pairwise_within"] == measured


def test_one_prompt_gives_numbers_without_intervals_and_never_nan(tmp_path, no_plots):
    study = study_of(tmp_path, [("A", "plain", 10), ("A", "SVDD", 10)], statistics=["mean", "top20"])
    for k, cell in enumerate(study.cells):
        draw(cell, {GUIDE: scores(k, k, prompts=1, scale=1e9)})
    write_outputs(study)
    row = table(study)["SVDD", "10"]
    assert float(row[f"{GUIDE}.mean.difference"]) > 0
    assert float(row[f"{GUIDE}.top20.difference"]) > 0
    for statistic in ("mean", "top20"):
        for part in ("standard_error", "difference.standard_error", "low", "high"):
            assert row[f"{GUIDE}.{statistic}.{part}"] == ""
    for path in tmp_path.glob("*.*"):
        assert not re.search(r"\b(nan|inf|None)\b", path.read_text()), path


def test_tables_escape_names_and_show_what_is_significant(tmp_path, no_plots):
    """Names have a meaning in LaTeX or markdown; with one of two guides, a judge falls where the guide rises."""
    names = ["S_VDD {a} & 5% #1 $x$ ~ ^", "*SVDD*|b", "[0]"]
    variants = [("plain", None), *((name, 10) for name in names)]
    study = study_of(tmp_path, [(guide, *each) for guide in ("A_1", "") for each in variants])
    for k, cell in enumerate(study.cells):
        rise = {names[0]: 2.0, names[1]: 1.0}.get(cell.variant, 0)
        fall = -rise if cell.guide else 0
        draw(cell, {"G": scores(k, rise, 10)[:, :1], "judge": scores(k + 20, fall, 10)[:, :1]})
    write_outputs(study)
    text = (tmp_path / "table.tex").read_text()
    for rule in (
        "\\begin{table}",
        "\\end{table}",
        "\\toprule",
        "\\midrule",
        "\\bottomrule",
        "\\end{tabular}",
        "\\caption{",
    ):
        assert text.count(rule) == 2, rule
    assert re.findall(r"\\label{(.*)}", text) == ["tab:study-1", "tab:study-2"]
    assert r"S\_VDD \{a\} \& 5\% \#1 \$x\$ \textasciitilde{} \textasciicircum{}" in text
    assert text.count("{") == text.count("}")
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 9, line
    first, second = (tmp_path / "table.md").read_text().split("\n## ")[1:]
    assert first.startswith("Guide A_1 (G)\n")
    rows = {line.split(" | ")[0].strip("| "): line.count("**") for line in first.splitlines() if line.startswith("|")}
    assert rows[names[0].replace("|", "\\|").replace("~", "\\~")] == 2  # the best guide in bold, and not its judge
    assert rows["\\*SVDD\\*\\|b"] == 0
    assert "Bonferroni: 98.333 % each" in first
    note = next(line for line in first.splitlines() if "Over-optimisation" in line)
    assert "judge became worse in S_VDD" in note
    assert "[0]" not in note
    assert "became worse" not in second


def test_resampled_quantiles_of_weighted_particles_are_those_of_the_list(tmp_path):
    generator = np.random.default_rng(3)
    values, weights = np.sort(generator.normal(size=7)), generator.random(7)
    copies, levels = generator.integers(0, 3, (20, 7)), np.array([0.5, 0.9, 0.2])
    found = _resampled(values, weights, copies, levels)
    for k, counts in enumerate(copies):
        statistics = RewardStatistics(higher_is_better=True), RewardStatistics(higher_is_better=False)
        for each in statistics:
            each.update(torch.tensor(values.repeat(counts)), weights=torch.tensor(weights.repeat(counts)))
        high, low = (each.compute() for each in statistics)
        expected = [high["median"].item(), high["top10"].item(), low["top20"].item()]
        assert found[k].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("baseline", "prompts"), [("plain", 6), (None, 1)])
def test_plots_show_every_variant_in_three_forms(tmp_path, baseline, prompts):
    """Names that a formula or a hidden label would be; budgets or none; one prompt has no bands; B has no rows."""
    names, budgets = ["plain", "$x^2$ & _SVDD", "_hidden"], (10, 20) if baseline else (None,)
    cells = [("A", name, budget) for name in names for budget in budgets]
    study = study_of(tmp_path, [*cells, ("B", "plain", 10)], baseline=baseline)
    for k, cell in enumerate(study.cells[:-1]):
        work = {**LEDGER, **dict.fromkeys(("denoiser_rows", "network_rows"), cell.budget or 10)}
        draw(cell, {GUIDE: scores(k, k, prompts), "judge": scores(k, -k, prompts)}, ledger=work)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_outputs(study)
    assert [path.name for path in paths[-3:]] == ["pareto.png", "pareto.pdf", "pareto.svg"]
    with Image.open(paths[-3]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert paths[-2].read_bytes().startswith(b"%PDF-")
    comments = " ".join(re.findall("<!-- (.*?) -->", paths[-1].read_text()))
    for text in ("plain", "$x^2$ & _SVDD", "hidden", "denoiser rows per image", "seconds per image", "judge"):
        assert text in comments.replace("\\$", "$").replace("&amp;", "&"), text
    drawn = [path.read_bytes() for path in paths[-3:]]
    if prompts == 1:
        write_outputs(study)
        assert drawn == [path.read_bytes() for path in paths[-3:]]


def test_fronts_of_two_rewards_with_and_without_doubt(tmp_path, capsys):
    """For the error lower is better, so that `far` is beaten in both and `near` by less than its noise."""
    places = {"plain": (0.0, 0.0), "one": (3.0, 0.0), "other": (0.5, -3.0), "near": (2.95, 0.05), "far": (1.0, 1.0)}
    study = study_of(tmp_path, [("A", name, 10) for name in places] + [("A", "far", 20), ("A", "missing", 10)])
    study = dataclasses.replace(study, fronts=((GUIDE, ERROR), (GUIDE, "Jugde")))
    for k, (cell, place) in enumerate(zip(study.cells, [*places.values(), (1.0, 1.0)], strict=False)):
        noise = np.random.default_rng(k).normal(0, 0.1, (2, 6, 2, 1))
        noise -= noise.mean((1, 2, 3), keepdims=True)
        rewards = {name: scores(0) + part + x for name, part, x in zip((GUIDE, ERROR), noise, place, strict=True)}
        draw(cell, rewards, lower=[ERROR])
    paths = write_outputs(study)
    assert "no run measured 'Jugde'" in capsys.readouterr().err
    assert [path.name for path in paths[-3:]] == ["fronts.png", "fronts.pdf", "fronts.svg"]
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    column = lines[0].index(next(name for name in lines[0] if name.startswith("front") and ERROR in name))
    found = {(line[0].strip("| "), line[1].strip()): line[column].strip() for line in lines[1:]}
    assert found["one", "10"] == found["other", "10"] == found["far", "20"] == "yes"
    assert found["near", "10"] == "within noise"
    assert found["far", "10"] == "no"
    assert found["missing", "10"] == ""


def test_a_summary_names_the_rewards_of_which_less_is_better():
    for others, expected in (({ERROR: False}, [ERROR]), ({JUDGE: True}, None)):
        statistics = RunStatistics({GUIDE: True, **others}, [], LEDGER)
        statistics.update([{"prompt_index": 0, "rewards": dict.fromkeys((GUIDE, *others), 1.0), "ledger": LEDGER}])
        assert statistics.compute().get("lower_is_better") == expected


def test_variants_of_a_grid_share_a_colour_where_there_are_many(tmp_path):
    names = [f"{sampler} alpha={k}" for sampler in ("SVDD", "SMC of N") for k in range(4)]
    cells = [Cell(name, "guide", name, None, {}, tmp_path / name) for name in ["plain", *names]]
    looks = looks_of(Study(cells=cells, baseline="plain", statistics=["mean"], folder=tmp_path))
    assert looks["plain"].colour == "black"
    assert len({look.colour for look in looks.values()}) == 3
    assert len({(look.colour, look.marker) for look in looks.values()}) == 9
    few = looks_of(Study(cells=cells[:6], baseline="plain", statistics=["mean"], folder=tmp_path))
    assert len({look.colour for look in few.values()}) == 6
