"""`ObjectCount`: the score out of given detections, and what is counted for a prompt."""

import math

import pytest
import torch
from torch import nn

from svdd import UserError
from svdd.rewards import ObjectCount
from svdd.rewards.columns import PromptText, columns_of
from svdd.rewards.models.detectors import Detection
from svdd.rewards.models.number_words import counted_object, singular
from svdd.rewards.object_count import soft_count
from svdd.runs.rows import Prompt


class Given(nn.Module):
    """Returns given detections, and records what was asked."""

    def __init__(self, *found: list[float]) -> None:
        super().__init__()
        self.found, self.asked = found, []

    def detect(self, images, labels, threshold, overlap, batch_size):
        self.asked.append((labels, threshold, overlap, batch_size))
        return [[Detection("apple", score, (0, 0, 1, 1)) for score in scores] for scores in self.found]


def test_the_score_is_minus_the_distance_of_the_soft_count():
    """A box at the threshold counts half, one softness above it 1 / (1 + e^-1)."""
    reward = ObjectCount(object="apple", count=2, threshold=0.5, softness=0.1)
    reward.pretrained_network = Given([0.5, 0.6], [1.0, 0.99, 0.98], [])
    one = 1 / (1 + math.exp(-1))
    clear = sum(1 / (1 + math.exp(-(score - 0.5) / 0.1)) for score in (1.0, 0.99, 0.98))
    scores = reward.score(torch.zeros(3, 3, 8, 8), ["", "", ""])
    torch.testing.assert_close(scores, torch.tensor([-(2 - 0.5 - one), -(clear - 2), -2.0]))
    assert reward.pretrained_network.asked == [([["apple"]] * 3, pytest.approx(0.1), 0.5, 8)]
    assert soft_count([0.5, 0.49, 0.9], 0.5, 0.0) == 2
    assert soft_count([0.5, 1e-9], 0.5, 1e-6) == 0.5


def test_arguments_come_before_columns_and_these_before_the_prompt():
    row = PromptText("three red apples on a table", {"object": "pear", "count": "4.0"})
    assert ObjectCount().wanted("three red apples on a table") == ("red apple", 3)
    assert ObjectCount().wanted(row) == ("pear", 4)
    assert ObjectCount(object="plum").wanted(row) == ("plum", 4)
    assert ObjectCount(object="plum", count=0).wanted(row) == ("plum", 0)
    assert ObjectCount(count=5).wanted("three red apples") == ("red apple", 5)
    assert ObjectCount(object="apple").name == "ObjectCount-apple"
    with pytest.raises(UserError, match="the prompt 'red apples' counts no object clearly; give object and count, or"):
        ObjectCount().wanted("red apples")
    with pytest.raises(UserError, match="the prompt 'red apples' counts no number of it clearly"):
        ObjectCount(object="apple").wanted("red apples")
    with pytest.raises(UserError, match=r"the column count of the prompt 'x' must be a whole number >= 0, got 1.5"):
        ObjectCount().wanted(PromptText("x", {"object": "pear", "count": 1.5}))
    with pytest.raises(UserError, match="the prompt 'red apples' counts no object"):  # before anything is drawn
        ObjectCount().check_prompt("red apples")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count must be a whole number >= 0, got -1"),
        ({"object": " "}, "object must be the name of what is counted"),
        ({"threshold": 1.5}, r"threshold and overlap must be in \[0, 1\], got 1.5 and 0.5"),
        ({"softness": -1}, "softness must be >= 0"),
        ({"softness": math.nan}, "softness must be >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ObjectCount(**arguments)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of three dogs", (3, "dog")),
        ("a photo of two wine glasses", (2, "wine glass")),
        ("a photo of three sports balls", (3, "sports ball")),
        ("12 Knives, on the wall", (12, "knife")),
        ("four sheep grazing in a field", (4, "sheep")),
        ("a street with 3 buses", (3, "bus")),
        ("seven people dancing", (7, "person")),
        ("five cookies and milk", (5, "cookie")),
        ("a red apple", (1, "red apple")),
        ("no clouds, zero birds", (0, "bird")),
        ("a red apple on a yellow background", (1, "red apple")),
        ("a close-up photo of an owl at night", (1, "owl")),
        ("a painting of apples on a table", None),
        ("apples on a table", None),
        ("two cats and three dogs", None),
        ("apples", None),
        ("three", None),
        ("", None),
    ],
)
def test_what_a_prompt_counts(prompt, expected):
    assert counted_object(prompt) == expected


def test_singulars():
    plurals = "boxes benches dishes potatoes cherries glass bus tennis pizzas wolves broccolis ties geese"
    expected = "box bench dish potato cherry glass bus tennis pizza wolf broccoli tie goose"
    assert [*map(singular, plurals.split())] == expected.split()


def test_a_prompt_that_counts_nothing_is_refused_before_anything_is_drawn():
    rows = [Prompt(0, "two cats", None, None, {}), Prompt(1, "cats", None, None, {})]
    with pytest.raises(UserError, match="line 1: ObjectCount: the prompt 'cats' counts no object clearly"):
        columns_of(ObjectCount()).check(rows, "line {}".format)
    columns_of(ObjectCount(object="cat", count=2)).check(rows, "line {}".format)
