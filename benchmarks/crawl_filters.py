"""The quality filters compared with datatrove's on the same texts: how often they agree, and texts per second.

    python benchmarks/crawl_filters.py TEXTS.jsonl [--limit 400]

TEXTS.jsonl has documents as extracted. datatrove 0.10 pins other versions of libraries than llmkit: run this in a
separate environment, with llmkit on the path:

    python -m venv peer && peer/bin/pip install "datatrove[processing]==0.10.0" spacy
    PYTHONPATH=. peer/bin/python benchmarks/crawl_filters.py texts.jsonl

CPU time of one process. Every filter gets every extracted text. Ours split each text into words once, which has its own
row; datatrove caches the words of the last five texts.
"""

import argparse
import importlib.metadata  # datatrove 0.10 forgets to
import json
import time
from collections import Counter
from collections.abc import Callable

from llmkit.crawl.filters.quality import (
    C4,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    c4,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
)
from llmkit.text.words import Split

OURS: dict[str, Callable[[Split], str | None]] = {
    "gopher_repetition": lambda split: gopher_repetition(split, GopherRepetition()).reason,
    "gopher_quality": lambda split: gopher_quality(split, GopherQuality()).reason,
    "c4": lambda split: c4(split, C4())[1].reason,
    "fineweb": lambda split: fineweb_quality(split, FineWebQuality()).reason,
}


def peers() -> dict[str, Callable[[str], str | None]]:
    """Return datatrove's filters with the settings of its examples/fineweb.py."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    def decision(peer: object) -> Callable[[str], str | None]:
        def decide(text: str) -> str | None:
            verdict = peer.filter(Document(text=text, id="0"))  # type: ignore[attr-defined]
            return None if verdict is True else verdict[1]

        return decide

    return {
        "gopher_repetition": decision(filters.GopherRepetitionFilter()),
        "gopher_quality": decision(filters.GopherQualityFilter()),
        "c4": decision(filters.C4QualityFilter(filter_no_terminal_punct=False)),
        "fineweb": decision(filters.FineWebQualityFilter()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    with open(options.texts, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][: options.limit]
    theirs = peers()
    for filters in (OURS, theirs):  # warm up what is loaded on first use
        for decide in filters.values():
            decide(Split(texts[0]) if filters is OURS else texts[0])
    cpu, alike, dropped, apart = Counter(), Counter(), Counter(), Counter()
    for text in texts:
        mark = time.process_time()
        split = Split(text)
        _ = split.counts, split.lengths
        cpu["ours", "words"] += time.process_time() - mark
        for name in OURS:
            marks = [time.process_time()]
            ours = OURS[name](split)
            marks.append(time.process_time())
            peer = theirs[name](text)
            marks.append(time.process_time())
            cpu["ours", name] += marks[1] - marks[0]
            cpu["peer", name] += marks[2] - marks[1]
            alike[name] += (ours is None) == (peer is None)
            dropped["ours", name] += ours is not None
            dropped["peer", name] += peer is not None
            if (ours is None) != (peer is None):
                apart[name, ours, peer] += 1
    version = importlib.metadata.version("datatrove")
    print(f"{len(texts)} texts of {sum(map(len, texts)) / len(texts):.0f} characters; datatrove {version}")
    print(f"{'filter':20}{'alike':>8}{'dropped':>9}{'peer':>6}{'ms/text':>9}{'peer':>8}")
    print(f"{'words':20}{'':23}{1000 * cpu['ours', 'words'] / len(texts):9.2f}")
    for name in OURS:
        ours, peer = (1000 * cpu[side, name] / len(texts) for side in ("ours", "peer"))
        drops = f"{dropped['ours', name]:9}{dropped['peer', name]:6}"
        print(f"{name:20}{alike[name] / len(texts):8.3f}{drops}{ours:9.2f}{peer:8.2f}")
    sums = {side: sum(seconds for (owner, _), seconds in cpu.items() if owner == side) for side in ("ours", "peer")}
    rates = {side: len(texts) / seconds for side, seconds in sums.items()}
    print(f"texts/s: {rates['ours']:.0f}, peer {rates['peer']:.1f}, {rates['ours'] / rates['peer']:.0f} times")
    for (name, ours, peer), count in apart.most_common():
        print(f"  {count:4} {name}: ours {ours}, peer {peer}")


if __name__ == "__main__":
    main()
