"""Where the records of WARC and ARC files begin and end, in whole, cut and damaged files.

    frames = Frames(Window(handle), "warc.gz")
    for offset, data in frames:    # data: the bytes of one record and perhaps blank ones, or why there are none
        ...

A record that cannot be read, and bytes that are no record, become one frame with a reason: `truncated` (the file
ends inside of it), `damaged`, `too_large` or `garbage`; reading goes on at the next record, and bytes that are not
searched for one, since that would take minutes, become a frame `unsearched`. The libraries for WARC
do not do this: FastWARC 2.0 takes a record cut at the end of its file for a whole one, and ends for good at garbage.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from llmkit.crawl.page import MAX_PAGE_BYTES
from llmkit.io.jsonl import GZIP_MAGIC, DamagedData

try:
    from isal import isal_zlib as inflating  # unpacks twice as fast as zlib
except ImportError:  # no wheels for this machine
    inflating = zlib

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, getattr(inflating, "error", zlib.error))
PACKING_ERRORS = (*GZIP_ERRORS, DamagedData)
Frame = tuple[int, bytes | str]
Bytes = bytes | bytearray

BLOCK = 1 << 18
STEP = 1 << 16  # of compressed bytes unpacked at once: at most 68 MB come out
FIRST_STEP = 1 << 12  # of a member; those behind it in the file are no part of it
MAX_HEADER = 1 << 16
OVERLAP = 1 << 13  # the start of a record that lies across two blocks; the longest header line of an ARC file
FOREVER = 1 << 62
# Budget for unpacking what turns out to be no gzip member: WASTE bytes for each byte passed over, beyond the first
# 64 MB; each attempt counts as 16 kB at least. Otherwise input that looks like a member every ten bytes, or members
# damaged near their end, would take minutes. In noise, one position in 2^29 looks like a member.
WASTE, LEAST_WASTE, FIRST_WASTE = 16, 1 << 14, 1 << 26

GZIP_START = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")
BLANK_LINE = re.compile(rb"\n\r?\n")
WARC_START = re.compile(rb"WARC/\d\.\d+\r?\n(?=[A-Za-z-]+:)")
_WARC_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,18})[ \t]*\r?$")
_WARC_TYPE = re.compile(rb"(?im)^warc-type:")
# URL, address, date, type, length; a URL may hold spaces
ARC_START = re.compile(rb"[a-z][a-z0-9+.-]*:[^\n]* [0-9a-f.:]+ \d{8,14} [^ \n]+ (\d{1,18})\r?$", re.MULTILINE)
_ARC_LINE = re.compile(rb"(?<=\n)" + ARC_START.pattern, re.MULTILINE)  # not from the midst of a line


class Window(io.RawIOBase):
    """The bytes of a stream from `position` on: looked at before they are passed over. Not seekable."""

    def __init__(self, handle: Any, position: int = 0) -> None:
        self.position, self.cut = position, False  # cut: the compressed stream ended early or is damaged
        self._handle, self._ahead, self._ended = handle, bytearray(), False
        self._read = handle.read1 if hasattr(handle, "read1") else handle.read

    def look(self, size: int) -> bytearray:
        """The bytes ahead, at least `size` of them unless the stream ends before; good until the next call."""
        while len(self._ahead) < size and not self._ended:
            try:
                block = self._read(BLOCK)
            except PACKING_ERRORS:
                block, self.cut = b"", True
            self._ahead += block
            self._ended = not block
        return self._ahead

    def take(self, size: int) -> bytes:
        """Pass over `size` bytes (fewer where the stream ends) and return them."""
        taken = bytes(memoryview(self.look(size))[:size])
        self.skip(len(taken))
        return taken

    def skip(self, size: int) -> int:
        """Pass over `size` bytes without keeping them; the number there were."""
        left = size
        while left and self.look(1):
            count = min(left, len(self._ahead))
            del self._ahead[:count]
            left -= count
        self.position += size - left
        return size - left

    def skip_over(self, what: bytes) -> None:
        """Pass over all bytes ahead that are among `what`."""
        while head := self.look(1)[:4096]:
            count = len(head) - len(head.lstrip(what))
            self.skip(count)
            if count < len(head):
                return

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.take(min(len(buffer), len(self.look(1))))
        buffer[: len(data)] = data
        return len(data)


class GzipStream:
    """The unpacked bytes of gzip members that follow one another.

    It gives all that can be had before it raises EOFError at a cut; Python's GzipFile loses the last 256 KB.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._inflater: Any = None

    def read1(self, size: int) -> bytes:
        """Some of the bytes, none at the end; `size` is not heeded."""
        while self._inflater or self._next_member():
            step = bytes(self._window.look(1)[:4096])  # of one with an error inside, all is lost
            if not step:
                raise EOFError
            data = self._inflater.decompress(step)
            self._window.skip(len(step) - len(self._inflater.unused_data))
            if self._inflater.eof:
                self._inflater = None
            if data:
                return data
        return b""

    def _next_member(self) -> bool:
        self._window.skip_over(b"\0")
        if self._window.look(1):
            self._inflater = inflating.decompressobj(31)
        return self._inflater is not None


def find(window: Window, stop: int, start: re.Pattern[bytes], bytes_without: Callable[[Window], int]) -> bool:
    """Move the window to the first record at its position or after, if it begins before `stop`, else no further.

    bytes_without: how many bytes there are ahead in which no record begins; 0 where one does
    """
    while window.position < stop and window.look(1):
        ahead = window.look(BLOCK)
        match = start.search(ahead)
        count = len(ahead) - (OVERLAP if len(ahead) >= BLOCK else 0)
        if match is not None and match.start() <= count:
            count = match.start()
            if window.position + count < stop:
                window.skip(count)
                count = bytes_without(window)
                if not count:
                    return True
        window.skip(min(count, stop - window.position))
    return False


def header_of(ahead: Bytes, arc: bool) -> tuple[int, int] | None:
    """The bytes of the header with which a record begins and of its block; None where no record begins."""
    if arc:
        match = ARC_START.match(ahead, 0, OVERLAP)
        return (match.end() + 1, int(match[1])) if match else None
    if not WARC_START.match(ahead):
        return None
    end = BLANK_LINE.search(ahead, 0, MAX_HEADER)
    length = _WARC_LENGTH.search(ahead, 0, end.end()) if end else None
    return (end.end(), int(length[1])) if end and length else None


def bytes_without_record(window: Window, arc: bool) -> int:
    """Count the bytes ahead in which no record begins; 0 where one does, by its whole header: pages quote first lines.

    Of text that begins like records ten thousand times, each is not searched to the end of its header: what the first
    lacks is missing behind it, too, up to the blank line that ends it.
    """
    header = header_of(window.look(MAX_HEADER), arc)
    if arc:
        return 0 if header else 1
    ahead = window.look(BLOCK)
    if header and _WARC_TYPE.search(ahead, 0, header[0]):
        return 0
    end = BLANK_LINE.search(ahead)
    behind = end.end() if end else len(ahead)
    return max(1, behind if behind <= MAX_HEADER else behind - MAX_HEADER)


def beginning(window: Window) -> bytes:
    """The first bytes ahead, a kilobyte or more where there is so much, unpacked where they begin a gzip member."""
    ahead = window.look(OVERLAP)
    if not ahead.startswith(GZIP_MAGIC):
        return bytes(ahead[:STEP])
    unpacked, inflater = b"", inflating.decompressobj(31)
    with suppress(*GZIP_ERRORS):
        for begin in range(0, min(len(ahead), OVERLAP), 512):
            unpacked += inflater.decompress(ahead[begin : begin + 512])
            if inflater.eof or len(unpacked) > OVERLAP:
                break
    return unpacked


class Frames:
    """The records of a file or of a span of it, in order: those that start before `stop`.

    kind: "warc" or "arc", with ".gz" where each record is a gzip member of its own. With `exact`, a record starts at
    the window's position, or nothing does; otherwise the first one after it is looked for.
    began, ended: the offset of the first record, None where there is none before `stop`; the offset of the first
    record that is not of the span, None where bytes that are no record lie across its end.
    """

    def __init__(
        self, window: Window, kind: str, exact: bool = True, stop: int = FOREVER, max_bytes: int = MAX_PAGE_BYTES
    ) -> None:
        self.window, self.stop, self.max_bytes = window, stop, max_bytes
        self.arc, self.packed = kind.startswith("arc"), kind.endswith(".gz")
        self.began: int | None = None
        self.ended: int | None = None
        self._start = _ARC_LINE if self.arc else WARC_START
        self._exact, self._lost = exact, False
        self._wasted, self._wasted_until = 0, window.position  # bytes unpacked in vain, and where that was counted
        self._unpacked_to = window.position  # in vain: what begins behind it unpacks nothing again
        self._unsearched = False

    def __iter__(self) -> Iterator[Frame]:
        window, data = self.window, None
        start, found = window.position, self._exact or self._find()
        self.began = window.position if found and window.position < self.stop else None
        yield from ((start, reason) for reason in self._told_unsearched())
        while found and not self._lost:
            window.skip_over(b"\0" if self.packed else b"\r\n")
            if window.position >= self.stop or not window.look(1):
                break
            offset = window.position
            for data in self._member() if self.packed else self._record():
                yield offset, data
        if window.cut and data != "truncated":
            yield window.position, "truncated"
        self.ended = window.position if found and not self._lost else None

    def _record(self) -> Iterator[bytes | str]:
        """The record that starts here."""
        window = self.window
        head = window.look(MAX_HEADER)
        header = header_of(head, self.arc)
        if header is None:
            begun = b"\n" not in head if self.arc else head[:5] == b"WARC/"[: len(head)] and not BLANK_LINE.search(head)
            yield "truncated" if begun and len(head) < MAX_HEADER else "garbage"
            yield from self._resume()
            return
        size = sum(header)
        if header[1] > self.max_bytes:
            yield self._pass_over(*header)
            return
        ahead = window.look(size + 1)
        if len(ahead) < size:
            yield "truncated"
            yield from self._resume()
            return
        if not self._is_followed(0, *header):
            ahead = window.look(size + OVERLAP)
            # behind every block is an end of line: without one, the length is wrong, and with one by chance
            chance = self.arc or not ahead[size : size + 1].strip(b"\r\n")
            swallowed = self._start.search(ahead, header[0], size + OVERLAP)
            at = swallowed.start() if swallowed else size
            if at < size and (not chance or self._is_record(at)):
                yield "damaged"
                window.skip(at)
                return
        yield window.take(size)

    def _pass_over(self, header: int, block: int) -> str:
        """Pass over a record that is too large; where a length is wrong, as far as the next record alone."""
        window, stop = self.window, self.window.position + header + block

        def bytes_without(window: Window) -> int:
            return bytes_without_record(window, self.arc) or int(not self._is_record(0))

        window.skip(header)
        if find(window, stop, self._start, bytes_without):
            return "damaged"
        window.skip(stop - window.position)
        return "too_large" if window.position == stop else "truncated"

    def _is_record(self, at: int) -> bool:
        """True if a record begins so many bytes ahead, and is followed by another."""
        header = header_of(self.window.look(at + MAX_HEADER)[at : at + MAX_HEADER], self.arc)
        return header is not None and header[1] <= self.max_bytes and self._is_followed(at, *header)

    def _is_followed(self, at: int, header: int, block: int) -> bool:
        """True if behind such a record, which begins so many bytes ahead, is another one or the end."""
        end = at + header + block
        ahead = self.window.look(end + OVERLAP)
        behind = ahead[end : end + OVERLAP].lstrip(b"\r\n")
        start = ARC_START if self.arc else WARC_START
        return len(ahead) >= end and (not behind or bool(start.match(behind)))

    def _member(self) -> Iterator[bytes | str]:
        """The records of the gzip member that starts here, as a rule one."""
        window = self.window
        magic = bytes(window.look(4)[:4])
        if not GZIP_START.match(magic):
            yield "truncated" if GZIP_MAGIC.startswith(magic[:2]) and len(magic) < 4 else "garbage"
            yield from self._resume()
            return
        data = self._unpack()
        if isinstance(data, str):
            yield data
            if data != "too_large":
                yield from self._resume()
            return
        header = header_of(data, self.arc)
        size = sum(header) if header else 0
        if header and header[1] <= self.max_bytes and size <= len(data) and not data[size:].strip(b"\r\n"):
            yield data  # as all others would be read too, three copies later
            return
        for _, record in Frames(Window(io.BytesIO(data)), "arc" if self.arc else "warc", max_bytes=self.max_bytes):
            yield record

    def _unpack(self) -> bytes | str:
        """The bytes of the gzip member that starts here, the window then being behind it; or why there are none."""
        window, inflater = self.window, inflating.decompressobj(31)
        chunks, size, at, start = [], 0, 0, window.position
        most, count = self.max_bytes + 2 * MAX_HEADER, FIRST_STEP
        while not inflater.eof:
            step = window.look(at + count)[at : at + count]
            count = min(2 * count, STEP)
            if not step:
                self._note_vain(start, at, min(size, most))
                return "truncated"
            try:
                part = inflater.decompress(step)
            except GZIP_ERRORS:
                self._note_vain(start, at + len(step), min(size, most))
                return "damaged"
            at += len(step) - len(inflater.unused_data)
            size += len(part)
            chunks.append(part)
            if size > most:  # on to its end, keeping nothing
                chunks.clear()
                window.skip(at)
                at = 0
        window.skip(at)
        return b"".join(chunks) if size <= most else "too_large"

    def _note_vain(self, start: int, ahead: int, unpacked: int) -> None:
        """Count what a member that is none has cost, unless it shares no byte with those before: those are not many."""
        if start < self._unpacked_to:
            self._wasted += max(ahead, unpacked)
        self._unpacked_to = max(self._unpacked_to, self.window.position + ahead)

    def _find(self) -> bool:
        if self.packed:
            return find(self.window, self.stop, GZIP_START, self._bytes_without_member)
        return find(self.window, self.stop, self._start, lambda window: bytes_without_record(window, self.arc))

    def _bytes_without_member(self, window: Window) -> int:
        """0 where a gzip member starts ahead that begins with a record, else how many bytes are passed over."""
        self._wasted = max(0, self._wasted - WASTE * (window.position - self._wasted_until))
        self._wasted_until = window.position
        if self._wasted > FIRST_WASTE:
            self._unsearched = True
            return 1 + (self._wasted - FIRST_WASTE) // WASTE
        if (ARC_START if self.arc else WARC_START).match(beginning(window)):
            return 0
        self._wasted += LEAST_WASTE
        return 1

    def _resume(self) -> Iterator[str]:
        """Look for the next record, past a byte that starts none, and tell of bytes that were not searched."""
        self.window.skip(1)
        self._lost = not self._find() and bool(self.window.look(1))
        yield from self._told_unsearched()

    def _told_unsearched(self) -> Iterator[str]:
        if self._unsearched:
            self._unsearched = False
            yield "unsearched"


def is_one_stream(window: Window, arc: bool, max_bytes: int = MAX_PAGE_BYTES) -> bool:
    """True if the gzip member ahead holds more than its first record, so that records cannot be sought."""
    inflater, unpacked, at = inflating.decompressobj(31), bytearray(), 0
    while not inflater.eof and len(unpacked) <= max_bytes:
        step = window.look(at + STEP)[at : at + STEP]
        try:
            unpacked += inflater.decompress(step)
        except GZIP_ERRORS:
            return False
        at += len(step)
        header = header_of(unpacked, arc)
        if header and unpacked[sum(header) :].strip(b"\r\n"):
            return True
        if not step or (header is None and len(unpacked) >= MAX_HEADER):
            return False
    return False
