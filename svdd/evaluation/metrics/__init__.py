"""Statistics as torchmetrics: exact over ranks, independent of the order of arrival."""

from svdd.evaluation.metrics.distances import CMMD
from svdd.evaluation.metrics.diversity import Diversity
from svdd.evaluation.metrics.reward_statistics import RewardStatistics

__all__ = ["CMMD", "Diversity", "RewardStatistics"]
