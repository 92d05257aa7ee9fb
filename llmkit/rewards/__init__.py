"""What a completion is worth: rewards by verifiers, reward models, commands and functions (docs/rewards.md)."""

from llmkit.rewards.parsing import parse_rewards
from llmkit.rewards.reward import Attempt, Reward, Weighted, total

__all__ = ["Attempt", "Reward", "Weighted", "parse_rewards", "total"]
