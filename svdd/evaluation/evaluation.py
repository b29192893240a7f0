"""What is measured on the finished pictures of a run, beside their rewards."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.evaluation.baseline import sampler_of
from svdd.evaluation.metrics import CMMD, Diversity
from svdd.rewards.clip import CLIPScore
from svdd.runs.folder import RunFolder
from svdd.runs.pictures import Picture, find_pictures, read_pictures

__all__ = ["Evaluation"]

Distance = Literal["cmmd", "kid", "fid"]
_KID_SUBSET = 1000


class Evaluation:
    """Diversity, and the distance to other pictures; read back from disk, so the same however a run was interrupted.

    One process measures all pictures: nothing is gathered from others, which do not take part.

    Args:
        features: The CLIP whose features diversity and CMMD compare: `emoji`, `emoji-judge`, a folder or a hub name.
            By default neither is measured.
        baseline: Folder of an unguided run of the same prompts: rewards are compared with it, prompt by prompt, and a
            warning tells where a held-out reward fell while the guide rose.
        reference: Pictures that distances are measured to: a folder or a run; by default the baseline's.
        distances: Any of `cmmd` (needs `features`), `kid` and `fid`.
        distance_features: What KID and FID compare: `inception` (needs `pip install 'svdd[fid]'`) or `clip`, which is
            `features`.
        batch_size: Pictures at once.

    Raises:
        ValueError: If settings are missing or do not go together.
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
        """Tries what would fail after the last picture otherwise; warns where the baseline is a guided run.

        Raises:
            UserError: If a folder that will be needed is not there, or a package or weights are missing.
        """
        for folder in {self.baseline, self.reference if self.distances else None} - {None}:
            assert folder is not None
            if folder == self.baseline and not RunFolder(folder).results.is_file():
                raise UserError(f"evaluation.baseline={str(folder)!r} is no finished run: it holds no result rows")
            find_pictures(folder)
        if self.baseline is not None and (sampler := sampler_of(self.baseline)) != "Unguided":
            warnings.warn(
                f"{self.baseline} is a run guided by {sampler}: what is gained against it is not what guidance gains; "
                "draw the baseline with --model.sampler Unguided",
                stacklevel=2,
            )
        clip = self._read_clip("cpu")
        for name in self.distances:
            self._distance(name, clip)

    def measure(self, pictures: Sequence[Picture], device: torch.device | str = "cpu") -> dict[str, Any]:
        """Returns what the settings ask for: `diversity` and `distances`.

        Args:
            pictures: What is measured; those of one prompt have its index.
            device: Where the networks run.

        Raises:
            UserError: If a folder holds no pictures, or a package or weights are missing.
        """
        result: dict[str, Any] = {}
        clip = self._read_clip(device)
        if clip is not None:
            diversity = Diversity(sync_on_compute=False).to(device)
            for part, features in self._embed(clip, pictures, device):
                diversity.update(features, torch.tensor([picture.prompt_index for picture in part]))
            result["diversity"] = {name: _finite(value) for name, value in diversity.compute().items()}
        if self.distances:
            assert self.reference is not None
            metrics = {name: self._distance(name, clip).to(device) for name in self.distances}
            for compared, real in ((find_pictures(self.reference), True), (pictures, False)):
                for _, images in read_pictures(compared, self.batch_size):
                    for name, metric in metrics.items():
                        shown = images.to(device)
                        metric.update(clip.image_features(shown) if clip and name == "cmmd" else shown, real=real)
            result["distances"] = {"reference": str(self.reference)} | {
                name: _value(metric) for name, metric in metrics.items()
            }
        return result

    def _read_clip(self, device: torch.device | str) -> CLIPScore | None:
        if self.features is None:
            return None
        clip = CLIPScore(self.features).to(device)
        clip.load()
        return clip

    @torch.inference_mode()
    def _embed(
        self, clip: CLIPScore, pictures: Sequence[Picture], device: torch.device | str
    ) -> Iterator[tuple[list[Picture], Tensor]]:
        for part, images in read_pictures(pictures, self.batch_size):
            yield part, clip.image_features(images.to(device))

    def _distance(self, name: Distance, clip: CLIPScore | None) -> Any:
        if name == "cmmd":
            return CMMD(sync_on_compute=False)
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        source: Any = _Features(clip) if self.distance_features == "clip" and clip is not None else 2048
        try:
            if name == "fid":
                return FrechetInceptionDistance(feature=source, normalize=True, sync_on_compute=False)
            return KernelInceptionDistance(
                feature=source, normalize=True, subset_size=_KID_SUBSET, sync_on_compute=False
            )
        except ModuleNotFoundError as error:
            raise UserError(f"{name} on Inception features needs torch-fidelity: pip install 'svdd[fid]'") from error


class _Features(nn.Module):
    """A CLIP as torchmetrics' FID and KID want a feature extractor: float [n, 3, h, w] in [0, 1] to [n, d]."""

    def __init__(self, clip: CLIPScore) -> None:
        super().__init__()
        self.clip = clip
        self.num_features = int(clip.network.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.image_features(images.float())


def _value(metric: Any) -> Any:
    """Returns a distance as numbers; KID's subsets are at most as large as the smaller set, and the same every time."""
    if hasattr(metric, "subset_size"):
        smaller = min(sum(len(part) for part in parts) for parts in (metric.real_features, metric.fake_features))
        metric.subset_size = min(metric.subset_size, smaller)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torchmetrics draws the subsets from the global generator
            mean, std = metric.compute()
        return {"mean": _finite(mean), "std": _finite(std)}
    return _finite(metric.compute())


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.6g}") if number == number else None
