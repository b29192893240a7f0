"""A small convolutional network on the noisy latents, which needs neither decoder nor denoiser."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError, require_at_least
from svdd.diffusion.base import Diffusion, per_row
from svdd.values.learned import LearnedValue, require_dropout
from svdd.values.losses import ValueLoss

__all__ = ["LatentConvValue"]

_FREQUENCIES = 16


class LatentConvValue(LearnedValue):
    """Time-conditioned residual convolutions on the noisy latents: no denoiser row, no decoding.

    SVDD then costs T denoiser rows per image for any number of candidates. The output is averaged over positions.
    Latents must have the shape [..., height, width]; all axes before the height count as channels.

    Args:
        channels: Width of the network, >= 1.
        num_blocks: Residual blocks at each resolution, >= 1; the latent is halved until its side is at most 8.
        use_prompt: Whether the network reads the prompt's text features.
        dropout: Dropout rate in training, >= 0 and < 1; states of one rollout are strongly correlated.
        mirror: Mirror half of the training states at random, for rewards that are symmetric in left and right.
        loss: `MeanLoss` (the expected reward) or `SoftLoss` (the soft value at a temperature).
        learning_rate: Peak learning rate of AdamW, > 0; cosine to 0.
        pretrained: A file that `svdd fit` wrote, or the name of a value that ships with svdd. Arguments above that are
            left at their defaults are taken from it.
    """

    def __init__(
        self,
        channels: int = 32,
        num_blocks: int = 2,
        use_prompt: bool = True,
        dropout: float = 0.1,
        mirror: bool = False,
        loss: ValueLoss | None = None,
        learning_rate: float = 1e-3,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(loss, learning_rate, pretrained)
        require_at_least(1, channels=channels, num_blocks=num_blocks)
        require_dropout(dropout)
        self.channels, self.num_blocks = channels, num_blocks
        self.use_prompt, self.dropout, self.mirror = use_prompt, dropout, mirror

    def build(self, diffusion: Diffusion) -> None:
        """Creates the network for the latents' shape and the prompt features' width; UserError if there is no area."""
        if len(shape := diffusion.latent_shape) < 3:
            raise UserError(
                f"LatentConvValue needs latents of shape [channels, height, width], and {type(diffusion).__name__} has "
                f"latents of shape {[*shape]}; use FeatureValue, which reads decoded images"
            )
        halvings = max(0, math.ceil(math.log2(max(shape[-2:]) / 8)))
        features, hidden = diffusion.prompt_features_size if self.use_prompt else 0, 2 * self.channels
        self.entry = nn.Conv2d(math.prod(shape[:-2]), self.channels, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.text = nn.Linear(features, hidden) if features else None
        self.blocks = nn.ModuleList(
            _Block(self.channels, hidden, self.dropout, halve=level > 0 and k == 0)
            for level in range(halvings + 1)
            for k in range(self.num_blocks)
        )
        self.exit = nn.Sequential(nn.Linear(self.channels, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def network_output(self, x: Tensor, progress: Tensor, text: Tensor | None) -> Tensor:
        """Returns predictions in units of the rewards' spread about their mean, [n]."""
        x = x.flatten(1, -3)  # frames, if there are any, count as channels
        if self.training and self.mirror:
            x = torch.where(per_row(torch.rand(len(x), device=x.device), x) < 0.5, x.flip(-1), x)
        angles = progress[:, None] * (math.pi * torch.arange(1, _FREQUENCIES + 1, device=x.device, dtype=x.dtype))
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        if self.text is not None and text is not None:
            condition = condition + self.text(text)
        hidden = self.entry(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.exit(hidden.flatten(2).transpose(1, 2)).mean((1, 2))


class _Block(nn.Module):
    """Two convolutions with a norm over channels, scaled and shifted by the condition, around a skip."""

    def __init__(self, channels: int, condition: int, dropout: float, halve: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(_ChannelNorm(channels) for _ in range(2))
        self.modulation = nn.Linear(condition, 2 * channels)
        self.halve, self.dropout = halve, nn.Dropout(dropout)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.halve:
            x = F.avg_pool2d(x, 2)
        scale, shift = self.modulation(F.silu(condition))[:, :, None, None].chunk(2, 1)
        hidden = self.norms[1](self.first(F.silu(self.norms[0](x)))) * (1 + scale) + shift
        return x + self.second(self.dropout(F.silu(hidden)))


class _ChannelNorm(nn.Module):
    """Root mean square norm over channels, not positions: the strength and area of a pattern matter to many rewards."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * self.scale
