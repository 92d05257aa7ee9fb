"""Decoders: configuration, arithmetic, adapters, folders and devices."""
