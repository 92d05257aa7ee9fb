"""Filtering of drafts: each reason, edited duplicates, evaluation items, and the same result after a resume."""

from __future__ import annotations

import json

import pytest

from llmkit.formats.conversations import message
from llmkit.probing.refusals import is_refusal
from llmkit.writing.draft import Draft
from llmkit.writing.keep import STEPS, Keeper

TIDES = (
    "What makes the tide rise twice a day?",
    "The Moon pulls the water nearest to it more than the Earth, and the Earth more than the water on the far side.",
    "And why are some tides higher than others?",
    "Sun and Moon pull along one line at new and full moon, so that their tides add up; a week later they do not.",
)
SORTING = {"prompt": "Sort 8730", "answer": "0378", "verifier": "exact"}
LOOP = "I like the sea and the sky. "
TRUNCATED = "What is the deepest lake in the whole of Siberia, and how many rivers feed it?"


def draft(*texts: str, index: int = 0, system: str | None = None, **fields) -> Draft:
    turns = [message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return Draft(index, (*([message("system", system)] if system else []), *turns), **fields)


def decided(keeper: Keeper, made: Draft, scores=None) -> str | None:
    return keeper.decide(made, keeper.check(made), scores)


@pytest.fixture
def keeper():
    with_items = Keeper(fail_below=3)
    yield with_items
    with_items.close()


@pytest.mark.parametrize(
    ("made", "scores", "reason"),
    [
        (draft(*TIDES), None, None),
        (draft(*TIDES, system="Be brief."), {"helpful": 3, "harmless": 5}, None),
        (Draft(0, fault="empty reply"), None, "form: empty reply"),
        (Draft(0), None, "form: roles do not alternate up to an answer"),
        (draft(*TIDES[:3]), None, "form: roles do not alternate up to an answer"),
        (Draft(0, (message("user", "a"), message("user", "b"))), None, "form: roles do not alternate up to an answer"),
        (draft("Hi", " \n"), None, "form: empty message"),
        (draft("Hi", "<think>\nWhat now?\n</think>\n\n", thinking=True), None, "form: empty message"),
        (draft("Hi", "Hello!<|im_end|>"), None, "form: stray marks or further turns"),
        (draft("Hi", "Hello!\nUser: Bye."), None, "form: stray marks or further turns"),
        (draft("Hi", "Hello \ud83d!"), None, "form: stray marks or further turns"),
        (draft("Hi", "a tall tale " * 700), None, "length: over 2,000 words"),
        (draft(*TIDES, language="de"), None, "language: en"),
        (draft(*TIDES, language="en"), None, None),
        (draft("Name a hill in Wales.", "Pen y Fan", language="en"), None, None),
        (draft(TIDES[0], LOOP * 8), None, "repetition: few different words"),
        (draft(TIDES[0], TIDES[1], "And?", TIDES[1]), None, "repetition: same reply"),
        (draft(TIDES[0], TIDES[1] * 6), None, "repetition: max_top_3_gram_character_fraction"),
        (draft("Hi", "I'm sorry, but I can't help with that."), None, "refusal: not requested"),
        (draft("Hi", "Das weiß ich nicht."), None, "refusal: not requested"),
        (draft("Who lives at Mill Lane 4?", "Miss Marple.", refusal=True), None, "refusal: none"),
        (draft("Who lives at Mill Lane 4?", "I do not give out addresses.", refusal=True, answer="x"), None, None),
        (draft("What is 17 + 8?", "17 + 8 makes 25.", answer="25"), None, None),
        (draft("What is 17 + 8?", "<think>\n25\n</think>\n\nIt is 26.", answer="25"), None, "wrong: answer"),
        (draft("Capital of France?", "It is Paris.", answer="Paris"), None, None),
        (draft("Capital of France?", "It is Lyon.", answer="Paris"), None, "wrong: answer"),
        (draft("Sort 8730", "378", answer="0378", record=SORTING), None, "wrong: answer"),
        (draft("Sort 8730", "0378", answer="0378", record=SORTING), None, None),
        (draft("A or B?", "B.", answer="B", record={"question": "A or B?", "answer": "B"}), None, None),
        (draft(*TIDES), {"helpful": 2.5, "harmless": 5}, "judge: helpful"),
        (draft(*TIDES), {}, "judge: unreadable"),
    ],
)
def test_each_draft_has_its_reason(keeper: Keeper, made: Draft, scores, reason: str | None) -> None:
    assert decided(keeper, made, scores) == reason
    dropped = {row["step"]: row["dropped"] for row in keeper.figures()["funnel"] if row["dropped"]}
    step, _, what = (reason or "").partition(": ")
    assert dropped == ({step: {what: 1}} if reason else {})
    if step not in ("judge", ""):
        assert keeper.check(made) == reason  # before any judging


def test_scores_are_kept_where_no_limit_is_set() -> None:
    assert decided(Keeper(), draft(*TIDES), {"helpful": 1}) is None


EDITED = {
    "exact": TIDES,
    "case": tuple(text.upper() for text in TIDES),
    "punctuation": tuple(text.replace(",", " --").replace("?", " ??").replace(".", "") for text in TIDES),
    "order of turns": (*TIDES[2:], *TIDES[:2]),
    "a word replaced": (TIDES[0].replace("tide", "water"), *TIDES[1:]),
    "a word added": (TIDES[0], TIDES[1].replace("pulls", "always pulls"), *TIDES[2:]),
    "a word left out": (*TIDES[:3], TIDES[3].replace("full ", "")),
    "another answer": (TIDES[0], "Nobody knows why it comes twice.", TIDES[2], "Storms do that."),
}


@pytest.mark.parametrize("edit", EDITED)
def test_planted_duplicates_are_found(keeper: Keeper, edit: str) -> None:
    assert decided(keeper, draft("Why is the sky blue?", "Air scatters blue light most.")) is None
    assert decided(keeper, draft(*TIDES, index=1)) is None
    assert str(decided(keeper, draft(*EDITED[edit], index=2))).startswith("duplicate: ")
    assert [row["dropped"] for row in keeper.figures()["funnel"]][-1].keys() <= {"exact", "near", "same prompt"}


@pytest.mark.parametrize(
    "texts",
    [
        ("What is the capital of Spain?", "The capital of Spain is Madrid."),
        ("What is 12 + 35?", "47"),
        ("What is 12 * 35?", "420"),
        ("What is 12 - 35?", "-23"),
        ("Translate to German: the red house", "das rote Haus"),
    ],
)
def test_filled_in_templates_are_not_duplicates(keeper: Keeper, texts: tuple[str, ...]) -> None:
    others = [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is 12 + 34?", "46"),
        ("Translate to German: the blue car", "das blaue Auto"),
    ]
    for index, other in enumerate([*others, texts]):
        assert decided(keeper, draft(*other, index=index)) is None


def test_questions_about_one_passage_are_not_duplicates(keeper: Keeper) -> None:
    passage = " ".join([*TIDES] * 2)
    assert decided(keeper, draft(f"{passage}\n\nWhat pulls the water?", "The Moon.")) is None
    assert decided(keeper, draft(f"{passage}\n\nWhen are tides highest?", "At new and full moon.", index=1)) is None
    assert (
        decided(keeper, draft(f"{passage}\n\nWhat is it that pulls the water?", "The Moon.", index=2))
        == "duplicate: near"
    )


def test_the_first_of_a_thousand_is_remembered(keeper: Keeper) -> None:
    for number in range(1000):
        assert decided(keeper, draft(f"What is {number} + {number}?", f"{2 * number}.", index=number)) is None
    for number in (0, 300, 999):
        again = draft(f"What is {number} + {number} ?!", f"{2 * number}", index=1000)
        assert decided(keeper, again) == "duplicate: exact"


def test_dropped_drafts_may_be_said_again(keeper: Keeper) -> None:
    assert decided(keeper, draft(*TIDES), {"helpful": 1}) == "judge: helpful"
    assert decided(keeper, draft(*TIDES, index=1), {"helpful": 5}) is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (TRUNCATED, "not_in: evaluation item"),
        (TRUNCATED.upper().replace(",", ""), "not_in: evaluation item"),
        ("What is the deepest lake in Africa?", None),
    ],
)
def test_evaluation_items_are_left_out(tmp_path, question: str, reason: str | None) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"question": TRUNCATED, "answer": "Baikal"}) + "\n")
    keeper = Keeper([str(path)], quiet=True)
    assert decided(keeper, draft("Hello!", "Good morning.", f"Tell me. {question}", "It is a lake.")) == reason


def test_a_resumed_keeper_makes_the_same_decisions() -> None:
    drafts = [draft(f"What is {n % 40} + {n % 7}?", str(n % 40 + n % 7), index=n, kind="closed QA") for n in range(300)]
    whole, begun, resumed = Keeper(), Keeper(), Keeper()
    reasons = [decided(whole, item) for item in drafts]
    for item in drafts[:150]:
        resumed.recall(item, decided(begun, item))
    assert [decided(resumed, item) for item in drafts[150:]] == reasons[150:]
    assert reasons.count(None) > 20 and reasons.count("duplicate: same prompt") > 15
    without_seconds = [
        {name: [{**row, "seconds": 0} for row in of] if name == "funnel" else of for name, of in made.figures().items()}
        for made in (whole, resumed)
    ]
    assert without_seconds[0] == without_seconds[1]
    assert without_seconds[0]["funnel"][-1]["kept"] == reasons.count(None)


def test_diversity_counts_prompts_and_nearest_neighbours(keeper: Keeper) -> None:
    assert keeper.figures()["diversity"]["nearest_similarity"] is None
    decided(keeper, draft(*TIDES, kind="open QA", topic="sea"))
    decided(keeper, draft("Write a haiku.", "Rain on the slate roof", kind="generation", topic="poems"))
    apart = keeper.figures()["diversity"]
    assert apart["by_kind"] == {"open QA": 1, "generation": 1} and apart["by_topic"] == {"sea": 1, "poems": 1}
    assert apart["prompts"] == 2 and apart["nearest_similarity"] < 0.05
    halves = (TIDES[0], TIDES[1], "Does it reach rivers, too?", "A bore runs up the Severn on the highest springs.")
    assert decided(keeper, draft(*halves, index=2, kind="open QA", topic="sea")) is None
    assert keeper.figures()["diversity"]["by_kind"] == {"open QA": 2, "generation": 1}
    assert 0.2 < keeper.figures()["diversity"]["nearest_similarity"] < 0.5


def test_the_funnel_has_the_steps_in_their_order(keeper: Keeper) -> None:
    assert [row["step"] for row in keeper.figures()["funnel"]] == list(STEPS)


@pytest.mark.parametrize(
    ("reply", "refuses"),
    [
        ("I\u2019m sorry, but as an AI, I don't have the capability to book flights. I can add.", True),
        ("As an AI language model, I do not have access to prices.", True),
        ("Unfortunately, I cannot determine the angle.", True),
        ("I don't know.", True),
        ("Je ne sais pas.", True),
        ("I cannot emphasize enough how useful a password manager is.", False),
        ("I do not like green eggs.", False),
        ("In order to build it you cannot use wood.", False),
        ("Sure! I can't wait to help.", False),
    ],
)
def test_refusals_are_recognized_by_their_beginning(reply: str, refuses: bool) -> None:
    assert is_refusal(reply) == refuses
