"""Libraries that encode text with a tokenizer.json, fastest first, and the check of their ids.

`tokenizers` is the reference. gigatoken and fastokens are optional and many times faster (benchmarks/tokens.py prints
how much); each is used only if it gives the same ids as `tokenizers` on adversarial strings and on the beginnings of
the documents to encode. tokie is not supported: its ids were wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from llmkit.io.foreign import no_panic

# gigatoken's threads need awkward; its import (0.3 s) pays off only for larger corpora.
GIGATOKEN_THREADS_FROM_BYTES = 128 << 20
CANNOT_ENCODE = "tokenizers cannot encode a text with it; simplify its regular expressions"
PROOF_DOCUMENTS, PROOF_CHARACTERS = 64, 1500  # 0.05 s: tokenizers encodes 1.8 MB/s

# fmt: off
HOSTILE = (
    "", " ", "   ", "a", "\n", "\r\n\r\n \t x", "  \n\n x \n", "a" * 3000, "0" * 70, " " * 130,
    "tab\tnbsp\u00a0wide\u3000line\u2028next\u0085.",
    "don't I'LL we'Ve they'RE x'd 'S K\u212a '\u017f \u017f's",
    "3.14159 1,000,000 \uff11\uff12\uff13 \u0663\u0664 \u2167 \u00bd",
    "\ufdfa" * 20, "x\u0301\u0302\u0303" * 9,
    "e\u0301 \u1e9b\u0323 \ufb01 A\u030a \u212b \u01c6 \u01c5 \u0130i \u00df \u1e9e",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \ufe0f",
    "日本語のテキスト。한국어 ไทย العربية עברית हिन्दी", "\u202eright-to-left\u202c", "!!!???...\n\n\n...",
    "\x00\x01\x1b[0m\x7f\ufeff\ufffd\ufdd0\ue000\U0010ffff", "http://a.b/c?d=e&f#g", "snake_case camelCase",
    "if (a<b&&c>d) { return x[i]->y; } // ~!@#$%^&*", "\u2581already\u2581there", "<0x41><0xFF>",
    "\u2026\u201cquoted\u201d\u2014dash\u2013\u2019s ALLCAPS",
)
# fmt: on


# Encodes raw texts, with special tokens as plain text and without adding any, to their concatenated ids (uint32) and
# the number of ids of each text (int64)
EncodeBatch = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class TokenizersBackend:
    """Hugging Face tokenizers: always installed, the reference."""

    def __init__(self, tokenizer_json: bytes) -> None:
        from tokenizers import Tokenizer

        with no_panic("tokenizer.json", "not readable by tokenizers"):
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # a literal <|im_start|> in a text is encoded as text

    def encode(self, text: str) -> Any:
        """Return the `tokenizers.Encoding` of one text: ids, offsets in characters."""
        with no_panic("tokenizer.json", CANNOT_ENCODE):
            return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_specials: bool) -> str:
        """Decode ids with the tokenizer's own decoder."""
        with no_panic("tokenizer.json", "its decoder fails"):
            return self.tokenizer.decode(ids, skip_special_tokens=skip_specials)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts like EncodeBatch."""
        with no_panic("tokenizer.json", CANNOT_ENCODE):
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _joined([np.array(encoding.ids, np.uint32) for encoding in encodings])


def fastokens(tokenizer_json: bytes) -> EncodeBatch:
    """Encode with fastokens, which uses all cores (RAYON_NUM_THREADS limits it)."""
    import fastokens as library

    plain = orjson.dumps({**orjson.loads(tokenizer_json), "post_processor": None})  # which would add tokens
    tokenizer = library.Tokenizer.from_json_str(plain.decode())

    def encode_batch(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    return encode_batch


def gigatoken(tokenizer_json: bytes) -> EncodeBatch:
    """Encode with gigatoken: in one thread at first, in its own threads once the corpus is large."""
    import gigatoken as library

    spec = orjson.loads(tokenizer_json)  # gigatoken cannot encode special tokens as text: remove them
    spec["added_tokens"] = [token for token in spec.get("added_tokens") or [] if not token["special"]]
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    tokenizer = library.Tokenizer.from_json(orjson.dumps(spec))
    seen, many_cores = 0, (os.cpu_count() or 1) > 2

    def encode_batch(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal seen
        if many_cores and seen > GIGATOKEN_THREADS_FROM_BYTES:
            layout: Any = tokenizer.encode_batch(list(texts)).layout  # awkward's list of variable lengths
            offsets = np.asarray(layout.offsets.data)
            ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
            return ids, np.diff(offsets).astype(np.int64)
        seen += sum(map(len, texts))
        return _joined([tokenizer.encode(text) for text in texts])

    return encode_batch


FASTEST_FIRST: tuple[Callable[[bytes], EncodeBatch], ...] = (gigatoken, fastokens)


def _joined(pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(part) for part in pieces], np.int64)
    return (np.concatenate(pieces) if pieces else np.empty(0, np.uint32)).astype(np.uint32, copy=False), lengths


def proof_texts(documents: Sequence[str], added_tokens: Sequence[str]) -> list[str]:
    """Collect texts that a backend must encode like `tokenizers`.

    These are adversarial strings, the tokenizer's added tokens in several contexts, and the beginnings of the first
    documents.
    """
    templates = ("{0}", "a{0}b", " {0} {0}\n")
    neighbourhoods = [template.format(token) for token in added_tokens for template in templates]
    heads = [document[:PROOF_CHARACTERS] for document in documents[:PROOF_DOCUMENTS]]
    return [*HOSTILE, *neighbourhoods, *heads]


def same_ids(encode_batch: EncodeBatch, reference: TokenizersBackend, texts: Sequence[str]) -> bool:
    """Return True if both give the same ids for each text."""
    expected_ids, expected_lengths = reference.encode_batch(texts)
    ids, lengths = encode_batch(texts)
    return np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids)


def fastest_proven(
    tokenizer_json: bytes, reference: TokenizersBackend, texts: Sequence[str], only: str | None = None
) -> tuple[str, EncodeBatch]:
    """Find the fastest installed library that gives the reference's ids on `texts`; return its name and function.

    `only` names the single library to try before the reference.
    """
    for make in FASTEST_FIRST:
        if only not in (None, make.__name__):
            continue
        try:
            encode_batch = make(tokenizer_json)
            if same_ids(encode_batch, reference, texts):
                return make.__name__, encode_batch
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # not installed or not supported; a Rust panic does not derive from Exception
            continue
    return "tokenizers", reference.encode_batch
