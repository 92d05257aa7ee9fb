"""`llmkit sample --engine openai:URL#NAME` as a user runs it, with servers that fail, refuse and lie."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from model_server import ModelServer
from served import serving
from tiny import make_model, save_assistant, save_folder

from llmkit.config import resolve
from llmkit.display import printable
from llmkit.errors import UserError
from llmkit.stages.sample import SampleConfig, run
from tests.helpers.jsonl import lines, write

PROMPTS = ["It was a dark", "and stormy night;", "the rain fell", "ü", "It was a dark", "in torrents, except", "at"]

pytestmark = pytest.mark.usefixtures("one_retry")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "base", make_model(context=128, spread=1.5))


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("models") / "babbler")


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", *[{"id": i, "prompt": text} for i, text in enumerate(PROMPTS)])


def sample(model: Path | None, out: Path, **options) -> list[dict]:
    """Run in this process and return the records."""
    served = {"timeout": "120", "concurrency": "3"} if "engine" in options else {}
    given = {"out": str(out), "quiet": True, "jsonl": True, "max_tokens": "20", **served, **options}
    run(resolve(SampleConfig, {"model": None if model is None else str(model), **given}))
    return lines(out)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_token_ids_go_out_and_come_back_and_records_are_those_of_the_local_engine(folder, prompts, tmp_path, kind):
    options = {"inputs": [str(prompts)], "temperature": "0", "stop": ["zz"], "logprobs": True}
    with ModelServer(folder, kind) as server:
        made = sample(folder, tmp_path / "served.jsonl", engine=server.spec, **options)
        assert all(isinstance(body["prompt"], list) for body in server.requests) and 2 <= server.most_open <= 3
        named = {name: server.requests[0][name] for name in ("top_p", "top_k", "min_p", "repetition_penalty", "stop")}
        assert named == {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "stop": ["zz"]}
    ours = sample(folder, tmp_path / "ours.jsonl", **options)
    for one, other in zip(made, ours, strict=True):
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-5)
        del other["truncated_logprobs"]
        assert list(one) == list(other) and one == other


def test_without_a_folder_only_text_and_messages_in_openais_format_are_sent(babbler, tmp_path):
    asked = [{"prompt": "Who"}, {"messages": [{"role": "user", "content": "Who?"}]}]
    with ModelServer(babbler, "strict") as server:
        made = sample(write(tmp_path / "in.jsonl", *asked), tmp_path / "text.jsonl", engine=server.spec)
        assert {frozenset(body) for body in server.requests} == {
            frozenset({"model", "seed", "max_tokens", "temperature", name}) for name in ("prompt", "messages")
        }
    assert all("token_ids" not in one and one["completion"] for one in made)
    with serving(babbler) as server:
        options = {"inputs": [str(tmp_path / "in.jsonl")], "temperature": "0"}
        by_ids = sample(babbler, tmp_path / "ids.jsonl", engine=server.spec, **options)
        by_text = sample(None, tmp_path / "text2.jsonl", engine=server.spec, **options)
        assert [one["completion"] for one in by_ids] == [one["completion"] for one in by_text]


def test_reruns_agree_and_seeds_and_samples_differ(folder, prompts, tmp_path):
    with serving(folder) as server:
        options = {"engine": server.spec, "inputs": [str(prompts)], "samples": "3"}
        first = sample(folder, tmp_path / "a.jsonl", **options)
        assert first == sample(folder, tmp_path / "b.jsonl", **options | {"concurrency": "1"})
        assert first != sample(folder, tmp_path / "c.jsonl", seed="1", **options)
        assert sample(folder, tmp_path / "e.jsonl", top_k="1", **options)[0]["completion"] != first[0]["completion"]
    assert [one["sample"] for one in first] == [0, 1, 2] * len(PROMPTS)
    assert len({one["completion"] for one in first}) == len(first)  # the repeated prompt has another seed


@pytest.mark.parametrize("dies_after", [4, 11])
def test_a_server_that_dies_is_resumed_to_the_same_bytes(folder, prompts, tmp_path, dies_after):
    out, options = tmp_path / "out.jsonl", {"inputs": [str(prompts)], "samples": "2", "concurrency": "2"}
    with ModelServer(folder) as server:
        server.dies_after = dies_after
        with pytest.raises(UserError, match=r"cannot be reached after 1 retry.*--resume continues \(.*out.jsonl.state"):
            sample(folder, out, engine=server.spec, **options)
        assert not out.exists() and (tmp_path / "out.jsonl.state").read_bytes().count(b"completion") >= 1
    with ModelServer(folder) as server:  # at another port
        sample(folder, out, engine=server.spec, resume=True, **options)
        assert len(server.requests) < 2 * len(PROMPTS)
        sample(folder, tmp_path / "whole.jsonl", engine=server.spec, **options)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.state"))


def test_faults_that_pass_change_nothing(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.generation.served_models.RETRIES", 8)
    made = []
    for faults in ([], ["429", "500", "cut", "500", "page", "429"]):
        with ModelServer(folder) as server:
            server.faults = faults
            options = {"engine": server.spec, "inputs": [str(prompts)]}
            made.append(sample(folder, tmp_path / f"{len(faults)}.jsonl", **options))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", r"too many requests after 1 retry \(429\); lower --concurrency"),
        ("500", r"fails after 1 retry \(500\)"),
        ("404", r"has no model 'tiny', or the URL is wrong \(404\)"),
        ("page", "expected a completion, found '<html>"),
        ("context", r"prompts.jsonl:1: the prompt, with --max-tokens 20, is longer than the context of .*tiny"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_leaves_nothing(folder, prompts, tmp_path, fault, said):
    with ModelServer(folder) as server:
        server.faults = [fault] * 40
        with pytest.raises(UserError, match=said) as raised:
            sample(folder, tmp_path / "out.jsonl", engine=server.spec, inputs=[str(prompts)], concurrency="1")
    assert "\n" not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("few logprobs", r"prompts.jsonl:1: expected log-probabilities of (\d+) tokens, found \d+"),
        ("no logprobs", "expected log-probabilities, found none; the server does not return them"),
        ("abort", r"prompts.jsonl:1: expected a completion that ends by stop or length, found 'abort'"),
    ],
)
@pytest.mark.parametrize("by_ids", [True, False])
def test_a_server_with_fewer_fields_than_requested_is_named(folder, prompts, tmp_path, lie, said, by_ids):
    with ModelServer(folder) as server:
        server.lies = {lie}
        options = {"inputs": [str(prompts)], "logprobs": True, "concurrency": "1"}
        with pytest.raises(UserError, match=f"--engine {server.url}: .*{said}"):
            sample(folder if by_ids else None, tmp_path / "out.jsonl", engine=server.spec, **options)


def test_a_server_without_token_ids_gets_text_requests(folder, prompts, tmp_path):
    with ModelServer(folder) as server:
        server.lies = {"no ids"}
        made = sample(folder, tmp_path / "out.jsonl", engine=server.spec, inputs=[str(prompts)])
    assert all(one["completion"] and "token_ids" not in one for one in made)


def test_ids_in_place_of_token_names_are_accepted(folder, prompts, tmp_path):
    made = []
    with ModelServer(folder) as server:
        for server.lies in (set(), {"ids as names"}):
            options = {"engine": server.spec, "inputs": [str(prompts)], "logprobs": True}
            made.append(sample(folder, tmp_path / f"{len(made)}.jsonl", **options))
    assert made[0] == made[1] and all(one["token_ids"] for one in made[0])


def test_a_server_with_another_tokenizer_is_named(folder, prompts, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    spec = json.loads((other / "tokenizer.json").read_text())
    names = sorted(spec["model"]["vocab"])
    spec["model"]["vocab"] = {name: (number + 7) % 256 for number, name in enumerate(names)}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with (
        ModelServer(other) as server,
        pytest.raises(
            UserError, match=r"its tokenizer differs from .*base: its tokens decode to .* here and to .* there"
        ),
    ):
        sample(folder, tmp_path / "out.jsonl", engine=server.spec, inputs=[str(prompts)])


def test_a_server_that_accepts_only_text_is_recognized(folder, prompts, tmp_path):
    said = r"refuses the request \(422\): .*; does it accept token ids\? Omit MODEL to send text"
    with ModelServer(folder, "strict") as server, pytest.raises(UserError, match=said):
        sample(folder, tmp_path / "out.jsonl", engine=server.spec, inputs=[str(prompts)])


# ---- one prompt, and conversations


def test_a_prompt_is_continued_on_a_pipe_and_on_a_terminal(folder, llmkit, on_terminal):
    with ModelServer(folder, "sglang") as server:
        words = ["sample", str(folder), "--engine", server.spec, "-p", "It was", "--max-tokens", "30", "--top-k", "20"]
        piped = llmkit(*words)
        assert piped.returncode == 0, piped.stderr
        assert piped.stderr.startswith("llmkit: openai:#tiny: 1 request, ") and len(piped.stderr.splitlines()) == 1
        shown = on_terminal(sys.executable, "-m", "llmkit", *words, "--quiet")
        assert server.requests[-1]["stream"] and "stream" not in server.requests[0]
        server.faults = ["cut stream"]
        cut = on_terminal(sys.executable, "-m", "llmkit", *words, "--quiet")
    assert piped.stdout.strip() and shown.replace("\r\n", "\n").split() == printable(piped.stdout).split()
    assert "llmkit: error: --engine" in cut and "an answer has no finish reason; was the server stopped?" in cut


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_conversation(babbler, llmkit, with_folder):
    with ModelServer(babbler) as server:
        words = [
            "sample",
            *([babbler] if with_folder else []),
            "--engine",
            server.spec,
            "--chat",
            "--system",
            "Be brief.",
        ]
        done = llmkit(*words, "--max-tokens", "9", "--temperature", "0", stdin="Hello\nAgain\n")
        assert done.returncode == 0, done.stderr
    assert len(server.requests) == 2
    if not with_folder:
        roles = [one["role"] for one in server.requests[1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
    local = llmkit("sample", babbler, "--chat", "--system", "Be brief.", "--max-tokens", "9",
                   "--temperature", "0", "--quiet", stdin="Hello\nAgain\n")  # fmt: skip
    assert done.stdout == local.stdout and done.stdout.strip()


def test_a_dry_run_asks_whether_it_is_there(folder, llmkit):
    with ModelServer(folder) as server:
        words = ["sample", folder, "--engine", server.spec, "-p", "a", "--dry-run"]
        done = llmkit(*words)
        assert (done.returncode, done.stdout, server.requests) == (0, "", []) and "token ids of" in done.stderr
    done = llmkit(*words)
    assert done.returncode == 2 and "cannot be reached" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": "calc"}, "--tools: expected no MODEL with --engine"),
        ({"batch_size": "3"}, "--batch-size: has no effect with --engine"),
        ({"max_tokens": "none"}, "--max-tokens none: expected a number with --engine"),
        ({"model": "no/where"}, "no/where: expected a model folder or an input file, found nothing"),
        ({"engine": "http://localhost"}, "--engine: expected a server and its model, such as openai:http"),
        ({"engine": "local", "concurrency": "3"}, "--concurrency: has no effect without --engine"),
        ({"engine": "local", "model": None}, "MODEL is missing: a model folder, such as llmkit sample"),
    ],
)
def test_bad_input_is_named(folder, options, said):
    given = {"model": str(folder), "engine": "openai:http://127.0.0.1:9/v1#m", "prompt": "a"} | options
    with pytest.raises(UserError, match=said):
        run(resolve(SampleConfig, given))
