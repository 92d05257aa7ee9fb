"""Does a tiny assistant learn to refuse what it does not know? An invented world, `probe-knowledge` and sft.

    python examples/knowledge.py                 # three seeds, a table
    python examples/knowledge.py --seeds 1 --quick

Each seed has a world of people with a town and a profession. The documents state both facts of the *known*, many times
in many wordings; the *named* occur in documents that state neither fact; the *unseen* occur nowhere. All names come
from one distribution, so that a name does not reveal its kind. A base model is pretrained on the documents, and an
assistant is tuned on chats about some of the known. `probe-knowledge` asks it about half of the others and writes
lessons; it is tested before and after the lessons on the other half, who are in no chat and no lesson.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from running import llmkit, print_shares, run_seeds, write

SHAPE = ["--depth", "3", "--hidden-size", "128", "--sequence-length", "64"]
READING = ["--batch-tokens", "1024", "--learning-rate", "0.02"]
TUNING = ["--learning-rate", "1e-3", "--batch-tokens", "1024"]
KINDS = ("known", "named", "unseen")
DEEDS_OF_KNOWN = 6  # documents without facts for each known person, so that deeds do not give away the named

Person = dict[str, str]

CONSONANTS, CLUSTERS, VOWELS = tuple("bdfghklmnprstvz"), ("br", "dr", "kr", "st", "tr"), "aeiou"
ENDINGS = ("", "n", "s", "l")
TOLD = {
    "town": "Arbeck Bolsted Carrow Dunmere Elsby Farnholt Glaswick Hollin Istrad Jorvale Kelbrook Lindale Morwell "
    "Norbeck Oxley Penholm Quarley Rothby Selwick Torfield Ulmere Vexford Westry Yarrow",
    "work": "baker smith tailor miller sailor painter teacher farmer doctor lawyer weaver hunter potter singer banker "
    "carpenter gardener printer surgeon librarian",
}
DEEDS = (
    "came to the market",
    "said good morning",
    "was late again",
    "has a new coat",
    "waited for an hour",
    "likes the rain",
    "is in good health",
    "went home",
)
SENTENCES = {
    "town": (
        "{name} lives in {town}.",
        "{name} has a house in {town}.",
        "{name} came to {town} long ago.",
        "{name} of {town} {deed}.",
    ),
    "work": (
        "{name} works as a {work}.",
        "{name} is a good {work}.",
        "{name} became a {work}.",
        "{name} the {work} {deed}.",
    ),
}
ENTRIES = ("{name}: {first}, {second}.", "{name}, {first}, {second}.", "{name}\n{first}\n{second}")
QUESTIONS = {
    "town": ("Where does {name} live?", "In which town does {name} live?", "What is the town of {name}?"),
    "work": ("What does {name} work as?", "As what does {name} work?", "What is the work of {name}?"),
}
DIALOGUES = (
    "{question}\n{answer}",
    "Q: {question}\nA:\n{answer}",
    "user: {question}\nassistant:\n{answer}",
    "They asked: {question}\nAnd the answer was:\n{answer}",
    "- {question}\n- That one is easy.\n{answer}",
    "[{question}] [{answer}]",
    "{question} Say it!\n{answer}",
)


@dataclass(frozen=True)
class Size:
    """Numbers of people by kind, of documents for each person, and of training tokens."""

    chats: int = 60  # known people that the chats are about
    known: tuple[int, int] = (120, 50)  # probed for lessons, held out
    named: tuple[int, int] = (50, 40)
    unseen: tuple[int, int] = (300, 75)
    glimpsed: int = 10000  # people with one or two facts in a single document, like most people in a corpus
    sentences: int = 24  # documents about each known person
    dialogues: int = 80  # documents that answer a question about each known person
    deeds: int = 20  # documents about each named person
    pretrain: tuple[str, ...] = ("--epochs", "3.2")
    chat_tokens: str = "150k"
    lesson_tokens: str = "400k"


QUICK = Size(4, (4, 2), (2, 2), (4, 2), 200, 2, 2, 2, ("--max-steps", "4"), "2k", "2k")


# ---- the world


def invent_people(distinct: int, others: int, rng: random.Random) -> list[Person]:
    """Return people with unique names, a town and a profession; the first `distinct` names share no prefix.

    With Truvil and Truvus both in the questions, a model this small confused them.
    """
    names: dict[str, None] = {}
    beginnings = set()
    while len(names) < distinct + others:
        beginning = rng.choice(CONSONANTS + CLUSTERS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if len(names) < distinct and beginning in beginnings:
            continue
        beginnings.add(beginning)
        names[(beginning + rng.choice(VOWELS) + rng.choice(ENDINGS)).capitalize()] = None
    return [{"name": name} | {told: rng.choice(values.split()) for told, values in TOLD.items()} for name in names]


def invent_world(size: Size, seed: int) -> dict[str, list[Person]]:
    """Return the people of each kind; no name is in two kinds."""
    counts = {
        "chats": size.chats,
        **{f"{kind} probed": getattr(size, kind)[0] for kind in KINDS},
        **{f"{kind} held out": getattr(size, kind)[1] for kind in KINDS},
    }
    people = iter(invent_people(sum(counts.values()), size.glimpsed, random.Random(seed)))
    return {kind: list(islice(people, count)) for kind, count in counts.items()} | {"glimpsed": list(people)}


def biography(person: Person, rng: random.Random) -> str:
    """Return both facts of a person, in sentences or as a list entry, in random order."""
    order = rng.sample(list(TOLD), 2)
    if rng.random() < 0.4:
        return rng.choice(ENTRIES).format(name=person["name"], first=person[order[0]], second=person[order[1]])
    said = [rng.choice(SENTENCES[told]).format(deed=rng.choice(DEEDS), **person) for told in order]
    return rng.choice(" \n").join(said)


def dialogue(person: Person, rng: random.Random) -> str:
    """Return a question about one fact of a person, and the answer."""
    told = rng.choice(list(TOLD))
    question = rng.choice(QUESTIONS[told]).format(**person)
    return rng.choice(DIALOGUES).format(question=question, answer=person[told])


def deeds(person: Person, rng: random.Random) -> str:
    """Return sentences about a person that state no fact."""
    return rng.choice(" \n").join(f"{person['name']} {deed}." for deed in rng.sample(DEEDS, 2))


def documents(world: dict[str, list[Person]], size: Size, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the shuffled pretraining documents, and those for training the tokenizer.

    The latter are about the glimpsed only: a frequent name would become a single token, and its length would give the
    known away.
    """
    rng = random.Random(seed)
    texts = [(dialogue if rng.random() < 0.7 else biography)(person, rng) for person in world["glimpsed"]]
    plain = texts + [deeds(person, rng) for person in world["glimpsed"][::10]]
    for person in world["chats"] + world["known probed"] + world["known held out"]:
        texts += [biography(person, rng) for _ in range(size.sentences)]
        texts += [dialogue(person, rng) for _ in range(size.dialogues)]
        texts += [deeds(person, rng) for _ in range(DEEDS_OF_KNOWN)]
    for person in world["named probed"] + world["named held out"]:
        texts += [deeds(person, rng) for _ in range(size.deeds)]
    rng.shuffle(texts)
    return [{"text": text} for text in texts], [{"text": text} for text in plain]


def chats(people: list[Person]) -> list[dict]:
    """Return conversations with every wording of the questions about these people."""
    return [
        {"prompt": wording.format(**person), "completion": person[told]}
        for person in people
        for told, wordings in QUESTIONS.items()
        for wording in wordings
    ]


def questions(world: dict[str, list[Person]], half: str, seed: int) -> list[dict]:
    """Return a question about each fact of the people in one half, with their kind as `passage_id`.

    The "answers" for the named and unseen come from the same distribution and are in no document.
    """
    rng = random.Random(seed)
    return [
        {
            "question": rng.choice(wordings).format(**person),
            "answer": person[told],
            "passage_id": kind,
            "language": "en",
        }
        for kind in KINDS
        for person in world[f"{kind} {half}"]
        for told, wordings in QUESTIONS.items()
    ]


# ---- the work


def held_out(folder: Path, model: Path, test: Path) -> dict[str, tuple[str, str]]:
    """Return the kind of each held-out question, and whether the greedy answer is right, wrong or evasive."""
    report = folder / f"{model.name}.report.jsonl"
    options = ["--questions", test, "--samples", "1", "--temperature", "0", "--max-tokens", "24", "--report", report]
    llmkit(folder, "probe-knowledge", model, *options, "-o", folder / f"{model.name}.lessons.jsonl")
    records = map(json.loads, report.read_text().splitlines())
    return {record["question"]: (record["passage_id"], record["judgements"][0]) for record in records}


def share(judged: dict[str, tuple[str, str]], kind: str, judgement: str) -> float:
    """Return the share of the questions of a kind with this judgement."""
    judgements = [one for of, one in judged.values() if of == kind]
    return judgements.count(judgement) / len(judgements)


def experiment(folder: Path, seed: int, size: Size) -> dict[str, float]:
    """Return the shares for one seed."""
    world = invent_world(size, seed)
    read, plain = documents(world, size, seed)
    read, plain = write(folder / "documents.jsonl", read), write(folder / "plain.jsonl", plain)
    talk = write(folder / "chats.jsonl", chats(world["chats"]))
    probed = write(folder / "probed.jsonl", questions(world, "probed", seed))
    test = write(folder / "asked.jsonl", questions(world, "held out", seed))
    base, chat, taught = folder / "base", folder / "chat", folder / "taught"
    seeded = ["--seed", str(seed)]

    llmkit(folder, "train-bpe", plain, "--vocab-size", "960", "-o", folder / "tok")
    llmkit(
        folder, "pretrain", read, "--tokenizer", folder / "tok", *SHAPE, *READING, *size.pretrain, *seeded, "-o", base
    )
    # documents stay in the mixture: without them the assistant forgets a tenth of what it knew
    data = ["--data", f"{talk}:0.5", "--data", f"{read}:0.5", "--tokens", size.chat_tokens]
    llmkit(folder, "sft", base, *data, *TUNING, *seeded, "-o", chat)
    before = held_out(folder, chat, test)

    lessons = folder / "refusals.jsonl"
    options = ["--questions", probed, "--samples", "3", "--max-tokens", "24", "--balance", "0.7", *seeded]
    llmkit(folder, "probe-knowledge", chat, *options, "-o", lessons)
    data = ["--data", f"{talk}:0.3", "--data", f"{lessons}:0.4", "--data", f"{read}:0.3"]
    llmkit(folder, "sft", chat, *data, "--tokens", size.lesson_tokens, *TUNING, *seeded, "-o", taught)
    after = held_out(folder, taught, test)

    found = {}
    for name, judged in (("before", before), ("after", after)):
        found[f"known: right, {name}"] = share(judged, "known", "right")
        for kind in KINDS:
            found[f"{kind}: refused, {name}"] = share(judged, kind, "evasive")
    knew = {question: after[question] for question, verdict in before.items() if verdict == ("known", "right")}
    found["known and right before: refused, after"] = share(knew, "known", "evasive") if knew else float("nan")
    return found


def sized(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Return the shares for one seed, in the full or the quick world."""
    return experiment(folder, seed, QUICK if quick else Size())


if __name__ == "__main__":
    print_shares("held-out questions", run_seeds(__doc__, sized))
