"""`svdd score --benchmark`: the rules of each benchmark, the match of pictures and prompts, and the intervals."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from svdd import UserError
from svdd.__main__ import main
from svdd.evaluation.benchmarks import summary
from svdd.evaluation.benchmarks.base import Entry
from svdd.evaluation.benchmarks.geneval import GenEval, crop
from svdd.evaluation.benchmarks.geneval_rules import evaluate, kept, overlap, relations
from svdd.evaluation.benchmarks.matching import match
from svdd.evaluation.benchmarks.summary import Score, summarise
from svdd.evaluation.metrics import RewardStatistics
from svdd.evaluation.metrics.intervals import t_quantile
from svdd.rewards.models.detectors import Detection
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import Picture
from tests.tiny_detectors import save_tiny_mask2former

# ---- GenEval: rules on given detections

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def drawn(*boxes: tuple[str, tuple[int, int, int, int], tuple[int, int, int], float]):
    """Returns a white picture of 100 x 100 with filled boxes, and their detections with masks."""
    image, found = torch.ones(3, 100, 100), []
    for label, (left, top, right, bottom), colour, score in boxes:
        mask = torch.zeros(100, 100, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        image = torch.where(mask, torch.tensor(colour)[:, None, None] / 255, image)
        found.append(Detection(label, score, (left, top, right, bottom), mask))
    return image, found


def named_by_pixels(image):
    """Returns a judge of colours that reads the mean colour of the object's pixels."""
    names = {RED: "red", BLUE: "blue", GREEN: "green"}

    def colours_of(name, objects):
        return [names[tuple((image[:, one.mask].mean(1) * 255).round().int().tolist())] for one in objects]

    return colours_of


CAT, DOG = ("cat", (10, 40, 30, 60), RED, 0.95), ("dog", (70, 40, 90, 60), BLUE, 0.8)
CASES = {  # task: boxes, include, exclude, and the reasons
    "single_object: there": ([CAT], [{"class": "cat", "count": 1}], [], []),
    "single_object: another": ([DOG], [{"class": "cat", "count": 1}], [], ["expected 1 or more of cat, found 0"]),
    "single_object: not sure enough": (
        [(*CAT[:3], 0.3)],
        [{"class": "cat", "count": 1}],
        [],
        ["expected 1 or more of cat, found 0"],
    ),
    "two_object: both": ([CAT, DOG], [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], [], []),
    "two_object: one": (
        [CAT],
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}],
        [],
        ["expected 1 or more of dog, found 0"],
    ),
    "counting: right": (
        [CAT, ("cat", (50, 50, 60, 60), RED, 0.91)],
        [{"class": "cat", "count": 2}],
        [{"class": "cat", "count": 3}],
        [],
    ),
    "counting: the second is below 0.9": (
        [CAT, ("cat", (50, 50, 60, 60), RED, 0.9)],
        [{"class": "cat", "count": 2}],
        [{"class": "cat", "count": 3}],
        ["expected 2 or more of cat, found 1"],
    ),
    "counting: too many": (
        [CAT, ("cat", (50, 50, 60, 60), RED, 0.91), ("cat", (5, 5, 9, 9), RED, 0.99)],
        [{"class": "cat", "count": 2}],
        [{"class": "cat", "count": 3}],
        ["expected fewer than 3 of cat, found 3"],
    ),
    "colors: right": ([CAT], [{"class": "cat", "count": 1, "color": "red"}], [], []),
    "colors: only the surest cat is judged": (
        [CAT, ("cat", (50, 50, 60, 60), BLUE, 0.9)],
        [{"class": "cat", "count": 1, "color": "blue"}],
        [],
        ["expected 1 or more of blue cat, found red"],
    ),
    "position: right of": (
        [CAT, DOG],
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        [],
        [],
    ),
    "position: the other way": (
        [CAT, DOG],
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
        [],
        ["expected dog above cat, found right of"],
    ),
    "position: nothing to refer to": (
        [DOG],
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        [],
        ["expected 1 or more of cat, found 0", "nothing that dog could be right of"],
    ),
    "color_attr: both": (
        [CAT, DOG],
        [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
        [],
        [],
    ),
    "color_attr: swapped": (
        [CAT, DOG],
        [{"class": "cat", "count": 1, "color": "blue"}, {"class": "dog", "count": 1, "color": "red"}],
        [],
        ["expected 1 or more of blue cat, found red", "expected 1 or more of red dog, found blue"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_geneval_judges_each_task_by_its_rules(case):
    boxes, include, exclude, reasons = CASES[case]
    image, found = drawn(*boxes)
    objects = kept(found, 0.9 if case.startswith("counting") else 0.3)
    assert evaluate(objects, include, exclude, named_by_pixels(image)) == reasons


def test_geneval_looks_at_16_objects_and_may_suppress_overlaps():
    _, found = drawn(*(("cat", (k, 0, k + 10, 10), RED, 0.5 + k / 100) for k in range(20)))
    assert [one.score for one in kept(found, 0.3)["cat"]] == [0.5 + k / 100 for k in range(19, 3, -1)]
    assert [one.box[0] for one in kept(found, 0.3, max_overlap=0.5)["cat"]] == [
        19,
        15,
        11,
        7,
    ]  # 88 / 154 > 0.5, 77 / 165 < 0.5
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [  # the offset of the centre of a box of 10 x 10 from another, of which 0.1 * 20 = 2 are taken off
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (2, 2, set()),
        (-30, 30, {"left of", "below"}),  # 28 / 42.4 = 0.66 in both directions
        (30, 17, {"right of"}),  # 15 / 34.5 = 0.43 downwards
        (3, 0, set()),  # 1 / 3
    ],
)
def test_relations_of_two_boxes(x, y, expected):
    assert relations((50 + x, 50 + y, 60 + x, 60 + y), (50, 50, 60, 60)) == expected


def test_a_crop_is_that_of_pil_on_grey():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8)
    mask = torch.rand(40, 50, generator=generator) > 0.5
    one = Detection("cat", 1.0, (4.4, 7.6, 31.2, 33.5), mask)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    blank = Image.new("RGB", picture.size, color="#999")
    expected = Image.composite(picture, blank, Image.fromarray(mask.numpy())).crop(one.box)
    ours = (crop(pixels.float() / 255, one) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(ours, np.asarray(expected))
    assert crop(pixels.float(), Detection("cat", 1.0, (60.0, -9.0, 70.0, -5.0))).shape == (3, 1, 1)  # outside


def test_colours_are_named_by_clip():
    """The embedded CLIP names the colour of a disc on grey, whatever surrounds it."""
    benchmark = GenEval("unused", "emoji")
    benchmark.clip.load()
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = (rows - 32) ** 2 + (columns - 32) ** 2 < 24**2
    one, found = Detection("apple", 1.0, (8, 8, 56, 56), mask), {}
    for name, colour in (("red", RED), ("blue", BLUE), ("green", GREEN)):
        for around in (0.0, 1.0):
            image = torch.where(mask, torch.tensor(colour)[:, None, None] / 255, around)
            found[name, around] = benchmark.colours_of(image, "apple", [one, one])
    assert all(names == [name, name] for (name, _), names in found.items()), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": []}, "has no include"),
        ({"tag": 3}, "has no tag"),
        ({"include": [{"count": 1}]}, "requires something without a class"),
        ({"include": [{"class": "cat", "count": 0}]}, "requires cat without a count >= 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "requires the color 'mauve'"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "requires the position"),
    ],
)
def test_a_damaged_prompt_file_is_refused(tmp_path, change, message):
    row = {"tag": "counting", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps({**row, "prompt": "fine"}) + "\n" + json.dumps(row | change))
    with pytest.raises(UserError, match=f"metadata.jsonl: the prompt 'a cat' {message}"):
        GenEval("unused").read(str(file))


# ---- pictures and prompts


def test_pictures_are_matched_by_prompt(tmp_path):
    entries = [Entry("a cat", "x"), Entry("a dog", "x"), Entry("a cat", "y")]
    pictures = [
        Picture(tmp_path, f"{p}-{k}.png", p, text, k)
        for p, text in enumerate(("a dog", "a cat", "an owl", "a cat"))
        for k in (0, 1)
    ]
    found = match(entries, pictures, False)
    assert [(picture.file, k) for picture, k in zip(found.pictures, found.entries, strict=True)] == [
        *(("1-0.png", 0), ("1-1.png", 0)),
        *(("0-0.png", 1), ("0-1.png", 1)),
        *(("3-0.png", 2), ("3-1.png", 2)),
    ]
    assert found.notes == ["2 of 8 pictures have other prompts and are left out"]
    once = match(entries, pictures[:4], False)  # the prompt was drawn once, and has two entries
    assert [picture.file for picture in once.pictures] == [
        "1-0.png",
        "1-1.png",
        "0-0.png",
        "0-1.png",
        "1-0.png",
        "1-1.png",
    ]
    with pytest.raises(UserError, match=r"1 of 3 prompts have no picture: 'a dog'.* --partial"):
        match(entries, pictures[2:], False)
    with pytest.raises(UserError, match="1 prompts have fewer than 2 pictures: 'a dog'"):
        match(entries, pictures[1:], False)
    assert match(entries, pictures[1:], True).notes[0] == "1 prompts have fewer than 2 pictures: 'a dog'"
    with pytest.raises(UserError, match="no picture has a prompt of the benchmark: the first picture's is 'an owl'"):
        match(entries, pictures[4:6], True)


# ---- intervals


def test_a_mean_has_the_interval_of_a_reward():
    values, prompts = [0.2, 0.6, 0.5, 0.9, 0.1, 0.3], [0, 0, 1, 1, 2, 2]
    (line, total) = summarise([Score("all", "r", value, prompt) for value, prompt in zip(values, prompts, strict=True)])
    metric = RewardStatistics()
    metric.update(torch.tensor(values, dtype=torch.float64), torch.tensor(prompts))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert line[2:5] == pytest.approx((found["mean"], found["ci95_low"], found["ci95_high"]))
    assert (line.prompts, line.images, total.category) == (3, 6, summary.OVERALL)
    assert total[2:] == pytest.approx(line[2:])


def test_a_proportion_has_wilsons_interval():
    """Its ends solve (p - q)^2 = t^2 q (1 - q) / n, with as many independent pictures as the prompts' spread says."""
    scores = [Score("a", "accuracy", float(k < 7), k) for k in range(10)]
    line, _ = summarise(scores, frozenset({"accuracy"}))
    t, n = t_quantile(0.95, 9), 9  # p (1 - p) / (p (1 - p) / 9), the unbiased variance of the mean of 10
    for end in (line.low, line.high):
        assert (0.7 - end) ** 2 == pytest.approx(t**2 * end * (1 - end) / n)
    alike = [Score("a", "accuracy", 1.0, k // 4) for k in range(40)]  # the 4 pictures of a prompt may be copies
    line, _ = summarise(alike, frozenset({"accuracy"}))
    assert (line.mean, line.high) == (1, pytest.approx(1))
    assert line.low == pytest.approx(10 / (10 + t**2))
    alone, _ = summarise(alike[:4], frozenset({"accuracy"}))
    assert math.isnan(alone.low)


def test_the_overall_number_is_the_mean_of_the_categories():
    """Not that of the pictures; its squared half-width is the sum of the categories' over their squared number."""
    scores = [Score("a", "m", value, k) for k, value in enumerate((0.0, 1.0, 2.0))]
    scores += [Score("b", "m", value, 3 + k) for k, value in enumerate((4.0, 6.0))]
    a, b, total = summarise(scores, order=("b", "a"))[::-1][::-1]
    assert (a.category, b.category) == ("b", "a")
    assert total.mean == 3
    assert total.high - 3 == pytest.approx(math.hypot(a.high - a.mean, b.high - b.mean) / 2)
    (line, whole) = summarise([*scores[:3], Score("dpg", "m", 0.4, 0), Score("dpg", "m", 0.6, 1)], whole="dpg")
    assert (line.category, whole.category, whole.mean) == ("a", summary.OVERALL, 0.5)


# ---- the command


def a_run(folder, rows):
    """Writes a run of 64 x 64 pictures, two of each prompt, as `svdd predict` does."""
    run, files = RunFolder(folder), []
    run.images.folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = np.random.default_rng(0)
    for p, row in enumerate(rows):
        for k in (0, 1):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            known = {"prompt_index": p, "image_index": k, "num_images": 2, **row, "seed": k}
            files.append(({**known, "rewards": {}, "ledger": {}}, buffer.getvalue()))
    run.open_shard(0)
    run.write(iter(files))
    run.close_shard()
    run.merge()
    return folder


def test_geneval_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A tiny Mask2Former and the embedded CLIP judge a run that was drawn with the metadata as its prompt file."""
    rows = [
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
        {
            "tag": "two_object",
            "include": [{"class": name, "count": 1} for name in ("tv", "dog")],
            "prompt": "a tv and a dog",
        },
        {
            "tag": "two_object",
            "include": [{"class": name, "count": 1} for name in ("disc", "tv")],
            "prompt": "a disc and a tv",
        },
    ]
    run = a_run(tmp_path / "run", rows)
    words = [
        "score",
        "--benchmark",
        "geneval",
        str(run),
        "--benchmark.detector",
        save_tiny_mask2former(tmp_path / "detector"),
    ]
    words += [
        "--benchmark.clip",
        "emoji",
        "--output",
        str(tmp_path / "scores"),
        "--reward",
        "Brightness",
        "--batch_size",
        "4",
    ]
    assert main(words) == 2
    assert "run was drawn with 3 of the 553 prompts; draw all, give --benchmark_prompts, or" in capsys.readouterr().err
    assert main([*words, "--partial"]) == 0
    out = capsys.readouterr().out
    assert "two_object" in out
    found = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert [(row["prompt_index"], row["image"]) for row in found] == [(p, k) for p in range(3) for k in (0, 1)]
    assert all(row["correct"] == (not row["reason"]) == (row["scores"] == {row["category"]: 1}) for row in found)
    results = json.loads((tmp_path / "scores" / "summary.json").read_text())["results"]
    table = {(line["metric"], line["category"]): line["mean"] for line in results}
    shares = [np.mean([row["correct"] for row in found if row["category"] == tag]) for tag in ("two_object", "colors")]
    assert [table["accuracy", tag] for tag in ("two_object", "colors", "overall")] == [*shares, np.mean(shares)]
    assert list(table)[3] == ("Brightness", "two_object")
    assert main([*words[:3], "absent", *words[4:]]) == 2
    assert main(["score", "--benchmark", "genevel", str(run)]) == 2
    assert "known: geneval, t2i-compbench, dpg, drawbench; did you mean 'geneval'?" in capsys.readouterr().err


def test_drawbench_measures_rewards_by_category(tmp_path, capsys):
    """The public csv as it is, for a run whose prompts came from another file."""
    file = tmp_path / "DrawBench.csv"
    file.write_text(
        "Prompts,Category\nA red colored car.,Colors\nA bird scaring a scarecrow.,Reddit\nOne car.,Counting \n"
    )
    run = a_run(
        tmp_path / "run", [{"prompt": text} for text in ("A red colored car.", "A bird scaring a scarecrow.", "Two.")]
    )
    words = ["score", "--benchmark=drawbench", str(run), "--benchmark_prompts", str(file), "--reward", "Brightness"]
    assert main(words) == 2
    assert "1 of 3 prompts have no picture: 'One car.'" in capsys.readouterr().err
    assert main([*words, "--eval_rewards+=Colorfulness", "--partial"]) == 0
    captured = capsys.readouterr()
    assert "warning: 2 of 6 pictures have other prompts and are left out" in captured.err
    lines = [line.split()[:2] for line in captured.out.splitlines()[2:]]
    assert lines == [[name, tag] for name in ("Brightness", "Colorfulness") for tag in ("Colors", "Reddit", "overall")]
    assert main([*words[:4], str(run / "prompts.jsonl")]) == 2
    assert "the prompt 'A red colored car.' has no category" in capsys.readouterr().err
    assert main([*words, "--partial", "--eval_rewards+=WinRate(Brightness)"]) == 2
    assert "WinRate-Brightness compares the pictures of a prompt with each other" in capsys.readouterr().err
    assert main([*words, "--partial", "--output", str(tmp_path / "scores")]) == 0
    table = capsys.readouterr().out.splitlines()[:5]
    assert main(["score", "--config", str(tmp_path / "scores" / "config.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == table
