"""The LightningModule that wraps a diffusion model, a sampler, a value and a reward."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.nn import ModuleDict, ModuleList
from torchmetrics import MeanMetric, SumMetric

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.evaluation.metrics import RewardStatistics
from svdd.rewards.base import Reward, is_device_failure
from svdd.runs.prediction import Prediction, predict_or_skip
from svdd.runs.prompts import Prompt
from svdd.runs.rows import ResultRow, result_row
from svdd.samplers.base import Sampler
from svdd.samplers.budget import Uncountable, count, current_count, fit_budget
from svdd.samplers.svdd import SVDD
from svdd.state.ledger import Ledger
from svdd.state.state import Start, State
from svdd.values.base import Value
from svdd.values.posterior_mean import PosteriorMean

__all__ = ["GuidedDiffusion"]


class GuidedDiffusion(L.LightningModule):
    """A pretrained diffusion model whose samples are steered towards a reward.

    Args:
        reward: The guide reward.
        diffusion: The pretrained model; by default `StableDiffusion`, with the model that ships with svdd.
        sampler: The algorithm; by default `SVDD` with 20 candidates.
        value: The estimate that guides the sampler; by default `PosteriorMean`.
        eval_rewards: Rewards that are measured on the final images and never guided on (held-out rewards).
        images_per_prompt: Images for each prompt.
        budget: Denoiser rows that one returned image may cost; a backward pass counts as two more. Sets the sampler's
            count (of candidates, particles or iterations) to the largest within the budget; see `chosen`.
        seed: Image k of prompt p starts from the seed `seed + p * images_per_prompt + k`; a prompt that brings its
            own seed s uses s + k.
        on_error: What happens when a prompt cannot be drawn or scored. `raise` ends the run; `skip` leaves the prompt
            out, writes it to failed.jsonl and goes on; starting the same command again tries it once more.

    Raises:
        ValueError: If `images_per_prompt` or `budget` is below 1, or `seed` negative.
        UserError: If the sampler cannot work on this chain, with this value or within this budget.

    Example:
        >>> from svdd.rewards.jpeg import Compressibility
        >>> from svdd.samplers.svdd import SVDD
        >>> model = GuidedDiffusion(Compressibility(), StableDiffusion("emoji", 4), SVDD(num_candidates=2))
        >>> images, scores = model.sample(["apple", "blue car"], seed=7)
        >>> images.shape, scores.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2]))
    """

    def __init__(
        self,
        reward: Reward,
        diffusion: Diffusion | None = None,
        sampler: Sampler | None = None,
        value: Value | None = None,
        eval_rewards: list[Reward] | None = None,
        images_per_prompt: int = 1,
        budget: int | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be >= 1, got {images_per_prompt}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be >= 1 denoiser rows per image, got {budget}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self.reward = reward
        self.diffusion = diffusion if diffusion is not None else StableDiffusion()
        self.sampler = sampler if sampler is not None else SVDD()
        self.value = value if value is not None else PosteriorMean()
        self.value.bind(reward, self.diffusion)
        self.eval_rewards = ModuleList(eval_rewards or [])
        self.images_per_prompt, self.budget, self.seed = images_per_prompt, budget, seed
        self.on_error = on_error
        self.sampler.check(self.diffusion, self.value)
        if budget is not None:
            self.sampler = fit_budget(self.sampler, budget, self.diffusion, self.value)
            self.sampler.check(self.diffusion, self.value)
        with suppress(Uncountable):  # a mistake in a sampler shows here, before anything is drawn
            count(self.sampler, self.diffusion, self.value)
        if not reward.higher_is_better:
            raise UserError(
                f"{reward.name} cannot guide: lower scores are better, and sampling climbs; give it a negative weight "
                "in WeightedSum"
            )
        names = [reward.name, *(held_out.name for held_out in eval_rewards or [])]
        if len(set(names)) < len(names):
            raise UserError(f"every reward needs a name of its own, got {', '.join(names)}; drop the double one")
        self.guide_name = reward.name
        self.statistics: Any = ModuleList(  # in the order of `rewards`
            RewardStatistics(higher_is_better=each.higher_is_better) for each in self.rewards.values()
        )
        self.path_kl = RewardStatistics()
        self.weighted: Any = ModuleList(MeanMetric().set_dtype(torch.float64) for _ in self.rewards)
        self.spent: Any = ModuleDict(
            {name: SumMetric().set_dtype(torch.float64) for name in Ledger.__dataclass_fields__}
        )
        self.summary: dict[str, Any] = {}
        self.on_step: Callable[[int, float | None], None] | None = None

    @property
    def rewards(self) -> dict[str, Reward]:
        """All rewards by name, the guide first."""
        return {reward.name: reward for reward in (self.reward, *self.eval_rewards)}

    @property
    def chosen(self) -> dict[str, float]:
        """The sampler's count, by its name, and the rows that a returned image costs with it."""
        cost = count(self.sampler, self.diffusion, self.value)
        gradients = {"gradient_rows": cost.gradient_rows} if cost.gradient_rows else {}
        return {**current_count(self.sampler), "denoiser_rows": cost.denoiser_rows, **gradients}

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str] | str, seed: int = 0, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws guided images outside of a Trainer: as many per prompt as the sampler returns, mostly one.

        Args:
            prompts: One or several prompts; repeat a prompt for several images of it.
            seed: Image k starts from the seed `seed + k`.
            seeds: One seed per image instead.

        Returns:
            Images, float32 [n, 3, h, w] in [0, 1], and the guide reward of each, float32 [n].
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        final = self.draw(texts, [seed + k for k in range(len(texts))] if seeds is None else list(seeds))
        scores = self.diffusion.chunker.map(self.reward.score, len(final.x), final.images, final.prompts)
        return final.images, scores

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], negative_prompts: Sequence[str | None] | None = None
    ) -> State:
        """Runs the sampler and returns the end of the chain, decoded, with as many rows per image as it returns.

        Inference mode is left where the sampler needs gradients.
        """
        self.value.eval()
        inference = torch.is_inference_mode_enabled() and not self.sampler.needs_gradient
        with torch.inference_mode(inference), torch.no_grad():
            start = Start(self.diffusion, prompts, seeds, negative_prompts)
            start.context.on_step = self.on_step
            with start.context.ledger.timed("total_seconds", self.diffusion.device):
                final = self.sampler(start, self.value)
                _ = final.images
        return final

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> Prediction:
        """Draws and scores the batch and records its statistics; with `on_error: skip`, leaves out failing prompts."""
        skip = self.on_error == "skip"
        prediction = predict_or_skip(self._predict, batch, is_device_failure) if skip else self._predict(batch)
        if prediction.rows:
            self.record(prediction.rows)
        return prediction

    def _predict(self, batch: list[Prompt]) -> Prediction:
        """Draws `images_per_prompt` images for every prompt of the batch and scores them with all rewards."""
        images_per_prompt = self.images_per_prompt
        jobs = [(prompt, k) for prompt in batch for k in range(images_per_prompt)]
        seeds = [seed for prompt in batch for seed in prompt.image_seeds(self.seed, images_per_prompt)]
        final = self.draw([prompt.text for prompt, _ in jobs], seeds, [prompt.negative_prompt for prompt, _ in jobs])
        total, returned, score = len(final.x), len(final.x) // len(jobs), self.diffusion.chunker.map
        scores = {
            name: [_short(s) for s in score(reward.score, total, final.images, final.prompts).tolist()]
            for name, reward in self.rewards.items()
        }
        trace, ledger = final.context.trace, final.context.ledger.per_image(total)
        weights = None if trace.weights is None else trace.weights.flatten().tolist()
        path_kl = None
        if trace.path_kl is not None:
            path_kl = torch.as_tensor(trace.path_kl, dtype=torch.float64).expand(len(jobs)).tolist()
        rows = [
            result_row(
                prompt,
                image_index=k * returned + particle,
                num_images=images_per_prompt * returned,
                seed=seeds[j],
                rewards={name: values[j * returned + particle] for name, values in scores.items()},
                ledger=ledger,
                particle=None if weights is None else (particle, _short(weights[j * returned + particle])),
                path_kl=None if path_kl is None else _short(path_kl[j]),
            )
            for j, (prompt, k) in enumerate(jobs)
            for particle in range(returned)
        ]
        traces = [
            {"prompt_index": prompt.index, "image_index": k * returned, **columns}
            for (prompt, k), columns in zip(jobs, trace.per_image(lineage=returned > 1), strict=False)
        ]
        return Prediction(final.images.cpu(), rows, traces)

    @torch.inference_mode(False)  # a metric that was filled in inference mode could not be used outside of it
    def record(self, rows: list[ResultRow]) -> None:
        """Adds result rows to the statistics; a resumed run feeds what it finds on disk through here."""
        prompts = torch.tensor([row["prompt_index"] for row in rows], dtype=torch.int64)
        for name, metric, weighted in zip(self.rewards, self.statistics, self.weighted, strict=True):
            scores = torch.tensor([row["rewards"][name] for row in rows], dtype=torch.float64)
            metric.update(scores, prompts)
            weighted.update(*_pairs((row["rewards"][name], row.get("particle_weight")) for row in rows))
        divergence, prompts = _pairs((row.get("path_kl"), row["prompt_index"]) for row in rows)
        self.path_kl.update(divergence, prompts.long())
        for name, metric in self.spent.items():
            metric.update(torch.tensor([row["ledger"][name] for row in rows], dtype=torch.float64))

    def configure_model(self) -> None:
        """Reads the rewards' weights before anything is drawn; Lightning calls it on every process."""
        for reward in self.rewards.values():
            reward.load()

    def on_predict_start(self) -> None:
        """Forgets the statistics of an earlier prediction; callbacks feed those of a resumed run after this."""
        self.summary = {}
        self._reset()

    def on_predict_epoch_end(self) -> None:
        """Computes the statistics over all ranks, keeps them as `summary` and hands them to the loggers."""
        statistics = {
            name: {key: value.item() for key, value in metric.compute().items()}
            for name, metric in zip(self.rewards, self.statistics, strict=True)
        }
        for entries, metric in zip(statistics.values(), self.weighted, strict=True):
            if not math.isnan(mean := metric.compute().item()):
                entries["weighted_mean"] = _short(mean)  # the order of the sum changes the last digits
        totals = {name: metric.compute().item() for name, metric in self.spent.items()}
        divergence = self.path_kl.compute()
        images = next(iter(statistics.values()))["count"]
        self.summary = {
            "guide": self.guide_name,
            "sampler": type(self.sampler).__name__,
            **({} if self.budget is None else {"budget": {"denoiser_rows": self.budget, "chosen": self.chosen}}),
            "rewards": statistics,
            **(
                {"path_kl": {k: divergence[k].item() for k in ("mean", "standard_error")}}
                if divergence["count"]
                else {}
            ),
            "ledger": {
                name: round(total, 3) if name.endswith("seconds") else round(total) for name, total in totals.items()
            },
            "denoiser_rows_per_image": totals["denoiser_rows"] / images if images else None,
        }
        self._reset()
        flat = {f"{name}/{key}": value for name, entries in statistics.items() for key, value in entries.items()}
        for logger in self.loggers:
            logger.log_metrics(flat)

    @torch.inference_mode(False)
    def _reset(self) -> None:
        for metric in (*self.statistics, *self.weighted, self.path_kl, *self.spent.values()):
            metric.reset()


def _pairs(pairs: Iterable[tuple[float | None, float | None]]) -> list[Tensor]:
    """Returns the first and the second numbers of the complete pairs, float64 [n] each."""
    complete = [pair for pair in pairs if None not in pair]
    return list(torch.tensor(complete, dtype=torch.float64).view(-1, 2).unbind(1))


def _short(score: float) -> float:
    """A float32 holds seven digits; the rest of its decimal form is noise."""
    return float(f"{score:.7g}")
