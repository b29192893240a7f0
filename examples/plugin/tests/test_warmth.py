"""The reward on images with known scores."""

import torch
from svdd_warmth import Warmth

from svdd.evaluation.reward_checks import check_reward


def test_red_is_warm_and_blue_is_cold():
    images = torch.zeros(3, 3, 8, 8)
    images[0, 0], images[1, 2] = 1, 1
    assert Warmth().score(images, ["", "", ""]).tolist() == [1, -1, 0]
    assert Warmth(strength=2).score(images[:1], [""]).tolist() == [2]


def test_it_keeps_to_what_svdd_expects():
    check_reward(Warmth(strength=2), remake=lambda: Warmth(strength=2))


def test_svdd_finds_it_by_name():
    from svdd.commands.registry import catalogue

    assert "Warmth" in [entry.name for entry in catalogue() if entry.kind == "reward"]
