"""Reinforcement learning: attempts at problems, their advantages, and the loss that they make."""
