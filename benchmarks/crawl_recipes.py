"""Both recipes beside 440 hand-labelled pages: which good and which bad ones each keeps.

    llmkit crawl-filter PAGES.warc.gz --write-scores scores.jsonl -o docs.jsonl
    python benchmarks/crawl_recipes.py scores.jsonl

recipe_labels.jsonl has the url, the label and what FineWeb's recipe did with each page, 220 at random of what its text
filters dropped and 220 of what they kept. One reader labelled them by excerpts of 400 characters (beginning, middle and
end), knowing what FineWeb's recipe had done: good is prose, a thread or documentation that a careful person would
train on. The thresholds of the recipe llmkit were chosen on the same labels, so its figures are optimistic.
The second figures weigh each half by its share of pages.
"""

import argparse
import json
from pathlib import Path

from llmkit.crawl.recipe import NAMED
from llmkit.crawl.scores import open_scores, read_scores
from llmkit.crawl.steps import Steps

FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
WEIGHTS = {True: 843 / 220, False: 474 / 220}  # pages of the archives that one labelled page stands for


def main() -> None:
    """Print precision and recall of every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores")
    path = parser.parse_args().scores
    with open(Path(__file__).parent / "recipe_labels.jsonl", encoding="utf-8") as lines:
        labels = {row["url"]: row for row in map(json.loads, lines)}
    print(f"{'recipe':10}{'precision':>10}{'recall':>8}{'kept':>6}{'weighted precision':>20}{'recall':>8}")
    for name, make in NAMED.items():
        recipe = make()
        steps = Steps(recipe)
        found = []
        for span in open_scores(path, recipe):
            for page in read_scores(span):
                label = labels.get(getattr(getattr(page, "page", None), "url", None) or "")
                if label and page.text is not None and page.step is None:
                    kept = not any(getattr(steps, step)(page) for step in FILTERS)
                    found.append((kept, label["label"] == "good", WEIGHTS[label["fineweb"] == "kept"]))
        figures = []
        for weigh in (False, True):
            worth = [(kept, good, weight if weigh else 1) for kept, good, weight in found]
            both = sum(weight for kept, good, weight in worth if kept and good)
            figures.append(both / sum(weight for kept, _, weight in worth if kept))
            figures.append(both / sum(weight for _, good, weight in worth if good))
        kept = sum(kept for kept, _, _ in found)
        print(f"{name:10}{figures[0]:10.3f}{figures[1]:8.3f}{kept:6}{figures[2]:20.3f}{figures[3]:8.3f}")


if __name__ == "__main__":
    main()
