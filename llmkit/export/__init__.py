"""Exporting models: GGUF, other precisions, adapters."""
