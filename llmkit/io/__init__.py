"""Files that appear whole, JSONL, run folders, metrics, progress, ranks and resumption."""
