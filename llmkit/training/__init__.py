"""The training loop and what it is made of: optimizer, checkpoints, plan, processes."""
