"""Decoders: configuration, computation, adapters, folders and devices."""
