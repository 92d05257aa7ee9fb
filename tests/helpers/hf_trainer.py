"""The reference of the BPE tests: Hugging Face's trainer and splitter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from llmkit.tokenizer.patterns import byte_alphabet

CHARACTER = {byte: character for character, byte in byte_alphabet()}
BYTE = {character: byte for character, byte in byte_alphabet()}


def hf_merges(
    texts: Iterable[str], regex: str, vocab_size: int, min_frequency: int = 0
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Return tokens by id, and the merges as pairs of ids, like train_merges."""
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    ids = model["vocab"]
    tokens = [bytes(BYTE[character] for character in token) for token in sorted(ids, key=ids.__getitem__)]
    return tokens, [(ids[left], ids[right]) for left, right in model["merges"]]


def hf_pieces(texts: Iterable[str], regex: str) -> Counter[bytes]:
    """Count each piece."""
    split = pre_tokenizers.Split(Regex(regex), "isolated").pre_tokenize_str
    return Counter(piece.encode() for text in texts for piece, _ in split(text) if piece)
