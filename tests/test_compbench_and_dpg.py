"""T2I-CompBench and DPG-Bench: rules on given detections, answers and depths, and both from the command line."""

import csv
import json
from importlib.util import find_spec

import pytest
import torch
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from svdd import UserError
from svdd.__main__ import main
from svdd.evaluation.benchmarks import compbench
from svdd.evaluation.benchmarks.compbench import T2ICompBench
from svdd.evaluation.benchmarks.compbench_rules import (
    Layout,
    counted,
    depth_order,
    numeracy,
    objects_around,
    pair,
    placed,
    spatial,
    wanted,
)
from svdd.evaluation.benchmarks.dpg import DPGBench, Question, judged
from svdd.evaluation.benchmarks.sentences import Sentence, parse
from svdd.rewards.models.depth import DepthModel
from svdd.rewards.models.detectors import Detection
from svdd.rewards.vlm_judge import VLMJudge
from svdd.runs.pictures import find_pictures, read_pictures
from tests.test_benchmarks import a_run
from tests.tiny_detectors import save_tiny_grounding_dino
from tests.tiny_reward_models import save_tiny_blip

LEFT, RIGHT, LOW = (0, 40, 20, 60), (60, 40, 80, 60), (0, 80, 20, 100)


def seen(label: str, score: float, box=LEFT) -> Detection:
    return Detection(label, score, box)


# ---- T2I-CompBench: rules


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [
        ("on the left of", LEFT, RIGHT, 1),
        ("on the left of", RIGHT, LEFT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("on the top of", LEFT, LOW, 1),
        ("on the bottom of", LEFT, LOW, 0),
        ("on the left of", LEFT, LOW, 0),  # as far below as to the side
        ("on the left of", (0, 0, 20, 20), (10, 0, 30, 20), 0.1 / (200 / 600)),  # they overlap by a third
        ("near", LEFT, RIGHT, 1),  # at the same height
        ("near", LEFT, (60, 80, 80, 100), 30 / 60),
        ("on top of", LEFT, LOW, 0),  # which the authors' code does not know
    ],
)
def test_place(relation, a, b, score):
    assert placed(relation, a, b, near=30) == pytest.approx(score)


def test_depth_order():
    nearness = torch.zeros(100, 100)
    nearness[:, 15:40] = 1  # what is on the right is near
    front, back = (10, 0, 30, 20), (0, 0, 20, 20)
    assert depth_order("in front of", front, back, nearness) == pytest.approx((200 / 600) / 0.5)
    assert depth_order("behind", front, back, nearness) == 0
    assert depth_order("hidden by", back, front, nearness) == pytest.approx((200 / 600) / 0.5)
    assert depth_order("in front of", (16, 0, 24, 20), (14, 0, 24, 20), nearness) == 1
    assert depth_order("in front of", RIGHT, LEFT, nearness) == 0  # they do not overlap


def test_spatial_score():
    layout = Layout("cat", "dog", "near")
    both = [seen("cat", 0.8), seen("cat", 0.4), seen("dog", 0.6)]
    assert spatial(both, layout, 1.0, 0.5) == pytest.approx(0.35 + 0.5)
    assert spatial(both, layout, 0.2, 0.5) == 0  # 0.45
    assert spatial(both[:1], layout, 1.0, 0.5) == 0
    assert spatial(both[:1], layout, 1.0, 0.0) == pytest.approx(0.2)


def test_pairs_of_objects():
    assert pair("a cat on the left of a airplane") == ("cat", "airplane", "on the left of")
    assert pair("a girl on side of a desk") == ("person", "desk", "on side of")
    assert pair("a chair hidden by a boy", depth=True) == ("chair", "person", "hidden by")
    assert pair("a red cat") is None


def sentence(text: str, *phrases: str) -> Sentence:
    """Reads words with their parts of speech, such as `cat/NOUN`."""
    words, tags = zip(*(word.split("/") for word in text.split()), strict=True)
    return Sentence(words, tags, phrases)


def test_objects_around_a_preposition():
    text = "The/DET black/ADJ chair/NOUN was/AUX on/ADP the/DET left/NOUN of/ADP the/DET white/ADJ table/NOUN ./PUNCT"
    assert objects_around(sentence(text)) == ("chair", "table", "on the left of")
    text = "The/DET man/NOUN sat/VERB next/ADV to/ADP the/DET brown/ADJ coat/NOUN rack/NOUN ./PUNCT"
    assert objects_around(sentence(text)) == ("person", "coat", "next to")
    text = "The/DET old/ADJ SUV/PROPN stood/VERB near/ADP Big/PROPN Ben/PROPN ./PUNCT"
    assert objects_around(sentence(text)) == ("SUV", "Ben", "near")
    assert objects_around(sentence("The/DET cat/NOUN slept/VERB ./PUNCT")) == ("", "", "")


def test_numeracy():
    assert wanted("two guitars, a helicopter, and three men entertained a warm crowd") == [
        ("guitar", 2),
        ("helicopter", 1),
        ("person", 3),
    ]
    assert wanted("six fish swam with two mice, four knives, eight butterflies, two peaches and five goldfish") == [
        *(("fish", 6), ("mouse", 2), ("knife", 4), ("butterfly", 8), ("peach", 2), ("fish", 5))
    ]
    found = [seen("cat", 0.9), seen("cat", 0.5, (0, 40, 20, 59)), seen("dog", 0.7), seen("cat", 0.6, RIGHT)]
    assert counted(found) == {"cat": 2, "dog": 1}  # the second cat lies in the first one
    assert numeracy([("cat", 2), ("dog", 3), ("cow", 1)], counted(found)) == pytest.approx((1 + 0.5 + 0) / 3)


# ---- T2I-CompBench: files and models


def test_complex_prompts_need_their_lists(tmp_path, monkeypatch):
    parsed = sentence("The/DET red/ADJ cat/NOUN", "The red cat")
    monkeypatch.setattr(compbench, "parse", lambda text: parsed)
    lines = ["The red cat was near the dog.", "The cat ate.", "The cat saw the dog near the tree."]
    (tmp_path / "complex_val.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"needs complex_val_spatial\.txt beside it"):
        T2ICompBench().read(str(tmp_path))
    (tmp_path / "complex_val_spatial.txt").write_text(lines[0].upper() + "\n")
    (tmp_path / "complex_val_action.txt").write_text(lines[1] + "\n")
    entries = T2ICompBench().read(str(tmp_path))
    assert [entry.extra["kind"] for entry in entries] == ["spatial", "action", ""]
    parts = [compbench._parts(entry) for entry in entries]
    assert parts == [("attributes", "place"), ("attributes", "alignment"), ("attributes", "place", "alignment")]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("colour_val.txt", "a red cat", "is none of T2I-CompBench's prompt files: color_val.txt, shape_val.txt"),
        ("spatial_val.txt", "a red cat", "does not name two objects and a relation"),
        ("numeracy_val.txt", "a red cat", "names no object of T2I-CompBench with a number"),
        ("prompts.jsonl", '{"prompt": "a red cat"}', "has no category; expected the public prompt file"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=problem):
        T2ICompBench().read(str(tmp_path / name))


def test_noun_phrases_by_spacy():
    """With spaCy's model the phrases of the sentence; else the command that installs it."""
    if find_spec("en_core_web_sm"):
        assert parse("a green bench and a blue bowl").phrases == ("a green bench", "a blue bowl")
    else:
        with pytest.raises(UserError, match="python -m spacy download en_core_web_sm"):
            parse("a green bench and a blue bowl")


def save_tiny_depth(folder) -> str:
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_t2i_compbench_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Tiny models of the real classes judge six pictures; the scores are those of the rules on what they find."""
    texts = {
        "color": "a red cat and a blue dog",
        "spatial": "a cat on the left of a dog",
        "3d_spatial": "a cat in front of a dog",
        "numeracy": "two cats and one dog",
        "non_spatial": "a cat sleeps",
    }
    parsed = Sentence(("a", "red", "cat"), ("DET", "ADJ", "NOUN"), ("a red cat", "a blue dog"))
    monkeypatch.setattr(compbench, "parse", lambda text: parsed)
    files = tmp_path / "dataset"
    files.mkdir()
    for name, text in texts.items():
        (files / f"{name}_val.txt").write_text(f"{text}\n")
    run = a_run(tmp_path / "run", [{"prompt": text} for text in texts.values()])
    blip, dino = save_tiny_blip(tmp_path / "blip"), save_tiny_grounding_dino(tmp_path / "dino")
    depth = save_tiny_depth(tmp_path / "depth")
    words = ["score", "--benchmark", "t2i-compbench", str(run), "--benchmark_prompts", str(files)]
    words += ["--benchmark.vqa", "VLMJudge", "--benchmark.vqa.pretrained", blip, "--benchmark.detector", dino]
    words += ["--benchmark.depth", depth, "--benchmark.clip", "emoji", "--benchmark.threshold", "0.0"]
    assert main([*words, "--output", str(tmp_path / "scores")]) == 0
    assert "overall" not in capsys.readouterr().out
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    means = {line["category"]: line["mean"] for line in summary["results"]}
    assert list(means) == list(texts)

    pictures = sorted(find_pictures(run), key=lambda one: (one.prompt_index, one.image))
    images = torch.cat([batch for _, batch in read_pictures(pictures, 64)])
    model = T2ICompBench(VLMJudge(blip), detector=dino, depth=depth, clip="emoji", threshold=0.0)
    odds = [model.vqa.log_odds(images[:2], [question] * 2) for question in ("a red cat?", "a blue dog?")]
    assert means["color"] == pytest.approx(float((odds[0].sigmoid() * odds[1].sigmoid()).mean()), abs=1e-5)
    detector = model._network("detector", images)
    for category, rows in (("spatial", (2, 3)), ("3d_spatial", (4, 5)), ("numeracy", (6, 7))):
        scores = []
        for k in rows:
            (found,) = detector.detect(images[k : k + 1], [["cat", "dog"]], 0.0)
            boxes = [next(one.box for one in found if one.label == name) for name in ("cat", "dog")]
            if category == "numeracy":
                scores.append(numeracy([("cat", 2), ("dog", 1)], counted(found)))
            elif category == "spatial":
                place = placed("on the left of", *boxes, 150 / 479 * 64)
                scores.append(spatial(found, Layout("cat", "dog", ""), place, 0.5))
            else:
                place = depth_order("in front of", *boxes, DepthModel(depth, {})(images[k : k + 1])[0])
                scores.append(spatial(found, Layout("cat", "dog", ""), place, 0.0))
        assert means[category] == pytest.approx(sum(scores) / 2, abs=1e-5)
    assert means["non_spatial"] == pytest.approx(float(model.clip.score(images[8:], ["a cat sleeps"] * 2).mean()))


# ---- DPG-Bench


def test_questions_that_depend_on_others():
    questions = {
        1: Question("Is there a cat?", "entity - whole", ()),
        2: Question("Is the cat red?", "attribute - color", (1,)),
        3: Question("Is there a dog?", "entity - whole", ()),
        4: Question("Is the red cat left of the dog?", "relation - spatial", (2, 3)),
    }
    found = judged(questions, {1: False, 2: True, 3: True, 4: True})
    assert found.scores["DPG-Bench"] == 1 / 4  # 2 falls with 1, and 4 with 2
    assert found.scores["entity"] == found.scores["entity - whole"] == 1 / 2
    assert found.scores["attribute"] == found.scores["relation - spatial"] == 1
    assert found.weights["entity"] == 2
    assert found.weights["relation"] == 1


def test_dpg_from_the_command_line(tmp_path, capsys):
    """Categories count every question once; the overall score counts every picture once."""
    lines = [
        ("0", "a cat", 1, "0", "entity - whole (cat)", "Is there a cat?"),
        ("1", "a dog on a mat", 1, "0", "entity - whole (dog)", "Is there a dog?"),
        ("1", "a dog on a mat", 2, "0", "entity - whole (mat)", "Is there a mat?"),
        ("1", "a dog on a mat", 3, "1, 2", "relation - spatial (dog, mat, on)", "Is the dog on the mat?"),
    ]
    with (tmp_path / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
        writer.writerows([names, *lines])
    (tmp_path / "prompts").mkdir()
    for item, text in (("10", "a dog on\na mat"), ("9", "a cat")):
        (tmp_path / "prompts" / f"{item}.txt").write_text(text)
    run = a_run(tmp_path / "run", [{"prompt": "a cat"}, {"prompt": "a dog on a mat"}])
    blip = save_tiny_blip(tmp_path / "blip")
    words = ["score", "--benchmark", "dpg", str(run), "--output", str(tmp_path / "scores")]
    words += ["--benchmark.vqa", "VLMJudge", "--benchmark.vqa.pretrained", blip]
    assert main(words) == 2
    assert "has no item_id; expected dpg_bench.csv" in capsys.readouterr().err
    file = str(tmp_path / "dpg_bench.csv")
    assert main([*words, "--benchmark_prompts", file]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "scores" / "summary.json").read_text())["results"]
    means = {line["category"]: line["mean"] for line in results}
    answers = [[row["answers"][str(k)] for k in range(1, 1 + len(row["answers"]))] for row in rows]
    entities = [value for row in answers for value in row[:2]]
    assert means["entity"] == pytest.approx(sum(entities) / len(entities))
    whole = [sum((*row[:2], all(row))) / 3 if len(row) == 3 else row[0] for row in answers]
    assert means["overall"] == pytest.approx(sum(whole) / len(whole))

    pictures = sorted(find_pictures(run), key=lambda one: (one.prompt_index, one.image))
    images = torch.cat([batch for _, batch in read_pictures(pictures, 64)])
    asked = ["Is there a cat? Answer yes or no."] * 2 + ["Is there a dog? Answer yes or no."] * 2
    odds = VLMJudge(blip).log_odds(images, asked)
    assert [row[0] for row in answers] == (odds > 0).tolist()
    with pytest.raises(UserError, match=r"question must contain \{question\}"):
        DPGBench(question="yes?")


def test_a_folder_of_prompts(tmp_path):
    from svdd.runs.prompts import PromptDataset

    for item, text in (("10", "a dog on\n a mat\n"), ("9", "a cat"), ("x", " ")):
        (tmp_path / f"{item}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("nothing")
    dataset = PromptDataset(str(tmp_path))
    assert [dataset[k].text for k in range(len(dataset))] == ["a cat", "a dog on a mat"]
    assert dataset[1].extra == {"prompt_file": "10.txt"}
