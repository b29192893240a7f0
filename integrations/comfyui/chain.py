"""A model that ComfyUI has loaded, as a Markov chain, and the sampler object through which ComfyUI lends it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from svdd.diffusion.base import Denoised, Diffusion
from svdd.diffusion.kernels.base import Level
from svdd.diffusion.kernels.transition import Transition
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.samplers.base import Sampler
from svdd.state.state import State

__all__ = ["ComfyChain", "Drawn", "GuidedSampler"]


class ComfyChain(Diffusion):
    """The reverse chain of a loaded model, with ComfyUI's guidance, patches and memory management in force.

    x = alpha x0 + sigma noise in the coordinates of the model's `noise_scaling`: (1, sigma) for Stable Diffusion,
    (1 - sigma, sigma) for flow models. With eta = 1 a step has the law of `euler_ancestral`, with eta = 0 that of
    `euler` and `ddim`.

    Args:
        guider: What ComfyUI gives to its samplers: returns x0 for (x, sigma), with classifier-free guidance.
        vae: The decoder, of ComfyUI's type VAE.
        sigmas: Noise levels of the T steps and of the end, float [T + 1].
        latent: The image to start from, zeros for none, [c, h, w].
        extra_args: Further arguments of the guider.
        eta: Noise of the steps, 0 to 1.
        rows_at_once: Latents that go through the network at once.
    """

    def __init__(
        self,
        guider: Any,
        vae: Any,
        sigmas: Tensor,
        latent: Tensor,
        extra_args: dict[str, Any],
        eta: float,
        rows_at_once: int,
    ) -> None:
        super().__init__(len(sigmas) - 1, rows_at_once)
        self.guider, self.vae, self.sigmas, self.latent = guider, vae, sigmas, latent
        self.extra_args, self.transition = extra_args, Transition(eta=eta)
        self.latent_shape, self.guidance_scale = tuple(latent.shape), guider.cfg
        self.rows_at_once, self.decoded = rows_at_once, True  # by the previous image
        self.levels = [self._level(sigma) for sigma in sigmas]
        self.to(latent.device)

    @property
    def model(self) -> Any:
        """ComfyUI's BaseModel."""
        return self.guider.inner_model

    def network_rows(self, guidance_scale: float | None, i: int | None = None) -> int:
        """Returns 1 at scale 1, where ComfyUI leaves the unconditional half out, and else 2."""
        return 1 if guidance_scale == 1 else 2

    def encode(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None:
        """Returns nothing: the guider has the conditioning."""

    def initial(self, noise: Tensor) -> Tensor:
        """Scales noise to the first level and adds the image to start from, as ComfyUI does."""
        sigma, largest = self.sigmas[:1], float(self.model.model_sampling.sigma_max)
        whole = float(sigma) > largest * (1 - 1e-5)
        image = self.latent.expand(noise.shape)
        return self.model.model_sampling.noise_scaling(sigma, noise.clone(), image, whole)

    def denoise(self, x: Tensor, i: int, conditioning: None, row: Tensor) -> Denoised:
        """Evaluates the guider and returns x0 and the mean alpha' x0 + rho sigma' epsilon."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.decoded:  # which can have moved the network off the device
            rows = 2 * min(self.rows_at_once, len(x))
            memory = self.model.memory_required([rows, *self.latent_shape])
            comfy.model_management.load_models_gpu([self.guider.model_patcher], memory_required=memory)
            self.decoded = False
        x0 = self.guider(x, self.sigmas[i].expand(len(x)), **self.extra_args)
        (alpha, sigma), (alpha_next, sigma_next) = self.levels[i : i + 2]
        epsilon = (x - alpha * x0) / sigma
        return Denoised(x0, alpha_next * x0 + self._rho(i) * sigma_next * epsilon)

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        return self.levels[i + 1][1] * max(0.0, 1 - self._rho(i) ** 2) ** 0.5

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """One Euler step without noise."""
        (alpha, sigma), (alpha_next, sigma_next) = self.levels[i : i + 2]
        return alpha_next * x0 + sigma_next / sigma * (x - alpha * x0)

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Noises latents to level i."""
        alpha, sigma = self.levels[i]
        return alpha * x0 + sigma * noise

    def decode(self, x0: Tensor) -> Tensor:
        """Evaluates the decoder."""
        self.decoded = True
        images = self.vae.decode(self.model.process_latent_out(x0))
        return images.movedim(-1, 1).to(x0.device, torch.float32).clamp(0, 1)

    def _rho(self, i: int) -> float:
        return self.transition.correlation(self.levels[i], self.levels[i + 1])

    def _level(self, sigma: Tensor) -> Level:
        """Returns alpha and sigma of x at a level; `noise_scaling` may change its argument."""
        scaled, at = self.model.model_sampling.noise_scaling, sigma.reshape(1)
        one, zero = torch.ones(1, device=sigma.device), torch.zeros(1, device=sigma.device)
        return float(scaled(at, zero.clone(), one, False)), float(scaled(at, one.clone(), zero, False))


@dataclass
class Drawn:
    """What was drawn: images, float [n, 3, h, w], scores by reward, float [n], and the work."""

    model: str = ""
    images: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)


@dataclass
class GuidedSampler:
    """What ComfyUI takes as a SAMPLER: it prepares model and conditioning, and calls `sample`.

    Image k of the batch has its own seed, which determines its noise: those of seed s equal what ComfyUI draws for a
    single image with this seed. A batch of equal latents is drawn together, others one after the other.
    """

    reward: Reward
    sampler: Sampler
    held_out: list[Reward]
    vae: Any
    prompt: str
    seeds: list[int]
    eta: float
    rows_at_once: int
    budget: int | None
    drawn: Drawn = field(default_factory=Drawn)

    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[int, Tensor, Tensor, int], object] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Returns the latents of the guided images, [n, c, h, w]; `noise` only states how many rows memory is for."""
        latents = latent_image[: len(self.seeds)]
        same = bool((latents == latents[:1]).all())
        groups = [self.seeds] if same else [[seed] for seed in self.seeds]
        ends: list[Tensor] = []

        def follow(i: int, state: State) -> None:
            if callback is not None:
                callback(i - 1, state.x0, state.x, state.num_steps)
            if state.done:
                ends.append(state.x)

        for latent, seeds in zip(latents, groups, strict=not same):
            chain = ComfyChain(guider, self.vae, sigmas, latent, extra_args, self.eta, self.rows_at_once)
            model = GuidedDiffusion(self.reward, chain, self.sampler, budget=self.budget)
            images, scores = model.sample([self.prompt] * len(seeds), seeds=seeds, callback=follow)
            self._keep(model, images, scores)
        final = torch.cat(ends)
        return guider.inner_model.model_sampling.inverse_noise_scaling(sigmas[-1], final)

    def _keep(self, model: GuidedDiffusion, images: Tensor, scores: Tensor) -> None:
        """Adds images, their scores by all rewards, and the work; the rewards leave the device."""
        drawn, prompts = self.drawn, [self.prompt] * len(images)
        found = {self.reward.name: scores}
        found |= {each.name: each.to(images.device).score(images, prompts) for each in self.held_out}
        for name, numbers in found.items():
            drawn.scores.setdefault(name, []).extend(numbers.tolist())
        drawn.images.append(images.cpu())
        assert model.ledger is not None
        for name, amount in vars(model.ledger).items():
            if isinstance(amount, int | float):
                drawn.work[name] = drawn.work.get(name, 0) + amount
        drawn.model = repr(model.sampler)
        for reward in (self.reward, *self.held_out):
            reward.cpu()
