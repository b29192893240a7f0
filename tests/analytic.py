"""Chains with known laws: exact denoisers for a Gaussian and for Gaussian mixtures, in float64."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from svdd.diffusion.base import Denoised, Diffusion, per_row
from svdd.diffusion.kernels.base import Kernel
from svdd.diffusion.kernels.glass import glass
from svdd.rewards.base import Reward
from svdd.state.start import Start
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean


class AnalyticDiffusion(Diffusion):
    """DDIM-eta steps (formula 12 of arXiv 2010.02502) over a variance-preserving schedule of T + 1 levels.

    Subclasses implement E[x_0 | x_i]. `decode` only reshapes, so a reward reads the latent from the image. A prompt
    that is a number shifts the prior by that number; other prompts have no effect. A latent has `size` numbers, of any
    `shape`.
    """

    def __init__(self, num_inference_steps, eta=1.0, size=2, first=0.05, last=0.97, chunk_size="auto", shape=None):
        super().__init__(num_inference_steps, chunk_size)
        self.eta, self.latent_shape = eta, shape or (1, 1, size)
        self.signal = np.linspace(first, last, num_inference_steps + 1).tolist()  # cumulative, at step i
        self.encoded: list[list[tuple[str, str | None]]] = []
        self.denoised_rows: list[int] = []  # rows evaluated, to check the ledger

    dtype = property(lambda self: torch.float64)
    device = property(lambda self: torch.device("cpu"))

    def posterior_mean(self, x: Tensor, signal: float, shift: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> Tensor:
        self.encoded.append(list(zip(prompts, negative_prompts, strict=True)))
        return torch.tensor([_number(prompt) for prompt in prompts], dtype=torch.float64)

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def denoise(self, x: Tensor, i: int, conditioning: Tensor, row: Tensor) -> Denoised:
        self.denoised_rows.append(len(x))
        signal, following, std = self.signal[i], self.signal[i + 1], self.std(i)
        x0 = self.posterior_mean(x, signal, per_row(conditioning[row], x))
        noise = (x - math.sqrt(signal) * x0) / math.sqrt(1 - signal)
        return Denoised(x0, math.sqrt(following) * x0 + math.sqrt(1 - following - std**2) * noise)

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        signal, following = self.signal[i], self.signal[i + 1]
        noise = (x - math.sqrt(signal) * x0) / math.sqrt(1 - signal)
        return math.sqrt(following) * x0 + math.sqrt(1 - following) * noise

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return math.sqrt(self.signal[i]) * x0 + math.sqrt(1 - self.signal[i]) * noise

    def std(self, i: int) -> float:
        signal, following = self.signal[i], self.signal[i + 1]
        return self.eta * math.sqrt((1 - following) / (1 - signal) * (1 - signal / following))

    def decode(self, x0: Tensor) -> Tensor:
        return x0.flatten(1)[:, None, None].expand(-1, 3, -1, -1)


class GaussianDiffusion(AnalyticDiffusion):
    """Prior N(mu, s^2 I): the posterior mean, hence the kernel's mean, is linear in x.

    The law of the chain's end is Gaussian but differs from the prior: each step uses the mean of x_0, not a sample.
    """

    def __init__(self, num_inference_steps, mu=0.3, s=0.8, **options):
        super().__init__(num_inference_steps, **options)
        self.mu, self.s = mu, s

    def posterior_mean(self, x, signal, shift):
        mu = self.mu + shift
        gain = self.s**2 * math.sqrt(signal) / (signal * self.s**2 + 1 - signal)
        return mu + gain * (x - math.sqrt(signal) * mu)

    def affine(self, i: int) -> tuple[float, float]:
        """Returns (K, k) of step i's mean K x + k, for an unshifted prompt."""
        signal, following, std = self.signal[i], self.signal[i + 1], self.std(i)
        gain = self.s**2 * math.sqrt(signal) / (signal * self.s**2 + 1 - signal)
        a, b = math.sqrt(following), math.sqrt(1 - following - std**2) / math.sqrt(1 - signal)
        weight = a - b * math.sqrt(signal)  # of x0; b is that of x
        return weight * gain + b, weight * self.mu * (1 - gain * math.sqrt(signal))

    def end(self, i: int) -> tuple[float, float, float]:
        """Returns (A, c, V): given x_i = x, each entry of x_T is N(A x + c, V)."""
        gain, offset, variance = 1.0, 0.0, 0.0
        for j in range(i, self.num_inference_steps):
            factor, constant = self.affine(j)
            gain, offset = factor * gain, factor * offset + constant
            variance = factor**2 * variance + self.std(j) ** 2
        return gain, offset, variance

    def end_law(self) -> tuple[float, float]:
        """Returns mean and variance of each entry of x_T."""
        gain, offset, variance = self.end(0)
        return offset, gain**2 + variance


class MixtureDiffusion(AnalyticDiffusion):
    """Prior sum_k w_k N(mu_k, s^2) on the line; the chain's laws are integrals over a grid."""

    weights, means, s = (0.7, 0.3), (-1.5, 2.0), 0.3

    def __init__(self, num_inference_steps, **options):
        super().__init__(num_inference_steps, size=1, **options)
        self.grid = np.linspace(-7, 7, 701)
        self.cell = self.grid[1] - self.grid[0]

    def posterior_mean(self, x, signal, shift):
        variance = signal * self.s**2 + 1 - signal
        weights, means = (torch.tensor(values, dtype=x.dtype) for values in (self.weights, self.means))
        residual = x[..., None] - math.sqrt(signal) * means
        share = (weights.log() - residual**2 / (2 * variance)).softmax(-1)
        return (share * (means + math.sqrt(signal) * self.s**2 / variance * residual)).sum(-1)

    def transition(self, i: int) -> np.ndarray:
        """Returns the kernel of step i as a matrix [to, from] over the grid; columns sum to 1."""
        x = torch.tensor(self.grid).view(-1, 1, 1, 1)
        mean = self.denoise(x, i, torch.zeros(1, dtype=x.dtype), torch.zeros(len(x), dtype=torch.int64)).mean
        self.denoised_rows.pop()
        density = np.exp(-((self.grid[:, None] - mean.flatten().numpy()) ** 2) / (2 * self.std(i) ** 2))
        return density / density.sum(0)

    def end_law(self, tilt: np.ndarray | None = None) -> np.ndarray:
        """Returns the mass of x_T on the grid.

        Args:
            tilt: exp(r / alpha) on the grid: every step then samples from the kernel times the exact soft value.
        """
        law = np.exp(-(self.grid**2) / 2)
        law /= law.sum()
        for i in range(self.num_inference_steps):
            kernel = self.transition(i)
            if tilt is not None:
                kernel = kernel * self.twist(i + 1, tilt)[:, None]
                kernel = kernel / kernel.sum(0)
            law = kernel @ law
        return law

    def twist(self, i: int, tilt: np.ndarray) -> np.ndarray:
        """Returns E[tilt(x_T) | x_i] on the grid."""
        for j in reversed(range(i, self.num_inference_steps)):
            tilt = self.transition(j).T @ tilt
        return tilt


class Linear(Reward):
    """r(x) = b . x, where x is the latent in the image."""

    differentiable = True

    def __init__(self, b):
        super().__init__()
        self.register_buffer("b", torch.tensor(b, dtype=torch.float64))

    def forward(self, images, prompts):
        return images[:, 0].flatten(1).to(self.b) @ self.b


class ExactSoftValue(Value):
    """alpha log E[exp(b . x_T / alpha) | x_i] = b . (A x + c) + V |b|^2 / (2 alpha); uses x0 at the end only."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    differentiable = True

    def estimate(self, state: State) -> Tensor:
        gain, offset, variance = state.context.diffusion.end(state.i)
        b = self.reward.b
        return (state.x.flatten(1) * gain + offset) @ b + variance * float(b @ b) / (2 * self.alpha)


class GridSoftValue(Value):
    """alpha log E[exp(r(x_T) / alpha) | x_i] of a `MixtureDiffusion`, interpolated on its grid."""

    def __init__(self, diffusion, tilt, alpha):
        super().__init__()
        self.grid, self.alpha = diffusion.grid, alpha
        self.table = [alpha * np.log(diffusion.twist(i, tilt)) for i in range(diffusion.num_inference_steps + 1)]

    def estimate(self, state: State) -> Tensor:
        return torch.from_numpy(np.interp(state.x.flatten().numpy(), self.grid, self.table[state.i]))

    forward = estimate  # at the end too: the reward is defined on the grid only


def bound(value: Value, reward: Reward) -> Value:
    """Returns the value bound to its reward; these values do not depend on the chain."""
    value.bind(reward, GaussianDiffusion(2))
    return value


def run(diffusion, sampler, value, count=None, prompts=None, seeds=None) -> State:
    """Samples `count` images of one prompt, or one image per prompt, with seeds 0, 1, ..."""
    prompts = [""] * count if prompts is None else prompts
    seeds = range(len(prompts)) if seeds is None else seeds
    return sampler(Start(diffusion, prompts, list(seeds)), value or PosteriorMean())


def _number(prompt: str) -> float:
    try:
        return float(prompt)
    except ValueError:
        return 0.0


class PlaneMixtureDiffusion(AnalyticDiffusion):
    """Prior sum_k w_k N(mu_k, s^2 I) in the plane; the law of the chain's end is an integral over a grid.

    An isotropic Gaussian kernel factors over the coordinates, so one step of the law is two matrix products.
    """

    weights = (0.5, 0.3, 0.2)
    means = ((-1.5, -1.0), (1.5, -1.0), (0.0, 1.5))
    s = 0.35

    def __init__(self, num_inference_steps, **options):
        super().__init__(num_inference_steps, size=2, **options)
        self.line = torch.linspace(-5, 5, 151, dtype=torch.float64)
        self.grid = torch.cartesian_prod(self.line, self.line)  # [points, 2]

    def posterior_mean(self, x, signal, shift):
        variance = signal * self.s**2 + 1 - signal
        weights, means = (torch.tensor(values, dtype=x.dtype) for values in (self.weights, self.means))
        residual = x.view(-1, 1, 2) - math.sqrt(signal) * means  # [n, modes, 2]
        share = (weights.log() - residual.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        return (share * (means + math.sqrt(signal) * self.s**2 / variance * residual)).sum(1).view_as(x)

    def end_law(self) -> Tensor:
        """Returns the mass of x_T on the grid, [points]."""
        law = torch.exp(-self.grid.square().sum(1) / 2)
        law = law / law.sum()
        for i in range(self.num_inference_steps):
            x = self.grid.view(-1, 1, 1, 2)
            mean = self.denoise(x, i, torch.zeros(1, dtype=x.dtype), torch.zeros(len(x), dtype=torch.int64)).mean
            self.denoised_rows.pop()
            factors = [
                (-((self.line[None] - mean.view(-1, 2)[:, axis, None]) ** 2) / (2 * self.std(i) ** 2)).softmax(1)
                for axis in range(2)
            ]
            law = ((law[:, None] * factors[0]).T @ factors[1]).flatten()
        return law


class Quadratic(Reward):
    """r(x) = -|x - centre|^2 / 2, where x is the latent in the image."""

    differentiable = True

    def __init__(self, centre):
        super().__init__()
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float64))

    def forward(self, images, prompts):
        return -(images[:, 0].flatten(1) - self.centre).square().sum(1) / 2


class FlowGaussian(GaussianDiffusion):
    """The same prior as a flow model, sampled by a kernel of svdd; every step is affine in x and in its noise."""

    def __init__(self, kernel: Kernel, **options):
        super().__init__(len(kernel.timesteps), **options)
        self.kernel, self.inner_steps = kernel, kernel.transition.inner_steps

    def network(self, x: Tensor, t: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        """Returns v = E[noise - x0 | x] at x = (1 - s) x0 + s noise, s = t / 1000."""
        sigma = float(t) / 1000
        mu, alpha = self.mu + shift, 1 - sigma
        x0 = mu + self.s**2 * alpha / (alpha**2 * self.s**2 + sigma**2) * (x - alpha * mu)
        return (x - x0) / sigma

    def initial(self, noise):
        return self.kernel.initial(noise)

    def denoise(self, x, i, conditioning, row):
        self.denoised_rows.append(len(x))
        shift = conditioning[row].view(-1, 1, 1, 1)
        output = self.network(self.kernel.scale_input(x, i), self.kernel.timesteps[i], shift)
        return self.kernel.predict(x, output, i)

    def draw(self, x, x0, noise, i, conditioning, row):
        self.denoised_rows.extend([len(x)] * (self.inner_steps - 1))
        shift = conditioning[row].view(-1, 1, 1, 1)
        return glass(self.kernel, x, x0, noise, i, lambda x, t: self.network(x, t, shift))

    def flow(self, x, x0, i):
        return self.kernel.flow(x, x0, i)

    def renoise(self, x0, noise, i):
        return self.kernel.renoise(x0, noise, i)

    def std(self, i):
        """Returns the standard deviation of x at step i + 1 given x."""
        return self.kernel.std(i) if self.inner_steps == 1 else self._step(i)[2]

    def affine(self, i):
        return self._step(i)[:2]

    def _step(self, i: int) -> tuple[float, float, float]:
        """Returns (K, k, std) of the law N(K x + k, std^2) of a step."""
        x, noise = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(2, 3, 1, 1, 1)
        known = self.kernel.predict(x, self.network(self.kernel.scale_input(x, i), self.kernel.timesteps[i]), i)
        end = glass(self.kernel, x, known.x0, noise, i, self.network)  # with one inner step the Gaussian step
        zero, one, pushed = end.flatten().tolist()
        return one - zero, zero, pushed - zero
