"""Token shards: the concatenated tokens of documents on disk, memory-mapped for reading.

A shard is a safetensors file `shard-00000.safetensors` (8 bytes of header length, a JSON header, the arrays:
https://github.com/huggingface/safetensors), which other tools can read:

    doc_ends   int64   [documents]  end of each document in `tokens`
    doc_bytes  int64   [documents]  bytes of UTF-8 text of each document, for bits per byte
    tokens     uint16  [tokens]     uint32 if the vocabulary has more than 65,536 ids

Every document is `start` and its text; its last token must predict the id `end`. Our own tokenizers use
`<|endoftext|>` for both. The metadata has `format`, `shard`, `last` (0 or 1), `tokenizer_sha256`, `vocab_size`,
`start`, `end`, and the counts `tokens`, `documents`, `bytes`.

Shards are cached, so that the same documents are tokenized once:

    shards = tokenize_documents(["docs.jsonl.gz"], tokenizer, Path("base.tokens"))

One thread reads while another encodes; backends use all cores if that is faster (llmkit/tokenizer/backends.py). The
cache identifies a corpus by the content of its files, not by their names.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.errors import UserError
from llmkit.io.files import atomic_file, atomic_folder
from llmkit.io.jsonl import input_files, name_of, names_of, read_documents, write_json
from llmkit.io.progress import Progress, counted
from llmkit.io.records import OF_DOCUMENT, OUTSIDE, BadRecords, Row
from llmkit.io.remote import is_remote, size_and_version

if TYPE_CHECKING:
    from llmkit.tokenizer.encoding import Tokenizer

FORMAT = "llmkit-tokens-1"
TOKENS_PER_SHARD = 15_000_000  # a shard ends with the first document that reaches this
DIGEST_TOKENS = 4096  # hashed at each end of a shard
DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
GROUP_CHARACTERS = 1 << 20  # characters encoded together: enough for all cores, little memory
HASHES = "inputs.json"
LEFT_OUT = "left-out.json"  # next to the shards: tallies of bad records and unused fields


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Information that all shards of a corpus share.

    start, end: the id before every document, and the id that the last token of a document predicts
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
    """Writes documents to the shards of a folder, in order; keeps one shard in memory.

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

        ids:        concatenated ids of the texts, without `start`; any unsigned dtype
        lengths:    number of ids of each document
        text_bytes: bytes of UTF-8 text of each document
        """
        lengths = np.asarray(lengths, np.int64) + 1
        part = np.full(lengths.sum(), self.info.start, DTYPES[self.info.dtype_name])
        is_text = np.ones(len(part), bool)
        is_text[np.cumsum(lengths) - lengths] = False
        part[is_text] = ids
        while len(lengths):
            if self._held >= self.tokens_per_shard:
                self._write(last=False)
            # the shard gets all documents up to and including the one that fills it
            ends = np.cumsum(lengths)
            count = int(np.searchsorted(ends, self.tokens_per_shard - self._held)) + 1
            cut = int(ends[min(count, len(ends)) - 1])
            self._parts.append(part[:cut])
            self._lengths.append(lengths[:count])
            self._text_bytes.append(np.asarray(text_bytes[:count], np.int64))
            self._held += cut
            self.tokens += cut
            self.documents += len(self._lengths[-1])
            self.bytes += int(np.sum(self._text_bytes[-1]))
            part, lengths, text_bytes = part[cut:], lengths[count:], text_bytes[count:]

    def finish(self) -> None:
        """Write the remaining documents as the last shard."""
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
        # 8-byte arrays first, so that all arrays are aligned
        layout = {
            "doc_ends": ("I64", [doc_ends]),
            "doc_bytes": ("I64", [doc_bytes]),
            "tokens": (self.info.dtype_name, self._parts),
        }
        header: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in metadata.items()}}
        position = 0
        for name, (dtype, pieces) in layout.items():
            size = sum(map(len, pieces))
            stop = position + size * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [position, stop]}
            position = stop
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(self.folder / _shard_name(self.shards), "wb") as handle:  # safetensors, from arrays in parts
            handle.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, pieces in layout.values():
                for piece in pieces:
                    handle.write(np.ascontiguousarray(piece).data)
        self.shards += 1
        self._clear()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


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
                    f"{path}: truncated or not a safetensors file: {counted(size, 'byte')}; make the shards again"
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
                    f"{path}: truncated: expected {counted(expected, 'byte')}, found {size}; make the shards again"
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


class TokenShards:
    """A folder of shards as one sequence of documents.

    tokens, documents, bytes: counts over all shards; `bytes` is UTF-8 text, without specials
    lengths: int64 [documents], tokens of each document with its `start`
    doc_bytes: int64 [documents]
    info: ShardInfo
    `shards[k]` is document k: a read-only view of its tokens.

    Raise UserError naming the file for a folder without shards, and for a shard that is missing, truncated, of another
    format, or made with another tokenizer than the first.
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
                raise UserError(f"{self.folder / _shard_name(number)}: missing; make the shards again")
            if shard.info != self.info:
                raise UserError(f"{shard.path}: made with another tokenizer than {self._shards[0].path}")
        if self._shards[-1].metadata["last"] != "1":
            raise UserError(f"{self.folder / _shard_name(len(paths))}: missing; make the shards again")
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
        """Return tokens start:stop of a document, as a read-only view."""
        number = int(np.searchsorted(self._first_document, document, side="right")) - 1
        shard = self._shards[number]
        end = int(shard.doc_ends[document - self._first_document[number]])
        begin = end - int(self.lengths[document])
        return shard.tokens[begin + start : begin + stop]


def document_files(paths: Sequence[str]) -> list[str]:
    """Expand paths to document files like `input_files`; keep a folder of token shards unchanged."""
    is_sharded = len(paths) == 1 and (Path(paths[0]) / _shard_name(0)).is_file()
    return list(paths) if is_sharded else input_files(paths, text=True)


def tokenize_documents(
    paths: Sequence[str],
    encoder: Tokenizer,
    cache: Path,
    *,
    limit: int | None = None,
    name: str = "tokens",
    resume: bool = False,
    bad: BadRecords | None = None,
    columns: Mapping[str, str] = {},
    quiet: bool = False,
) -> TokenShards:
    """Return the token shards of documents, from the cache if possible.

    paths:   files of documents for `read_documents`, or one folder of token shards
    cache:   folder for the shards, created if missing; a corpus is in the subfolder `name`-HASH, one from a pipe in
             `name`-stream
    limit:   most documents to read
    resume:  use the shards of a pipe that the resumed run has read; otherwise a pipe is read and encoded again
    columns: field name to the column it is read from
    bad:     skips and counts bad records, also those that were skipped when the cache was made; without it, the first
             raises UserError

    In a job of several processes, one must call this before the others. A killed call leaves no shards that look
    complete. Raise UserError for documents without any text, and for token shards of another tokenizer.
    """
    bad = BadRecords() if bad is None else bad
    start, end = encoder.document_bounds()
    info = ShardInfo(tokenizer_sha256=encoder.sha256, vocab_size=encoder.vocab_size, start=start, end=end)
    if len(paths) == 1 and (Path(paths[0]) / _shard_name(0)).is_file():
        shards = TokenShards(paths[0])
        if shards.info != info:
            raise UserError(
                f"{paths[0]}: these token shards were made with another tokenizer (sha256 "
                f"{shards.info.tokenizer_sha256[:12]}, this one {info.tokenizer_sha256[:12]}); use the documents"
            )
        return shards
    is_new = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    inputs = [_content_of(path, cache / HASHES) for path in paths]
    if all(inputs):
        named = [dict(columns)] if columns else []
        of_tokenizer = [info.tokenizer_sha256, info.vocab_size, info.start, info.end]
        decides = json.dumps([FORMAT, inputs, of_tokenizer, limit, *named])
        folder = cache / f"{name}-{hashlib.blake2b(decides.encode(), digest_size=8).hexdigest()}"
        keep = True
    else:  # stdin, a pipe, an address without a version, or a missing file, which read_documents reports
        folder, keep = cache / f"{name}-stream", resume
    known, left_out = None, []
    if keep:
        with suppress(UserError, ValueError, OSError):  # missing or damaged
            shards = TokenShards(folder)
            left_out = json.loads((folder / LEFT_OUT).read_bytes())
            known = shards
    if known is not None and known.info == info:
        bad.restore(left_out)
        return known
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as partial:
            before = len(bad.tallies)
            documents = read_documents(paths, limit, bad, columns, OF_DOCUMENT)
            _write_shards(documents, encoder, ShardWriter(partial, info), paths, bad, quiet)
            write_json(partial / LEFT_OUT, bad.as_json(before))
    except UserError:
        if is_new:  # a failed run leaves no empty folder
            shutil.rmtree(cache, ignore_errors=True)
        raise
    return TokenShards(folder)


def _write_shards(
    documents: Iterable[Row],
    encoder: Tokenizer,
    writer: ShardWriter,
    paths: Sequence[str],
    bad: BadRecords,
    quiet: bool,
) -> None:
    """Read, encode and write documents; a thread encodes a group of them while the next group is read."""
    outside = 0
    waiting: list[Future[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
    with Progress("tokenize", unit="MB", quiet=quiet) as progress, ThreadPoolExecutor(1) as pool:
        for texts in chain(_groups(documents), [None]):
            if texts is not None:
                waiting.append(pool.submit(_encode, encoder, texts))
            while waiting and (len(waiting) > 2 or texts is None):
                ids, lengths, text_bytes = waiting.pop(0).result()
                if encoder.unk_id is not None:
                    outside += len(
                        np.unique(np.searchsorted(np.cumsum(lengths), np.flatnonzero(ids == encoder.unk_id), "right"))
                    )
                writer.add(ids, lengths, text_bytes)
                progress.advance(float(text_bytes.sum()) / 1e6, tokens=writer.tokens, backend=encoder.backend)
    if outside:
        name = name_of(paths[-1])
        bad.count_unused(name, [OUTSIDE] * outside)
        bad.report(name)
    if not writer.documents:
        raise UserError(f"{names_of(paths)}: no document with text; expected records with 'text', or plain text")
    writer.finish()


def _encode(encoder: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, lengths and UTF-8 bytes of texts."""
    ids, lengths = encoder.encode_batch(texts)
    # after encoding, for which CPython has cached the UTF-8 of each text: 10 times cheaper
    return ids, lengths, np.array([len(text.encode()) for text in texts], np.int64)


def _groups(documents: Iterable[Row]) -> Iterator[list[str]]:
    """Yield the texts of documents in groups of about GROUP_CHARACTERS, without empty ones."""
    group: list[str] = []
    size = 0
    for row in documents:
        text = row.value["text"]
        if text:
            group.append(text)
            size += len(text)
            if size >= GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _content_of(path: str, memory: Path) -> list[Any] | None:
    """Identify the content and format of a file or an address; return None if that is not possible."""
    if is_remote(path):
        size, version = size_and_version(path)
        return [path, size, version] if version else None
    return [hash_of_file(path, memory), "".join(Path(path).suffixes)] if Path(path).is_file() else None


def hash_of_file(path: str, memory: Path) -> str:
    """Return the BLAKE2b hash of a file (0.7 GB/s), cached in the JSON file `memory` by path, size and mtime."""
    stat = Path(path).stat()
    key, version = str(Path(path).resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        known = {}
    if known.get(key, [None])[:3] != version:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(path, "rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from error
        known[key] = [*version, digest.hexdigest()]
        with atomic_file(memory, "w") as out:
            json.dump(known, out)
    return known[key][3]
