"""Training data: documents to token shards, token shards to batches; without torch."""
