"""Documents to blocks of bytes for counting, at any size of input, with a sample put aside for the report."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmkit.errors import UserError
from llmkit.io.jsonl import BYTE_ORDER_MARK, check_no_archive, is_jsonl, json_rows, name_of, open_input
from llmkit.io.records import BadRecords, check_document, good_records
from llmkit.tokenizer.patterns import Pattern
from llmkit.tokenizer.piece_counts import END

BLOCK = 4 << 20  # bytes of text sent to a process at a time
WHOLE_TEXT = 16 << 20  # plain text up to this size is one document under any pattern
SAMPLE_OF_SOURCE, SAMPLE_OF_DOCUMENT, SAMPLE = 256 << 10, 16 << 10, 16 << 20  # bytes put aside at most
NO_SOURCE = "(no source)"


class Corpus:
    """The text of some inputs, read once.

    documents, bytes   what was read so far
    sample             source -> beginnings of documents, within the bounds above
    """

    def __init__(
        self,
        paths: Sequence[str],
        pattern: Pattern,
        limit: int | None = None,
        limit_bytes: int | None = None,
        bad: BadRecords | None = None,
    ) -> None:
        self.paths, self.pattern, self.limit, self.limit_bytes, self._bad = paths, pattern, limit, limit_bytes, bad
        self.documents = self.bytes = 0
        self.sample: dict[str, list[str]] = {}
        self.bytes_of_source: dict[str, int] = {}
        self._sampled: dict[str, int] = {}

    def blocks(self) -> Iterator[bytes]:
        """Documents in UTF-8, each followed by END, in blocks of at least BLOCK bytes; documents without text are
        left out. Bad records are skipped as `bad` has it; without that, the first raises UserError."""
        pieces: list[bytes] = []
        size = 0
        for text, source in self._texts():
            data = text.encode()
            last = self.limit_bytes is not None and self.bytes + len(data) >= self.limit_bytes
            if last:
                text = data[: (self.limit_bytes or 0) - self.bytes].decode(errors="ignore")  # no half characters
                data = text.encode()
            self._note(text, len(data), source)
            pieces += (data, END)
            size += len(data)
            if size >= BLOCK or last:
                yield b"".join(pieces)
                pieces.clear()
                size = 0
            if last:
                return
        if size:
            yield b"".join(pieces)

    def _texts(self) -> Iterator[tuple[str, str]]:
        for path in self.paths:
            with open_input(path) as handle:
                if not is_jsonl(handle, path):
                    check_no_archive(handle, path)
                    name = name_of(path)
                    if self._counts_another():
                        yield from ((text, Path(name).name) for text in plain_text(handle, name, self.pattern))
                    continue
                left = None if self.limit is None else self.limit - self.documents
                if left == 0:
                    return
                for row in good_records(json_rows(handle, path), check_document, name_of(path), self._bad, left):
                    self.documents += 1
                    if text := row.value["text"]:
                        yield text, row.value.get("source") or NO_SOURCE

    def _counts_another(self) -> bool:
        self.documents += 1
        if self.limit is not None and self.documents > self.limit:
            self.documents = self.limit
            return False
        return True

    def _note(self, text: str, size: int, source: str) -> None:
        self.bytes += size
        self.bytes_of_source[source] = self.bytes_of_source.get(source, 0) + size
        if source not in self._sampled and len(self._sampled) * SAMPLE_OF_SOURCE >= SAMPLE:
            return
        taken = self._sampled.get(source, 0)
        if taken < SAMPLE_OF_SOURCE:
            head = text[:SAMPLE_OF_DOCUMENT]
            self.sample.setdefault(source, []).append(head)
            self._sampled[source] = taken + len(head.encode())


def plain_text(handle: io.BufferedReader, name: str, pattern: Pattern) -> Iterator[str]:
    """A file of plain text as one document, in parts whose pieces are those of the whole.

    The parts end where the pattern cuts in any case: before a space after a letter. Where no such place is known,
    text of more than WHOLE_TEXT is cut at ends of lines.
    """
    least = BLOCK if pattern.unbroken is not None else WHOLE_TEXT
    lines, offset, rest = 1, 0, handle.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while True:
        data = handle.read(least)
        rest += data
        cut = (_last_cut(rest, pattern) if len(rest) >= least else 0) if data else len(rest)
        part, rest = rest[:cut], rest[cut:]
        try:
            text = part.decode()
        except UnicodeDecodeError as error:
            line = lines + part.count(b"\n", 0, error.start)
            raise UserError(
                f"{name}:{line}: not UTF-8 at byte {offset + error.start}; convert the file first"
            ) from None
        if text:
            yield text
        if not data:
            return
        lines, offset = lines + part.count(b"\n"), offset + len(part)


def _last_cut(data: bytes, pattern: Pattern) -> int:
    if pattern.unbroken is None:
        return data.rfind(b"\n") + 1
    end = len(data)
    while (space := data.rfind(b" ", 0, end)) > 0:
        if re.match(rb"[A-Za-z]", data[space - 1 : space]):
            return space
        end = space
    return 0
