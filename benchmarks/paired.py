"""Prompts of the benchmarks, and differences that are paired by prompt."""

import math

import torch

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
T_95 = {15: 2.1314, 23: 2.0687, 7: 2.3646}  # two-sided 95 % quantile of Student's t


def interval(first: torch.Tensor, second: torch.Tensor) -> str:
    """Returns mean and 95 % interval of first - second, [prompts, images] each."""
    difference = (first - second).mean(1).double()
    n = len(difference)
    half = T_95[n - 1] * float(difference.std()) / math.sqrt(n)
    mean = float(difference.mean())
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
