"""Atomic files, JSONL, run folders, metrics, progress, ranks, resumption and process pools."""
