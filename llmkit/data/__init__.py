"""A corpus on its way to the model: documents to token shards, token shards to batches. No torch here."""
