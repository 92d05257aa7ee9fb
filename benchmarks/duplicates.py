"""Dedup: signatures and lookups per CPU second, recall, false positives, and memory.

    python benchmarks/duplicates.py [docs.jsonl.gz] [--documents 1000000]

With a file, its texts are the documents, cut to 600 words; without one, documents are words drawn from Zipf's law.
All rates are on one thread, in CPU time. Memory is that of a separate process that adds --documents synthetic
signatures, a tenth of them near duplicates of the first batch, with and without a spill folder: the peak resident set
(ru_maxrss, mapped files included), and the peak of its anonymous part (RssAnon, read after each batch). Linux only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import numpy as np

from llmkit.crawl.dedup.duplicates import BANDS, ROWS, SHINGLE, THRESHOLD, Duplicates, signature_type, signatures

WORDS = 600  # per document, as on an average web page
SEED = 7


def load_texts(path: str | None, count: int) -> list[str]:
    """Return `count` documents of at least 100 words."""
    if path is None:
        rng = random.Random(SEED)
        weights = list(accumulate(1 / rank for rank in range(1, 50_001)))
        vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in weights]
        return [" ".join(rng.choices(vocabulary, cum_weights=weights, k=1000)) for _ in range(count)]
    texts: list[str] = []
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(text.split()) >= 100:
                texts.append(text)
            if len(texts) == count:
                break
    return texts


# ---- speed


def signature_rate(texts: list[str]) -> tuple[float, float]:
    """Return documents per CPU second, in batches of 64, the median of five rounds; and their mean number of words."""
    documents = [" ".join(text.split(" ")[:WORDS]) for text in texts]
    rates = []
    for _ in range(5):
        started = time.process_time()
        for start in range(0, len(documents), 64):
            signatures(documents[start : start + 64])
        rates.append(len(documents) / (time.process_time() - started))
    return sorted(rates)[2], sum(len(words_of(document)) for document in documents) / len(documents)


def synthetic(rng: np.random.Generator, count: int, before: np.ndarray | None) -> np.ndarray:
    """Return random signatures; a tenth of them have eight tenths of the bands and minima of one in `before`."""
    found = np.empty(count, signature_type())
    found["exact"] = rng.integers(0, 2**64, (count, 2), np.uint64)
    found["bands"] = (rng.integers(0, 2**64, (count, BANDS), np.uint64) >> np.uint64(8)) << np.uint64(8)
    found["bands"] |= np.arange(BANDS, dtype=np.uint64)
    found["minima"] = rng.integers(0, 256, (count, BANDS * ROWS), np.uint8)
    if before is not None:
        rows = rng.choice(count, count // 10, replace=False)
        twins = before[rng.integers(0, len(before), len(rows))]
        for name in ("bands", "minima"):
            same = rng.random(found[name][rows].shape) < 0.8
            found[name][rows] = np.where(same, twins[name], found[name][rows])
    return found


def resident() -> dict[str, int]:
    """Return the resident bytes of this process: total and anonymous."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) << 10 for name in ("VmRSS", "RssAnon")}


def run_memory(count: int, batch: int, spill: Path | None) -> None:
    """Add synthetic signatures and print the rate and the peaks as JSON."""
    rng = np.random.default_rng(SEED)
    duplicates = Duplicates(spill)
    base, peak = resident(), dict.fromkeys(resident(), 0)
    seconds, repeats, before = 0.0, 0, None
    for start in range(0, count, batch):
        more = synthetic(rng, min(batch, count - start), before)
        before = more.copy() if before is None else before
        started = time.process_time()
        repeats += sum(repeat is not None for repeat in duplicates.seen(more))
        seconds += time.process_time() - started
        peak = {name: max(peak[name], size) for name, size in resident().items()}
    peak["VmRSS"] = max(peak["VmRSS"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    print(json.dumps({"rate": count / seconds, "base": base, "peak": peak, "repeats": repeats}))


def memory(count: int, batch: int, spill: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure-memory", folder if spill else "-"]
        command += ["--documents", str(count), "--batch", str(batch)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ---- recall


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def edited(words: list[str], fraction: float, rng: random.Random) -> list[str]:
    """Edit a fraction of the words: replace, remove, or insert a word before them, a third each."""
    result = list(words)
    for at in sorted(rng.sample(range(len(words)), round(fraction * len(words))), reverse=True):
        kind = rng.choice(("replace", "insert", "delete"))
        new = [] if kind == "delete" else [rng.choice(words)]
        result[at : at + (kind != "insert")] = new
    return result


def jaccard(some: list[str], others: list[str]) -> float:
    """Return the Jaccard similarity of the sets of shingles."""
    a, b = ({tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)} for words in (some, others))
    return len(a & b) / len(a | b)


def found_share(pairs: list[tuple[list[str], list[str]]]) -> float:
    """Return the share of pairs whose second document is reported as a repeat of the first."""
    count = 0
    for pair in pairs:
        count += Duplicates().seen(signatures([" ".join(words) for words in pair]))[1] is not None
    return count / len(pairs)


def pairs_between(
    texts: list[str], count: int, fractions: tuple[float, float], low: float, high: float
) -> tuple[list[tuple[list[str], list[str]]], float]:
    """Return pairs of a document (100 to 1,000 words) and an edited copy with similarity low to high; and the mean."""
    rng = random.Random(SEED)
    pairs, similarities = [], []
    while len(pairs) < count:
        words = words_of(rng.choice(texts))[: rng.randint(100, 1000)]
        if len(words) < 100:
            continue
        other = edited(words, rng.uniform(*fractions), rng)
        if low <= (alike := jaccard(words, other)) < high:
            pairs.append((words, other))
            similarities.append(alike)
    return pairs, sum(similarities) / count


def join_probability(alike: float) -> float:
    """Return the probability that a pair is joined: a band matches, and at least `THRESHOLD` of all minima do."""
    agree = [math.comb(ROWS, n) * alike**n * (1 - alike) ** (ROWS - n) for n in range(ROWS + 1)]
    every, no_band = np.ones(1), np.ones(1)
    for _ in range(BANDS):
        every, no_band = np.convolve(every, agree), np.convolve(no_band, [*agree[:-1], 0.0])
    return float((every - no_band)[math.ceil(THRESHOLD * BANDS * ROWS) :].sum())


# ---- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", nargs="?", help="JSONL with `text`")
    parser.add_argument("--documents", type=int, default=1_000_000, help="for memory (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16_384, help="documents per add() (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2_000, help="pairs for recall (default: %(default)s)")
    parser.add_argument("--measure-memory", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        spill = None if options.measure_memory == "-" else Path(options.measure_memory)
        return run_memory(options.documents, options.batch, spill)

    texts = load_texts(options.docs, 1000)
    print(f"{options.docs or 'synthetic words'}, {platform.processor() or platform.machine()}, numpy {np.__version__}")
    rate, words = signature_rate(texts)
    print(f"signatures            {rate:10,.0f} documents/s of CPU, {words:.0f} words each")
    for fraction in (0.01, 0.02, 0.03, 0.05):
        pairs, alike = pairs_between(texts, options.pairs, (fraction, fraction), 0, 1)
        print(
            f"found, {fraction:.0%} edited      {found_share(pairs):10.4f} of {len(pairs):,}, mean Jaccard {alike:.3f}"
        )
    pairs, alike = pairs_between(texts, options.pairs, (0.1, 0.16), 0.4, 0.5)
    print(f"joined below .5       {found_share(pairs):10.4f} of {len(pairs):,}, mean Jaccard {alike:.3f}")
    print("expected              " + ", ".join(f"{join_probability(s):.1e} at {s}" for s in (0.3, 0.4, 0.5, 0.6, 0.7)))
    for spill in (False, True):
        show_memory(memory(options.documents, options.batch, spill), options, spill)


def show_memory(figures: dict, options: argparse.Namespace, spill: bool) -> None:
    name, batches = "add, spill folder" if spill else "add, in memory", f"in batches of {options.batch:,}"
    print(f"{name:<21} {figures['rate']:10,.0f} documents/s of CPU, {options.documents:,} {batches}")
    peak, base = ({key: size / 1e6 for key, size in figures[of].items()} for of in ("peak", "base"))
    at_all, no_file = f"{peak['VmRSS']:,.0f} MB", f"{peak['RssAnon']:,.0f} MB of it no file"
    start, repeats = f"{base['VmRSS']:,.0f} MB at the start", f"{figures['repeats']:,} repeats"
    print(f"  peak memory         {at_all:>10} ({start}), {no_file}; {repeats}")


if __name__ == "__main__":
    main()
