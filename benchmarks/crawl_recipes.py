"""Precision and recall of both recipes on 637 hand-labelled pages.

    llmkit crawl-filter PAGES.warc.gz --only url,extract,language -o texts.jsonl
    python benchmarks/crawl_recipes.py texts.jsonl

Good pages are prose, threads or documentation that a careful person would train on. recipe_labels.jsonl has two sets
from four archives with 1,349 pages. The first, 219 random pages that FineWeb's text filters dropped and 220 that they
kept, was labelled from excerpts of 400 characters (beginning, middle and end) with FineWeb's verdict known, and the
thresholds of the recipe llmkit were chosen on it, so its figures there are optimistic. The fresh set has 198 of the
other pages, sampled with a seed: 99 that only one of the recipes keeps, 50 that both keep and 49 that neither does. One
reader saw them shuffled and without any verdict, complete up to 2,600 characters, otherwise as 2,400 characters from
five places, and wrote all labels before any comparison; the texts came from the extractor before its last training. In
the weighted figures each page represents its stratum.
"""

import argparse
import json
from pathlib import Path

from llmkit.crawl.judge import Judge
from llmkit.crawl.page import Document, Page
from llmkit.crawl.recipe import NAMED

FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
# pages of the archives that one labelled page represents
FIRST = {True: 843 / 220, False: 474 / 219}  # kept by FineWeb's recipe, or not
FRESH = {"one": 144 / 99, "both": 584 / 50, "neither": 181 / 49}  # how many recipes keep it


def main() -> None:
    """Print precision and recall of every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    with open(parser.parse_args().texts, encoding="utf-8") as lines:
        texts = {row["url"]: row["text"] for row in map(json.loads, lines) if "url" in row}
    with open(Path(__file__).parent / "recipe_labels.jsonl", encoding="utf-8") as lines:
        labels = {row["url"]: row for row in map(json.loads, lines)}
    heads = f"{'set':7}{'recipe':9}{'good kept':>10}{'bad kept':>9}{'precision':>10}{'recall':>7}"
    print(heads + f"{'weighted precision':>20}{'recall':>7}")
    for name, recipe in NAMED.items():
        judge = Judge(recipe)
        kept = {}
        for url in labels.keys() & texts.keys():
            page = Document(Page("", 0, url, None, None, texts[url], {}), texts[url])
            kept[url] = not any(getattr(judge, step)(page) for step in FILTERS)
        for which in ("first", "fresh"):
            pages = [row for url, row in labels.items() if row["set"] == which and url in kept]
            figures = []
            for weigh in (False, True):
                total = {True: 0.0, False: 0.0}  # of good and bad pages
                stays = {True: 0.0, False: 0.0}
                for row in pages:
                    stands_for = FRESH[row["kept_by"]] if which == "fresh" else FIRST[row["fineweb"] == "kept"]
                    weight = stands_for if weigh else 1
                    total[row["label"] == "good"] += weight
                    stays[row["label"] == "good"] += weight * kept[row["url"]]
                figures += [stays[True] / sum(stays.values()), stays[True] / total[True]]
                if not weigh:
                    counts = stays
            cells = f"{figures[0]:10.3f}{figures[1]:7.3f}{figures[2]:20.3f}{figures[3]:7.3f}"
            print(f"{which:7}{name:9}{counts[True]:10.0f}{counts[False]:9.0f}{cells}")


if __name__ == "__main__":
    main()
