"""DrawBench: 200 prompts in 11 categories, without a metric of its own.

Source: Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, 2022, arXiv
2205.11487, where people compare two models' pictures. Later work reports the means of rewards on its prompts (Liu et
al., Flow-GRPO, 2025, arXiv 2505.05470).
"""

from collections.abc import Sequence

from torch import Tensor

from svdd.evaluation.benchmarks.base import Benchmark, Entry, Judgement
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.rewards.image_reward import ImageReward

__all__ = ["DrawBench"]


class DrawBench(Benchmark):
    """DrawBench: means of rewards over 200 prompts, by category.

    Without `--reward` these are CLIPScore (ViT-L/14) and ImageReward.
    """

    size = 200
    known = (
        *("Colors", "Conflicting", "Counting", "DALL-E", "Descriptions", "Gary Marcus et al.", "Misspellings"),
        *("Positional", "Rare Words", "Reddit", "Text"),
    )

    def default_rewards(self) -> list[Reward]:
        """Returns CLIPScore and ImageReward."""
        return [CLIPScore("openai/clip-vit-large-patch14"), ImageReward()]

    def judge(self, images: Tensor, entries: Sequence[Entry]) -> list[Judgement]:
        """Returns empty judgements: DrawBench has no number of its own."""
        return [Judgement({}) for _ in entries]
