"""Documents to token shards, kept in a cache so that the same documents are encoded once.

    shards = tokenize_documents(["docs.jsonl.gz"], tokenizer, Path("base.tokens"))

One thread reads while another encodes; the backends encode on all cores by themselves where that is faster
(llmkit/tokenizer/backends.py). The cache knows a corpus by what is in the files, not by their names.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from llmkit.data.shards import FORMAT, ShardInfo, ShardWriter, TokenShards, is_shard_folder
from llmkit.errors import UserError
from llmkit.io.files import atomic_file, atomic_folder
from llmkit.io.jsonl import name_of, names_of, read_documents, write_json
from llmkit.io.progress import Progress
from llmkit.io.records import OUTSIDE, BadRecords

GROUP_CHARACTERS = 1 << 20  # documents encoded together: enough for all cores, little to hold
HASHES = "inputs.json"
LEFT_OUT = "left-out.json"  # beside the shards: what of the documents they do not have


class Encoder(Protocol):
    """Part of a tokenizer that is needed here (llmkit.tokenizer.encoding.Tokenizer)."""

    sha256: str
    vocab_size: int
    unk_id: int | None

    @property
    def backend(self) -> str: ...
    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def document_bounds(self) -> tuple[int, int]: ...


def tokenize_documents(
    paths: Sequence[str],
    encoder: Encoder,
    cache: Path,
    *,
    limit: int | None = None,
    name: str = "tokens",
    resume: bool = False,
    bad: BadRecords | None = None,
    quiet: bool = False,
) -> TokenShards:
    """The token shards of some documents, from the cache where it has them.

    paths:  files of documents as `read_documents` takes them, or one folder of ready token shards
    cache:  folder for the shards, made when absent; a corpus lies in `name`-HASH below it, one that came
            through a pipe in `name`-stream
    limit:  the number of documents to take
    resume: take the shards of a pipe that the resumed run read; without this a pipe is read and encoded anew each
            time
    bad:    skips bad records, also those that the cache has left out; without it, the first raises UserError

    In a job of several processes let one call this, and the others after it. A killed call leaves nothing
    that a later one would take for whole. Raises UserError for documents without any text, and for ready shards of
    another tokenizer.
    """
    bad = BadRecords() if bad is None else bad
    start, end = encoder.document_bounds()
    info = ShardInfo(tokenizer_sha256=encoder.sha256, vocab_size=encoder.vocab_size, start=start, end=end)
    if len(paths) == 1 and is_shard_folder(paths[0]):
        return _ready_shards(paths[0], info)
    is_new = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    if all(Path(path).is_file() for path in paths):
        folder = cache / f"{name}-{_cache_key(paths, info, limit, cache)}"
        keep = True
    else:  # stdin, a pipe, or a file that is not there: read_documents says so
        folder, keep = cache / f"{name}-stream", resume
    known, left_out = False, []
    if keep:
        with suppress(UserError, ValueError):  # absent, or damaged since
            shards = TokenShards(folder)
            known = shards.info == info
            left_out = json.loads((folder / LEFT_OUT).read_bytes()) if (folder / LEFT_OUT).exists() else []
    if known:
        bad.restore(left_out)
        return TokenShards(folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as partial:
            before = len(bad.tallies)
            _write_shards(paths, encoder, ShardWriter(partial, info), limit, bad, quiet)
            write_json(partial / LEFT_OUT, bad.as_json(before))
    except UserError:
        if is_new:  # a mistake leaves nothing behind
            shutil.rmtree(cache, ignore_errors=True)
        raise
    return TokenShards(folder)


def _ready_shards(path: str, info: ShardInfo) -> TokenShards:
    shards = TokenShards(path)
    if shards.info != info:
        raise UserError(
            f"{path}: these token shards were made with another tokenizer (sha256 "
            f"{shards.info.tokenizer_sha256[:12]}, this one {info.tokenizer_sha256[:12]}); give the documents"
        )
    return shards


def _write_shards(
    paths: Sequence[str], encoder: Encoder, writer: ShardWriter, limit: int | None, bad: BadRecords, quiet: bool
) -> None:
    """Read, encode and write: groups of documents are encoded in a thread while the next group is read."""
    outside = 0
    waiting: list[Future[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
    with Progress("tokenize", unit="MB", quiet=quiet) as progress, ThreadPoolExecutor(1) as pool:
        for texts in chain(_groups(paths, limit, bad), [None]):
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
        raise UserError(f"{names_of(paths)}: no document with text; expected JSONL with 'text', or plain text")
    writer.finish()


def _encode(encoder: Encoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, lengths and bytes of UTF-8 of some texts."""
    ids, lengths = encoder.encode_batch(texts)
    # After the encoding, for which CPython has made and kept the UTF-8 of each text: 10 times cheaper
    return ids, lengths, np.array([len(text.encode()) for text in texts], np.int64)


def _groups(paths: Sequence[str], limit: int | None, bad: BadRecords) -> Iterator[list[str]]:
    """Texts of documents in groups of about GROUP_CHARACTERS; documents without text are left out."""
    group: list[str] = []
    size = 0
    for row in read_documents(paths, limit, bad):
        text = row.value["text"]
        if text:
            group.append(text)
            size += len(text)
            if size >= GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _cache_key(paths: Sequence[str], info: ShardInfo, limit: int | None, cache: Path) -> str:
    """Hash of all that decides the shards: the inputs' bytes and kind, tokenizer, format, limit."""
    inputs = [[hash_of_file(path, cache / HASHES), "".join(Path(path).suffixes)] for path in paths]
    tokenizer = [info.tokenizer_sha256, info.vocab_size, info.start, info.end]
    decides = json.dumps([FORMAT, inputs, tokenizer, limit])
    return hashlib.blake2b(decides.encode(), digest_size=8).hexdigest()


def hash_of_file(path: str, memory: Path) -> str:
    """BLAKE2b of a file's bytes (0.7 GB/s), remembered in the JSON file `memory` by path, size and mtime."""
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
