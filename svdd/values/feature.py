"""A network on CLIP features of a decoded latent, as for the aesthetic score in Li et al., 2024, arXiv 2408.08252."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import require_at_least
from svdd.diffusion.base import Diffusion
from svdd.rewards.clip import CLIPScore
from svdd.state.finite import require_finite
from svdd.values.learned import LearnedValue, require_dropout
from svdd.values.losses import ValueLoss

__all__ = ["FeatureValue"]


class FeatureValue(LearnedValue):
    """Time-conditioned network on CLIP features of the decoded latent, or of its decoded x0; decodes every candidate.

    Args:
        pretrained_clip: The CLIP model: `emoji`, a folder or a hub name.
        decode_from: What is decoded: `x`, as in the authors' code, or `x0`, far more informative for one denoiser row.
        width: Width of the network, >= 1.
        use_prompt: Whether the network reads the CLIP's embedding of the prompt and its cosine with the image's, to
            which a part of the value is proportional; false for rewards that ignore the prompt.
        dropout: Dropout rate in training, >= 0 and < 1.
        loss: `MeanLoss` (the expected reward) or `SoftLoss` (the soft value at a temperature).
        learning_rate: Peak learning rate of AdamW, > 0; cosine to 0.
        pretrained: A file that `svdd fit` wrote. Arguments above that are left at their defaults are taken from it.
    """

    decodes = True
    frozen = ("clip.",)
    exact = (*LearnedValue.exact, "units.")

    def __init__(
        self,
        pretrained_clip: str = "emoji",
        decode_from: Literal["x", "x0"] = "x0",
        width: int = 256,
        use_prompt: bool = True,
        dropout: float = 0.1,
        loss: ValueLoss | None = None,
        learning_rate: float = 1e-3,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(loss, learning_rate, pretrained)
        require_at_least(1, width=width)
        require_dropout(dropout)
        if decode_from not in ("x", "x0"):
            raise ValueError(f"decode_from must be x or x0, got {decode_from!r}")
        self.pretrained_clip, self.decode_from = pretrained_clip, decode_from
        self.width, self.use_prompt, self.dropout = width, use_prompt, dropout

    def build(self, diffusion: Diffusion) -> None:
        """Loads the CLIP model and creates the network for the features' widths."""
        self.input, self.clip = self.decode_from, CLIPScore(self.pretrained_clip)
        self.settings = {"clip": self.clip.identity}
        self._decoder = (diffusion,)  # a tuple, so that the model is not registered a second time
        inputs = self.clip.network.width * (2 if self.use_prompt else 1) + 3 + self.use_prompt
        layers = [nn.Linear(inputs, self.width), nn.Linear(self.width, self.width)]
        parts = [part for layer in layers for part in (layer, nn.SiLU(), nn.Dropout(self.dropout))]
        self.network = nn.Sequential(*parts, nn.Linear(self.width, 1))
        if self.use_prompt:
            self.units = nn.BatchNorm1d(1, affine=False)  # of the cosine, whose mean and spread depend on the CLIP
            self.slope = nn.Linear(3, 1)  # of the value as a function of the cosine, by progress
            nn.init.zeros_(self.slope.weight)
            nn.init.ones_(self.slope.bias)

    def prompt_features(self, diffusion: Diffusion, conditioning: Any, prompts: Sequence[str]) -> Tensor | None:
        """Returns the CLIP's embeddings of the prompts, [p, d]."""
        return self.clip.network.text_features(prompts) if self.use_prompt else None

    def network_output(self, x: Tensor, progress: Tensor, text: Tensor | None) -> Tensor:
        """Returns predictions in units of the rewards' spread about their mean, [n]."""
        images = self._decoder[0].decode(x)
        require_finite("decoder", x, images)
        features = self.clip.image_features(images) * 10  # entries of about unit size
        waves = torch.stack([progress, (torch.pi * progress).sin(), (torch.pi * progress).cos()], 1)
        if text is None:
            return self.network(torch.cat([features, waves], 1).to(waves))[:, 0]
        cosine = (features * text).sum(1, keepdim=True)
        if len(cosine) > 1 or not self.training:
            cosine = self.units(cosine)
        else:  # one row has no spread
            cosine = F.batch_norm(cosine, self.units.running_mean, self.units.running_var)
        cosine = cosine.to(waves)
        values = self.network(torch.cat([features, waves, cosine, 10 * text], 1).to(waves))
        return (values + self.slope(waves) * cosine)[:, 0]
