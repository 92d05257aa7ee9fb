"""The training loop and its parts: optimizer, checkpoints, plan, ranks."""
