"""`svdd compare`: which images are paired, what is refused, and what the table says."""

import csv
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from svdd.__main__ import main
from svdd.evaluation.comparison import distinct_names
from svdd.evaluation.pairing import pair
from svdd.evaluation.sides import read_side
from svdd.runs.config import write_config
from tests.memory import peak_bytes

TEXTS = ["red apple", "blue car", "panda", "owl"]


def image(prompt: int, index: int = 0, text: str = "", seed: int | None = None, **rewards: float) -> dict:
    """Returns a result row."""
    ledger = {"denoiser_rows": 5, "network_rows": 7.4, "total_seconds": 0.5}
    row = {"prompt_index": prompt, "image_index": index, "num_images": 1, "prompt": text or TEXTS[prompt % 4]}
    row |= {"seed": prompt if seed is None else seed, "rewards": rewards or {"a": float(prompt)}, "ledger": ledger}
    return row | {"file": f"images/{prompt:06d}-{index:02d}.png"}


def save(run, rows, sampler="SVDD", finished=True, failed=(), weights="1", pictures=False, **settings):
    """Writes a run folder."""
    (run / "images").mkdir(parents=True)
    diffusion = {"class_path": "svdd.diffusion.StableDiffusion", "init_args": {"num_inference_steps": 3} | settings}
    chosen = {"class_path": f"svdd.samplers.{sampler}", "init_args": {"alpha": 0.0} if sampler == "SVDD" else {}}
    write_config(run, "predict", {"model": {"diffusion": diffusion, "sampler": chosen}, "output": str(run)})
    parts = {"diffusion.configuration": str(settings), "diffusion.unet": weights, "reward a": settings.get("clip", "")}
    (run / "fingerprints.json").write_text(json.dumps({"parts": parts, "versions": {}}))
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (run / "summary.json").write_text('{"prompts": 1}')
    if failed:
        lines = [json.dumps({"prompt_index": 9, "image_index": 0, "prompt": text}) for text in failed]
        (run / "failed.jsonl").write_text("\n".join(lines) + "\n")
    for row in rows if pictures else ():
        Image.new("RGB", (16, 16), (60 * (row["prompt_index"] % 4), 0, 0)).save(run / row["file"])
    return run


def four(gain: float = 0.0, **options) -> list[dict]:
    return [image(k, a=k + gain, **options) for k in range(4)]


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Runs the command in `tmp_path`; returns its output, or the message of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0):
        assert main(["compare", *words]) == code
        output = capsys.readouterr()
        if code:
            (line,) = output.err.strip().splitlines()
            assert line.startswith("svdd: error: ")
            return line
        return output.out

    return run


def table_of(run, *words: str) -> dict[str, dict[str, str]]:
    """Returns the rows of the csv table by run."""
    return {row["run"]: row for row in csv.DictReader(io.StringIO(run(*words, "--format", "csv")))}


def test_runs_are_paired_by_prompt_index_and_seed(compare, tmp_path):
    """The prompts stand in another order, and one of them occurs twice, the first time with the other's second seed."""
    rows = [image(0, seed=5, a=1.0), image(1, seed=6, a=2.0), image(2, text="red apple", seed=7, a=4.0)]
    moved = [
        image(0, text="red apple", seed=7, a=14.0),
        image(1, text="blue car", seed=6, a=22.0),
        image(2, text="red apple", seed=5, a=31.0),
    ]
    one, other = (read_side(save(tmp_path / name, each)) for name, each in (("one", rows), ("other", moved)))
    places = pair([one, other])
    assert [each.tolist() for each in places] == [[0, 1, 2], [2, 1, 0]]
    found = table_of(compare, "one", "other")["other"]
    # the images of a prompt's text are averaged: red apple (30 + 10) / 2, blue car 20
    assert float(found["a difference"]) == pytest.approx(20)
    assert (found["prompts"], found["images"]) == ("2", "3")


def test_equal_images_of_one_run_are_paired_in_their_order(tmp_path):
    """The same prompt with the same seed, three times in one run and twice in the other."""
    one = read_side(save(tmp_path / "one", [image(k, text="x", seed=1) for k in range(3)]))
    other = read_side(save(tmp_path / "other", [image(k, text="x", seed=1) for k in range(2)]))
    assert [each.tolist() for each in pair([one, other])] == [[0, 1], [0, 1]]
    assert [each.tolist() for each in pair([other, one, one])] == [[0, 1]] * 3


def test_the_table_states_means_errors_and_corrected_intervals(compare, tmp_path):
    """Against independent formulas: three runs, two images of each of four prompts, two comparisons."""
    scores = np.random.default_rng(0).normal(size=(3, 4, 2)) + np.arange(4)[:, None]
    for name, each in zip("xyz", scores, strict=True):
        rows = [image(k, j, seed=2 * k + j, a=each[k, j]) for k in range(4) for j in range(2)]
        save(tmp_path / name, rows)
    found = table_of(compare, "x", "y", "z", "--baseline", "y")
    level = 1 - 0.05 / 2
    # Student's t with 3 degrees of freedom: P(|T| < t) = 2 / pi (u / (1 + u^2) + atan(u)), u = t / sqrt(3)
    low, high = 0.0, 100.0
    for _ in range(100):
        t = (low + high) / 2
        u = t / 3**0.5
        low, high = (t, high) if 2 / math.pi * (u / (1 + u * u) + math.atan(u)) < level else (low, t)
    for name, each in zip("xyz", scores, strict=True):
        means, row = each.mean(1), found[name]
        assert float(row["a"]) == pytest.approx(means.mean())
        assert float(row["a standard error"]) == pytest.approx(means.std(ddof=1) / 2)
        assert [float(row[key]) for key in ("denoiser rows", "network rows", "seconds")] == pytest.approx([5, 7.4, 0.5])
        if name == "y":
            assert row["a difference"] == ""
            continue
        gains = means - scores[1].mean(1)
        half = t * gains.std(ddof=1) / 2
        assert float(row["a difference"]) == pytest.approx(gains.mean())
        assert [float(row[f"a {end}"]) for end in ("low", "high")] == pytest.approx(
            [gains.mean() - half, gains.mean() + half]
        )
    said = compare("x", "y", "z", "--baseline", "y")
    assert "95 % intervals together for 2 comparisons (Bonferroni)" in said
    assert f"{scores[0].mean():.4g} ± {scores[0].mean(1).std(ddof=1) / 2:.2g}" in said


REFUSED = {
    "other prompts": (
        {"rows": [image(k, text=f"a {k}") for k in range(4)]},
        "one and other share no prompt: 'red apple', 'blue car', 'panda', ... in one, 'a 0', 'a 1', 'a 2', ... in the",
    ),
    "some other prompts": (
        {"rows": [*four()[:3], image(3, text="frog")]},
        "other lacks 1 prompt of one, 'owl'; one lacks 1 prompt of other, 'frog'; draw both from the same prompts, or",
    ),
    "fewer prompts": (
        {"rows": four()[:2]},
        "other lacks 2 prompts of one, 'panda', 'owl'; draw both from the same",
    ),
    "more prompts": ({"rows": [*four(), image(4, text="frog")]}, "one lacks 1 prompt of other, 'frog'; draw both"),
    "other seeds": (
        {"rows": [*four()[:2], image(2, seed=8), image(3, seed=9)]},
        "one and other have other random seeds of 2 images: 'panda', image 0: 2 and 8, 'owl', image 0: 3 and 9; dr",
    ),
    "other steps": (
        {"num_inference_steps": 4},
        "num_inference_steps is 3 in one and 4 in other; draw both with the",
    ),
    "other weights": (
        {"weights": "2"},
        "one and other have other weights of unet; draw both with the same setti",
    ),
    "another model": (
        {"weights": "2", "pretrained": "big"},
        "one and other have other weights of unet (None and big); draw both",
    ),
    "other steps and seeds": (
        {"num_inference_steps": 4, "rows": four(seed=7)},
        "num_inference_steps is 3 in one and 4 in other; one and other have other random seeds of 4 images",
    ),
    "more images": (
        {"rows": [image(k, j, seed=k if j == 0 else 100 + k) for k in range(4) for j in range(2)]},
        "one has fewer images than other of 4 prompts, 'red apple', 'blue car', 'panda', ...; draw both from the same",
    ),
    "no images": ({"rows": []}, "other holds no image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_do_not_match_are_refused_or_compared_without_pairs(compare, tmp_path, case):
    options, message = REFUSED[case]
    save(tmp_path / "one", four())
    save(tmp_path / "other", **({"rows": four(1.0)} | options))
    assert message in compare("one", "other", code=2)
    if case != "no images":
        said = compare("--unpaired", "one", "other")  # a flag alone means true, also before the runs
        assert "means over all images of each run" in said
        same = {row["prompt"] for row in options.get("rows", four())} == {*TEXTS}
        assert ("means of each prompt, by Student's t" if same else "means of all, by Welch's t") in said
    if "draw both from the same" in message:
        said = compare("one", "other", "--shared", "true")
        everything = len({row["prompt"] for row in [*four(), *options["rows"]]})
        shared = len({row["prompt"] for row in four()} & {row["prompt"] for row in options["rows"]})
        assert (f"of {shared} of {everything} prompts" if shared < everything else f"of {shared} prompts") in said


def test_steps_and_weights_are_not_compared_where_they_are_unknown(compare, tmp_path):
    one = save(tmp_path / "one", four())
    save(tmp_path / "other", four(1.0), weights="2", num_inference_steps=4)
    (one / "fingerprints.json").unlink()
    (one / "config.yaml").write_text("torn")
    assert float(table_of(compare, "one", "other")["other"]["a difference"]) == 1


def test_an_unfinished_run_is_compared_on_what_both_have(compare, tmp_path):
    """It lacks a prompt; another one failed in the third run."""
    save(tmp_path / "whole", four())
    save(tmp_path / "drawn", four(1.0)[:3], finished=False)
    save(tmp_path / "partly", four(2.0)[1:], failed=["red apple"])
    said = compare("whole", "drawn", "partly")
    assert "means over 2 images of 2 of 4 prompts; drawn is not finished; 1 prompt failed in partly" in said
    found = table_of(compare, "whole", "drawn", "partly")
    assert [float(found[name]["a"]) for name in found] == [1.5, 2.5, 3.5]


def test_a_run_may_grow_while_it_is_read(tmp_path):
    """Another process has drawn an earlier prompt when an image is looked up."""
    run = save(tmp_path / "run", four()[1:], finished=False)
    side = read_side(run)
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in four()))
    assert [image.prompt for _, image in side.shown([0, 2])] == ["blue car", "owl"]


def test_rewards_that_only_some_runs_have_are_blank(compare, tmp_path):
    """Also those that an image lacks, and the difference of one that was measured with other weights."""
    save(tmp_path / "one", [image(k, a=1.0, b=2.0) for k in range(4)])
    save(tmp_path / "other", [image(k, b=3.0 + k, **({"c": 1.0} if k else {})) for k in range(4)])
    save(tmp_path / "clip", four(), clip="2")
    found = table_of(compare, "one", "other")
    assert (found["one"]["c"], found["other"]["a"], found["other"]["c"]) == ("", "", "")
    assert float(found["other"]["b difference"]) == 2.5
    said = compare("one", "clip", "--baseline", "one")
    assert (
        "a was measured with other weights or settings in clip than in one: no difference" not in said
    )  # unknown in one
    write_clip = {"parts": {"reward a": "1"}}
    (tmp_path / "one" / "fingerprints.json").write_text(json.dumps(write_clip))
    assert "a was measured with other weights or settings in clip than in one: no difference" in compare("one", "clip")
    assert table_of(compare, "one", "clip")["clip"]["a difference"] == ""


def test_what_differs_between_the_settings_is_said_first(compare, tmp_path):
    save(tmp_path / "one", four(), sampler="Unguided", guidance_scale=3.0)
    save(tmp_path / "other", four(), guidance_scale=7.5)
    lines = [line.split() for line in compare("one", "other").splitlines()]
    assert lines[0] == ["setting", "one", "other"]
    assert lines[2:5] == [
        ["model.diffusion.guidance_scale", "3.0", "7.5"],
        ["model.sampler", "Unguided", "SVDD"],
        ["model.sampler.alpha", "-", "0.0"],
    ]
    assert lines[5] == []  # the outputs differ too, but do not matter


@pytest.mark.parametrize("form", ["md", "csv", "tex"])
def test_other_formats_leave_only_the_table_on_stdout(tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "one_%", four(), sampler="Unguided")
    save(tmp_path / "other", four(1.0))
    assert main(["compare", "one_%", "other", "--format", form]) == 0
    output = capsys.readouterr()
    assert "model.sampler" in output.err
    assert "means over 4 images of 4 prompts" in output.err
    begin = {"md": "| run ", "csv": "run,prompts,images,a,", "tex": r"\begin{tabular}"}[form]
    assert output.out.startswith(begin)
    assert {"md": r"one\_%", "csv": "one_%", "tex": r"one\_\%"}[form] in output.out
    if form == "tex":
        assert r"\bottomrule" in output.out


def test_names_that_clash_are_told_apart(compare, tmp_path):
    for folder in ("a/x/svdd", "b/x/svdd", "b/smc"):
        save(tmp_path / folder, four())
    assert list(table_of(compare, "a/x/svdd", "b/x/svdd", "b/smc")) == ["a/x/svdd", "b/x/svdd", "smc"]
    assert distinct_names([tmp_path / "svdd", tmp_path / "a" / "svdd"]) == [f"{tmp_path.name}/svdd", "a/svdd"]
    assert "a/x/svdd is given twice" in compare("a/x/svdd", "a/x/../x/svdd", code=2)
    assert "given twice" in compare("a/x/svdd", "a/x/svdd", code=2)


def test_a_baseline_that_is_no_run_of_the_table_joins_it(compare, tmp_path):
    save(tmp_path / "plain", four())
    save(tmp_path / "one", four(1.0))
    found = table_of(compare, "one", "--baseline", "plain")
    assert list(found) == ["plain", "one"]
    assert float(found["one"]["a difference"]) == 1
    alone = table_of(compare, "one")["one"]
    assert "a difference" not in alone
    assert float(alone["a"]) == 2.5


def test_particles_count_by_weight(compare, tmp_path):
    """One run has two particles of an image, with scores 0 and 1 and weights 1/4 and 3/4."""
    save(tmp_path / "plain", [image(0, a=0.0)])
    particles = [image(0, k, a=float(k)) | {"particle": k, "particle_weight": (0.25, 0.75)[k]} for k in range(2)]
    save(tmp_path / "run", particles)
    found = table_of(compare, "plain", "run")["run"]
    assert (found["a"], found["images"], found["a low"]) == ("0.75", "1", "")


def test_the_picture_shows_pairs_and_wraps(compare, tmp_path):
    """The same prompts at other indices: each column has one colour, that of its prompt in the first run."""
    rows = [image(k, text=f"prompt {k}", seed=k) for k in range(10)]
    moved = [image(9 - k, text=f"prompt {k}", seed=k) for k in range(10)]
    save(tmp_path / "one", rows, pictures=True)
    save(tmp_path / "other", sorted(moved, key=lambda row: row["prompt_index"]))
    for row, source in zip(moved, rows, strict=True):
        (tmp_path / "other" / row["file"]).write_bytes((tmp_path / "one" / source["file"]).read_bytes())
    said = compare("one", "other", "--output", "new/both.png", "--limit", "20")
    assert said.endswith("wrote new/both.png\n")
    sheet = np.asarray(Image.open(tmp_path / "new/both.png").convert("RGB"))[..., 0].astype(int)
    across, down = 190 + 12, 128 + 18 * 2 + 12  # as long as no picture is wider than 190 pixels
    assert sheet.shape[1] == 8 * across + 12
    block = 2 * down + 2 * 18
    for k in range(10):
        x, y = 12 + k % 8 * across + 64, 12 + k // 8 * block + 2 * 18 + 64
        assert [sheet[y, x], sheet[y + down, x]] == [60 * (k % 4)] * 2
    compare("one", "other", "--output", "new/both.png", "--limit", "1")  # replaces its own picture
    save(tmp_path / "third", [image(k, text=f"else {k}") for k in range(2)], pictures=True)
    compare("one", "third", "--unpaired", "true", "--output", "third.png")
    assert Image.open("third.png").size == (2 * across + 12, 2 * (down + 18) + 24)


@pytest.mark.parametrize(
    ("words", "damage", "message"),
    [
        (["--limit", "0"], None, "--limit must be >= 1, got 0"),
        (["--limit", "-3"], None, "--limit must be >= 1, got -3"),
        (["--shared=maybe"], None, "argument --shared: expected true or false, got 'maybe'"),
        (["--format", "html"], None, "argument --format: invalid choice: 'html'"),
        (["--baseline", "nothing"], None, "nothing holds no results.jsonl"),
        (["--output", "folder.png"], None, "--output must be a file whose name ends in .png, got folder.png"),
        (["--output", "one/results.jsonl"], None, "--output must be a file whose name ends in .png"),
        (["--output", "one/images/000000-00.png"], None, "choose another"),
        (["--output", "one/images/000009-00.png"], None, "lies in the output folder"),
        (["--output", "one/new/a.png"], None, "lies in the output folder"),
        (["--output", "mine.png"], None, "mine.png exists and was not written by `svdd compare`; choose another"),
        (["--output", "mine.png/x.png"], None, "cannot write mine.png/x.png"),
        (
            ["--output", "x.png"],
            lambda run: (run / "images/000001-00.png").unlink(),
            "000001-00.png cannot be read as a picture",
        ),
        (
            ["--output", "x.png"],
            lambda run: (run / "images/000001-00.png").write_bytes(b"no"),
            "000001-00.png cannot be read as a picture",
        ),
        ([], lambda run: (run / "results.jsonl").write_text("3\n"), "line 1 is damaged (not an object)"),
        ([], lambda run: edit(run, lambda row: row.pop("rewards")), "line 1 is damaged (rewards is None"),
        ([], lambda run: edit(run, lambda row: row.update(file="../x.png")), "expected a path in the folder"),
        ([], lambda run: edit(run, lambda row: row.update(rewards={"a": "1"})), "rewards.a is '1', expected a finite"),
        ([], lambda run: edit(run, lambda row: row.update(rewards={"a": math.nan})), "rewards.a is nan"),
        ([], lambda run: edit(run, lambda row: row.update(prompt_index=True)), "prompt_index is True"),
        ([], lambda run: edit(run, lambda row: row.update(particle=2)), "particle is larger than image_index"),
        ([], lambda run: edit(run, lambda row: row.update(seed="7")), "seed is '7', expected an integer from 0"),
        ([], lambda run: edit(run, lambda row: row.update(seed=-1)), "seed is -1, expected an integer from 0"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(compare, tmp_path, words, damage, message):
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    mine = (tmp_path / "mine.png").read_bytes()
    one, other = (save(tmp_path / name, four(), pictures=True) for name in ("one", "other"))
    if damage is not None:
        damage(other)
    before = (one / "images/000000-00.png").read_bytes()
    assert message in compare("one", "other", *words, code=2)
    assert (one / "images/000000-00.png").read_bytes() == before
    assert (tmp_path / "mine.png").read_bytes() == mine


def edit(run, change) -> None:
    """Changes the rows of a run in place."""
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_folder_of_a_study_is_no_run(compare, tmp_path):
    (tmp_path / "study").mkdir()
    write_config(tmp_path / "study", "study", {})
    assert "study holds no results.jsonl; give the folders of runs in study" in compare("study", "other", code=2)


def test_a_command_without_runs_is_refused(compare):
    assert "RUN is required: run folders" in compare(code=2)


def test_control_characters_of_prompts_and_rewards_are_escaped(compare, tmp_path):
    save(tmp_path / "one", [image(0, text="x\x1b[2J", **{"a\x1b[31m": 1.0})])
    save(tmp_path / "other", [image(0, text="y\x1b[2J")])
    assert "\x1b" not in compare("one") + compare("one", "other", code=2)


def test_memory_grows_by_little_more_than_the_numbers(tmp_path):
    """100 bytes an image: a run of 100,000 takes 10 MB. Rows have 400 bytes on disk."""

    def read(count: int) -> int:
        run = save(tmp_path / str(count), [image(k, text=f"prompt {k}", a=1.0, b=2.0) for k in range(count)])
        return peak_bytes(lambda: read_side(run))

    assert (read(2500) - read(500)) / 2000 < 200


def test_a_table_needs_no_torch():
    code = "import sys, svdd.commands.compare; assert not {'torch', 'PIL', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
