"""Passages of documents: cut at paragraph borders, and some of them drawn by a seed.

for passage in sample_passages(read_documents(["docs.jsonl"]), count=200, seed=0): ...
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count as count_from
from operator import itemgetter

from llmkit.io.records import Row

CHARACTERS = 1500  # of a passage, at most, where its paragraphs allow it: about 300 words
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage: `name` is its document's id, url or number, and its place in it; `where` its document's place."""

    text: str
    name: str
    where: str


def cut_passages(text: str, characters: int = CHARACTERS) -> Iterator[str]:
    """Join neighbouring paragraphs, together at most so long; a longer paragraph stands alone.

    A text with blank lines has its paragraphs between them, any other a paragraph a line.

    >>> list(cut_passages("One.\\nTwo.\\nThree.", characters=10))
    ['One.\\nTwo.', 'Three.']
    """
    text = text.replace("\r\n", "\n").strip()
    border = BLANK_LINE if BLANK_LINE.search(text) else re.compile(r"\n")
    joint = "\n\n" if border is BLANK_LINE else "\n"
    passage = ""
    for paragraph in filter(None, map(str.strip, border.split(text))):
        if passage and len(passage) + len(joint) + len(paragraph) > characters:
            yield passage
            passage = ""
        passage = passage + joint + paragraph if passage else paragraph
    if passage:
        yield passage


def sample_passages(documents: Iterable[Row], count: int, seed: int) -> list[Passage]:
    """Draw `count` passages of all that the documents have, each as likely as another, in the order of the documents.

    What is drawn depends on the seed, the texts and their order alone; no more than `count` are held.
    """

    def keyed() -> Iterator[tuple[bytes, int, Passage]]:
        order = count_from(0)
        for number, row in enumerate(documents, 1):
            document = row.value.get("id") or row.value.get("url") or number
            for place, text in enumerate(cut_passages(row.value["text"]), 1):
                index = next(order)
                key = blake2b(f"{seed} {index} {text}".encode(), digest_size=8).digest()
                yield key, index, Passage(text, f"{document}/{place}", row.where)

    sample = heapq.nsmallest(count, keyed())
    return [passage for _, _, passage in sorted(sample, key=itemgetter(1))]
