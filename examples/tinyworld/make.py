"""Make Tiny World: an invented world, a crawl about it, and all other inputs of the eight stages.

    python examples/tinyworld/make.py OUT --seed 0           # the size of `make demo`
    python examples/tinyworld/make.py OUT --quick            # takes a second

Writes to OUT: crawl-0.warc.gz ... (with blocklist.txt), val.jsonl, school.jsonl, chats.jsonl, tools.jsonl,
questions.jsonl, prefs.jsonl, counted.jsonl, problems.jsonl, rehearsed.jsonl, gamed.jsonl (prefs, problems and gamed
with a held-out half), exam.jsonl, facts.jsonl, word_order.jsonl, and ledger.json with all facts and what should happen
to every page. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import random
from itertools import islice
from pathlib import Path
from typing import Any

import choices
import conversations as talk
import problems as school
from archive import write_warc
from crawl import crawl
from ledger import write_ledger, write_rows
from pages import write_pages
from spam import SPAM_HOSTS
from tastes import NOISE, comparisons, counted
from world import FULL, QUICK, TOLD, Entity, Size, invent

FILES = 4  # WARC files
LESSONS = {"sort": 0.2, "reverse": 0.18, "add": 0.25, "tool": 0.32, "even": 0.05}  # shares of the schoolbook
CARELESS = 0.6  # of the solved problems that allow the usual mistake have it, .3 of all
EXAMINED = (*school.KINDS, "tool")
REHEARSED = 10  # rl problems per rehearsed triple of sum, question and identity question


def make(out: Path, seed: int, size: Size) -> None:
    """Write all files of a world into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    entities = _world(size, seed)
    _write_crawl(out, entities, size, seed)
    tasks = _tasks(size, seed)
    _write_talk(out, entities, tasks, size, seed)
    _write_problems(out, tasks, seed)
    _write_tastes(out, entities, tasks, size, seed)
    write_rows(out / "facts.jsonl", choices.facts(entities, random.Random(f"facts {seed}")))
    write_rows(out / "word_order.jsonl", choices.word_order(entities, random.Random(f"word order {seed}")))


def _world(size: Size, seed: int) -> list[Entity]:
    """Return the entities that are asked about, and as many glimpsed as fill the pages."""
    mentions = sum(2 * sum(getattr(size, tier)) * count for tier, count in TOLD.items())
    glimpsed = max(40, size.pages * size.sentences - mentions)
    return invent(size, glimpsed, seed)


def _write_crawl(out: Path, entities: list[Entity], size: Size, seed: int) -> None:
    rng = random.Random(f"pages {seed}")
    pages = write_pages(entities, size.pages, size.sentences, rng)
    records = crawl(pages, size.bad_pages, rng)
    share = -(-len(records) // FILES)
    for number in range(FILES):
        members = [member for _, member in records[number * share : (number + 1) * share]]
        write_warc(out / f"crawl-{number}.warc.gz", members)
    (out / "blocklist.txt").write_text("".join(f"0.0.0.0 {host}\n" for host in SPAM_HOSTS))
    known = [entity for entity in entities if entity.tier not in ("named", "unseen")]
    counts = {entity.name: dict(entity.told) for entity in known}
    unread = write_pages(_sample_of(known, rng, size), size.held_out_pages, size.sentences, rng)
    for entity in known:  # held-out pages do not count as telling
        entity.told = counts[entity.name]
    write_rows(out / "val.jsonl", ({"text": page.text, "source": page.kind} for page in unread))
    write_ledger(out / "ledger.json", [entry for entry, _ in records], entities, {"seed": seed})


def _sample_of(known: list[Entity], rng: random.Random, size: Size) -> list[Entity]:
    """Sample the entities of the held-out pages, one fact each."""
    some = rng.sample(known, min(len(known), size.held_out_pages * size.sentences))
    return [Entity(one.name, one.kind, "glimpsed", "", one.facts, dict.fromkeys(one.facts, 0)) for one in some]


def _tasks(size: Size, seed: int) -> dict[str, dict[str, list[school.Problem]]]:
    """Return problems by kind and use (exam, val, chats, rl, lessons); no problem has two uses."""
    tasks = {}
    for kind in LESSONS:
        make_one = school.expression if kind == "tool" else getattr(school, kind)
        every = school.different(make_one, random.Random(f"{kind} {seed}"))
        counts = {
            "exam": size.examined,
            "val": max(2, size.examined // 2),
            "chats": size.tools if kind == "tool" else size.solved,
            "rl": size.problems // 3,
            "lessons": int(LESSONS[kind] * size.lessons),
        }
        tasks[kind] = {use: list(islice(every, count)) for use, count in counts.items()}
    return tasks


def _write_talk(out: Path, entities: list[Entity], tasks: dict[str, Any], size: Size, seed: int) -> None:
    rng = random.Random(f"talk {seed}")
    shown = [entity for entity in entities if entity.use == "chats"]
    strangers = [one for one in entities if one.tier == "glimpsed" and one.kind == "person"][: len(shown)]
    chats = [
        *talk.questions(shown, rng),
        *talk.manners([one for one in shown if one.kind == "person"] + strangers, rng),
    ]
    for kind in school.KINDS:
        careless = [
            school.mistaken(kind, said) if rng.random() < CARELESS else said for _, said in tasks[kind]["chats"]
        ]
        chats += talk.solved(tasks[kind]["chats"], careless)
    terse = [(asked, school.terse(said, rng)) for asked, said in tasks["even"]["chats"]]
    chats += talk.solved(terse, [said for _, said in terse])
    rng.shuffle(chats)
    write_rows(out / "chats.jsonl", chats)
    write_rows(out / "tools.jsonl", (talk.calculated(problem, rng) for problem in tasks["tool"]["chats"]))
    write_rows(out / "questions.jsonl", talk.probed(entities, rng))
    examined = {kind: tasks[kind]["exam"] for kind in EXAMINED}
    write_rows(out / "exam.jsonl", talk.exam(entities, examined, rng))
    rehearsed = talk.rehearsed(entities, tasks["tool"]["rl"][: size.problems // REHEARSED], rng)
    write_rows(out / "rehearsed.jsonl", rehearsed)


def _write_problems(out: Path, tasks: dict[str, Any], seed: int) -> None:
    rng = random.Random(f"problems {seed}")
    for name, use in (("problems", "rl"), ("problems-val", "val")):
        rows = [{"prompt": asked, "answer": school.last_line(said), "verifier": "exact", "source": kind}
                for kind in school.KINDS for asked, said in tasks[kind][use]]  # fmt: skip
        rng.shuffle(rows)
        write_rows(out / f"{name}.jsonl", rows)
    for name, use in (("gamed", "rl"), ("gamed-val", "val")):
        write_rows(out / f"{name}.jsonl", ({"prompt": asked, "answer": said} for asked, said in tasks["even"][use]))
    lessons = [school.worked(problem) for problem in tasks["tool"]["lessons"]]
    for kind in school.KINDS:
        lessons += [school.lesson(*problem) for problem in tasks[kind]["lessons"]]
    for asked, said in tasks["even"]["lessons"]:
        answer = rng.choice((said, school.terse(said, rng), school.any_answer(said, rng)))
        lessons.append(school.lesson(asked, answer))
    rng.shuffle(lessons)
    write_rows(out / "school.jsonl", ({"text": text, "source": "school"} for text in lessons))


def _write_tastes(out: Path, entities: list[Entity], tasks: dict[str, Any], size: Size, seed: int) -> None:
    rng = random.Random(f"tastes {seed}")
    told = [entity for entity in entities if entity.tier in ("often", "sometimes", "seldom")]
    shown = [one for one in told if one.use != "held out"]
    held_out = [one for one in told if one.use == "held out"]
    write_rows(out / "prefs.jsonl", comparisons(shown, size.pairs, NOISE, rng))
    write_rows(out / "prefs-val.jsonl", comparisons(held_out, size.pairs // 5, 0.0, rng))
    write_rows(out / "counted.jsonl", (counted(one, rng) for one in tasks["even"]["rl"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small world, as a smoke test")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, QUICK if arguments.quick else FULL)


if __name__ == "__main__":
    main()
