"""A reward in units of its standard deviation."""

import json
import warnings
from pathlib import Path

from torch import Tensor

from svdd import SUMMARY_FILE, UserError
from svdd.rewards.base import Reward
from svdd.rewards.conversion import RewardLike, as_reward

__all__ = ["ZScored"]


class ZScored(Reward):
    """A standardised reward: (reward - mean) / std.

    Args:
        reward: The reward to standardise.
        mean: Its mean.
        std: Its standard deviation.
        statistics: The folder or summary of an unguided run that measured the reward, instead of mean and std.

    Raises:
        ValueError: Unless either `statistics` or both numbers are given, std > 0, and the summary holds the reward.
    """

    from_files = ("mean", "std")

    def __init__(
        self, reward: RewardLike, mean: float | None = None, std: float | None = None, statistics: str | None = None
    ) -> None:
        super().__init__()
        reward = as_reward(reward)
        if statistics is not None and mean is None and std is None:
            mean, std = _read_statistics(Path(statistics).expanduser(), reward.name)
        elif statistics is not None or mean is None or std is None:
            raise ValueError(f"give statistics, or mean and std, got {statistics=}, {mean=}, {std=}")
        if not std > 0:
            raise ValueError(f"std must be > 0, got {std}: the reward does not vary")
        self.reward, self.mean, self.std = reward, float(mean), float(std)
        self.differentiable, self.groupwise = reward.differentiable, reward.groupwise
        self.higher_is_better = reward.higher_is_better
        self.run_like(reward)
        low, high = ((end - self.mean) / self.std for end in reward.range)
        self.range, self.variant = (low, high), reward.name

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the standardised score of each image, float32 [n]."""
        return (self.reward.score(images, prompts) - self.mean) / self.std


def _read_statistics(path: Path, name: str) -> tuple[float, float]:
    """Returns mean and standard deviation; the latter within prompts if there are several images per prompt."""
    path = path / SUMMARY_FILE if path.is_dir() else path
    try:
        if not path.is_file():
            raise FileNotFoundError
        summary = json.loads(path.read_text(encoding="utf-8"))
        known = {key: dict(entry) for key, entry in summary["rewards"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"statistics={str(path)!r} is not the summary of a run ({type(error).__name__})"
        raise UserError(f"{problem}; expected the folder of a finished `svdd predict`") from error
    if name not in known:
        problem = f"statistics={str(path)!r} has {', '.join(known)}, not {name}"
        raise UserError(f"{problem}; measure it: --model.eval_rewards+={name}")
    if summary.get("sampler", "Unguided") != "Unguided":
        warnings.warn(f"{path} belongs to a run guided by {summary['sampler']}, which changes the spread", stacklevel=3)
    within = known[name].get("std_within")  # null if every prompt had one image
    mean, std = known[name].get("mean"), known[name].get("std") if within is None else within
    if not isinstance(mean, int | float) or not isinstance(std, int | float):
        found = f"statistics={str(path)!r} has mean {mean!r} and standard deviation {std!r} of {name}"
        raise UserError(f"{found}; expected the folder of a finished `svdd predict` of several images")
    return float(mean), float(std)
