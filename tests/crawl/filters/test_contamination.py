"""Evaluation items in texts are found in any layout, without false positives."""

from __future__ import annotations

import json
import pickle
import random
import string
from pathlib import Path

import pytest

from llmkit.crawl.filters.contamination import Contamination, ContaminationRules
from tests.helpers.jsonl import write

ITEMS = [
    {"query": "Which gas do plants take in from the air to feed on?", "choices": ["the first", "none"], "gold": 1},
    {"context": "The harbour master rang the bell twice, for the ship was", "continuation": "late"},
    {"context_options": ["The ball broke the window because the ball", "The ball broke the window because the window"],
     "gold": 0, "continuation": "was made of steel."},
    {"question": "Who wrote it?", "answer": ["Nathaniel Hawthorne of Salem", "Hawthorne"]},
    {"sentence_good": "Many old sailors were helping Caroline home.", "sentence_bad": "Many old sailors was helping."},
    {"messages": [{"role": "user", "content": "Name the river that runs through the town of Durham."}]},
    {"prompt": "Здесь корабль стоит вдоль причала уже три дня", "answer": "да"},
    {"goal": "Mixing the batter", "sol1": "Stir it with a wooden spoon.", "sol2": "Stir it with a wooden door."},
    {"question": "Whose is it?", "answer": {"value": "Melville's", "aliases": ["Herman Melville's"]}},
    {"question": "Which gas?", "choices": {"text": ["neon of space", "carbon of coal"], "label": ["1", "2"]},
     "answerKey": "2"},
    {"question": "Which bird?", "A": "the old heron", "B": "the grey wagtail", "answer": "B"},
    {"question": "2+2?", "answer": "4"},
]  # fmt: skip
PLANTED = [
    "which gas do plants take in from the air to feed on",
    "THE HARBOUR MASTER RANG THE BELL TWICE FOR THE SHIP WAS",
    "The ball\nbroke the window\nbecause the ball\nwas made of steel",
    "Who wrote it?   Nathaniel   Hawthorne -- of Salem",
    "Many old sailors, were helping; Caroline: home!",
    "Name the river — that runs through the town of Dürham?",
    "здесь, корабль. стоит вдоль причала: уже три дня",
    "Mixing the batter\n\nStir it with a wooden spoon",
    "whose is it? MELVILLE'S",
    "Which gas? Carbon of coal",
    "Which bird? -- The Grey Wagtail",
]
BEFORE, AFTER = "It was a bright cold day in April. ", " And so the clocks were striking thirteen."


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Contamination:
    path = tmp_path_factory.mktemp("eval") / "e.jsonl"
    write(path, *ITEMS)
    return Contamination(ContaminationRules((str(path),)))


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_an_item_is_found_in_a_longer_text_however_it_is_set(index: Contamination, number: int) -> None:
    (match,) = index.find(BEFORE + PLANTED[number] + AFTER)
    assert match.item.endswith(f"e.jsonl:{number + 1}") and match.score >= 0.8
    redacted = index.redact(BEFORE + PLANTED[number] + AFTER)
    assert redacted.startswith(BEFORE) and redacted.endswith(AFTER[1:]) and not index.find(redacted)


def test_a_text_without_an_item_is_left_as_it_is(index: Contamination, capsys) -> None:
    for text in (
        BEFORE + AFTER,
        "",
        "2+2? 4",
        "Which gas do plants take in",
        "Mixing the batter takes long.",
        "Who wrote it? Melville wrote it, of New York",
    ):
        assert not index.find(text) and index.redact(text) == text


def test_all_questions_of_squad_are_items(tmp_path: Path) -> None:
    asked = [
        {"question": text, "answers": [{"text": "in Durham"}], "id": "q"} for text in ("Where is it now?", PLANTED[0])
    ]
    article = {"title": "A", "paragraphs": [{"context": BEFORE + AFTER, "qas": asked}]}
    (tmp_path / "s.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    index = Contamination(ContaminationRules((str(tmp_path / "s.json"),)))
    assert len(index.items) == 2 and not index.find(BEFORE + AFTER)
    assert index.find("Where is it now? In Durham!")[0].item == f"{tmp_path}/s.json:1.1, id q"


def test_scattered_pieces_of_an_item_do_not_match(index: Contamination) -> None:
    question = ITEMS[0]["query"]
    pieces = [question[place : place + 30] for place in range(0, len(question) - 26, 4)]
    assert index.find(" ".join(pieces))
    text = (BEFORE * 20).join(pieces)
    assert not index.find(text) and index.redact(text) == text
    assert index.redact(f"{pieces[0]}. {BEFORE * 20}{question}") == f"{pieces[0]}. {BEFORE * 20}?"


def test_each_item_of_a_list_of_items_of_one_form_is_found(tmp_path: Path) -> None:
    """Each is searched at its rarest pieces, because the common format is everywhere."""
    names = ["".join(random.Random(number).choices(string.ascii_lowercase, k=25)) for number in range(150)]
    items = [f"Answer in one word, without any other words. What is the colour of {name}?" for name in names]
    write(tmp_path / "e.jsonl", *({"question": item} for item in items))
    index = Contamination(ContaminationRules((str(tmp_path / "e.jsonl"),)))
    text = "\n".join(items)
    assert len(index.find(text)) == 150
    assert not index.find(index.redact(text))


def test_processes_share_one_index(tmp_path: Path) -> None:
    write(tmp_path / "e.jsonl", *ITEMS)
    index = Contamination(ContaminationRules((str(tmp_path / "e.jsonl"),)), quiet=True)
    whole = len(pickle.dumps(index))
    index.share()
    sent = pickle.dumps(index)
    assert len(sent) < 2000 < whole
    assert pickle.loads(sent).find(PLANTED[0]) == index.find(PLANTED[0]) != []


@pytest.mark.shared
def test_planted_items_of_public_sets_are_found_and_documents_without_are_kept(shared_data: Path) -> None:
    """Recall of at least .98, and at most .1% false positives, with six layouts of an item."""
    from llmkit.io.jsonl import read_jsonl

    names = "arc_easy arc_challenge piqa boolq openbook_qa winogrande copa lambada_openai HumanEval".split()  # noqa: SIM905
    paths = [str(shared_data / "eval" / f"{name}.jsonl.gz") for name in names]
    index = Contamination(ContaminationRules(tuple(paths)), quiet=True)
    # a quarter of the 5,167 documents
    documents = [row.value["text"] for row in read_jsonl([str(shared_data / "corpus" / "english.train.jsonl.gz")])][::4]
    assert sum(bool(index.find(text)) for text in documents) <= 1
    chance, missed, tried = random.Random(0), 0, 0
    rows = [row.value for row in read_jsonl(paths)]
    to_spaces = str.maketrans(string.punctuation, " " * len(string.punctuation))
    for value in chance.sample(rows, 150):
        question = next(value[key] for key in ("prompt", "query", "context", "context_options") if key in value)
        question = f"{question[value['gold']]} {value['continuation']}" if isinstance(question, list) else question
        answer = value["choices"][value["gold"]] if "choices" in value else value.get("continuation", "")
        item = f"{question} {answer}"
        words = item.split()
        for changed in (
            item,
            "\n".join(" ".join(words[place : place + 8]) for place in range(0, len(words), 8)),
            item.replace("\n", " "),
            item.upper(),
            item.translate(str.maketrans("", "", string.punctuation)),
            item.translate(to_spaces),
        ):
            text = chance.choice(documents)[: chance.randrange(100, 5000)]
            missed += not index.find(f"{text[: len(text) // 2]} {changed} {text[len(text) // 2 :]}")
            tried += 1
    assert missed <= 0.02 * tried
