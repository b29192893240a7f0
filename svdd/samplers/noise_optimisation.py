"""Noise optimisation: gradient ascent on the starting noise through the whole chain.

Target: the start that maximises the reward of its image plus the log-density of the norm of its noise.
Source: Eyring et al., ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization, 2024,
arXiv 2406.04312, with the defaults of its code (github.com/ExplainableML/ReNO).
"""

import math

import torch
from torch import Tensor

from svdd import UserError, require_numbers
from svdd.diffusion.base import per_row
from svdd.samplers.base import Diffusion, Sampler, Start, State, Value, require_at_least_one
from svdd.samplers.toolbox.selection import top
from svdd.state.gradient import differentiate
from svdd.state.recorder import descent

__all__ = ["NoiseOptimisation", "norm_log_density", "norm_slope"]


class NoiseOptimisation(Sampler):
    """Noise optimisation (ReNO): gradient ascent on the starting noise z through the chain and the decoder.

    1. K times: run the chain from z to its end; g = gradient at z of r + regularisation ((d - 1) log |z| - |z|^2 / 2)
    2. g <- g min(1, clip / |g|);  velocity <- momentum velocity + g;  z <- z + learning_rate (g + momentum velocity)
    3. return the end of the highest reward

    The regulariser is the log-density of the norm of d standard normal numbers, up to a constant. All norms are those
    of one image. As published for one step and for few; the last run needs no gradient. Noise in the steps (eta > 0)
    is the same in all runs, as there. For distilled models and short chains: the graph of T denoiser evaluations and a
    decode is kept for as many images as the chunk size says. The settings depend on the reward's unit: for c r in place
    of r, learning_rate / c, c clip and c regularisation give the same images. Costs K T denoiser rows per image,
    (K - 1) T of them with a backward pass.

    Args:
        num_iterations: K, runs of the chain.
        learning_rate: Factor on the clipped gradient, above 0; a step without momentum is at most this times `clip`.
        momentum: Of Nesterov's kind, 0 to below 1.
        clip: Largest norm of an image's gradient, above 0.
        regularisation: Weight of the log-density, in units of the reward, at least 0.
    """

    budget_argument = "num_iterations"
    needs_gradient = True

    def __init__(
        self,
        num_iterations: int = 50,
        learning_rate: float = 5.0,
        momentum: float = 0.9,
        clip: float = 0.1,
        regularisation: float = 0.01,
    ) -> None:
        require_at_least_one(num_iterations=num_iterations)
        require_numbers(learning_rate=learning_rate, momentum=momentum, clip=clip, regularisation=regularisation)
        for name, factor in (("learning_rate", learning_rate), ("clip", clip)):
            if not factor > 0:
                raise ValueError(f"{name} must be > 0, got {factor}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be >= 0 and below 1, got {momentum}")
        if not (math.isfinite(regularisation) and regularisation >= 0):
            raise ValueError(f"regularisation must be a finite number >= 0, got {regularisation}")
        self.num_iterations, self.learning_rate, self.momentum = num_iterations, learning_rate, momentum
        self.clip, self.regularisation = clip, regularisation

    def check(self, diffusion: Diffusion, value: Value) -> None:
        """Raises UserError if the reward has no gradient; other values than the reward are not used."""
        if not value.reward.differentiable:
            raise UserError(
                f"NoiseOptimisation needs gradients, and reward {value.reward.name} is not differentiable; use a "
                "differentiable reward such as CLIPScore, or a search without gradients such as ZeroOrderSearch"
            )

    def sample(self, start: Start, value: Value) -> State:
        """Returns the best end of the iterations for each image."""
        state = start()
        scale = state.context.diffusion.initial(torch.ones_like(state.x))
        x = state.x.to(torch.promote_types(state.x.dtype, torch.float32))  # half precision would lose small steps
        best, best_value, slope = self._run(state.replay(state.x), value, self.num_iterations > 1)
        velocity = torch.zeros_like(x)
        for k in range(2, self.num_iterations + 1):
            slope = scale * slope + self.regularisation * norm_slope(x / scale)  # by the noise, x / scale
            slope = slope / per_row(slope.flatten(1).norm(dim=1) / self.clip, slope).clamp(min=1)
            velocity = self.momentum * velocity + slope
            x = x + scale * self.learning_rate * (slope + self.momentum * velocity)
            ends, v, slope = self._run(state.replay(x.to(state.x.dtype)), value, k < self.num_iterations)
            v = torch.cat([best_value, v], 1)
            index = top(v)
            best, best_value = self.keep(best.join(ends), index, v), v.gather(1, index)
        return best

    def _run(self, state: State, value: Value, gradient: bool) -> tuple[State, Tensor, Tensor]:
        """Returns the ends of all chains, their rewards, [images, 1], and, if wanted, the gradients of these at x."""
        context = state.context

        def run(x: Tensor, image: Tensor) -> dict[str, Tensor]:
            leaf, own = x.detach().requires_grad_(gradient), context.of(image).replay()  # a chunk may be run again
            part, ends = State(leaf, 0, state.row[image], state.origin[image], own), []

            def reward(part: State) -> Tensor:
                ends.append(self.finish(part))
                return value(ends[0])

            found = differentiate(reward, part, leaf) if gradient else {"values": reward(part), "gradient": x}
            known = {name: found[name] for name in ("values", "gradient")}
            return known | {"x": ends[0].x.detach(), "images": ends[0].images.detach()} | descent(ends[0])

        image = torch.arange(state.num_images, device=state.x.device)
        work = ("gradient", context.diffusion, value, gradient)
        # in chunks, which bounds the memory of the graph
        found = context.diffusion.chunker.map(run, state.num_images, state.x, image, work=work)
        state.require_finite("reward's gradient", state.x, found["gradient"])
        values = found.pop("values").view(-1, 1)
        context.report(state.num_steps, values)
        x, slope = found.pop("x"), found.pop("gradient")
        return State(x, state.num_steps, state.row, state.origin, context, found), values, slope


def norm_log_density(noise: Tensor) -> Tensor:
    """Returns (d - 1) log |z| - |z|^2 / 2 of each row z of d numbers, [n]; the largest at |z| = sqrt(d - 1)."""
    norm = noise.flatten(1).norm(dim=1)
    return (noise[0].numel() - 1) * norm.log() - norm.square() / 2


def norm_slope(noise: Tensor) -> Tensor:
    """Returns the gradient of `norm_log_density`, ((d - 1) / |z|^2 - 1) z, [n, ...]."""
    return per_row((noise[0].numel() - 1) / noise.flatten(1).norm(dim=1).square() - 1, noise) * noise
