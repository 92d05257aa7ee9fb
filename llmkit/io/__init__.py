"""Files that appear whole, JSONL, run folders, metrics, progress, ranks, resumption and the pool of processes."""
