"""Checks of what svdd expects of a reward: for `svdd test-reward`, a plug-in's own tests, and those of svdd."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdd import UserError, first_line
from svdd.evaluation.reward_trials import Failed, Skipped, Trial, drawn
from svdd.rewards.base import Reward
from svdd.rewards.columns import PromptText, columns_of
from svdd.rewards.function import FunctionReward
from svdd.runs.secrets import redact
from svdd.runs.tracebacks import users_traceback

__all__ = ["CHECKS", "Finding", "check_reward", "findings", "seconds_per_image"]

_STEPS = (0.005, 0.001)  # of finite differences, in units of a pixel's range; the second for networks with kinks
_NO_GRADIENT, _NO_RANGE = "no gradient is stated", "no range is stated"
_LEAST = 0.2  # seconds that a measurement of time takes


class Finding(NamedTuple):
    """What a check has found."""

    check: str
    passed: bool | None  # None if it was skipped
    message: str = ""  # why it failed or was skipped, and what to do
    traceback: str = ""  # through the user's own code, if the reward failed


def findings(trial: Trial, names: Iterable[str] | None = None) -> Iterator[Finding]:
    """Yields what checks find: all, or those of these names."""
    for name in CHECKS if names is None else names:
        try:
            CHECKS[name](trial)
            yield Finding(name, True)
        except Failed as error:
            yield Finding(name, False, str(error))
        except Skipped as error:
            yield Finding(name, None, str(error))
        except Exception as error:
            kind = "" if users_traceback(error) == "" else f"{type(error).__name__}: "
            yield Finding(name, False, f"{kind}{redact(first_line(error))}", users_traceback(error))


def check_reward(
    reward: Reward,
    images: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    remake: Callable[[], Reward] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Runs all checks, as `svdd test-reward` does; for a test of your own.

    Args:
        reward: The reward.
        images: At least two pictures, float [n, 3, h, w] in [0, 1], whose scores differ; by default drawn shapes.
        prompts: Their n prompts; a `PromptText` has columns.
        remake: Builds the same reward once more, for example its class.
        tolerance: How much rounding may change a score: of its size, and at least of 1.

    Raises:
        AssertionError: If a check fails; the message lists those that do, and what to do.
    """
    own = drawn()
    given = own[0] if images is None else images.float()
    texts = (own[1] if images is None else [""] * len(given)) if prompts is None else prompts
    found = findings(Trial(reward, given, texts, remake, tolerance))
    if failed := [each for each in found if each.passed is False]:
        lines = [f"{each.check}: {each.message}\n{each.traceback}".rstrip() for each in failed]
        raise AssertionError("\n".join([f"reward {reward.name} fails {len(failed)} of {len(CHECKS)} checks:", *lines]))


def seconds_per_image(trial: Trial) -> float:
    """Returns how long a score takes, in batches of all pictures."""
    calls, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < _LEAST:
        trial.score()
        calls += 1
    return passed / calls / len(trial.images)


# ---- the checks, in the order in which they run


def _shape(trial: Trial) -> None:
    for count in (len(trial.images), 1):
        scores = trial.score(rows=range(count))
        if scores.shape != (count,) or scores.dtype != torch.float32:
            raise Failed(f"score() returned {scores.dtype} {list(scores.shape)} for {count} images; leave it as it is")


def _order(trial: Trial) -> None:
    trial.require_spread()
    rows = [*range(1, len(trial.images)), 0]
    if not trial.close(trial.score(rows=rows), trial.scores[rows]):
        raise Failed("a score does not stay with its image when the images change places: return scores in their order")


def _independence(trial: Trial) -> None:
    if trial.reward.groupwise:
        raise Skipped("a groupwise reward compares the images of a call")
    trial.require_spread()
    for k in range(len(trial.images)):
        if not trial.close(alone := trial.score(rows=[k]), trial.scores[k : k + 1]):
            found = f"image {k} scores {alone.item():.6g} alone and {trial.scores[k]:.6g} with others"
            how = "use no statistics of the batch (mean over images, BatchNorm in training), or set groupwise = True"
            raise Failed(f"{found}: {how}")


def _repeats(trial: Trial) -> None:
    again = trial.score()
    if not torch.equal(again, trial.scores) and not trial.close(again, trial.scores):
        how = "draw no random numbers in forward, and switch dropout off with .eval()"
        raise Failed(f"a second call differs by {(again - trial.scores).abs().max():.3g}: {how}")


def _left_alone(trial: Trial) -> None:
    given = trial.images.clone()
    trial.reward.score(given, list(trial.prompts))
    if not torch.equal(given, trial.images):
        raise Failed("forward changes the images that it gets, which others read too: clone them before a change")


def _edges(trial: Trial) -> None:
    """Black, white, noise, and pictures that are not square."""
    noise = torch.rand(trial.images[:1].shape, generator=torch.Generator().manual_seed(1)).to(trial.images)
    plain = torch.zeros_like(noise)
    trial.score(torch.cat([plain, plain + 1, noise]))
    height = trial.images.shape[2]
    trial.score(trial.images[:, :, : max(1, height * 2 // 3)])


def _range(trial: Trial) -> None:
    low, high = trial.reward.range
    if not low <= high:
        raise Failed(f"range is {trial.reward.range}; expected (lowest, highest)")
    if low == -math.inf and high == math.inf:
        raise Skipped(_NO_RANGE)
    plain = torch.zeros_like(trial.images[:1])
    found = torch.cat([trial.scores, trial.score(torch.cat([plain, plain + 1]))])
    slack = trial.tolerance * max(1, *(abs(end) for end in (low, high) if math.isfinite(end)), 1)
    if found.min() < low - slack or found.max() > high + slack:
        raise Failed(f"scores from {found.min():.6g} to {found.max():.6g} leave range = {trial.reward.range}: widen it")


def _gradient(trial: Trial) -> None:
    reward, prompts = trial.reward, list(trial.prompts)
    images = trial.images[:, :, : max(1, trial.images.shape[2] * 8 // 9)].clamp(0.2, 0.8).requires_grad_()
    if not reward.differentiable:
        flows = False
        with suppress(Exception):  # such as numpy's, which refuses a tensor with a gradient
            flows = reward(images, prompts).requires_grad
        how = "the argument differentiable" if isinstance(reward, FunctionReward) else "differentiable = True"
        raise Skipped(f"gradients flow: state {how} so that DPS can use them" if flows else _NO_GRADIENT)
    scores = reward(images, prompts)
    if reward.groupwise:
        raise Failed("a groupwise reward has no gradient of one image: set differentiable = False")
    if not scores.requires_grad:
        raise Failed("differentiable = True, but no gradient flows: use torch functions only, without .detach()")
    (of_first,) = torch.autograd.grad(scores[0], images, retain_graph=True)
    if of_first[1:].abs().max() > 0:
        raise Failed("the gradient of an image's score reaches other images: score each image on its own")
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    norms = gradient.flatten(1).norm(dim=1)
    if not gradient.isfinite().all() or norms.max() == 0:
        raise Failed("the gradient is zero, NaN or infinite: set differentiable = False, or smooth the function")
    flat = torch.full_like(gradient, gradient[0].numel() ** -0.5)  # where the gradient is zero, so must be the slope
    direction = torch.where(norms.view(-1, 1, 1, 1) > 0, gradient / norms.view(-1, 1, 1, 1), flat)
    wrong, slope = torch.ones_like(norms, dtype=torch.bool), norms
    for step in _STEPS:
        with torch.no_grad():
            ahead, behind = (reward(images + sign * step * direction, prompts) for sign in (1, -1))
        rounding = 5e-7 / step * scores.detach().abs().clamp(min=1)
        slope = (ahead - behind) / (2 * step)
        wrong &= (slope - norms).abs() > 0.02 * norms + rounding
    if wrong.any():
        k = int(wrong.int().argmax())
        found = f"image {k} has a gradient of norm {norms[k]:.4g} and a slope of {slope[k]:.4g}"
        raise Failed(f"{found}: the gradient is that of another function")


def _precision(trial: Trial) -> None:
    """Images of 16 bits, and a Trainer's surroundings in 16-mixed, bf16-mixed and bf16-true."""
    kind = trial.images.device.type
    for dtype in (torch.bfloat16, torch.float16):
        images = trial.images.to(dtype)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.autocast(kind, torch.bfloat16):
                scores = trial.score(images)
        finally:
            torch.set_default_dtype(before)
        if not trial.close(scores, trial.score(images.float())):
            raise Failed(f"{dtype} images, or autocast, change the scores: do not override score(), and set no dtype")


def _device(trial: Trial) -> None:
    for name, part in trial.reward.named_modules():
        if loose := [key for key, value in vars(part).items() if isinstance(value, Tensor) and value.numel() > 1]:
            where = f"{name}.{loose[0]}".lstrip(".")
            how = f"self.register_buffer({loose[0]!r}, tensor) takes it along"
            raise Failed(f"the tensor self.{where} stays behind when the reward moves to a device: {how}")


def _loading(trial: Trial) -> None:
    before = trial.scores
    trial.reward.load()
    trial.reward.load()
    if not trial.close(trial.score(), before):
        raise Failed("scores differ after load() was called again: it must do nothing then")


def _identity(trial: Trial) -> None:
    reward = trial.reward
    try:
        known = json.dumps(reward.identity, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Failed(
            f"identity is no plain data ({first_line(error)}): keep arguments as the constructor got them"
        ) from error
    trial.score()
    if json.dumps(reward.identity) != known:
        raise Failed("identity changes when images are scored: change no attribute named like an argument")
    if trial.remake is not None and json.dumps(trial.remake().identity) != known:
        raise Failed("a second one with the same arguments has another identity: store arguments unchanged")


def _second(trial: Trial) -> None:
    if trial.remake is None:
        raise Skipped("no way to build it again was given")
    other = trial.remake().to(trial.images.device).eval()
    scores = other.score(trial.images, list(trial.prompts)).cpu()
    if not trial.close(scores, trial.scores):
        how = "each process builds its own, so weights must come from a file or a fixed seed"
        raise Failed(
            f"a second one with the same arguments scores {(scores - trial.scores).abs().max():.3g} apart: {how}"
        )


def _prompts(trial: Trial) -> None:
    texts = [
        PromptText(text, getattr(p, "columns", {}), getattr(p, "folder", None))
        for text, p in zip(["", "long " * 60], trial.prompts, strict=False)
    ]
    try:
        for check in columns_of(trial.reward).checks:
            for text in texts:
                check(text)
    except UserError as error:
        raise Skipped(f"check_prompt refuses them: {first_line(error)}") from error
    trial.reward.score(trial.images[:2], list(texts))


CHECKS: dict[str, Callable[[Trial], Any]] = {
    "one finite number per image, also for one image": _shape,
    "scores stay with their images in any order": _order,
    "other images of a call have no influence": _independence,
    "a second call gives the same scores": _repeats,
    "images are not changed": _left_alone,
    "black, white, noise and pictures that are not square have scores": _edges,
    "empty and long prompts have scores": _prompts,
    "scores are within the stated range": _range,
    "the gradient is the slope": _gradient,
    "the same scores in every precision of the Trainer": _precision,
    "moves to a device as a whole": _device,
    "loads twice": _loading,
    "the identity is stable": _identity,
    "a second process has the same scores": _second,
}
