"""Evaluating models on standard benchmarks."""
