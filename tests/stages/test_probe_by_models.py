"""`llmkit probe-knowledge --writer ... --judge ...` as a user runs it, with a server that may fail and with folders."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import ChatServer
from tiny import save_assistant

from llmkit.errors import UserError
from llmkit.probing.judges import JUDGE_PROMPT
from llmkit.probing.model_questions import WRITER_PROMPT
from llmkit.stages.probe_knowledge import ProbeKnowledgeConfig, run
from tests.helpers.jsonl import lines, write

DOCS = Path(__file__).parent.parent.parent / "docs" / "probe-knowledge.md"
TOWNS = [f"The mill of {chr(65 + n)}rden was built in {1800 + n} by Ada Roe." for n in range(12)]
QUICK = ["--timeout", "5"]
pytestmark = pytest.mark.usefixtures("one_retry")


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "babbler")


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "parrot", "Paris")


@pytest.fixture
def documents(tmp_path) -> Path:
    return write(tmp_path / "docs.jsonl", *({"text": text, "id": f"d{n}"} for n, text in enumerate(TOWNS)))


def clever(prompt: str, seed: int) -> str:
    """Write two good questions and a bad one about a passage, or judge by the length of the answer."""
    if prompt.startswith("Judge"):
        answer = prompt.split("<answer>\n")[1].split("\n</answer>")[0]
        return f"Let me see.\nVERDICT: {('right', 'wrong', 'wrong')[len(answer) % 3]}"
    town, year = re.search(r"mill of (\w+) was built in (\d+)", prompt).groups()
    pairs = [(f"When was the mill of {town} built?", year), (f"Who built the mill of {town}?", "Ada Roe")]
    pairs.insert(1, (f"What is the height of {town}?", "9 feet"))
    return json.dumps({"questions": [{"question": question, "answer": answer} for question, answer in pairs]})


def probe(model: Path, out: Path, **options):
    given = {name: (str(value),) if name in ("questions", "passages") else value for name, value in options.items()}
    given = {"quiet": True, "timeout": 60} | given
    return run(ProbeKnowledgeConfig(model=str(model), out=str(out), **given))


def questions(path: Path, count: int = 3) -> Path:
    asked = [{"question": f"Who is number {n}?", "answer": "Paris", "context": "Paris is."} for n in range(count)]
    write(path, *asked)
    return path


# ---- a server


def test_a_server_writes_the_questions_and_judges_the_answers(babbler, documents, tmp_path, llmkit):
    out, report = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    with ChatServer(clever) as server:
        options = ["--passages", documents, "--writer", server.spec, "--judge", server.spec, "-n", "2", *QUICK]
        done = llmkit("probe-knowledge", babbler, *options, "--max-tokens", "9", "-o", out, "--report", report)
    assert done.returncode == 0, done.stderr
    summary, records = json.loads(done.stdout), lines(report)
    assert summary["questions"] == len(records) == 24 and summary["left_out"] == {"answer not in the passage": 12}
    assert summary["written_by"] == summary["judged_by"] == "openai:#tiny"
    assert records[0]["question"] == "When was the mill of Arden built?" and records[0]["answer"] == "1800"
    assert {(one["written_by"], one["judged_by"]) for one in records} == {("openai:#tiny", "openai:#tiny")}
    judged = [pair for one in records for pair in zip(one["responses"], one["judgements"], strict=True)]
    assert all(verdict in ("evasive", "right" if len(text) % 3 == 0 else "wrong") for text, verdict in judged)
    assert {verdict for _, verdict in judged} >= {"right", "wrong"}
    assert summary["usage"]["writer"] == {"requests": 12, "prompt_tokens": 1200, "completion_tokens": 84}
    assert "writer openai:#tiny: 12 requests, 1,200 tokens in, 84 out" in done.stderr
    assert "judge openai:#tiny: " in done.stderr and "left out: answer not in the passage 12" in done.stderr
    assert "by patterns" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "docs.jsonl",
        "p.jsonl",
        "r.jsonl",
        "r.jsonl.manifest.json",
    ]


@pytest.mark.parametrize("dies_after", [4, 19])
def test_a_server_that_dies_in_the_middle_is_resumed_to_the_same_bytes(babbler, documents, tmp_path, dies_after):
    """The first 12 requests write questions, the others judge."""
    out, report = tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    options = {"passages": documents, "samples": 2, "max_tokens": 9, "concurrency": 2}
    with ChatServer(clever) as server:
        models = {"writer": server.spec, "judge": server.spec}
        server.dies_after = dies_after
        with pytest.raises(UserError, match=r"cannot be reached after 1 retry.*r.jsonl\.(written\.)?state\)"):
            probe(babbler, out, report=str(report), **options, **models)
        assert not out.exists() and not report.exists()
        kept = sum(path.read_bytes().count(b"\n") - 1 for path in tmp_path.glob("r.jsonl*.state"))
        assert kept >= 2
    with ChatServer(clever) as server:  # at another port
        models = {"writer": server.spec, "judge": server.spec}
        summary = probe(babbler, out, report=str(report), resume=True, **options, **models)
        assert summary.questions == 24 and not list(tmp_path.glob("*.state"))
        again = len(server.requests)
        whole = tmp_path / "whole.jsonl", tmp_path / "whole-report.jsonl"
        probe(babbler, whole[0], report=str(whole[1]), **options, **models)
        assert again < len(server.requests) - again  # kept answers were not requested again
    assert out.read_bytes() == whole[0].read_bytes() and report.read_bytes() == whole[1].read_bytes()


def test_garbage_is_counted_and_never_right(parrot, documents, tmp_path, llmkit):
    asked = questions(tmp_path / "q.jsonl")
    with ChatServer(lambda prompt, seed: "right right right {]") as server:
        done = llmkit("probe-knowledge", parrot, "--questions", asked, "--judge", server.spec, "-o", tmp_path / "r")
        assert done.returncode == 2 and not (tmp_path / "r").exists()
        assert len(server.requests) == 6  # each of the three once more
        assert "--judge: no verdict of openai:#tiny could be read, in 15 judgements" in done.stderr
        assert "'right right right {]'" in done.stderr
        server.answer = lambda prompt, seed: "right {]" if "number 0" in prompt else "VERDICT: right"
        again = probe(parrot, tmp_path / "r", questions=asked, judge=server.spec, force=True, concurrency=1)
        assert (again.known, again.mixed, again.unreadable_judgements) == (2, 1, 5)
        server.answer = lambda prompt, seed: "right right right {]"
        with pytest.raises(
            UserError, match=r"--writer: no question of openai:#tiny .*unreadable reply 12.*example: .right right"
        ):
            probe(parrot, tmp_path / "s.jsonl", passages=documents, writer=server.spec)
    assert not list(tmp_path.glob("*.state"))


def test_a_refusing_model_is_not_taken_for_a_knowing_one(tmp_path):
    silent = save_assistant(tmp_path / "silent", "Nope!")
    asked = questions(tmp_path / "q.jsonl")
    wordings = tmp_path / "own.json"
    wordings.write_text(json.dumps({"en": ["Nope!"]}))
    with ChatServer(lambda prompt, seed: "VERDICT: right") as server:
        summary = probe(silent, tmp_path / "r.jsonl", questions=asked, judge=server.spec, refusals=str(wordings))
        assert summary.evasive == 3 and server.requests == []


def test_a_server_that_is_down_is_reported_before_the_work(parrot, tmp_path, llmkit):
    with ChatServer(clever) as server:
        pass
    asked = questions(tmp_path / "q.jsonl")
    done = llmkit("probe-knowledge", parrot, "--questions", asked, "--judge", server.spec, "-o", tmp_path / "r", *QUICK)
    assert done.returncode == 2 and done.stdout == ""
    (error,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert error.startswith(f"llmkit: error: --judge {server.url}: cannot be reached")
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_an_interrupted_run_does_not_wait_for_the_server(parrot, tmp_path):
    asked = questions(tmp_path / "q.jsonl", 40)
    with ChatServer(lambda prompt, seed: "VERDICT: right") as server:
        server.faults, server.slow = [*[None] * 10, *["slow"] * 90], 30.0
        options = ["--questions", str(asked), "--judge", server.spec, "-o", str(tmp_path / "r"), "--max-tokens", "9"]
        command = [sys.executable, "-m", "llmkit", "probe-knowledge", str(parrot), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while len(server.requests) < 14 and process.poll() is None:
                time.sleep(0.01)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate()
        assert process.returncode == 130 and "llmkit: error: interrupted" in said
        assert time.monotonic() - started < 10


# ---- folders


def test_a_folder_judges(parrot, tmp_path):
    judge = save_assistant(tmp_path / "judge", "VERDICT: right", context=4096)
    summary = probe(parrot, tmp_path / "r.jsonl", questions=questions(tmp_path / "q.jsonl"), judge=str(judge))
    assert (summary.known, summary.confirmations) == (3, 3) and summary.judged_by == str(judge)
    assert summary.usage["judge"]["requests"] == 3 and summary.usage["judge"]["completion_tokens"] > 0


def test_random_replies_of_a_folder_are_counted(parrot, documents, tmp_path):
    babbler = save_assistant(tmp_path / "babbler", context=2048)
    options = {"questions": questions(tmp_path / "q.jsonl"), "samples": 2}
    with pytest.raises(UserError, match=r"--judge: no verdict of .*babbler could be read, in 6 judgements"):
        probe(parrot, tmp_path / "r.jsonl", judge=str(babbler), **options)
    with pytest.raises(UserError, match=r"--writer: no question of .*passages: unreadable reply 12"):
        probe(parrot, tmp_path / "s.jsonl", passages=documents, writer=str(babbler))
    with pytest.raises(UserError, match=r"--writer: no question of .*passages: longer than the model's context 12"):
        probe(parrot, tmp_path / "s.jsonl", passages=documents, writer=str(parrot))


def test_a_run_does_not_resume_with_another_judge(parrot, tmp_path):
    asked = questions(tmp_path / "q.jsonl")
    with ChatServer(lambda prompt, seed: "VERDICT: right") as server:
        server.dies_after = 2
        with pytest.raises(UserError, match="--resume continues"):
            probe(parrot, tmp_path / "r.jsonl", questions=asked, judge=server.spec)
        with pytest.raises(UserError, match=r"another run: --judge was openai:#tiny and is now match; .*--force"):
            probe(parrot, tmp_path / "r.jsonl", questions=asked, resume=True)


# ---- reports, and bad input


def test_a_dry_run_shows_the_prompts_without_requests(parrot, documents, tmp_path, llmkit):
    options = ["--writer", "openai:http://127.0.0.1:9/v1#tiny", "--judge", parrot, "--dry-run", "-o", tmp_path / "r"]
    done = llmkit("probe-knowledge", parrot, "--passages", documents, *options)
    assert (done.returncode, done.stdout) == (0, "") and not (tmp_path / "r").exists()
    assert WRITER_PROMPT in done.stderr and JUDGE_PROMPT in done.stderr
    assert "36 questions, written by openai:#tiny at most, 5 answers each" in done.stderr


def test_the_documentation_has_the_prompts_and_every_option():
    from llmkit.config import flag_of, option_fields

    text = DOCS.read_text()
    indented = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    for prompt in (WRITER_PROMPT, JUDGE_PROMPT):
        assert re.sub(r"\n+", "\n", prompt) in re.sub(r"\n+", "\n", indented)
    for item in option_fields(ProbeKnowledgeConfig):
        if flag_of(item).startswith("--"):
            assert re.search(rf"[`/]{flag_of(item)}\b", text), flag_of(item)


def test_contradictory_options_are_refused(parrot, documents, tmp_path):
    asked = questions(tmp_path / "q.jsonl")
    out = tmp_path / "r.jsonl"
    for options, message in (
        ({"questions": asked, "writer": str(parrot)}, "--writer: needs --passages, to write"),
        ({"questions": asked, "judge": "mtach"}, "--judge: expected the folder of a model, or openai:.*, found mtach"),
        ({"questions": asked, "judge": "openai:localhost"}, "--judge: expected a server and its model, such as"),
        ({"passages": documents, "writer": "openai:#m"}, "--writer: expected a server and its model, such as"),
        ({"recite": str(documents), "judge": str(parrot)}, "--recite: cannot be combined"),
    ):
        with pytest.raises(UserError, match=message):
            probe(parrot, out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.jsonl", "q.jsonl"]
