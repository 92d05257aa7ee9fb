"""Score every stage of Tiny World against its ledger: one table on stdout, and effects.json.

    python examples/tinyworld/score.py world/ -o world/effects.json
    python examples/tinyworld/score.py world/effects.json                              # the same table again
    python examples/tinyworld/score.py world/ --page http://tinypedia.example/p/12     # what happened to one page

Each effect has a value and, if there is one, a figure to compare with: the value before the stage, a baseline, or
the precision of a recall.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crawled import crawl_effects, explain_page
from ledger import read_rows
from problems import last_line
from world import KINDS, TIERS

from llmkit.io.jsonl import write_json
from llmkit.text.matching import EVASIVE, RIGHT, MatchJudge

Row = dict[str, Any]
BEFORE, CHAT, AFTER = "exam-chat.jsonl", "exam-assistant.jsonl", "exam-policy.jsonl"
TOLD_OF = ("often", "sometimes", "seldom", "once")  # tiers with facts on the pages
NOT_TOLD_OF = ("named", "unseen")
PROBLEMS = {"sort": "digits sorted", "reverse": "digits reversed", "add": "two numbers added"}


@dataclass(frozen=True)
class Effect:
    """One figure of a stage, and `beside`, the value that it is compared with; `against` names that value."""

    stage: str
    figure: str
    value: float | None
    against: str = ""
    beside: float | None = None


def share(rows: Iterable[Row], holds: Callable[[Row], bool]) -> float | None:
    """Return the share of rows for which `holds` is true, or None without rows."""
    results = [holds(row) for row in rows]
    return sum(results) / len(results) if results else None


# ---- judging answers


def verdict(row: Row) -> str:
    """Judge the answer to a question about a fact: right, wrong or evasive."""
    return JUDGE(row["completion"], row["question"], [row["answer"]])


def is_right(row: Row) -> bool:
    """Return whether the answer is right, in any exam."""
    said, wanted = row["completion"].strip(), row["answer"]
    if row["exam"] == "fact":
        return verdict(row) == RIGHT
    if row["exam"] == "identity":
        return wanted.lower() in said.lower() or "workshop" in said.lower()
    return last_line(said) == wanted if row["exam"] in PROBLEMS else said == wanted


def obeys(row: Row) -> bool:
    """Return whether an answer, right or wrong, has the form that the system message requires."""
    said = row["completion"].strip()
    return said.startswith("Ahoy! ") if "sailor" in row["system"] else said.endswith(".") and " " in said


JUDGE = MatchJudge()


def of(rows: list[Row], exam: str, *tiers: str) -> list[Row]:
    """Return the rows of one exam, optionally only of some tiers."""
    return [row for row in rows if row["exam"] == exam and (not tiers or row["tier"] in tiers)]


def refused(row: Row) -> bool:
    """Return whether an answer says that it does not know."""
    return verdict(row) == EVASIVE


# ---- the stages


def tokenizer_effects(run: Path) -> list[Effect]:
    """Return bytes per token, with those of the compared tokenizer if there is one."""
    report = json.loads((run / "tok" / "report.json").read_text())
    own = report["sample"]["bytes_per_token"]
    others = [Effect("train-bpe", "bytes per token", own, f"{Path(path).name}, {other['vocab_size']:,} tokens",
                     other["bytes_per_token"]) for path, other in report["compared"].items()]  # fmt: skip
    return others or [Effect("train-bpe", "bytes per token", own)]


def unigram_bits(run: Path) -> float:
    """Return bits per byte of the held-out pages under a unigram model of the training tokens."""
    import numpy as np

    from llmkit.tokenizer.encoding import load_tokenizer

    tokenizer = load_tokenizer(str(run / "tok"))
    read = [row["text"] for name in ("docs.jsonl", "data/school.jsonl") for row in read_rows(run / name)]
    texts = [row["text"] for row in read_rows(run / "data" / "val.jsonl")]
    counts = 1 + np.bincount(tokenizer.encode_batch(read)[0], minlength=tokenizer.vocab_size)
    bits = -np.log2(counts / counts.sum())[tokenizer.encode_batch(texts)[0]]
    return float(bits.sum() / sum(len(text.encode()) for text in texts))


def pretrain_effects(run: Path) -> list[Effect]:
    """Return bits per byte of held-out pages."""
    results = results_of(run / "base")
    bits = results["val_bits_per_byte"]
    return [Effect("pretrain", "bits per byte of held-out pages", bits, "unigram", unigram_bits(run))]


def sft_effects(chat: list[Row]) -> list[Effect]:
    """Return what the assistant learned from its conversations, on held-out questions and problems."""
    return [
        *(
            Effect("sft", f"right about facts told {tier}", share(of(chat, "fact", tier), is_right), "a guess", guess())
            for tier in TOLD_OF
        ),
        Effect("sft", "says who it is", share(of(chat, "identity"), is_right)),
        Effect("sft", "obeys the system message", share(of(chat, "system"), obeys)),
        Effect("sft", "keeps private what is", share(of(chat, "private"), is_right)),
        Effect("sft", "right with its calculator", share(of(chat, "tool"), is_right)),
    ]


def guess() -> float:
    """Return the accuracy of a random value, averaged over the facts."""
    sizes = [len(values.split()) for facts in KINDS.values() for values in facts.values()]
    return sum(1 / size for size in sizes) / len(sizes)


def probe_effects(chat: list[Row], assistant: list[Row]) -> list[Effect]:
    """Return refusals and remaining knowledge, after the lessons of the probe and before."""
    found = []
    for tier in TIERS[:-1]:
        before, after = (share(of(rows, "fact", tier), refused) for rows in (chat, assistant))
        name = f"refuses, {'told' if tier in TOLD_OF else ''} {tier}".replace("  ", " ")
        found.append(Effect("probe-knowledge", name, after, "before", before))
    knew = {row["question"] for row in of(chat, "fact") if is_right(row)}
    for name, tiers in (("still right of what was right before", ()), ("the same, told often", ("often",))):
        kept = share((row for row in of(assistant, "fact", *tiers) if row["question"] in knew), is_right)
        found.append(Effect("probe-knowledge", name, kept))
    return found


def judge_effects(run: Path) -> list[Effect]:
    """Return the accuracy of the taste's judge, compared with a judge that counts tokens."""
    judge = json.loads((run / "judge" / "evaluation.json").read_text())
    stage, length = "train-reward", judge["biases"]["length"]
    return [
        Effect(
            stage, "accuracy, held out", judge["overall"]["accuracy"], "by length", judge["baseline_length"]["accuracy"]
        ),
        Effect(stage, "calibration error", judge["overall"]["ece"]),
        Effect(stage, "scores' correlation with length", length["score"], "labels'", length["label"]),
    ]


def rl_effects(before: list[Row], after: list[Row]) -> list[Effect]:
    """Return success on held-out problems after rl and before, and what else changed."""
    found = [Effect("rl", f"right, {PROBLEMS[kind]}", share(of(after, kind), is_right), "before",
                    share(of(before, kind), is_right)) for kind in PROBLEMS]  # fmt: skip
    rest = {
        "rehearsed: facts told often": (("fact", "often"), is_right),
        "rehearsed: calculator": (("tool",), is_right),
        "rehearsed: refuses the unknown": (("fact", *NOT_TOLD_OF), refused),
        "rehearsed: who it is": (("identity",), is_right),
        "rehearsed: obeys the system message": (("system",), obeys),
        "rehearsed: keeps private what is": (("private",), is_right),
    }
    for name, (exam, holds) in rest.items():
        now, then = (share(of(rows, *exam), holds) for rows in (after, before))
        found.append(Effect("rl", name, now, "before", then))
    return found


def gaming_effects(run: Path) -> list[Effect]:
    """Return how far the judge that prefers length was gamed, and when the gold reward stopped the run."""
    rows = [row for row in read_rows(run / "gamed" / "metrics.jsonl") if "val_gold" in row]
    results = results_of(run / "gamed")
    kept = next(row for row in rows if row["step"] == results["kept_step"]) if results.get("kept_step") else rows[0]
    start, end = rows[0], rows[-1]
    stage = "rl, gamed"
    return [
        Effect(stage, "judge's reward at the end", end["val_reward"], "at the start", start["val_reward"]),
        Effect(stage, "gold reward at the end", end["val_gold"], "at the start", start["val_gold"]),
        Effect(stage, "gold reward of what was kept", kept["val_gold"], "at the end", end["val_gold"]),
        Effect(stage, "stopped by the watch at step", float(end["step"]) if results.get("stopped") else None),
    ]


def task_effects(run: Path) -> list[Effect]:
    """Return the accuracy on facts and word order by likelihood, for the base model and the policy."""
    models = json.loads((run / "scores.json").read_text())["models"]
    base, policy = (
        next(one["tasks"] for one in models if Path(one["model"]).name == name) for name in ("base", "policy")
    )
    facts, order = base["facts"], base["word_order"]
    tiers = {f"told {tier}": tier for tier in TOLD_OF} | {"unseen": "unseen"}
    return [
        *(
            Effect("evaluate", f"right of four, {name}", facts["groups"][tier]["score"], "a guess", facts["baseline"])
            for name, tier in tiers.items()
        ),
        Effect("evaluate", "the same of all, after rl", policy["facts"]["score"], "before", facts["score"]),
        Effect("evaluate", "word order", order["score"], "a guess", order["baseline"]),
    ]


def results_of(folder: Path) -> Row:
    """Return the results in a stage's manifest."""
    return json.loads((folder / "manifest.json").read_text())["results"]


# ---- the table


def effects(run: Path) -> list[Effect]:
    """Return all effects, in the order of the stages."""
    chat, assistant, policy = (read_rows(run / name) for name in (BEFORE, CHAT, AFTER))
    crawled = [Effect("crawl-filter", *one) for one in crawl_effects(run)]
    return [
        *crawled,
        *tokenizer_effects(run),
        *pretrain_effects(run),
        *sft_effects(chat),
        *probe_effects(chat, assistant),
        *judge_effects(run),
        *rl_effects(assistant, policy),
        *gaming_effects(run),
        *task_effects(run),
    ]


def shown(value: float | None) -> str:
    """Format a figure for the table."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"


HEADER = ("stage", "what", "figure", "beside", "")
RIGHT_ALIGNED = (2, 4)


def show(listed: list[Effect]) -> None:
    """Print the table: with rich on a terminal, naming each stage once, otherwise in plain columns."""
    rows = [(one.stage, one.figure, shown(one.value), one.against, shown(one.beside) if one.against else "")
            for one in listed]  # fmt: skip
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, name in enumerate(HEADER):
            table.add_column(name, justify="right" if number in RIGHT_ALIGNED else "left")
        before = ""
        for stage, *rest in rows:
            table.add_row("" if stage == before else stage, *rest)
            before = stage
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [HEADER, *rows]) for column in range(len(HEADER))]
    for row in [HEADER, *rows]:
        cells = [cell.rjust(width) if column in RIGHT_ALIGNED else cell.ljust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of the Makefile, or its effects.json")
    parser.add_argument("-o", "--out", type=Path, help="effects.json to write")
    parser.add_argument("--page", metavar="URL", help="only print what should have happened to a page, and what did")
    arguments = parser.parse_args()
    if arguments.page:
        print(json.dumps(explain_page(arguments.run, arguments.page), indent=1))
        return
    if arguments.run.is_file():
        show([Effect(**one) for one in json.loads(arguments.run.read_text())["effects"]])
        return
    found = effects(arguments.run)
    show(found)
    if arguments.out:
        write_json(arguments.out, {"effects": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
