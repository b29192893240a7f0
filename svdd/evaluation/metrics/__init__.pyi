from .distances import CMMD as CMMD
from .diversity import Diversity as Diversity
from .reward_statistics import RewardStatistics as RewardStatistics
