"""`llmkit probe-knowledge --engine openai:URL#NAME` as a user runs it: the probed model is behind a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_server import ModelServer
from tiny import save_assistant

from llmkit.errors import UserError
from llmkit.stages.probe_knowledge import ProbeKnowledgeConfig, run
from tests.helpers.jsonl import lines, write

pytestmark = pytest.mark.usefixtures("one_retry")


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "babbler")


@pytest.fixture
def questions(tmp_path) -> Path:
    asked = [{"question": f"Who is number {n}?", "answer": "Paris", "context": "Paris is."} for n in range(8)]
    return write(tmp_path / "q.jsonl", *asked)


def probe(model: Path | None, questions: Path, name: str, **options) -> list[dict]:
    """Probe in this process and return the records of the report."""
    out, report = questions.with_name(name), questions.with_name(f"{name}.report")
    served = {"timeout": 120, "concurrency": 2} if "engine" in options else {}
    given = {"samples": 2, "max_tokens": 8, "questions": (str(questions),), "quiet": True, **served, **options}
    folder = None if model is None else str(model)
    summary = run(ProbeKnowledgeConfig(model=folder, out=str(out), report=str(report), **given))
    if "engine" in options:
        assert summary.usage["answers"]["requests"] >= 1
    return lines(report)


def test_a_servers_answers_are_those_of_its_folder(babbler, questions):
    with ModelServer(babbler) as server:
        served = probe(babbler, questions, "a", engine=server.spec, temperature=0)
        asked = [body for body in server.requests if isinstance(body["prompt"], list)]
        assert len(asked) == len(server.requests) == 16
    local = probe(babbler, questions, "b", temperature=0)
    assert served == [{**one, "logprobs": [None, None]} for one in local]


def test_without_a_folder_questions_are_sent_as_messages(babbler, questions):
    with ModelServer(babbler, "strict") as server:
        first = probe(None, questions, "a", engine=server.spec)
        assert first == probe(None, questions, "b", engine=server.spec, concurrency=1)
        assert server.requests[0]["messages"] == [{"role": "user", "content": "Who is number 0?"}]
        assert len({body["seed"] for body in server.requests}) == 16
    assert all(one["logprobs"] == [None, None] and len(one["judgements"]) == 2 for one in first)


def test_a_server_that_dies_is_resumed_to_the_same_bytes(babbler, questions):
    with ModelServer(babbler) as server:
        server.dies_after = 7
        with pytest.raises(UserError, match=r"cannot be reached after 1 retry.*--resume continues \(.*a\.state"):
            probe(babbler, questions, "a", engine=server.spec)
    with ModelServer(babbler) as server:
        probe(babbler, questions, "a", engine=server.spec, resume=True)
        again = len(server.requests)
        probe(babbler, questions, "b", engine=server.spec)
        assert again < 16 == len(server.requests) - again
    for end in ("", ".report"):
        assert questions.with_name(f"a{end}").read_bytes() == questions.with_name(f"b{end}").read_bytes()


def test_a_question_that_is_too_long_for_the_server_is_left_out(babbler, questions):
    with questions.open("a") as handle:
        handle.write(json.dumps({"question": "Who is " + "very " * 60 + "tall?", "answer": "Paris"}) + "\n")
    with ModelServer(babbler) as server:
        for model in (babbler, None):
            assert len(probe(model, questions, f"{model is None}", engine=server.spec)) == 8


def test_options_that_a_server_does_not_support_are_refused(babbler, questions):
    with pytest.raises(UserError, match="--engine: cannot be combined with --max-tokens none or --recite"):
        probe(babbler, questions, "b", engine="openai:http://localhost:9/v1#m", max_tokens=None)
    with pytest.raises(UserError, match="MODEL is missing"):
        probe(None, questions, "c")
