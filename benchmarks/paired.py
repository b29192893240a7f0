"""Prompts of the benchmarks, and differences paired by prompt."""

import torch

from svdd.evaluation.baseline import paired

__all__ = ["PROMPTS", "interval"]

PROMPTS = (
    "red apple on a yellow background",
    "penguin on a blue background",
    "rocket on a black background",
    "birthday cake on a pink background",
    "green car on a white background",
    "tiger on an orange background",
    "sunflower on a purple background",
    "blue elephant",
    "house on a teal background",
    "pizza on red and white stripes",
    "frog on a brown background",
    "balloon on a blue and pink gradient",
    "mushroom on a green background",
    "purple fish",
    "snowman on a gray background",
    "guitar on a yellow background",
    "owl on a green background",
    "strawberry on a white background",
    "robot on a gray background",
    "yellow balloon on a blue background",
    "pumpkin on a black background",
    "bicycle on a pink background",
    "whale on a teal background",
    "crown on a purple background",
)


def interval(first: torch.Tensor, second: torch.Tensor) -> str:
    """Returns mean and 95 % interval (Student's t) of first - second over prompts, [prompts, images] each."""
    found = paired((first - second).mean(1).double().tolist())
    return f"{found['difference']:+.3f} [{found['ci95_low']:+.3f}, {found['ci95_high']:+.3f}]"
