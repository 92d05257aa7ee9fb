"""Convert multiple-choice questions and minimal pairs to the format of CORE's eval_bundle (DCLM, nanochat).

    python examples/evaluation/bundle.py facts.jsonl word_order.jsonl -o eval_bundle/

`core.yaml` lists the tasks with their types and numbers of few-shot examples, `eval_meta_data.csv` the accuracy of
random guessing in percent, and `eval_data/` the items: {"query", "choices", "gold"}, {"context_options",
"continuation", "gold"} and {"context", "continuation"}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CORE = """icl_tasks:
- {label: facts, dataset_uri: facts.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}
- {label: facts_after_three, dataset_uri: facts.jsonl, num_fewshot: [3], icl_task_type: multiple_choice}
- {label: last_word, dataset_uri: last_word.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
- {label: word_order, dataset_uri: word_order.jsonl, num_fewshot: [0], icl_task_type: schema}
"""
GUESSES = "Eval Task,Random baseline\nfacts,25\nfacts_after_three,25\nlast_word,0\nword_order,50\n"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def schema(good: str, bad: str) -> dict:
    """Split two sentences into two contexts and their common last words; the item asks which context fits better."""
    pairs = zip(reversed(good.split()), reversed(bad.split()), strict=True)
    shared = next((number for number, (one, other) in enumerate(pairs) if one != other), 0)
    words = len(good.split()) - shared
    contexts = [" ".join(sentence.split()[:words]) for sentence in (good, bad)]
    return {"context_options": contexts, "continuation": " ".join(good.split()[words:]), "gold": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("word_order", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    facts = read_rows(options.facts)
    schemas = [schema(row["good"], row["bad"]) for row in read_rows(options.word_order)]
    tasks = {
        "facts": [{name: row[name] for name in ("query", "choices", "gold")} for row in facts],
        "last_word": [{"context": row["query"], "continuation": row["choices"][row["gold"]]} for row in facts],
        "word_order": [row for row in schemas if row["continuation"]],
    }
    (options.out / "eval_data").mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (options.out / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.out / "eval_meta_data.csv").write_text(GUESSES)
    (options.out / "core.yaml").write_text(CORE)


if __name__ == "__main__":
    main()
