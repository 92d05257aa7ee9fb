"""A model folder for other programs: GGUF, another precision, the adapter alone."""
