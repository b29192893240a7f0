"""A small network on CLIP features of a decoded latent.

Source: the value networks of Li et al., 2024, arXiv 2408.08252, for the aesthetic score.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdd.diffusion.base import Diffusion
from svdd.rewards.clip import CLIPScore
from svdd.values.learned import LearnedValue
from svdd.values.losses import ValueLoss

__all__ = ["FeatureValue"]


class FeatureValue(LearnedValue):
    """Time-conditioned network on CLIP features of the decoded latent, or of its decoded x0.

    Decodes every candidate; reads x without a denoiser row, as the paper's code does, or x0, which costs one and is far
    easier to judge.

    Args:
        pretrained_clip: The CLIP: `emoji`, a folder or a hub name.
        of: What is decoded: `x0` or `x`.
        width: Width of the network.
        use_prompt: Whether the network sees the prompt's text features.
        loss: `MeanLoss` (the expected reward) or `SoftLoss` (the soft value at a temperature).
        learning_rate: Peak step size of AdamW, cosine to 0.
        pretrained: Trained weights: a safetensors file that `svdd fit` wrote.

    Raises:
        ValueError: If an argument is out of range.
        UserError: If the CLIP cannot be loaded.
    """

    decodes = True

    def __init__(
        self,
        pretrained_clip: str = "emoji",
        of: Literal["x", "x0"] = "x0",
        width: int = 256,
        use_prompt: bool = True,
        loss: ValueLoss | None = None,
        learning_rate: float = 1e-3,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(loss, learning_rate, pretrained)
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        if of not in ("x", "x0"):
            raise ValueError(f"of must be x or x0, got {of!r}")
        self.pretrained_clip, self.of, self.width, self.use_prompt = pretrained_clip, of, width, use_prompt
        self.input = of
        self.clip = CLIPScore(pretrained_clip)

    def build(self, diffusion: Diffusion) -> None:
        """Makes the network for the features' widths."""
        self._decoder = (diffusion,)  # a tuple, so that the model is not registered a second time
        image = self.clip.network.width
        text = diffusion.prompt_features_size if self.use_prompt else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(image + text + 3, self.width),
                nn.SiLU(),
                nn.Linear(self.width, self.width),
                nn.SiLU(),
                nn.Linear(self.width, 1),
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Which CLIP's features it reads."""
        return {"clip": self.clip.identity}

    def own_state(self) -> dict[str, Tensor]:
        """Returns the state without the frozen CLIP."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("clip.")}

    def estimate(self, x: Tensor, progress: Tensor, text: Tensor | None) -> Tensor:
        """Returns the estimates in units of the rewards' spread, [n]; `x` comes in units of its own."""
        features = self.clip.image_features(self._decoder[0].decode(x)) * 10  # entries of about unit size
        waves = torch.stack([progress, (torch.pi * progress).sin(), (torch.pi * progress).cos()], 1)
        parts = [features.to(waves), waves]
        if self.use_prompt and text is not None:
            parts.append(text)
        return self.network(torch.cat(parts, 1))[:, 0]

    def observe(self, rewards: Tensor, spread: Tensor) -> None:
        """Sets the units of the rewards; what is decoded keeps its own."""
        super().observe(rewards, torch.ones_like(spread))
