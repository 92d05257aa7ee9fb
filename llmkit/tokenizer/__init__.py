"""Tokenizers: training byte-level BPE, encoding and decoding text."""
