"""Measurements of the finished pictures of a run, besides their rewards."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.evaluation.metrics import CMMD, Diversity
from svdd.rewards.clip import CLIPScore
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import Picture, find_pictures, read_pictures

__all__ = ["Evaluation"]

Distance = Literal["cmmd", "kid", "fid"]


class Evaluation:
    """Diversity, and the distance to other pictures, read back from disk by one process.

    Args:
        features: The CLIP whose features diversity and CMMD compare: `emoji`, `emoji-judge`, a folder or a hub name.
            By default neither is measured.
        baseline: Folder of an unguided run of the same prompts. Rewards are compared with it, prompt by prompt, with a
            warning if a held-out reward fell while the guide rose.
        reference: Pictures to which distances are measured: a folder or a run; by default the baseline's.
        distances: Any of `cmmd` (needs `features`), `kid` and `fid`.
        distance_features: What KID and FID compare: `inception` (needs `pip install 'svdd[fid]'`) or `clip`, which is
            `features`.
        batch_size: Pictures at once.

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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if distances and reference is None and baseline is None:
            raise ValueError(f"distances={distances} need a reference or a baseline to measure to")
        if features is None and ("cmmd" in (distances or []) or (distances and distance_features == "clip")):
            raise ValueError("the distances are measured on CLIP features: set features, for example to emoji")
        self.features, self.batch_size, self.distance_features = features, batch_size, distance_features
        self.baseline = None if baseline is None else Path(baseline).expanduser()
        self.reference = self.baseline if reference is None else Path(reference).expanduser()
        self.distances = list(distances or [])

    def check(self) -> None:
        """Checks folders, packages and weights before the first picture; warns if the baseline is a guided run.

        Raises:
            UserError: If one of them is missing.
        """
        if self.baseline is not None:
            folder = RunFolder(self.baseline)
            if not folder.results.is_file():
                raise UserError(f"evaluation.baseline={str(self.baseline)!r} is no finished run: it has no result rows")
            find_pictures(self.baseline)
            if (sampler := folder.read_summary().get("sampler")) != "Unguided":
                warnings.warn(
                    f"{self.baseline} is a run guided by {sampler}, so a gain over it is not the gain of guidance; "
                    "draw the baseline with --model.sampler Unguided",
                    stacklevel=2,
                )
        if self.distances and self.reference is not None:
            find_pictures(self.reference)
        clip = self._read_clip("cpu")
        for name in self.distances:
            self._distance(name, clip)

    @torch.inference_mode()
    def measure(self, pictures: Sequence[Picture], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Returns what the settings ask for: `diversity` and `distances`, with NaN as None.

        Raises:
            UserError: If a folder holds no pictures, or a package or weights are missing.
        """
        result: dict[str, Any] = {}
        clip = self._read_clip(device)
        if clip is not None:
            diversity = Diversity(sync_on_compute=False).to(device)
            for part, images in read_pictures(pictures, self.batch_size):
                prompts = torch.tensor([picture.prompt_index for picture in part])
                diversity.update(clip.image_features(images.to(device)), prompts)
            result["diversity"] = {name: _finite(value) for name, value in diversity.compute().items()}
        if self.distances:
            assert self.reference is not None
            reference = find_pictures(self.reference)
            subset = min(1000, len(pictures), len(reference))
            metrics = {name: self._distance(name, clip, subset).to(device) for name in self.distances}
            for compared, real in ((reference, True), (pictures, False)):
                for _, images in read_pictures(compared, self.batch_size):
                    shown = images.to(device)
                    for name, metric in metrics.items():
                        metric.update(clip.image_features(shown) if clip and name == "cmmd" else shown, real=real)
            result["distances"] = {"reference": str(self.reference)}
            for name, metric in metrics.items():
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(0)  # KID draws its subsets from the global generator
                    found = metric.compute()
                result["distances"][name] = _finite(found)
        return result

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
