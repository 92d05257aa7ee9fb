"""Count the pieces into which a pattern splits a corpus of any size.

    corpus = Corpus(["docs.jsonl.gz"], find_pattern("qwen2"))
    pieces, counts = count_pieces(corpus.blocks(), corpus.pattern)

Text comes in *blocks*: concatenated documents in UTF-8, each followed by END, a byte that does not occur in UTF-8.
Numpy finds safe places to cut (patterns.py) and loads each chunk of up to 16 bytes, 99.8% of those in English, as two
integers; sorting groups equal chunks. At the end the pattern splits each unique chunk into pieces, which get the
chunk's count. 100 MB of English take 1.0 s; Hugging Face's trainer takes 22 s.

Longer chunks are counted in a dict of bytes. When these accumulate (scripts without spaces), and for patterns without
known safe places, text is split at once and pieces are counted instead.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import UserError
from llmkit.io.files import file_path
from llmkit.io.jsonl import BYTE_ORDER_MARK, check_no_archive, is_jsonl, json_rows, name_of, open_input
from llmkit.io.pool import in_order
from llmkit.io.ranks import available_cores
from llmkit.io.records import OF_DOCUMENT, BadRecords, check_document, good_records
from llmkit.tokenizer.patterns import Pattern, piece_finder

BLOCK = 4 << 20  # bytes of text sent to a process at a time
WHOLE_TEXT = 16 << 20  # plain text up to this size is one document under any pattern
SAMPLE_OF_SOURCE, SAMPLE_OF_DOCUMENT, SAMPLE = 256 << 10, 16 << 10, 16 << 20  # largest samples, in bytes
NO_SOURCE = "(no source)"
END = b"\xff"
SLICE = 4 << 20  # bytes processed together; 1 MB and 16 MB are slower (cache, number of calls)
KEPT_BYTES = 16 << 20  # long chunks kept before they are split into pieces
PENDING = 1 << 19  # counts collected before they are merged
ALONE_BYTES = 12 << 20  # counted in this process before others start, which takes 0.2 s
HANDED_OVER = 2_000_000  # counts after which a process sends them to the parent, to bound memory on many cores

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]
Counts = tuple[Words, Words, Ints, dict[bytes, int], dict[bytes, int]]  # chunks: head, tail, count; long ones; pieces
_MASK = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)  # the first i bytes of a little-endian integer
_LETTER, _NOT_SPACE, _AFTER_END, _ANY = 1, 2, 4, 8


# ---- documents to blocks


class Corpus:
    """The text of input files, read once.

    documents, bytes   read so far
    bytes_of_source    source of documents -> bytes
    sample             source -> beginnings of documents, for the report
    """

    def __init__(
        self,
        paths: Sequence[str],
        pattern: Pattern,
        limit: int | None = None,
        limit_bytes: int | None = None,
        bad: BadRecords | None = None,
        columns: Mapping[str, str] = {},
    ) -> None:
        self.paths, self.pattern, self.limit, self.limit_bytes, self._bad = paths, pattern, limit, limit_bytes, bad
        self._columns = columns
        self.documents = self.bytes = 0
        self.bytes_of_source: Counter[str] = Counter()
        self.sample: dict[str, list[str]] = {}
        self._sampled: Counter[str] = Counter()

    def blocks(self) -> Iterator[bytes]:
        """Yield non-empty documents in UTF-8, each followed by END, in blocks of at least BLOCK bytes.

        `bad` skips and counts bad records; without it, the first raises UserError.
        """
        pieces: list[bytes] = []
        size = 0
        for text, source in self._texts():
            data = text.encode()
            last = self.limit_bytes is not None and self.bytes + len(data) >= self.limit_bytes
            if last:
                text = data[: (self.limit_bytes or 0) - self.bytes].decode(errors="ignore")  # no partial characters
                data = text.encode()
            self.bytes += len(data)
            self.bytes_of_source[source] += len(data)
            room = source in self._sampled or len(self._sampled) * SAMPLE_OF_SOURCE < SAMPLE
            if room and self._sampled[source] < SAMPLE_OF_SOURCE:
                head = text[:SAMPLE_OF_DOCUMENT]
                self.sample.setdefault(source, []).append(head)
                self._sampled[source] += len(head.encode())
            pieces += (data, END)
            size += len(data)
            if last:
                break
            if size >= BLOCK:
                yield b"".join(pieces)
                pieces.clear()
                size = 0
        if size:
            yield b"".join(pieces)

    def _texts(self) -> Iterator[tuple[str, str]]:
        for path in self.paths:
            left = None if self.limit is None else self.limit - self.documents
            if left == 0:
                return
            with open_input(path, self._columns, OF_DOCUMENT) as handle:
                name = name_of(path)
                if is_jsonl(handle, path):
                    rows = json_rows(handle, path, self._columns)
                    for row in good_records(rows, check_document, name, self._bad, left):
                        self.documents += 1
                        if text := row.value["text"]:
                            yield text, row.value.get("source") or NO_SOURCE
                else:
                    check_no_archive(handle, path)
                    self.documents += 1
                    for text in plain_text(handle, name, self.pattern):
                        yield text, Path(file_path(name)).name


def plain_text(handle: io.BufferedReader, name: str, pattern: Pattern) -> Iterator[str]:
    """Yield a plain text file as one document, in parts that split into the same pieces as the complete text.

    Parts end where the pattern always cuts: before a space that follows a letter. If no such place is known, text
    above WHOLE_TEXT bytes is cut at newlines. Raise UserError if it is not UTF-8.
    """
    least = BLOCK if pattern.unbroken is not None else WHOLE_TEXT
    border = re.compile(rb".*(?<=[A-Za-z])(?= )" if pattern.unbroken is not None else rb".*\n", re.DOTALL)
    lines, offset, rest = 1, 0, handle.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while True:
        data = handle.read(least)
        rest += data
        cut = len(rest)
        if data:
            match = border.match(rest) if cut >= least else None
            cut = match.end() if match else 0
        part, rest = rest[:cut], rest[cut:]
        try:
            text = part.decode()
        except UnicodeDecodeError as error:
            line, byte = lines + part.count(b"\n", 0, error.start), offset + error.start
            raise UserError(f"{name}:{line}: not UTF-8 at byte {byte}; convert the file first") from None
        if text:
            yield text
        if not data:
            return
        lines, offset = lines + part.count(b"\n"), offset + len(part)


# ---- blocks to counts


def count_pieces(
    blocks: Iterable[bytes],
    pattern: Pattern,
    processes: int | None = None,
    on_progress: Callable[[int], object] = lambda size: None,
    alone: int = ALONE_BYTES,
    handed_over: int = HANDED_OVER,
) -> tuple[list[bytes], Ints]:
    """Count the unique pieces of all blocks, by default on all cores; errors of `blocks` propagate.

    on_progress: called with the bytes of each counted block
    alone: bytes that this process counts before it starts others
    handed_over: counts after which another process sends them
    """
    processes = available_cores() if processes is None else processes
    counter, counted = PieceCounter(pattern), 0
    blocks = iter(blocks)
    for block in blocks:
        counter.add(block)
        counted += len(block)
        on_progress(len(block))
        if counted >= alone and processes > 1:
            break
    make = partial(PieceCounter, pattern, handed_over)
    advice = "use fewer cores (taskset)"
    for block, results in in_order(
        blocks, make, processes, name=lambda block: "a block of text", rest=True, advice=advice
    ):
        for counts in results:
            counter.merge(counts)
        on_progress(len(block or b""))
    return counter.result()


class PieceCounter:
    """Counts the pieces of blocks of text; a worker of the pool yields its counts when there are many."""

    def __init__(self, pattern: Pattern, handed_over: int = HANDED_OVER) -> None:
        self.pattern, self._handed_over = pattern, handed_over
        self._find = piece_finder(pattern)
        # by byte: a chunk begins where before[previous byte] & at[byte] != 0
        before, at = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
        letters = np.array([byte for byte in range(128) if chr(byte).isalpha()])
        before[letters] |= _LETTER
        at[:128] |= _LETTER
        at[letters] &= ~np.uint8(_LETTER)
        at[list(pattern.unbroken or b"")] &= ~np.uint8(_LETTER)
        before[0x21:0x7F] |= _NOT_SPACE
        at[0x20] |= _NOT_SPACE
        before[END[0]] |= _AFTER_END
        at[:] |= _AFTER_END
        before[:] |= _ANY
        at[END[0]] |= _ANY
        self._before, self._at = before.tobytes(), at.tobytes()
        self._clear()

    def _clear(self) -> None:
        self._head = self._tail = np.empty(0, np.uint64)  # the chunks: first 8 bytes, then up to 8 more
        self._count = np.empty(0, np.int64)
        self._pending: list[tuple[Words, Words, Ints]] = []
        self._long: Counter[bytes] = Counter()
        self._long_bytes = 0
        self._pieces: Counter[bytes] = Counter()

    def __call__(self, block: bytes | None) -> Iterator[Counts]:
        """Count a block; yield all counts if there are many, or for None, which ends the input."""
        if block is not None:
            self.add(block)
        rows = len(self._count) + len(self._long) + len(self._pieces) + sum(len(count) for *_, count in self._pending)
        if block is None or rows > self._handed_over:
            self._add_pending()
            yield self._head, self._tail, self._count, dict(self._long), dict(self._pieces)
            self._clear()

    def merge(self, counts: Counts) -> None:
        """Add the counts of another counter of the same pattern."""
        self._pending.append(counts[:3])
        self._add_pending()
        self._long.update(counts[3])
        self._pieces.update(counts[4])

    def add(self, block: bytes) -> None:
        """Count a block, which ends with END."""
        if self.pattern.unbroken is None:
            for document in block.split(END):
                self._pieces.update(self._find(document))
            return
        start, size = 0, SLICE
        while start < len(block):
            part = block[start : start + size]
            cuts = self._cuts(part)
            if start + size >= len(block):
                end = len(part)
            elif len(cuts):
                end = int(cuts[-1])  # the rest goes into the next slice
                cuts, part = cuts[:-1], part[:end]
            else:
                size *= 2
                continue
            self._count_chunks(part, cuts)
            start, size = start + end, SLICE

    def _cuts(self, part: bytes) -> Ints:
        """Find where chunks begin, except the first."""
        before = np.frombuffer(part.translate(self._before), np.uint8)
        at = np.frombuffer(part.translate(self._at), np.uint8)
        cut = (before[:-1] & at[1:]) != 0
        letters = np.frombuffer(part, np.uint8)
        if np.count_nonzero(letters[::64] >= 0x80) * 64 > len(part) // 8:
            # Not English: also cut before spaces after other scripts. Two-byte letters from U+00C0 on (C3..DF) and
            # three-byte ones with lead byte E0, or E4 and above, include no white space.
            space = np.flatnonzero(letters[3:] == 0x20) + 3
            last, two, three = letters[space - 1], letters[space - 2], letters[space - 3]
            wide = (two >= 0xC3) & (two <= 0xDF)
            wide |= (two >= 0x80) & (two < 0xC0) & ((three == 0xE0) | ((three >= 0xE4) & (three <= 0xEF)))
            cut[space[(last >= 0x80) & (last < 0xC0) & wide] - 1] = True
        return np.flatnonzero(cut) + 1

    def _count_chunks(self, part: bytes, cuts: Ints) -> None:
        starts = np.concatenate([[0], cuts])
        lengths = np.diff(starts, append=len(part))
        padded = part + bytes(16)
        packed = np.full(len(starts), b"\0" not in part)  # NUL is the padding: such chunks would look shorter
        packed &= lengths <= 16
        word_at = np.ndarray(len(part) + 8, "<u8", padded, strides=(1,))
        short = packed & (lengths <= 8)
        head = word_at[starts[short]] & _MASK[lengths[short]]
        head.sort()
        first = np.flatnonzero(_changes(head))
        self._pending.append((head[first], np.zeros(len(first), np.uint64), np.diff(first, append=len(head))))

        packed &= ~short
        head, tail = word_at[starts[packed]], word_at[starts[packed] + 8] & _MASK[lengths[packed] - 8]
        self._pending.append(_add_up(head, tail, np.ones(len(head), np.int64)))
        if sum(len(count) for *_, count in self._pending) > max(PENDING, len(self._count)):
            self._add_pending()

        rest = np.flatnonzero((lengths > 16) if b"\0" not in part else lengths > 0)
        if len(rest):
            bounds = zip(starts[rest].tolist(), (starts[rest] + lengths[rest]).tolist(), strict=True)
            chunks = [part[i:j] for i, j in bounds]
            self._long.update(chunks)
            self._long_bytes += sum(map(len, chunks))
            if self._long_bytes > KEPT_BYTES:
                self._cut_long()

    def _add_pending(self) -> None:
        self._pending.insert(0, (self._head, self._tail, self._count))
        head, tail, count = (np.concatenate([table[column] for table in self._pending]) for column in range(3))
        self._pending.clear()  # frees memory before more is needed; 15% of the time otherwise
        self._head, self._tail, self._count = _add_up(head, tail, count)  # pyright: ignore[reportArgumentType]

    def _cut_long(self) -> None:
        self._long.pop(END, None)
        self._cut(self._long.items())
        self._long.clear()
        self._long_bytes = 0

    def _cut(self, chunks: Iterable[tuple[bytes, int]]) -> None:
        find, pieces, known = self._find, self._pieces, self._pieces.get
        for chunk, count in chunks:
            for piece in find(chunk):
                pieces[piece] = known(piece, 0) + count

    def result(self) -> tuple[list[bytes], Ints]:
        """Return the unique pieces and their counts, and clear the counter."""
        self._add_pending()
        self._cut_long()
        text = self._head != END[0]
        chunks = np.stack([self._head[text], self._tail[text]], axis=1).astype("<u8", copy=False).view("S16")[:, 0]
        counts, pieces = self._count[text], self._pieces
        self._head = self._tail = np.empty(0, np.uint64)  # frees memory for the pieces
        self._count = np.empty(0, np.int64)
        for i in range(0, len(chunks), PENDING):  # S16 drops the zero bytes at the end
            self._cut(zip(chunks[i : i + PENDING].tolist(), counts[i : i + PENDING].tolist(), strict=True))
        self._clear()
        return list(pieces), np.fromiter(pieces.values(), np.int64, len(pieces))


def _add_up(head: Words, tail: Words, count: Ints) -> tuple[Words, Words, Ints]:
    """Sum the counts of equal (head, tail), sorted by a hash; a rare collision may leave equal ones apart."""
    order = np.argsort(head * np.uint64(0x9E3779B97F4A7C15) + tail * np.uint64(0xC2B2AE3D27D4EB4F))
    head, tail, count = head[order], tail[order], count[order]
    first = np.flatnonzero(_changes(head) | _changes(tail))
    return head[first], tail[first], np.add.reduceat(count, first) if len(first) else count


def _changes(values: Words) -> NDArray[np.bool_]:
    """Return True where a value differs from the previous one, and at the first."""
    changes = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes
