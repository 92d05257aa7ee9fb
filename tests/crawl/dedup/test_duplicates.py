"""Exact and near duplicates: compared with a brute-force search, for any batches and processes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest

import llmkit.crawl.dedup.band_index as band_index
from llmkit.crawl.dedup.duplicates import (
    SHINGLE,
    THRESHOLD,
    Duplicates,
    Repeat,
    keys,
    shared,
    signatures,
)

Words = list[str]


# ---- documents


def document(rng: random.Random, length: int) -> Words:
    """Draw words from Zipf's law: the tenth is ten times as rare as the first."""
    return [f"w{int(3000 ** rng.random())}" for _ in range(length)]


def edited(words: Words, fraction: float, rng: random.Random) -> Words:
    """Edit a fraction of the words: replace, delete, or insert a word before them."""
    found = list(words)
    for place in sorted(rng.sample(range(len(words)), round(fraction * len(words))), reverse=True):
        kind = rng.choice(("replace", "insert", "delete"))
        found[place : place + (kind != "insert")] = [] if kind == "delete" else [f"new{rng.randrange(1000)}"]
    return found


def replaced(words: Words, fraction: float, rng: random.Random) -> Words:
    """Replace a fraction of the words, the edit that reduces similarity most."""
    places = set(rng.sample(range(len(words)), round(fraction * len(words))))
    return [f"new{rng.randrange(1000)}" if at in places else word for at, word in enumerate(words)]


def jaccard(some: Words, others: Words) -> float:
    a, b = ({tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)} for words in (some, others))
    return len(a & b) / len(a | b)


def family(rng: random.Random, count: int) -> list[Words]:
    """Return documents, half of them copies of an earlier one with 0 to 12% of the words edited."""
    found: list[Words] = []
    for _ in range(count):
        if found and rng.random() < 0.5:
            found.append(edited(rng.choice(found), rng.choice((0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.12)), rng))
        else:
            found.append(document(rng, rng.randint(60, 250)))
    return found


def joined(documents: list[Words]) -> list[str]:
    return [" ".join(words) for words in documents]


def in_batches(found: np.ndarray, sizes: Sequence[int], duplicates: Duplicates) -> list[Repeat | None]:
    repeats: list[Repeat | None] = []
    while len(repeats) < len(found):
        for size in sizes:
            repeats += duplicates.seen(found[len(repeats) : len(repeats) + size])
    return repeats


# ---- the reference rule


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_is_the_one_that_is_written_down(seed: int) -> None:
    """The reference has a dictionary per band, and picks the most similar of the documents first with a key."""
    found = signatures(joined(family(random.Random(100 + seed), 150)))
    first: dict[int, int] = {}
    roots: list[int] = []
    for number, own in enumerate(keys(found).tolist()):
        others = {first.setdefault(key, number) for key in own} - {number}
        score = {other: float(shared(*found["minima"][[[number], [other]]])[0]) for other in others}
        exact = [other for other in others if (found["exact"][other] == found["exact"][number]).all()]
        near = [other for other in others if score[other] >= THRESHOLD]
        best = min(exact, default=min(near, key=lambda other: (-score[other], other), default=number))
        roots.append(roots[best] if best < number else number)
    answers = Duplicates().seen(found)
    assert [repeat.index if repeat else number for number, repeat in enumerate(answers)] == roots


def test_of_pairs_with_2_percent_of_words_edited_97_of_100_are_found() -> None:
    rng = random.Random(7)
    first = [document(rng, rng.randint(100, 1000)) for _ in range(700)]
    second = [replaced(words, 0.02, rng) for words in first]
    repeats = Duplicates().seen(signatures(joined(first + second)))
    assert all(repeat is None for repeat in repeats[:700])
    found = sum(repeat is not None and repeat.index == number for number, repeat in enumerate(repeats[700:]))
    print(f"found: {found} of 700")
    assert found >= 0.97 * 700


def test_no_pair_below_half_is_joined() -> None:
    rng = random.Random(8)
    pairs = []
    while len(pairs) < 250:
        words = document(rng, rng.randint(100, 400))
        other = edited(words, rng.uniform(0.09, 0.16), rng)
        if 0.35 <= jaccard(words, other) < 0.5:
            pairs.append((words, other))
    repeats = Duplicates().seen(signatures(joined([words for pair in pairs for words in pair])))
    assert not any(repeats)


# ---- independent of batches, files and processes


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spill, merge and release in pieces of a few rows."""
    for module, name, size in (
        (band_index, "IN_FILE", 16),
        (band_index, "CHUNK", 64),
        (band_index, "LOOKED_UP", 100),
        (band_index, "TOUCHED", 300),
        (band_index, "BLOCK", 8),
        (band_index, "TOUCHED_ROWS", 10),
    ):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("sizes", [(1,), (7,), (64, 3, 1), (1000,)])
@pytest.mark.parametrize("asked", [{}, {"exact": False}, {"near": False}, {"threshold": 0.9}])
def test_batches_of_any_size_spilled_or_in_memory_are_the_same(tmp_path, small_files, sizes, asked) -> None:
    texts = joined(family(random.Random(42), 200))
    found = signatures([*texts, "", texts[3], "one", "", "Two", "two"])
    online = Duplicates(**asked).seen(found)
    assert sum(repeat is not None for repeat in online) > 10
    assert in_batches(found, sizes, Duplicates(tmp_path, **asked)) == online
    assert list(tmp_path.iterdir()) == []  # the files have no names, so that not even a killed run leaves any


# ---- kept documents


def chain(links: int) -> list[Words]:
    """Return documents with a similarity of .86 to their neighbours, the last almost without words of the first."""
    rng = random.Random(4)
    words = document(rng, 400 + 30 * links)
    return [words[30 * link : 30 * link + 400] for link in range(links)]


def test_each_dropped_document_names_its_twin_with_any_number_of_processes(tmp_path, llmkit) -> None:
    """Other fields than the text make the input long enough for three spans."""
    rng = random.Random(6)
    documents = family(rng, 350)
    texts = joined([*documents, *chain(10), documents[3], documents[0]])
    padding = "x" * 24_000
    with (tmp_path / "in.jsonl").open("w") as handle:
        for number, text in enumerate(texts):
            handle.write(json.dumps({"id": f"d{number}", "text": text, "padding": padding}) + "\n")
    written = []
    for workers in (1, 3):
        out, rejects = tmp_path / f"{workers}.jsonl", tmp_path / f"{workers}.rejects.jsonl"
        asked = ("--only", "exact_duplicates,near_duplicates", "--rejects", rejects, "--workers", workers)
        done = llmkit("crawl-filter", tmp_path / "in.jsonl", "-o", out, *asked, "--quiet")
        assert done.returncode == 0, done.stderr
        written.append((out.read_bytes(), rejects.read_bytes()))
    assert written[0] == written[1]
    kept, dropped = ([json.loads(line) for line in lines.splitlines()] for lines in written[0])
    expected = Duplicates().seen(signatures(texts))
    assert [row["id"] for row in kept] == [f"d{number}" for number, found in enumerate(expected) if found is None]
    told = [(row["id"], row["step"], row["reason"], row["repeats"], row["score"]) for row in dropped]
    assert told == [
        (f"d{number}", f"{found.kind}_duplicates", "repeats", f"d{found.index}", round(found.similarity, 4))
        for number, found in enumerate(expected)
        if found is not None
    ]


# ---- short texts and other scripts


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("", "", "exact"),
        ("", " \n\t ", "exact"),  # white space counts as empty
        ("", "word", None),
        ("", "!", None),
        ("!", "?", None),  # no words: compared verbatim
        ("!", " !\n", "exact"),
        ("one", "one", "exact"),
        ("one", "One!", "near"),  # the same words
        ("one", "two", None),
        ("one two three four", "four three two one", "near"),  # below 5 words they are compared as a set
        ("one two three four", "one two three five", None),
        ("one two three four five", "five four three two one", None),  # from 5 words on, order counts
        ("caf\u00e9 au lait", "cafe\u0301 au lait", "exact"),  # composed and decomposed letters
        ("a  b\n\nc", "a b c", "exact"),
        ("\ud800", "\ud800", "exact"),  # lone surrogates, as some JSONL has them
        ("\ud800", "\udfff", None),
    ],
)
def test_empty_and_short_texts(first: str, second: str, kind: str | None) -> None:
    repeats = Duplicates().seen(signatures([first, second]))
    assert repeats[0] is None
    assert (repeats[1] and repeats[1].kind) == kind


def test_scripts_without_spaces_are_compared_by_letters() -> None:
    rng = random.Random(11)
    text = "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(500))
    other = "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(500))
    repeats = Duplicates().seen(signatures([text, other, text[:250] + "\u4e00" + text[251:]]))
    assert [repeat and repeat.index for repeat in repeats] == [None, None, 0]
