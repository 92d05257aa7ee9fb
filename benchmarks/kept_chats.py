"""Dedup of conversations by write-chats: recall on planted duplicates, real conversations dropped, and time.

    python benchmarks/kept_chats.py alpaca.jsonl sgd.jsonl.gz [--show]

The first 1,000 conversations of each file are the drafts. Edited copies of 150 kept ones are planted: one word
replaced, inserted (from the same file) or deleted, upper or lower case, changed punctuation, or turns in another order.
One thread, CPU time.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from random import Random
from time import process_time

from llmkit.formats.conversations import Conversation, message, read_conversation
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import BadRecords
from llmkit.writing.draft import Draft
from llmkit.writing.keep import Keeper

Turns = list[tuple[str, str]]
DRAFTS, PLANTED = 1000, 150


def turns_of(conversation: Conversation) -> Turns:
    """Return the texts with their roles, up to the last answer."""
    turns = [(turn.role, turn.text) for turn in conversation.messages if turn.role != "system" and turn.text.strip()]
    return turns[:-1] if turns and turns[-1][0] == "user" else turns


def edited(turns: Turns, words: list[str], rng: Random) -> Iterator[tuple[str, Turns]]:
    """Yield a copy for each kind of edit that the turns allow."""
    number = rng.randrange(len(turns))
    role, text = turns[number]
    before, after = (said := text.split(" "))[: (at := rng.randrange(len(said)))], said[at + 1 :]
    other = rng.choice(words)
    for name, middle in {"replaced": [other], "inserted": [said[at], other], "deleted": []}.items():
        if before or middle or after:
            yield name, [*turns[:number], (role, " ".join([*before, *middle, *after])), *turns[number + 1 :]]
    yield "case", [(role, text.upper() if rng.random() < 0.5 else text.lower()) for role, text in turns]
    yield (
        "punctuation",
        [(role, re.sub(r"[.,;:!?]", lambda _: rng.choice(("", ".", " ", "!")), text)) for role, text in turns],
    )
    pairs = [turns[start : start + 2] for start in range(0, len(turns) - 1, 2)]
    if len(pairs) > 1:
        yield "order of turns", [turn for pair in [*pairs[1:], pairs[0]] for turn in pair]


def draft_of(turns: Turns, index: int) -> Draft:
    """Return a draft with these turns."""
    return Draft(index, tuple(message(role, text) for role, text in turns))


def main() -> None:
    """Print a line per file, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--show", action="store_true", help="print the near duplicates among the real ones")
    options = parser.parse_args()
    found, planted = Counter[str](), Counter[str]()
    for path in options.files:
        rng, keeper, became = Random(0), Keeper(), Counter[str]()
        rows = read_jsonl([path], None, read_conversation, BadRecords("100%", True))
        drafts = [turns for _, turns in zip(range(DRAFTS), filter(None, map(turns_of, rows)), strict=False)]
        words = [word for turns in drafts for _, text in turns for word in text.split(" ")]
        began, kept = process_time(), []
        for index, turns in enumerate(drafts):
            reason = keeper.duplicate(draft_of(turns, index))
            keeper.recall(draft_of(turns, index), reason)
            became[reason or "kept"] += 1
            if reason is None:
                kept.append(turns)
            elif options.show and reason == "duplicate: near":
                print(turns)
        milliseconds = 1000 * (process_time() - began) / len(drafts)
        for turns in rng.sample(kept, min(PLANTED, len(kept))):
            for edit, copy in edited(turns, words, rng):
                planted[edit] += 1
                found[edit] += keeper.duplicate(draft_of(copy, len(drafts))) is not None
        nearest = keeper.figures()["diversity"]["nearest_similarity"]
        print(f"{path}: {dict(became)}, nearest {nearest}, {milliseconds:.2f} ms a draft")
    for edit, count in planted.items():
        print(f"{edit}: {found[edit] / count:.3f} of {count:,} found")


if __name__ == "__main__":
    main()
