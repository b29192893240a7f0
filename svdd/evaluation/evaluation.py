"""Measurements of the finished pictures of a run, besides their rewards."""

import random
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from svdd import UserError, require_at_least
from svdd.evaluation.baseline import UNPAIRED
from svdd.evaluation.images import RunImage
from svdd.evaluation.metrics.distances import CMMD
from svdd.evaluation.metrics.diversity import Diversity
from svdd.evaluation.pairing import incomparable, other_model, require_pairs
from svdd.evaluation.sides import Images, Side, read_side
from svdd.rewards.clip import CLIPScore
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import Picture, find_pictures, read_pictures
from svdd.runs.prompts import PromptDataset

__all__ = ["Evaluation", "diversity_of"]

Distance = Literal["cmmd", "kid", "fid"]

_LEAST = {"cmmd": 1, "kid": 2, "fid": 2}  # pictures on each side


class Evaluation:
    """Diversity, and the distance to other pictures, read back from disk by one process.

    Particles of an image count by their weights; for KID and FID, which take none, one of them is drawn.

    Args:
        features: The CLIP whose features diversity and CMMD compare: `emoji`, `emoji-judge`, a folder or a hub name.
            By default neither is measured.
        baseline: Folder of an unguided run of the same prompts, seeds, steps and model, which may have more of them.
            Rewards are compared with it, prompt by prompt, with a warning if a held-out reward fell while the guide
            rose.
        reference: Pictures to which distances are measured: a folder or a run; by default the baseline's.
        distances: Any of `cmmd` (needs `features`), `kid` and `fid`.
        distance_features: What KID and FID compare: `inception` (needs `pip install 'svdd[fid]'`) or `clip`, which is
            `features`.
        batch_size: Pictures at once.
        unpaired: Compare with a baseline of other prompts, seeds, steps or another model: the mean of each prompt, or
            if it has other prompts, the mean of all.

    Raises:
        ValueError: If settings are missing or contradict each other.
    """

    def __init__(
        self,
        features: str | None = None,
        baseline: str | None = None,
        reference: str | None = None,
        distances: list[Distance] | None = None,
        distance_features: Literal["inception", "clip"] = "inception",
        batch_size: int = 64,
        unpaired: bool = False,
    ) -> None:
        require_at_least(1, batch_size=batch_size)
        if distances and reference is None and baseline is None:
            raise ValueError(f"distances={distances} need a reference or a baseline to measure to")
        if features is None and ("cmmd" in (distances or []) or (distances and distance_features == "clip")):
            raise ValueError("the distances are measured on CLIP features: set features, for example to emoji")
        self.features, self.batch_size, self.distance_features = features, batch_size, distance_features
        self.baseline = None if baseline is None else Path(baseline).expanduser()
        self.reference = self.baseline if reference is None else Path(reference).expanduser()
        self.distances = list(distances or [])
        self.unpaired = unpaired
        self._drawn: Side | None = None  # the baseline
        self._planned: Side | None = None  # this run

    def check(
        self, num_images: int, prompts: PromptDataset | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Checks folders, packages and weights before the first picture; warns if the baseline is a guided run.

        Args:
            num_images: How many images will be measured.
            prompts: Their prompts, for pairs with the images of the baseline.
            config: The configuration of `svdd predict` with which they will be drawn.

        Raises:
            UserError: If something is missing or damaged, the baseline cannot be paired with the images, or a distance
                has fewer pictures than it needs.
        """
        if self.baseline is not None:
            folder = RunFolder(self.baseline)
            if not folder.has_rows():
                raise UserError(f"evaluation.baseline={str(self.baseline)!r} is no run: it has no result rows")
            self._drawn = read_side(self.baseline)
            if prompts is not None and config is not None:
                self._planned = _planned(prompts, config)
                if not self.unpaired:
                    for note in require_pairs([self._planned, self._drawn], UNPAIRED):
                        warnings.warn(f"rewards will be compared on a part of the prompts: {note}", stacklevel=2)
            if (sampler := folder.sampler()) != "Unguided":
                warnings.warn(
                    f"{self.baseline} is a run guided by {sampler}, so a gain over it is not the gain of guidance; "
                    "draw the baseline with --model.sampler Unguided",
                    stacklevel=2,
                )
        reference = find_pictures(self.reference) if self.distances and self.reference is not None else []
        for name in self.distances:
            others = len(_one_per_image(reference))
            if min(num_images, others) < _LEAST[name]:
                what = f"{name} needs at least {_LEAST[name]} images on each side, got {num_images} to be measured"
                advice = f"draw more, or leave {name} out of evaluation.distances"
                raise UserError(f"{what} and {others} in {self.reference}; {advice}")
        clip = self._read_clip("cpu")
        with torch.inference_mode():
            for name in self.distances:
                metric = self._distance(name, clip)
                for _, images in read_pictures(reference[:1], 1):  # shows whether features and pictures fit
                    metric.update(clip.image_features(images) if clip and name == "cmmd" else images, real=True)

    def check_model(self, rewards: Collection[str], fingerprints: Mapping[str, str]) -> None:
        """Checks the loaded model against the baseline, which `check` has read.

        Raises:
            UserError: If the baseline has none of these rewards, or another model's weights.
        """
        if self._drawn is None or self._planned is None:
            return
        loaded = replace(self._planned, parts=fingerprints, rewards={name: np.empty(0) for name in rewards})
        others = incomparable(loaded, self._drawn)
        if not self._drawn.rewards.keys() & set(rewards) - others:
            known = ", ".join(sorted(self._drawn.rewards.keys() - others)) or "no reward"
            what = f"{self.baseline} measured {known}, not {', '.join(rewards)}"
            with_others = " with these weights and settings" if others else ""
            raise UserError(
                f"{what}{with_others}; measure one of them there, or add one of those to model.eval_rewards"
            )
        for name in sorted(others):
            what = f"{name} was measured with other weights or settings in {self.baseline}"
            warnings.warn(f"{what}, and is not compared with it", stacklevel=2)
        if not self.unpaired and (changed := other_model(loaded, self._drawn)):
            raise UserError(f"{changed}; {UNPAIRED}")

    @torch.inference_mode()
    def measure(self, pictures: Sequence[Picture], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Returns what the settings ask for: `diversity` and `distances`, with NaN as None.

        Raises:
            UserError: If a folder holds no pictures, or a package or weights are missing.
        """
        result: dict[str, Any] = {}
        clip = self._read_clip(device)
        if clip is not None:
            result["diversity"] = diversity_of(pictures, clip, device, self.batch_size)
        if self.distances:
            assert self.reference is not None
            result["distances"] = self._measure_distances(pictures, find_pictures(self.reference), clip, device)
        return result

    def _measure_distances(
        self, pictures: Sequence[Picture], reference: Sequence[Picture], clip: CLIPScore | None, device: Any
    ) -> dict[str, Any]:
        """Returns the distances between two sets of pictures by name; None where there are too few."""
        sides = [(side, set(_one_per_image(side)), real) for side, real in ((reference, True), (pictures, False))]
        images = min(len(chosen) for _, chosen, _ in sides)
        found: dict[str, Any] = {"reference": str(self.reference), **dict.fromkeys(self.distances)}
        metrics: dict[str, Any] = {
            name: self._distance(name, clip, min(1000, images)).to(device)
            for name in self.distances
            if images >= _LEAST[name]
        }
        for side, chosen, real in sides:
            for part, pixels in read_pictures(side, self.batch_size):
                shown, drawn = pixels.to(device), [k for k, picture in enumerate(part) if picture in chosen]
                for name, metric in metrics.items():
                    if clip is not None and name == "cmmd":
                        weights = torch.tensor([picture.weight for picture in part])
                        metric.update(clip.image_features(shown), real=real, weights=weights)
                    elif drawn:
                        metric.update(shown[drawn], real=real)
        for name, metric in metrics.items():
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # KID draws its subsets from the global generator
                found[name] = _finite(metric.compute())
        return found

    def _read_clip(self, device: torch.device | str) -> CLIPScore | None:
        if self.features is None:
            return None
        clip = CLIPScore(self.features).to(device)
        clip.load()
        return clip

    def _distance(self, name: Distance, clip: CLIPScore | None, subset_size: int = 1) -> Any:
        if name == "cmmd":
            return CMMD(sync_on_compute=False)
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        options: dict[str, Any] = {"normalize": True, "sync_on_compute": False}
        if self.distance_features == "clip" and clip is not None:
            options["feature"] = _Features(clip)
        try:
            if name == "fid":
                return FrechetInceptionDistance(**options)
            return KernelInceptionDistance(subset_size=subset_size, **options)
        except ModuleNotFoundError as error:
            raise UserError(f"{name} on Inception features needs torch-fidelity: pip install 'svdd[fid]'") from error


def _planned(prompts: PromptDataset, config: Mapping[str, Any]) -> Side:
    """Returns the images that a run will draw."""
    seed, count = config["model"]["seed"], config["model"]["images_per_prompt"]

    def images() -> Images:
        for k in range(len(prompts)):
            for index, image_seed in enumerate(prompts[k].image_seeds(seed, count)):
                yield (k, index), RunImage(prompts[k].text, "", {}, seed=image_seed)

    return Side.of("this run", images, config)


@torch.inference_mode()
def diversity_of(
    pictures: Sequence[Picture], clip: CLIPScore, device: torch.device | str, batch_size: int = 64
) -> dict[str, float | None]:
    """Returns the entries of `Diversity` in the features of a CLIP on a device, with NaN as None."""
    diversity = Diversity(sync_on_compute=False).to(device)
    for part, images in read_pictures(pictures, batch_size):
        prompts, weights = zip(*((picture.prompt_index, picture.weight) for picture in part), strict=True)
        features = clip.image_features(images.to(device))
        diversity.update(features, torch.tensor(prompts), torch.tensor(weights, dtype=torch.float64))
    return {name: _finite(value) for name, value in diversity.compute().items()}


class _Features(nn.Module):
    """A CLIP as a feature extractor for torchmetrics: float [n, 3, h, w] in [0, 1] to [n, d]."""

    def __init__(self, clip: CLIPScore) -> None:
        super().__init__()
        self.clip, self.num_features = clip, int(clip.network.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.image_features(images.float())


def _finite(value: Tensor | tuple[Tensor, Tensor]) -> Any:
    """Returns a number with six digits, None for NaN; KID's two numbers by name."""
    if isinstance(value, tuple):
        return {"mean": _finite(value[0]), "std": _finite(value[1])}
    number = float(value)
    return float(f"{number:.6g}") if number == number else None


def _one_per_image(pictures: Sequence[Picture]) -> list[Picture]:
    """Returns the pictures, or of each image's particles one that is drawn by weight, always the same."""
    images, generator = defaultdict(list), random.Random(0)
    for picture in pictures:
        images[picture.prompt_index, picture.image].append(picture)
    return [
        particles[0]
        if len(particles) == 1
        else generator.choices(particles, [max(p.weight, 1e-300) for p in particles])[0]
        for particles in images.values()
    ]
