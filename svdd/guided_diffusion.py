"""The LightningModule that wraps a diffusion model, a sampler, a value and a reward."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from svdd import is_integer, require_at_least
from svdd.assets.content import digest, sources
from svdd.diffusion.arithmetic import float32_default
from svdd.diffusion.auto import AutoDiffusion, from_pipeline
from svdd.diffusion.base import Diffusion
from svdd.diffusion.chunking import redrawn
from svdd.evaluation.metrics.run_statistics import RunStatistics
from svdd.rewards.base import Reward, full_precision, is_device_failure, sparing_rewards
from svdd.rewards.columns import columns_of
from svdd.rewards.conversion import RewardLike, check_rewards
from svdd.runs.bounds import check_images
from svdd.runs.prediction import Prediction, predict_or_skip
from svdd.runs.prompts import PromptDataset
from svdd.runs.requests import requests
from svdd.runs.rows import Prompt, ResultRow, result_row
from svdd.samplers.base import Sampler, require_at_least_one
from svdd.samplers.budget import Cost, Uncountable, count, current_count, fit_budget, settings
from svdd.samplers.svdd import SVDD
from svdd.state.ledger import Ledger
from svdd.state.recorder import Recorder, recorded
from svdd.state.scoring import score, score_all
from svdd.state.start import Start
from svdd.state.state import State
from svdd.state.trace import STATISTICS, rounded
from svdd.state.trajectory import Trajectory, frame_steps
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean

__all__ = ["GuidedDiffusion"]


class GuidedDiffusion(L.LightningModule):
    """A pretrained diffusion model whose samples are steered towards a reward.

    Args:
        reward: The guide reward; in Python also a function of images, float [n, 3, h, w] in [0, 1], and their prompts.
        diffusion: The pretrained model, or in Python a pipeline object of diffusers, which stays as it is; by default
            the model that ships with svdd.
        sampler: The algorithm; by default `SVDD` with 20 candidates.
        value: The estimate that guides the sampler; by default `PosteriorMean`.
        eval_rewards: Rewards that are measured on the final images and never guided on (held-out rewards).
        images_per_prompt: Images for each prompt, at most 10,000.
        budget: Denoiser rows that a returned image may cost; a backward pass counts as two more, a cheaper preview as
            its share. Sets the sampler's count (of candidates, particles or iterations) to the largest within the
            budget; see `chosen`.
        seed: Image k of prompt p has the seed `seed + p * images_per_prompt + k`, or the prompt's own seed plus k.
        on_error: If a prompt fails, `raise` ends the run; `skip` goes on, and the same command tries the prompt again.

    Raises:
        ValueError: If an argument is out of range, or the sampler cannot work on this chain, with this value or budget.

    Examples:
        >>> from svdd.rewards.jpeg import Compressibility
        >>> from svdd.samplers.svdd import SVDD
        >>> model = GuidedDiffusion(Compressibility(), AutoDiffusion("emoji", 4), SVDD(num_candidates=2))
        >>> images, scores = model.sample(["apple", "blue car"], seed=7)
        >>> images.shape, scores.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2]))
    """

    def __init__(
        self,
        reward: RewardLike,
        diffusion: Diffusion | None = None,
        sampler: Sampler | None = None,
        value: Value | None = None,
        eval_rewards: list[RewardLike] | None = None,
        images_per_prompt: int = 1,
        budget: int | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        require_at_least_one(images_per_prompt=images_per_prompt)
        check_images(1, images_per_prompt)
        if budget is not None and (not is_integer(budget) or budget < 1):
            raise ValueError(f"budget must be an integer >= 1, in denoiser rows per image, got {budget!r}")
        require_at_least(0, seed=seed)
        self.reward, held_out = check_rewards(reward, eval_rewards or [])
        self.eval_rewards = nn.ModuleList(held_out)
        if diffusion is not None and not isinstance(diffusion, Diffusion):
            diffusion = from_pipeline(diffusion)
        self.diffusion = AutoDiffusion() if diffusion is None else diffusion
        self.sampler = SVDD() if sampler is None else sampler
        self.value = PosteriorMean() if value is None else value
        self.value.bind(self.reward, self.diffusion)
        self.images_per_prompt, self.budget, self.seed, self.on_error = images_per_prompt, budget, seed, on_error
        self.sampler.check(self.diffusion, self.value)
        if budget is not None:
            self.sampler = fit_budget(self.sampler, budget, self.diffusion, self.value)
            self.sampler.check(self.diffusion, self.value)
        self.cost: Cost | None = None  # of a returned image; None if it cannot be counted
        self._costs_nothing = False  # the reproducible mode on a CPU
        with suppress(Uncountable):  # a mistake in a sampler shows here, before anything is drawn
            self.cost = count(self.sampler, self.diffusion, self.value)
            self._costs_nothing = self.cost.fills_a_cpu
        self.columns = columns_of(*self.rewards.values())
        best = {name: reward.higher_is_better for name, reward in self.rewards.items()}
        self.statistics = RunStatistics(best, STATISTICS, [each.name for each in fields(Ledger)])
        self.summary: dict[str, Any] = {}
        self.on_step: Callable[[int, float | None], None] | None = None
        self.ledger: Ledger | None = None  # of the batch that is drawn, or was drawn last

    @property
    def rewards(self) -> dict[str, Reward]:
        """All rewards by name, the guide first."""
        return {reward.name: reward for reward in (self.reward, *self.eval_rewards)}

    @property
    def chosen(self) -> dict[str, Any]:
        """The sampler's count or schedule, by its name, and the rows that a returned image costs with it."""
        cost = count(self.sampler, self.diffusion, self.value)
        gradients = {"gradient_rows": cost.gradient_rows} if cost.gradient_rows else {}
        equivalent = {"equivalent_rows": round(cost.network_rows, 3)} if cost.network_rows != cost.denoiser_rows else {}
        return {**current_count(self.sampler), "denoiser_rows": cost.denoiser_rows, **equivalent, **gradients}

    @torch.no_grad()
    @redrawn
    def sample(
        self,
        prompts: Sequence[str] | str,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        *,
        num_images: int = 1,
        negative_prompts: Sequence[str | None] | str | None = None,
        callback: Callable[[int, State], object] | None = None,
        trajectory: bool | int | Sequence[int] = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Trajectory]:
        """Draws guided images outside of a Trainer.

        Args:
            prompts: A text or several.
            seed: Image k of prompt p starts from the seed `seed + p * num_images + k`, as in `svdd predict`.
            seeds: Or one seed per image; or one per prompt, whose image k starts from the prompt's seed + k.
            num_images: Images of each prompt.
            negative_prompts: What no image should show, or a text or None for each prompt.
            callback: Called as `callback(i, state)` after each step: i = 1 .. T, and the `State` of the particles that
                go on, which it may read. An exception that it raises ends the call. Searches pass 1 .. T - 1 in each
                of their rounds.
            trajectory: Also return a `Trajectory`, with frames of all steps (True), of so many, or of these steps.

        Returns:
            Images, float32 [n, 3, h, w] in [0, 1], the first prompt's first; the guide reward of each, float32 [n]; the
            trajectory, if wanted. n is the number of images, times the number that the sampler returns for each.
        """
        wanted = requests(prompts, seed, seeds, num_images, negative_prompts)
        frames = [] if trajectory is False else frame_steps(trajectory, self.diffusion.num_inference_steps)
        recorder = Recorder(frames, callback) if frames or callback is not None else None
        texts, starts, negatives = zip(*wanted, strict=True)
        final = self.draw(texts, starts, negatives, recorder)
        groups = len(wanted) // num_images if self.reward.groupwise else len(wanted)
        scores = score(self.reward, self.diffusion.chunker, groups, final.images, final.prompts)
        if recorder is None or not frames:
            return final.images, scores
        own = [each for each in starts for _ in range(len(final.x) // len(starts))]
        return final.images, scores, Trajectory.of(recorder, final, own, scores)

    @float32_default()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str | None] | None = None,
        recorder: Recorder | None = None,
    ) -> State:
        """Runs the sampler and returns the end of the chain, decoded, with as many rows per image as it returns."""
        self.value.eval()
        if self.device != self.diffusion.device:  # where a pipeline object is
            self.to(self.diffusion.device)
        self._resolve()
        inference = torch.is_inference_mode_enabled() and not self.sampler.needs_gradient
        with torch.inference_mode(inference), torch.no_grad():
            start = Start(self.diffusion, prompts, seeds, negative_prompts)
            start.context.on_step, start.context.recorder = self.on_step, recorder
            self.ledger = self.diffusion.chunker.ledger = start.context.ledger
            with start.context.ledger.timed("total_seconds", self.diffusion.device):
                final = self.sampler(start, self.value)
                _ = final.images
                start.context.finiteness.settle()
            recorded(final)
        return final

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> Prediction:
        """Draws and scores the batch and records its statistics; with `on_error: skip`, leaves out failing prompts."""
        skip = self.on_error == "skip"
        prediction = predict_or_skip(self.predict, batch, is_device_failure) if skip else self.predict(batch)
        if prediction.rows:
            self.record(prediction.rows)
        return prediction

    @redrawn
    def predict(self, batch: list[Prompt], recorder: Recorder | None = None) -> Prediction:
        """Draws `images_per_prompt` images for every prompt of the batch and scores them with all rewards."""
        jobs = [(prompt, k) for prompt in batch for k in range(self.images_per_prompt)]
        seeds = [seed for prompt in batch for seed in prompt.image_seeds(self.seed, self.images_per_prompt)]
        texts = [self.columns.text(prompt) for prompt, _ in jobs]
        final = self.draw(texts, seeds, [prompt.negative_prompt for prompt, _ in jobs], recorder)
        returned = len(final.x) // len(jobs)
        found = score_all(self.rewards, self.diffusion.chunker, final.images, final.prompts, len(jobs), len(batch))
        scores = {name: rounded(values) for name, values in found.items()}
        trace, ledger = final.context.trace, final.context.ledger.per_image(len(final.x))
        weights = None if trace.weights is None else rounded(trace.weights.flatten())
        path_kl: Sequence[float | None] = [None] * len(jobs)
        if trace.path_kl is not None:
            path_kl = rounded(torch.as_tensor(trace.path_kl, dtype=torch.float64).expand(len(jobs)))
        selections = trace.statistics(len(jobs))
        rows = [
            result_row(
                prompt,
                image_index=k * returned + particle,
                num_images=self.images_per_prompt * returned,
                seed=seeds[j],
                rewards={name: values[j * returned + particle] for name, values in scores.items()},
                ledger=ledger,
                particle=None if weights is None else (particle, weights[j * returned + particle]),
                path_kl_sample=path_kl[j],
                selection=selections[j],
            )
            for j, (prompt, k) in enumerate(jobs)
            for particle in range(returned)
        ]
        traces = [
            {"prompt_index": prompt.index, "image_index": k * returned, **columns}
            for (prompt, k), columns in zip(jobs, trace.per_image(lineage=returned > 1), strict=False)
        ]
        return Prediction(final.images, rows, traces)

    def record(self, rows: list[ResultRow]) -> None:
        """Adds result rows to the statistics; a resumed run also adds the rows that are on disk."""
        self.statistics.update(rows)

    def check_prompts(self, prompts: PromptDataset) -> None:
        """Raises UserError if a prompt lacks a column that a reward needs, or a file that it names."""
        self.columns.check(prompts, prompts.place)

    def fingerprints(self) -> dict[str, str]:
        """Returns digests of all weights, files and user's code that images and scores depend on, by what they are."""
        self.configure_model()
        found = {f"diffusion.{name}": content for name, content in self.diffusion.fingerprints().items()}
        found |= {f"reward {name}": digest(reward) for name, reward in self.rewards.items()}
        found["value"] = digest(self.value)
        parts = (self.diffusion, self.sampler, self.value, *self.rewards.values())
        return found | {f"the code of {name}": content for name, content in sources(*parts).items()}

    def configure_model(self) -> None:
        """Reads the rewards' weights before anything is drawn; Lightning calls it on every process."""
        with full_precision():
            for reward in self.rewards.values():
                reward.load()

    def on_predict_start(self) -> None:
        """Resets the statistics of an earlier prediction; callbacks add those of a resumed run after this."""
        self.summary = {}
        self.statistics.reset()
        self._resolve()

    def on_predict_epoch_end(self) -> None:
        """Computes the statistics over all ranks, keeps them as `summary` and hands them to the loggers."""
        statistics = self.statistics.compute()
        names = {"value": type(self.value).__name__, "sampler": type(self.sampler).__name__}
        self.summary = {"guide": self.reward.name, **names, "sampler_arguments": settings(self.sampler)}
        if self.budget is not None:
            self.summary["budget"] = {"denoiser_rows": self.budget, "chosen": self.chosen}
        self.summary |= statistics
        self.statistics.reset()
        for logger in self.loggers:
            logger.log_metrics(
                {
                    f"{name}/{key}": number
                    for name, found in statistics["rewards"].items()
                    for key, number in found.items()
                    if math.isfinite(number)
                }
            )

    def __repr__(self) -> str:
        """Returns one line, where a module would list all its parts."""
        model = f"{type(self.diffusion).__name__} of {self.diffusion.num_inference_steps} steps"
        return f"GuidedDiffusion({self.reward.name}, {model}, {self.sampler!r}, {type(self.value).__name__})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuidedDiffusion":
        """Moves and converts the model, as `to` and Lightning do; rewards keep their precision."""
        return super()._apply(sparing_rewards(self, fn), recurse)

    def _resolve(self) -> None:
        """Switches the reproducible mode on where it is left open and costs nothing."""
        self.diffusion.chunker.resolve(self._costs_nothing and self.diffusion.device.type == "cpu")
