"""The reverse step of a scheduler as a Gaussian kernel N(mean, std^2 I).

Schedulers return samples, not means. For the law that a scheduler draws itself, its class here repeats its arithmetic
in the same order, so a draw from the kernel equals `scheduler.step` bit for bit in float32, wherever that is finite;
for any other law it takes the general step of `Transition`. Multistep solvers (PNDM, UniPC, ...) are not Markov and
have no kernel.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdd import did_you_mean
from svdd.diffusion.base import Denoised
from svdd.diffusion.kernels.transition import Transition

__all__ = ["Kernel", "Level", "Network", "find_kernel", "widen"]

Level = tuple[float, float]  # alpha and sigma of x = alpha x0 + sigma noise
Network = Callable[[Tensor, Tensor], Tensor]  # of scaled latents and what the network is told, with guidance


class Kernel(ABC):
    """The T steps of one scheduler; ValueError if its configuration has no Gaussian kernel.

    Args:
        config: A diffusers scheduler configuration, of any scheduler of the same training noise.
        num_inference_steps: T.
        transition: How much of a step is noise.
        timestep_options: Further arguments of the scheduler's `set_timesteps`.

    Attributes:
        timesteps: What the network is told at each step, [T].
        levels: alpha and sigma of x at each step and at the end, T + 1 pairs.
    """

    scheduler_class: ClassVar[Any]
    allowed: ClassVar[dict[str, tuple[Any, ...]]]  # values of the configuration that the kernel implements
    timesteps: Tensor
    levels: list[Level]

    def __init__(
        self,
        config: Mapping[str, Any],
        num_inference_steps: int,
        transition: Transition = Transition(),  # noqa: B008, frozen
        timestep_options: Mapping[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in config.items() if value is not None}  # null means the default
        kind = self.scheduler_class.__name__
        try:
            self.scheduler = self.scheduler_class.from_config(given)
        except NotImplementedError as error:
            raise ValueError(f"{kind} does not know beta_schedule={given['beta_schedule']!r}") from error
        except ImportError as error:
            raise ValueError(f"{kind} with use_beta_sigmas=true needs scipy: pip install scipy") from error
        except TypeError as error:
            raise ValueError(f"{kind} cannot take these settings: {error}") from error
        self.config, self.transition = self.scheduler.config, transition
        for name, known in self.allowed.items():
            if self.config.get(name) not in known:
                listed = ", ".join(str(value) for value in known)
                raise ValueError(f"{kind}: {name} must be one of {listed}, got {self.config.get(name)!r}")
        try:
            self._set_timesteps(num_inference_steps, dict(timestep_options or {}))
        except (ArithmeticError, IndexError) as error:  # in diffusers
            raise ValueError(f"{kind} has no {num_inference_steps} steps with these settings: {error}") from error

    @staticmethod
    @abstractmethod
    def settings(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a kernel takes of a saved scheduler's configuration, whatever class of scheduler saved it.

        ValueError if that scheduler is for models of another kind.
        """

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError if an option is no setting of the scheduler, or of another type than its default."""
        known = dict(inspect.signature(cls.scheduler_class.__init__).parameters)
        known.pop("self")
        for name, value in options.items():
            if name not in known:
                kind, near = cls.scheduler_class.__name__, did_you_mean(name, sorted(known))
                raise ValueError(f"scheduler_options: {kind} has no setting {name!r}{near}")
            if value is not None and (expected := _type(known[name].default)) not in ("", _type(value)):
                raise ValueError(f"scheduler_options: {name} must be {expected}, got {value!r}")

    @classmethod
    def configure(cls, saved: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings from a saved configuration, with some options in place of the saved ones."""
        settings = cls.settings(saved)
        defaults = [name for name in settings.get("_use_default_values", []) if name not in options]
        return {**settings, **options, "_use_default_values": defaults}

    @abstractmethod
    def _set_timesteps(self, count: int, options: dict[str, Any]) -> None:
        """Sets `timesteps` and `levels`; ValueError if there are not so many steps."""

    def timestep_on(self, device: torch.device, i: int) -> Tensor:
        """Returns what the network is told at step i, on a device, for which nothing waits."""
        return self.timesteps[i].to(device, non_blocking=True)

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Scales standard normal noise to x at i = 0."""

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """Scales latents at step i for the network."""
        return x

    @abstractmethod
    def split(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Returns the posterior mean and the predicted noise, by the network's output at step i."""

    @abstractmethod
    def denoise(self, statistic: Tensor, ratio: float, network: Network) -> Tensor:
        """Returns the posterior mean of x0 given `statistic`, x0 + noise / ratio, for any ratio alpha / sigma."""

    def predict(self, x: Tensor, output: Tensor, i: int) -> Denoised:
        """Turns the network's output at step i into the posterior mean and the kernel's mean."""
        x0, epsilon = (widen(part) for part in self.split(x, output, i))
        alpha, sigma = self.levels[i + 1]
        return Denoised(x0.to(x.dtype), (alpha * x0 + self.rho(i) * sigma * epsilon).to(x.dtype))

    def rho(self, i: int) -> float:
        """Returns the correlation of the noises before and after step i; without a posterior the last draws none."""
        if i + 2 == len(self.levels) and not self.transition.posterior:
            return 1.0
        return self.transition.correlation(self.levels[i], self.levels[i + 1])

    def std(self, i: int) -> float:
        """Returns the standard deviation of step i."""
        return self.levels[i + 1][1] * math.sqrt(1 - self.rho(i) ** 2)

    def renoise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Draws x at step i given x0, with standard normal noise: alpha x0 + sigma noise."""
        alpha, sigma = self.levels[i]
        return (alpha * widen(x0) + sigma * widen(noise)).to(x0.dtype)

    def flow(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """Moves x from step i to i + 1 without noise: alpha' x0 + (sigma' / sigma) (x - alpha x0)."""
        (alpha, sigma), (alpha_next, sigma_next) = self.levels[i], self.levels[i + 1]
        x0_wide = widen(x0)
        return (alpha_next * x0_wide + sigma_next / sigma * (x - alpha * x0_wide)).to(x.dtype)


def _type(value: object) -> str:
    """Returns the type of a setting in words, or an empty string if any is allowed."""
    types: dict[Any, str] = {bool: "true or false", (int, float): "a number", str: "text"}  # a bool is an int as well
    return next((word for kind, word in types.items() if isinstance(value, kind)), "")


def find_kernel(name: str, known: Mapping[str, type[Kernel]]) -> type[Kernel]:
    """Returns the kernel class of a scheduler; raises ValueError if there is none."""
    if name in known:
        return known[name]
    raise ValueError(
        f"scheduler {name!r} has no Gaussian one-step kernel here (multistep solvers are not Markov); known: "
        f"{', '.join(known)}{did_you_mean(name, known)}"
    )


def widen(x: Tensor) -> Tensor:
    """Returns half-precision numbers in float32, others as they are."""
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
