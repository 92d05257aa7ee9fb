"""Token shards: the tokens of documents end to end on disk, read by memory map.

A shard is a safetensors file `shard-00000.safetensors` (8 bytes of header length, a JSON header, the arrays:
https://github.com/huggingface/safetensors), so that other tools read it too:

    doc_ends   int64   [documents]  where each document ends in `tokens`
    doc_bytes  int64   [documents]  bytes of UTF-8 text of each document, for bits per byte
    tokens     uint16  [tokens]     uint32 when the vocabulary has more than 65,536 ids

Every document is `start, its text`; the id that its last token must predict is `end`. Our own tokenizers use
`<|endoftext|>` for both. The metadata holds `format`, `shard`, `last` (0 or 1), `tokenizer_sha256`,
`vocab_size`, `start`, `end`, and the counts `tokens`, `documents`, `bytes`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmkit.errors import UserError
from llmkit.io.progress import counted

FORMAT = "llmkit-tokens-1"
TOKENS_PER_SHARD = 15_000_000  # a shard ends with the first document that reaches it
DIGEST_TOKENS = 4096  # of either end of a shard
DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Information that all shards of a corpus share.

    start, end: the id in front of every document, and the id that the last token of a document predicts.
    """

    tokenizer_sha256: str
    vocab_size: int
    start: int
    end: int

    @property
    def dtype_name(self) -> str:
        return "U16" if self.vocab_size <= 1 << 16 else "U32"


# ---- writing


class ShardWriter:
    """Writes documents to the shards of a folder, in order. Memory: one shard.

    with atomic_folder(path) as folder:
        writer = ShardWriter(folder, info)
        writer.add(ids, lengths, text_bytes)
        writer.finish()
    """

    def __init__(self, folder: Path, info: ShardInfo, tokens_per_shard: int = TOKENS_PER_SHARD) -> None:
        self.folder, self.info, self.tokens_per_shard = folder, info, tokens_per_shard
        self.shards = self.tokens = self.documents = self.bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._parts: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._text_bytes: list[np.ndarray] = []
        self._held = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Add documents.

        ids:        the text's ids of all of them end to end, without `start`; any unsigned dtype
        lengths:    number of ids of each
        text_bytes: bytes of UTF-8 text of each
        """
        lengths = np.asarray(lengths, np.int64) + 1
        part = np.full(lengths.sum(), self.info.start, DTYPES[self.info.dtype_name])
        is_text = np.ones(len(part), bool)
        is_text[np.cumsum(lengths) - lengths] = False
        part[is_text] = ids
        while len(lengths):
            if self._held >= self.tokens_per_shard:
                self._write(last=False)
            # the shard takes every document up to and including the one that fills it
            ends = np.cumsum(lengths)
            count = int(np.searchsorted(ends, self.tokens_per_shard - self._held)) + 1
            cut = int(ends[min(count, len(ends)) - 1])
            self._hold(part[:cut], lengths[:count], text_bytes[:count])
            part, lengths, text_bytes = part[cut:], lengths[count:], text_bytes[count:]

    def _hold(self, part: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        self._parts.append(part)
        self._lengths.append(lengths)
        self._text_bytes.append(np.asarray(text_bytes, np.int64))
        self._held += len(part)
        self.tokens += len(part)
        self.documents += len(lengths)
        self.bytes += int(np.sum(text_bytes))

    def finish(self) -> None:
        """Write what is held as the last shard."""
        self._write(last=True)

    def _write(self, last: bool) -> None:
        doc_ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *self._lengths])).astype("<i8")
        doc_bytes = np.concatenate([np.empty(0, np.int64), *self._text_bytes]).astype("<i8")
        metadata = {
            "format": FORMAT,
            "shard": self.shards,
            "last": int(last),
            "tokenizer_sha256": self.info.tokenizer_sha256,
            "vocab_size": self.info.vocab_size,
            "start": self.info.start,
            "end": self.info.end,
            "tokens": self._held,
            "documents": len(doc_ends),
            "bytes": int(doc_bytes.sum()),
        }
        # The 8-byte arrays first, so that every array is aligned
        layout = {
            "doc_ends": ("I64", [doc_ends]),
            "doc_bytes": ("I64", [doc_bytes]),
            "tokens": (self.info.dtype_name, self._parts),
        }
        with open(self.folder / _shard_name(self.shards), "wb") as handle:
            _write_safetensors(handle, layout, metadata)
        self.shards += 1
        self._clear()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _write_safetensors(
    handle: IO[bytes],
    layout: dict[str, tuple[str, list[np.ndarray]]],
    metadata: dict[str, str | int],
) -> None:
    """Write one-dimensional arrays, each given in parts, as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in metadata.items()}}
    position = 0
    for name, (dtype, pieces) in layout.items():
        size = sum(map(len, pieces))
        stop = position + size * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [position, stop]}
        position = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    handle.write(len(encoded).to_bytes(8, "little") + encoded)
    for _, pieces in layout.values():
        for piece in pieces:
            handle.write(np.ascontiguousarray(piece).data)


# ---- reading


class Shard:
    """One shard file, memory-mapped: `tokens`, `doc_ends`, `doc_bytes`, `metadata`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as handle:
            size = path.stat().st_size
            head = handle.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise UserError(
                    f"{path}: truncated or no safetensors file: {counted(size, 'byte')}; make the shards anew"
                )
            try:
                header = json.loads(handle.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                stops = [entry["data_offsets"][1] for entry in header.values()]
            except (ValueError, AttributeError, TypeError, KeyError):
                raise UserError(f"{path}: no safetensors header; expected a token shard") from None
            if self.metadata.get("format") != FORMAT or set(header) != {"tokens", "doc_ends", "doc_bytes"}:
                instead = self.metadata.get("format") or sorted(header)[:4]
                raise UserError(f"{path}: expected a token shard of format {FORMAT}, found {instead}")
            expected = 8 + length + max(stops)
            if size != expected:
                raise UserError(
                    f"{path}: truncated: expected {counted(expected, 'byte')}, found {size}; make the shards anew"
                )
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens, self.doc_ends, self.doc_bytes = (
            np.frombuffer(data, DTYPES[entry["dtype"]], entry["shape"][0], 8 + length + entry["data_offsets"][0])
            for entry in (header["tokens"], header["doc_ends"], header["doc_bytes"])
        )
        if (self.doc_ends[-1] if len(self.doc_ends) else 0) != len(self.tokens):
            raise UserError(f"{path}: damaged: its last document does not end with its last token")
        self.info = ShardInfo(
            tokenizer_sha256=self.metadata["tokenizer_sha256"],
            vocab_size=int(self.metadata["vocab_size"]),
            start=int(self.metadata["start"]),
            end=int(self.metadata["end"]),
        )


def is_shard_folder(path: str | Path) -> bool:
    """True if `path` is a folder of token shards (and not of documents to encode)."""
    return (Path(path) / _shard_name(0)).is_file()


class TokenShards:
    """A folder of shards as one sequence of documents.

    tokens, documents, bytes: counts over all shards; `bytes` is UTF-8 text, without specials
    lengths: int64 [documents], tokens of each document with its `start`
    doc_bytes: int64 [documents]
    info: ShardInfo
    `shards[k]` is document k: a read-only view of its tokens.

    Raises UserError, naming the file, for a folder without shards, a shard that is truncated, foreign,
    missing, or made with another tokenizer than the first.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("shard-*.safetensors")) if self.folder.is_dir() else []
        if not paths:
            raise UserError(f"{folder}: expected a folder with shard-00000.safetensors, found none")
        self._shards = [Shard(path) for path in paths]
        self.info = self._shards[0].info
        for number, shard in enumerate(self._shards):
            if shard.path.name != _shard_name(number):
                raise UserError(f"{self.folder / _shard_name(number)}: missing; make the shards anew")
            if shard.info != self.info:
                raise UserError(f"{shard.path}: made with another tokenizer than {self._shards[0].path}")
        if self._shards[-1].metadata["last"] != "1":
            raise UserError(f"{self.folder / _shard_name(len(paths))}: missing; make the shards anew")
        self.lengths = np.concatenate([np.diff(shard.doc_ends, prepend=0) for shard in self._shards])
        self.doc_bytes = np.concatenate([shard.doc_bytes for shard in self._shards])
        self._first_document = np.cumsum([0] + [len(shard.doc_ends) for shard in self._shards])
        self.tokens = int(self.lengths.sum())
        self.documents = len(self.lengths)
        self.bytes = int(self.doc_bytes.sum())

    def __len__(self) -> int:
        return self.documents

    @property
    def digest(self) -> str:
        """Hash the length of every document and the tokens at the shards' ends."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=8)
        for shard in self._shards:
            digest.update(shard.tokens[:DIGEST_TOKENS].tobytes() + shard.tokens[-DIGEST_TOKENS:].tobytes())
        return digest.hexdigest()

    def __getitem__(self, document: int) -> np.ndarray:
        return self.span(document, 0, int(self.lengths[document]))

    def span(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start:stop of a document, a read-only view."""
        number = int(np.searchsorted(self._first_document, document, side="right")) - 1
        shard = self._shards[number]
        end = int(shard.doc_ends[document - self._first_document[number]])
        begin = end - int(self.lengths[document])
        return shard.tokens[begin + start : begin + stop]
