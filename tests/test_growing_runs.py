"""Runs that are read while they are drawn, and runs whose prompts grow."""

import json

import pytest

from svdd import UserError
from svdd.__main__ import main
from svdd.runs.folder import RunFolder
from svdd.runs.json_lines import encode
from tests.memory import peak_bytes

PNG = b"\x89PNG, though no picture"


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
    with pytest.raises(UserError, match=r"results\.jsonl, line 4 is damaged \(not JSON\)"):
        next(rows)


def test_merged_rows_are_read_in_constant_memory(tmp_path):
    def read(count):
        (tmp_path / "results.jsonl").write_bytes(b"".join(encode(row(k)) + b"\n" for k in range(count)))
        return peak_bytes(lambda: [None for row in RunFolder(tmp_path).rows() if row["prompt_index"] < 0])

    assert read(4000) - read(1000) < 100_000


def test_compare_and_score_work_on_a_killed_run(tmp_path, sd15, prompts_file, capsys):
    """Also as a baseline: its rows are not merged, and it has no summary."""
    words = ["predict", "--config", "quickstart", "--data.prompts", str(prompts_file), "--model.reward", "Brightness"]
    words += ["--model.diffusion.pretrained", sd15, "--model.diffusion.num_inference_steps", "2"]
    words += ["--model.sampler", "Unguided", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*words, "--output", str(killed)]) == 0
    (killed / "results.jsonl").rename(killed / "results-00000.jsonl")
    (killed / "summary.json").unlink()
    assert main([*words, "--output", str(whole), "--evaluation.baseline", str(killed)]) == 0
    picture = str(tmp_path / "both.png")
    assert main(["compare", str(killed), str(whole), "--output", picture]) == 0
    assert main(["score", "--images", str(killed), "--reward", "Brightness", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "Brightness - " in said
    assert json.loads((whole / "summary.json").read_text())["baseline"]["rewards"]["Brightness"]["difference"] == 0
