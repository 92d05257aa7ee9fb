"""Rewards of completions: verifiers, reward models, commands and functions (docs/rewards.md)."""

from llmkit.rewards.reward import Attempt, Reward, Weighted, total
from llmkit.rewards.specs import parse_rewards

__all__ = ["Attempt", "Reward", "Weighted", "parse_rewards", "total"]
