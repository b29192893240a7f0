"""Runs that are read while they are drawn, and runs whose prompts grow."""

import json
import math
import shlex

import pytest
import yaml
from PIL import Image

import svdd.runs.images
from svdd import UserError
from svdd.__main__ import main
from svdd.commands.predict import PredictCLI
from svdd.guided_diffusion import GuidedDiffusion
from svdd.runs.command_line import overwriting
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from svdd.samplers.budget import settings
from svdd.samplers.refinement import Refinement
from svdd.samplers.svdd import SVDD
from svdd.values.training.calibration import write
from tests.faults.harness import Case
from tests.memory import peak_bytes

PROMPTS = ["red apple", "blue car", "panda", "owl"]
PNG = b"\x89PNG, though no picture"


@pytest.fixture
def case(tmp_path):
    case = Case(tmp_path / "it's one", ["red apple", "blue car"])
    case.gate.touch()
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of four prompts, with three images of each."""
    case = Case(tmp_path_factory.mktemp("whole"), PROMPTS)
    case.gate.touch()
    assert case.run("--model.images_per_prompt", "3") == 0
    return case.content()


def row(prompt, image=0, score=0.5):
    known = {"prompt_index": prompt, "image_index": image, "num_images": 1 + image, "prompt": f"prompt {prompt}"}
    return {**known, "seed": prompt, "rewards": {"r": score}, "ledger": {"denoiser_rows": 3, "network_rows": 6}}


def draw(folder, prompts, rank=0, score=0.5, tar=False):
    """Appends finished images to the shard of a rank, as a process does that is then killed."""
    run = RunFolder(folder, tar=tar)
    run.images.folder.mkdir(parents=True, exist_ok=True)
    run.open_shard(rank)
    run.write((row(prompt, score=score), PNG) for prompt in prompts)
    run.close_shard()


def scores(folder):
    return [(row["prompt_index"], row["rewards"]["r"]) for row in RunFolder(folder).rows(checked=True)]


@pytest.mark.parametrize("tar", [False, True])
def test_rows_of_a_run_that_is_being_drawn(tmp_path, tar):
    """Merged rows and shards count, of several the newest, but no torn line and no row whose image is gone."""
    draw(tmp_path, [0, 3, 5], score=0.1, tar=tar)
    RunFolder(tmp_path).merge()
    draw(tmp_path, [1, 3], rank=0, score=0.2, tar=tar)
    draw(tmp_path, [6, 4], rank=1, score=0.3, tar=tar)
    with open(tmp_path / "results-00001.jsonl", "ab") as shard:
        shard.write(encode(row(2))[:-30])
    expected = [(0, 0.1), (1, 0.2), (3, 0.2), (4, 0.3), (5, 0.1), (6, 0.3)]
    assert scores(tmp_path) == expected
    reading = RunFolder(tmp_path).rows(checked=True)
    assert next(reading)["prompt_index"] == 0
    RunFolder(tmp_path).merge()  # the run ends while it is read
    assert [(row["prompt_index"], row["rewards"]["r"]) for row in reading] == expected[1:]
    assert scores(tmp_path) == expected
    draw(tmp_path, [7], tar=tar)
    lost = next((tmp_path / "images").glob("00000-000002.tar" if tar else "000007-00.png"))
    lost.unlink()
    assert scores(tmp_path) == expected


def test_a_folder_without_rows_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"holds no results\.jsonl; give the --output folder of a `svdd predict`"):
        scores(tmp_path)
    RunFolder(tmp_path).claim({"model": {}})
    with pytest.raises(UserError, match=r"holds no results\.jsonl; wait until an image is drawn"):
        scores(tmp_path)


def test_a_damaged_line_of_the_merged_file_is_an_error(tmp_path):
    draw(tmp_path, [0, 1])
    RunFolder(tmp_path).merge()
    with open(tmp_path / "results.jsonl", "ab") as merged:
        merged.write(b'{"prompt_index": [2], "image_index": 0}\n{"torn')
    rows = RunFolder(tmp_path).rows()
    assert [row["prompt_index"] for _, row in zip(range(3), rows, strict=False)] == [0, 1, [2]]
    with pytest.raises(UserError, match=r"line 4 is damaged \(not JSON\); to draw the image again: the `svdd p"):
        next(rows)


def test_merged_rows_are_read_in_constant_memory(tmp_path):
    def read(count):
        (tmp_path / "results.jsonl").write_bytes(b"".join(encode(row(k)) + b"\n" for k in range(count)))
        return peak_bytes(lambda: [None for row in RunFolder(tmp_path).rows() if row["prompt_index"] < 0])

    assert read(4000) - read(1000) < 100_000


def test_commands_read_a_killed_run(case, tmp_path, capsys):
    """Also as a baseline: its rows are not merged, and it has no summary."""
    assert case.run("--model.sampler", "Unguided") == 0
    (case.folder / "results.jsonl").rename(case.folder / "results-00000.jsonl")
    (case.folder / "summary.json").unlink()
    killed, whole, picture = str(case.folder), str(tmp_path / "whole"), str(tmp_path / "both.png")
    words = ["--model.sampler", "Unguided", "--output", whole, "--evaluation.baseline", killed]
    assert case.run(*words) == 0
    assert main(["compare", killed, whole, "--output", picture]) == 0
    assert main(["score", "--images", killed, "--reward", "Brightness", "--device", "cpu"]) == 0
    assert "Brightness: mean " in capsys.readouterr().out
    baseline = json.loads((tmp_path / "whole" / "summary.json").read_text())["baseline"]
    assert {name: entry["difference"] for name, entry in baseline["rewards"].items()} == {"StubReward": 0}


# --- prompts are appended ---


def stamps(case):
    return {path.name: path.stat().st_mtime_ns for path in case.folder.glob("images/**/*.png")}


@pytest.mark.parametrize("grow", ["file", "limit", "list", "tar"])
def test_appended_prompts_continue_the_folder(case, whole, monkeypatch, capsys, grow):
    """They leave what a run of all prompts would have made; the first images stay where they are."""
    monkeypatch.setattr(svdd.runs.images, "_IMAGES_PER_FOLDER", 6)  # the third prompt's images begin a subfolder
    source = case.folder.parent / "prompts.txt"
    options = ["--model.images_per_prompt", "3", *(["--tar"] if grow == "tar" else [])]
    more = {"limit": ["--data.limit", "4"], "list": ["--data.prompts", json.dumps(PROMPTS)]}.get(grow, [])
    fewer = {"limit": ["--data.limit", "2"], "list": ["--data.prompts", json.dumps(PROMPTS[:2])]}.get(grow, [])
    if grow == "limit":
        source.write_text("\n".join(PROMPTS))
    assert case.run(*options, *fewer) == 0
    config, before = (case.folder / "config.yaml").read_bytes(), stamps(case)
    source.write_text("\n".join(PROMPTS) + "\n")
    assert case.run(*options, *more) == 0
    assert "2 prompts were appended to the 2 of" in capsys.readouterr().err
    if grow == "list":  # a process is killed after it has recorded the prompts, and before it has drawn one
        (case.folder / "config.yaml").write_bytes(config)
        assert case.run(*options, *more) == 0
    assert before.items() <= stamps(case).items()
    assert [json.loads(line) for line in (case.folder / "prompts.jsonl").open()] == [{"prompt": p} for p in PROMPTS]
    assert case.content() == whole
    assert yaml.safe_load((case.folder / "config.yaml").read_text())["data"]["limit"] == (
        4 if grow == "limit" else None
    )
    if grow != "tar":
        names = {path.relative_to(case.folder).as_posix() for path in case.folder.glob("images/**/*.png")}
        assert names == {f"images/{'0001/' * (p > 1)}{p:06d}-{k:02d}.png" for p in range(4) for k in range(3)}


def test_other_edits_are_refused_with_what_differs(case, tmp_path, capsys):
    """And the folder stays as it is."""
    long = "a picture " * 30
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps(row) + "\n"
        for row in [{"prompt": "a", "seed": 3, "source": "x"}, {"prompt": f"{long} one {long}"}, *[{"prompt": "b"}] * 8]
    ))  # fmt: skip
    words = ["--data.prompts", str(tmp_path / "p.jsonl"), "--trainer.limit_predict_batches", "1"]
    assert case.run(*words) == 0
    before = {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()}

    def refused(edit, *options):
        text = (tmp_path / "p.jsonl").read_text()
        (tmp_path / "p.jsonl").write_text(edit(text))
        capsys.readouterr()
        assert case.run(*words, *options) == 2
        (tmp_path / "p.jsonl").write_text(text)
        assert {path: path.read_bytes() for path in case.folder.rglob("*") if path.is_file()} == before
        (line,) = capsys.readouterr().err.splitlines()
        return line

    seed = refused(lambda text: text.replace('3, "source": "x"', '4, "negative_prompt": "dog"'))
    assert "prompt 0: seed was 3, now 4, source was 'x', now none, negative_prompt was none, now 'dog'" in seed
    inner = refused(lambda text: text.replace(" one ", " two ", 1), "--model.seed", "5")
    assert "holds a run with other settings: model.seed was 0, now 5, and other prompts: 1 of the first 10" in inner
    assert "prompt 1: was ... picture a picture  one a picture" in inner
    assert "now ... picture a picture  two a picture" in inner
    many = refused(lambda text: text.replace('"b"', '"c"'))
    assert "8 of the first 10 prompts differ (prompt 2: was 'b', now 'c'; prompt 3: was 'b', now 'c'; prompt 4" in many
    assert "; and 5 more); only new prompts at the end continue a run. Choose another --output, or remove" in many
    assert "holds images of 1 prompts beyond the 1 given" in refused(lambda text: text, "--data.limit", "1")
    (case.folder / "prompts.jsonl").rename(tmp_path / "lost")
    before.pop(case.folder / "prompts.jsonl")
    assert "a run with unknown prompts, as its prompts.jsonl is missing" in refused(lambda text: text)


def test_prompts_that_are_not_drawn_may_go(case, tmp_path):
    prompts = json.dumps(["a", "b", "c", "d"])
    words = ["--data.prompts", prompts, "--data.batch_size", "1"]
    assert case.run(*words, "--trainer.limit_predict_batches", "2") == 0
    assert case.run(*words, "--data.limit", "3") == 0
    assert len((case.folder / "prompts.jsonl").read_text().splitlines()) == 3
    assert [row["prompt"] for row in RunFolder(case.folder).rows()] == ["a", "b", "c"]


def test_a_prompt_file_that_changes_while_the_run_starts_is_not_read_again(case, monkeypatch):
    load = GuidedDiffusion.configure_model

    def append(module):
        load(module)
        (case.folder.parent / "prompts.txt").write_text("another\n")

    monkeypatch.setattr(GuidedDiffusion, "configure_model", append)
    assert case.run() == 0
    assert [row["prompt"] for row in RunFolder(case.folder).rows()] == ["red apple", "blue car"]


def test_a_folder_of_an_earlier_version_is_refused_in_one_line(case, capsys):
    assert case.run() == 0
    config = yaml.safe_load((case.folder / "config.yaml").read_text())
    config["data"]["prompts_sha256"], config["rows_at_once"] = "0" * 64, 20
    text = "# svdd predict: the full resolved configuration\n" + yaml.safe_dump(config)
    (case.folder / "config.yaml").write_text(text)
    capsys.readouterr()
    assert case.run() == 2
    assert "was begun by an earlier version of svdd, which this one cannot continue" in capsys.readouterr().err
    assert main(["predict", "--config", str(case.folder / "config.yaml")]) == 2
    assert "remove rows_at_once, data.prompts_sha256 and overwrite from it" in capsys.readouterr().err


# --- commands that svdd prints, and options without a value ---


def test_the_printed_command_removes_the_old_run(case, capsys):
    assert case.run("--overwrite", "false") == 0
    assert case.run("--model.seed", "5", "--overwrite=false") == 2
    said = capsys.readouterr().err
    words = shlex.split(said.partition("remove the old run: ")[2])
    assert words == ["svdd", *case.words("--model.seed", "5", "--overwrite")] or words[1:3] == ["-m", "svdd"]
    assert main(words[words.index("predict") :]) == 0
    assert [row["seed"] for row in RunFolder(case.folder).rows()] == [5, 6]
    assert "overwrite" not in yaml.safe_load((case.folder / "config.yaml").read_text())


def test_a_damaged_run_names_the_command_that_repairs_it(case):
    assert case.run() == 0
    with open(case.folder / "results.jsonl", "ab") as file:
        file.write(b"{")
    with pytest.raises(UserError, match="to draw the image again: ") as error:
        list(RunFolder(case.folder).rows())
    words = shlex.split(str(error.value).partition("again: ")[2])
    assert main(words[words.index("predict") :]) == 0
    assert len(list(RunFolder(case.folder).rows())) == 2


@pytest.mark.parametrize("words", [["--key.api_key", "abc"], ["--x", "hf_abcdefghijklmnop"], ["--x", "a\nb"]])
def test_a_command_that_cannot_be_shown_is_not_printed(words):
    assert overwriting(["predict", *words]) == "the same command with --overwrite"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--overwrite"], {"overwrite": True}),
        (["--overwrite", "--tar", "--output", "x"], {"overwrite": True, "tar": True, "output": "x"}),
        (["--overwrite", "false", "--tar=true"], {"overwrite": False, "tar": True}),
        (["--config", "{overwrite: true, tar: false}"], {"overwrite": True, "tar": False}),
        (["--trainer.deterministic", "--tar", "no"], {"trainer.deterministic": True, "tar": False}),
    ],
)
def test_an_option_that_takes_true_may_stand_alone(words, expected, monkeypatch):
    found = {}

    def stop(command):
        found.update({name: command.settings[name] for name in expected})
        raise UserError("enough")

    monkeypatch.setattr(PredictCLI, "before_instantiate_classes", stop)
    assert main(["predict", "--config", "quickstart", "--trainer.accelerator", "cpu", *words]) == 2
    assert found == expected


@pytest.mark.parametrize("command", ["fit", "calibrate", "score"])
def test_a_recorded_configuration_runs_as_it_is(command, sd15, tmp_path, prompts_file):
    """And makes the same files."""
    words = [] if command == "score" else ["--model.reward", "Brightness", "--model.diffusion.pretrained", sd15]
    if command == "score":
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        words += ["--reward", "Brightness", "--images", str(tmp_path), "--device", "cpu"]
    else:
        words += ["--model.diffusion.num_inference_steps", "2", "--data.prompts", str(prompts_file)]
        words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    if command == "fit":
        words += ["--data.cache", str(tmp_path / "cache"), "--data.num_rollouts", "4", "--trainer.max_epochs", "1"]
        words += ["--model.value.channels", "4"]
    overwrite = [] if command == "score" else ["--overwrite"]
    assert main([command, *words, "--output", str(tmp_path / "one"), *overwrite]) == 0
    config = tmp_path / "one" / "config.yaml"
    assert main([command, "--config", str(config), "--output", str(tmp_path / "two")]) == 0
    ours, theirs = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("one", "two"))
    assert ours | {"output": None} == theirs | {"output": None}
    for name in {"fit": ["value.safetensors", "prompts.jsonl"], "calibrate": ["calibration.csv", "prompts.jsonl"],
                 "score": ["scores.jsonl"]}[command]:  # fmt: skip
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# --- what a run says about itself ---


def test_the_summary_names_sampler_and_value_and_nothing_is_nan(case, tmp_path, capsys):
    """With one image there are no spread and no standard error."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    words = [
        "--model.sampler",
        "SMC",
        "--model.budget",
        "8",
        "--data.limit",
        "1",
        "--trainer.logger",
        json.dumps(logger),
    ]
    assert case.run(*words) == 0
    summary = json.loads((case.folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["guide"], summary["sampler"], summary["value"]) == ("StubReward", "SMC", "PosteriorMean")
    assert summary["sampler_arguments"].items() >= {"num_particles": 4, "alpha": "auto", "returns": "best"}.items()
    assert summary["rewards"]["StubReward"]["std"] is summary["rewards"]["StubReward"]["std_within"] is None
    assert summary["resamplings"] >= 0
    assert 1 <= summary["ess"] * 4 <= 4
    metrics = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert "StubReward/mean" in metrics
    assert "no standard error from one prompt" in (said := capsys.readouterr().out)
    assert "nan" not in (said + metrics).lower()


def test_settings_of_a_sampler_are_plain():
    inner = settings(Refinement(2, sampler=SVDD(3, alpha=math.inf)))
    assert inner["sampler"]["class"] == "SVDD"
    assert inner["sampler"]["arguments"]["alpha"] == "inf"
    assert inner["rounds"] == 2


def test_a_table_of_calibration_has_no_nan(tmp_path):
    table = [{"step": 1, "spearman": 0.5, "spearman_within": math.nan, "explained_variance": 0.1}]
    text, _ = write(tmp_path, table, {"value": "V"}, "title")
    assert text.splitlines()[1].split() == ["1", "0.5000", "-", "0.1000"]
    assert (tmp_path / "calibration.csv").read_text().splitlines()[1] == "1,0.5,,0.1"
