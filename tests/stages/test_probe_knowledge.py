"""`llmkit probe-knowledge` as a user runs it: known and taught facts, kills and resumes, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import certain, make_model, save_assistant, save_folder, save_tokenizer

from llmkit.errors import UserError
from llmkit.stages.probe_knowledge import ProbeKnowledgeConfig, run
from tests.helpers.jsonl import lines, write

PARIS = {"question": "What is the capital of France?", "answer": ["Lutetia", "Paris"], "passage_id": "p1"}
ROME = {"question": "Wie heißt die Hauptstadt der Republik Italien?", "answer": "Rom"}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "parrot", "Paris")


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "babbler")


def probe(model: Path, out: Path, **options):
    given = {name: (str(value),) if name in ("questions", "passages") else value for name, value in options.items()}
    return run(ProbeKnowledgeConfig(model=str(model), out=str(out), quiet=True, **given))


# ---- output


def test_known_facts_are_confirmed_and_unknown_ones_refused(parrot, tmp_path, llmkit):
    asked = write(tmp_path / "q.jsonl", PARIS, ROME, {**ROME, "question": "Is it Paris or Rome?", "answer": "Rome"})
    out, report = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    done = llmkit("probe-knowledge", parrot, "--questions", asked, "-n", "3", "-o", out, "--report", report)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["known"], summary["unknown"], summary["responses"]) == (1, 2, 9)
    assert (summary["confirmations"], summary["refusals"]) == (1, 1)  # balanced
    first, second, _ = lines(report)
    assert {name: first[name] for name in ("question", "answer", "passage_id")} == PARIS
    assert (first["responses"], first["judgements"], first["known"]) == (["Paris"] * 3, ["right"] * 3, "yes")
    assert (second["judgements"], second["known"], second["written_by"]) == (["wrong"] * 3, "no", "given")
    assert summary["by_kind"]["what"] == {"known": 1}
    assert "1 more unknown left out to keep them balanced" in done.stderr and "66.7%" in done.stderr
    assert not (tmp_path / "r.jsonl.state").exists()
    taught = lines(out)
    assert taught[0]["messages"][1] == {"role": "assistant", "content": "Lutetia"} and taught[0]["known"] == "yes"
    assert len(taught) == 2
    manifest = json.loads((tmp_path / "r.jsonl.manifest.json").read_text())
    assert (manifest["stage"], manifest["parents"]) == ("probe-knowledge", [{"path": str(parrot)}])
    assert manifest["inputs"][0]["path"] == str(asked)
    assert manifest["results"] == {name: summary[name] for name in manifest["results"]} and "refusals" in summary


def test_a_refusal_is_in_the_language_of_the_question(parrot, tmp_path):
    asked = write(tmp_path / "q.jsonl", ROME, {"question": "Who?", "answer": "Ada", "language": "tlh"})
    wordings = tmp_path / "own.json"
    wordings.write_text(json.dumps({"tlh": ["jISovbe'."], "de": ["Keine Ahnung."]}))
    probe(parrot, tmp_path / "r.jsonl", questions=asked, refusals=str(wordings), samples=2)
    assert [one["messages"][1]["content"] for one in lines(tmp_path / "r.jsonl")] == ["Keine Ahnung.", "jISovbe'."]


def test_the_conversations_are_what_sft_reads(parrot, tmp_path):
    from llmkit.formats.conversations import read_conversation
    from llmkit.io.jsonl import read_jsonl

    asked = write(tmp_path / "q.jsonl", PARIS, ROME)
    probe(parrot, tmp_path / "r.jsonl", questions=asked)
    read = [read_conversation(row).messages for row in read_jsonl([str(tmp_path / "r.jsonl")])]
    assert [[one.role for one in messages] for messages in read] == [["user", "assistant"]] * 2


def test_questions_are_made_from_passages_by_the_seed(parrot, tmp_path):
    texts = [
        f"Town {chr(65 + n)}rden has {n + 14} bridges over the river. The mill was built in {1800 + n}.\n\n"
        f"After long talks, the people of the valley moved to Lower Lusatia in {1900 + n}."
        for n in range(12)
    ]
    documents = write(tmp_path / "docs.jsonl", *({"text": text, "id": f"d{n}"} for n, text in enumerate(texts)))
    report = tmp_path / "p.jsonl"
    options = {"passages": documents, "max_passages": 6, "per_passage": 2, "samples": 1, "report": str(report)}
    summary = probe(parrot, tmp_path / "r.jsonl", **options)
    records = lines(report)
    assert summary.questions == len(records) > 6 and summary.written_by == "embedded"
    assert {one["written_by"] for one in records} == {"embedded"} and {one["known"] for one in records} == {"no"}
    assert len({one["passage_id"] for one in records}) <= 6 and records[0]["passage_id"].startswith("d")
    first = report.read_bytes()
    probe(parrot, tmp_path / "r.jsonl", force=True, **options)
    assert report.read_bytes() == first
    probe(parrot, tmp_path / "r.jsonl", force=True, seed=1, **options)
    assert {one["question"] for one in lines(report)} != {one["question"] for one in records}


def test_an_answer_does_not_depend_on_the_batch(babbler, tmp_path):
    rows = [{"question": f"What is {n}?", "answer": "nothing"} for n in range(9)]
    together, alone = tmp_path / "together.jsonl", tmp_path / "alone.jsonl"
    options = {"samples": 3, "max_tokens": 9}
    probe(
        babbler, tmp_path / "r", questions=write(tmp_path / "q", *rows), report=str(together), batch_size=4, **options
    )
    probe(babbler, tmp_path / "s", questions=write(tmp_path / "q", rows[7]), report=str(alone), batch_size=1, **options)
    (one,) = lines(alone)
    assert one["responses"] == lines(together)[7]["responses"] and len(set(one["responses"])) > 1


def test_conversations_go_to_stdout_and_nothing_else(parrot, llmkit):
    done = llmkit("probe-knowledge", parrot, "-n", "1", stdin=json.dumps(ROME))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["messages"][0]["content"] == ROME["question"]
    assert "1 refusal, 0 confirmations" in done.stderr and "there are only refusals" in done.stderr


def test_a_dry_run_asks_nothing(parrot, tmp_path, llmkit):
    asked = write(tmp_path / "q.jsonl", PARIS, ROME)
    done = llmkit("probe-knowledge", parrot, "--questions", asked, "-o", tmp_path / "r.jsonl", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "") and not (tmp_path / "r.jsonl").exists()
    assert "2 questions, 5 answers each" in done.stderr and "at most 640 tokens" in done.stderr
    assert "What is the capital of France? [what: Lutetia | Paris]" in done.stderr


def test_questions_that_cannot_be_asked_are_counted(parrot, tmp_path):
    long = {"question": "Why " * 100, "answer": "so"}
    asked = write(tmp_path / "q.jsonl", long, PARIS, {"question": "Who?", "answers": {"text": []}})
    summary = probe(parrot, tmp_path / "r.jsonl", questions=asked)
    assert summary.questions == 1
    assert summary.left_out == {"longer than the context": 1, "no answer in the passage": 1}
    assert probe(parrot, tmp_path / "s.jsonl", questions=asked, limit=2).left_out == {"longer than the context": 1}


# ---- recitation


def test_recitation_is_measured(tmp_path, llmkit):
    """The model generates "abcdefgh" after "+", regardless of the text before."""
    model = save_folder(tmp_path / "model")
    from llmkit.model.folder import save_model
    from llmkit.tokenizer.encoding import load_tokenizer

    ids = load_tokenizer(model).encode("+abcdefgh")
    save_model(certain(make_model(context=64), *ids), model)
    start = "0" * 29
    texts = [start + text for text in ("12+abcdefgh, and so on", "34+abcdXfgh, and so on", "99+0000000000000", "1")]
    texts.append(texts[0])
    documents = write(tmp_path / "docs.jsonl", *({"text": text, "id": f"d{n}"} for n, text in enumerate(texts)))
    out = tmp_path / "recited.jsonl"
    options = ["--max-tokens", "8", "-o", out]
    done = llmkit("probe-knowledge", model, "--recite", documents, *options)
    assert done.returncode == 0, done.stderr
    found = [[one[name] for name in ("id", "repeats", "matched", "longest", "share")] for one in lines(out)]
    assert found == [["d0", 2, 8, 8, 1.0], ["d1", 1, 4, 4, 0.5], ["d2", 1, 0, 0, 0.0]]
    assert lines(out)[0]["prefix"] == start + "12+" and lines(out)[0]["completion"] == "abcdefgh"
    summary = json.loads(done.stdout)
    assert summary["by_repeats"] == {
        "once": {"documents": 2, "mean_share": 0.25, "whole": 0},
        "2 to 9 times": {"documents": 1, "mean_share": 1.0, "whole": 1},
    }
    assert (summary["documents"], summary["too_short"]) == (3, 1) and "1 recited in full" in done.stderr


def test_recitals_that_cannot_be(babbler, tmp_path):
    documents = write(tmp_path / "docs.jsonl", {"text": "short"})
    for options, message in (
        ({}, "docs.jsonl: expected documents of more than 32 tokens, found none"),
        ({"max_tokens": 250}, r"expected less than the model's context of 256 tokens"),
        ({"max_tokens": None}, "--recite: cannot be combined"),
        ({"questions": documents}, "--recite: cannot be combined"),
    ):
        with pytest.raises(UserError, match=message):
            probe(babbler, tmp_path / "r.jsonl", recite=str(documents), **options)
    write(documents, {"title": "no text"})
    with pytest.raises(UserError, match=r"docs.jsonl:1: expected field 'text'"):
        probe(babbler, tmp_path / "r.jsonl", recite=str(documents))
    assert not (tmp_path / "r.jsonl").exists()


# ---- resuming


def test_a_run_of_something_else_is_not_resumed(parrot, babbler, tmp_path, monkeypatch):
    from llmkit.io.resume import Kept

    asked, other = write(tmp_path / "q.jsonl", PARIS, ROME), write(tmp_path / "other.jsonl", ROME)
    out, state, model = tmp_path / "r.jsonl", tmp_path / "r.jsonl.state", tmp_path / "model"
    shutil.copytree(parrot, model)
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "remove", lambda self: None)  # like a kill at the very end
        probe(model, out, questions=asked)
    for options, message in (
        ({"samples": 3}, r"r.jsonl.state: another run: --samples was 5 and is now 3; resume with the same"),
        ({"questions": other}, r"r.jsonl.state: another run: --questions was"),
    ):
        with pytest.raises(UserError, match=message):
            probe(model, out, **{"questions": asked, "resume": True, **options})
    shutil.copy(babbler / "model.safetensors", model)
    with pytest.raises(UserError, match=r"another run: the model was \w+ and is now \w+; .* start over with --force"):
        probe(model, out, questions=asked, resume=True)
    shutil.copy(parrot / "model.safetensors", model)
    write(asked, ROME, PARIS)
    with pytest.raises(UserError, match=r"has a record that is not in the input: .*q.jsonl:1"):
        probe(model, out, questions=asked, resume=True)
    write(asked, PARIS, ROME)
    out.unlink()
    for plan in (False, True):
        with pytest.raises(UserError, match=r"r.jsonl.state: an unfinished run; --resume continues it"):
            probe(model, out, questions=asked, dry_run=plan)
    assert probe(model, out, questions=asked, resume=True).questions == 2 and not state.exists()
    for same in (model, f"{model}/"):
        finished = probe(same, out, questions=asked, resume=True)
        assert finished.questions == 2 and finished.seconds is None  # there was nothing to do
    manifest = tmp_path / "r.jsonl.manifest.json"
    made = manifest.read_text()
    edited = json.loads(made)
    edited["results"], edited["inputs"] = {"questions": 2, "of another version": 1}, [{"bytes": 1}]
    manifest.write_text(json.dumps(edited))
    assert probe(model, out, questions=asked, resume=True).questions == 2
    manifest.write_text(made)
    for options, message in (
        ({"samples": 3}, "r.jsonl: another run: --samples was 5 and is now 3; resume with the same"),
        ({"balance": None}, "r.jsonl: another run: --balance was 1.0 and is now none"),
        ({"report": str(tmp_path / "p.jsonl")}, "p.jsonl: cannot be made from .*r.jsonl, which is finished"),
    ):
        with pytest.raises(UserError, match=message):
            probe(model, out, questions=asked, resume=True, **options)
    with pytest.raises(UserError, match=r"q.jsonl: not a finished probe-knowledge run"):
        probe(model, Path(asked), questions=other, resume=True)
    write(asked, ROME)
    with pytest.raises(UserError, match=r"r.jsonl: another run: .*q.jsonl has changed since; start over with --force"):
        probe(model, out, questions=asked, resume=True)


# ---- bad input


def test_a_base_model_is_refused(tmp_path):
    from llmkit.tokenizer.chat import CHAT_SPECIALS

    asked = write(tmp_path / "q.jsonl", PARIS)
    base = save_folder(tmp_path / "base")
    with pytest.raises(UserError, match=r"expected the special tokens of conversations.*llmkit sft"):
        probe(base, tmp_path / "r.jsonl", questions=asked)
    untuned = save_folder(tmp_path / "untuned", make_model(vocab_size=257 + len(CHAT_SPECIALS)))
    save_tokenizer(untuned, *CHAT_SPECIALS)
    with pytest.raises(
        UserError,
        match=r"untuned: a base model, which has not learnt to end a turn.*llmkit sft.*evaluate without --chat",
    ):
        probe(untuned, tmp_path / "r.jsonl", questions=asked)


@pytest.mark.parametrize(
    ("option", "line", "message"),
    [
        (
            "questions",
            '{"question": "Who?", "answer": ""}',
            r"x.jsonl:2: expected 'answer' to be text, found an empty string",
        ),
        ("questions", '{"question": "Who?"}', r"x.jsonl:2: expected 'question' and 'answer'"),
        ("questions", "{", r"x.jsonl:2: expected one JSON object per line"),
        ("passages", '{"title": "no text"}', r"x.jsonl:2: expected field 'text' \(a document\)"),
        ("passages", '{"text": 3}', r"x.jsonl:2: expected 'text' to be a string"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_left(parrot, tmp_path, option, line, message):
    first = {"question": "Who?", "answer": "I", "text": "In 1889 the tower of Arles was still closed."}
    given = write(tmp_path / "x.jsonl", first, line)
    with pytest.raises(UserError, match=message):
        probe(parrot, tmp_path / "r.jsonl", max_bad="0", **{option: given})
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("rows", "option", "message"),
    [
        ([], "questions", "x.jsonl: expected questions with answers, found none"),
        ([{"question": "Who?", "answers": {"text": []}}], "questions", "expected questions with answers, found none"),
        ([], "passages", "x.jsonl: expected documents with text to ask about, found none"),
        ([{"text": " \n"}], "passages", "expected documents with text to ask about, found none"),
        (
            [{"text": "nothing to ask about here, all in small letters"}],
            "passages",
            "expected a sentence of 6 to 40 words",
        ),
    ],
)
def test_input_without_questions_is_refused(parrot, tmp_path, rows, option, message):
    with pytest.raises(UserError, match=message):
        probe(parrot, tmp_path / "r.jsonl", **{option: write(tmp_path / "x.jsonl", *rows)})


def test_options_that_cannot_be_meant_are_refused(parrot, tmp_path):
    asked = write(tmp_path / "q.jsonl", PARIS)
    out = tmp_path / "r.jsonl"
    for options, message in (
        ({"questions": asked, "passages": asked}, "--passages: cannot be combined with --questions"),
        ({"questions": asked, "report": str(out)}, "--report: expected another file than --out"),
        ({"questions": asked, "report": "-"}, "--report: expected a file, found -"),
        ({"questions": tmp_path / "none.jsonl"}, "none.jsonl: expected a readable file"),
    ):
        with pytest.raises(UserError, match=message):
            probe(parrot, out, **options)
    with pytest.raises(UserError, match="--resume: expected --out"):
        run(ProbeKnowledgeConfig(model=str(parrot), questions=(str(asked),), resume=True))
    with pytest.raises(UserError, match="MODEL is missing: a model folder"):
        run(ProbeKnowledgeConfig(questions=(str(asked),)))
    with pytest.raises(UserError, match="no/where: expected a model folder, found nothing"):
        probe(Path("no/where"), out, questions=asked)
    out.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        probe(parrot, out, questions=asked)
    assert out.read_text() == "mine"
