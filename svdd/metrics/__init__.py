"""Statistics as torchmetrics: exact over ranks, independent of the order of arrival."""

from svdd.metrics.distances import CMMD
from svdd.metrics.diversity import Diversity
from svdd.metrics.reward_statistics import RewardStatistics

__all__ = ["CMMD", "Diversity", "RewardStatistics"]
