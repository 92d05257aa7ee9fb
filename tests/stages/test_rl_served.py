"""`llmkit rl --engine openai:URL#NAME` as a user runs it: a server samples, and loads the weights of every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_server import ModelServer
from tiny import make_model, save_assistant, save_folder

from llmkit.errors import UserError
from llmkit.stages.rl import RlConfig, run
from tests.helpers.jsonl import lines, write

QUICK = {"group": 4, "batch_size": 4, "max_tokens": 6, "learning_rate": 0.01, "max_steps": 3}
pytestmark = pytest.mark.usefixtures("one_retry")
SERVED = {"timeout": 120.0, "quiet": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("base") / "base", make_model(context=128))


@pytest.fixture
def problems(tmp_path) -> Path:
    rows = [{"prompt": f"Throw {i}", "answer": "x", "id": i} for i in range(8)]
    path = tmp_path / "problems.jsonl"
    write(path, *rows)
    (tmp_path / "score.py").write_text('def low(record):\n    return sum(map(ord, record["completion"])) % 7\n')
    return path


def train(model: Path, problems: Path, server: ModelServer, **options):
    """Run in this process, with the output `policy` next to the problems."""
    judged = (f"py:{problems.with_name('score.py')}:low",)
    given = QUICK | SERVED | {"reward": judged, "engine": server.spec} | options
    return run(RlConfig(model=str(model), data=(str(problems),), out=str(problems.with_name("policy")), **given))


@pytest.mark.parametrize(
    ("kind", "more"),
    [("vllm", {}), ("sglang", {"lora_rank": 4}), ("sglang", {"temperature": 1.3}), ("vllm", {"updates": 2})],
)
def test_rollouts_come_from_the_server_with_the_policys_weights(base, problems, kind, more):
    with ModelServer(base, kind) as server:
        summary = train(base, problems, server, val=(str(problems),), eval_every=2, **more)
        sampled = [body for body in server.requests if body and "prompt" in body]
    assert summary is not None and summary.steps == 3
    steps = [row for row in lines(Path(summary.path) / "metrics.jsonl") if "reward" in row]
    assert len(steps) == 3 and all(row["logprob_difference_max"] < 1e-4 for row in steps)
    # before each step, and before the evaluations of steps 0, 2 and 3
    assert len(server.loaded) == 6 and len(set(server.loaded)) == 6
    assert server.resets == (6 if kind == "vllm" else 0)
    rollouts = lines(Path(summary.path) / "rollouts.jsonl")
    assert len(rollouts) == 16 * len(steps) and len(sampled) == len(rollouts) + 3 * 8
    assert all(len(row["token_ids"]) == len(row["logprobs"]) >= 1 for row in rollouts)
    assert all(body["top_k"] == -1 and body["return_token_ids"] and body["logprobs"] == 1 for body in sampled)
    assert not [path for path in server.loaded if path.exists()] and not (Path(summary.path) / "served").exists()


def test_the_policy_that_is_saved_is_the_one_that_was_handed_over_last(base, problems, tmp_path):
    from llmkit.model.folder import load_model

    class Copying(ModelServer):
        def _load(self, folder: Path) -> None:
            super()._load(folder)
            self.steps = [*getattr(self, "steps", []), load_model(folder)]

    with Copying(base) as server:
        summary = train(base, problems, server, val=(str(problems),), seed=1)  # the last policy is the best
        assert summary is not None
    saved = dict(load_model(summary.path).named_parameters())
    last = dict(server.steps[-1].named_parameters())
    first = dict(server.steps[0].named_parameters())
    assert all(saved[name].equal(last[name]) for name in saved)
    assert not all(saved[name].equal(first[name]) for name in saved)


@pytest.mark.parametrize(
    ("kind", "lie", "said"),
    [
        ("vllm", "few logprobs", r"problems.jsonl:\d: expected log-probabilities of \d tokens, found \d"),
        ("sglang", "no logprobs", "expected log-probabilities, found none"),
        ("vllm", "no ids", r"expected token ids, found none; serve the model with vLLM or SGLang"),
        ("sglang", "abort", "expected a completion that ends by stop or length, found 'abort'"),
        ("sglang", "stale", "expected weights 'policy-.*', found 'default'"),
        (
            "sglang",
            "refuses",
            r"have other shapes.*update_weights_from_disk\): it did not load the policy.*can it read /",
        ),
        ("vllm", "refuses", r"it did not load the policy.*started with VLLM_SERVER_DEV_MODE=1, and can it read /"),
    ],
)
def test_wrong_answers_of_a_server_end_the_run_in_one_line(base, problems, kind, lie, said):
    with ModelServer(base, kind) as server:
        server.lies = {lie}
        with pytest.raises(UserError, match=said) as raised:
            train(base, problems, server)
    assert "\n" not in str(raised.value) and not problems.with_name("policy").exists()


def test_stale_weights_of_a_server_are_noticed_by_their_log_probabilities(base, problems):
    with ModelServer(base, "vllm") as server:
        server.lies = {"stale"}
        said = r"sampler and trainer disagree: .* differ by .* expected at most 0.05; saved in"
        with pytest.raises(UserError, match=said):
            train(base, problems, server)
    steps = [row for row in lines(problems.with_name("policy.partial") / "metrics.jsonl") if "reward" in row]
    assert len(steps) == 1  # sampled with the weights that the server had


def test_a_rollout_without_its_end_token_is_not_trained_on(problems, tmp_path):
    parrot = save_assistant(tmp_path / "parrot", "x")
    with ModelServer(parrot) as server:
        server.lies = {"no end"}
        with pytest.raises(UserError, match=r"expected an end token last \(\[.*\]\), found .* does not learn to stop"):
            train(parrot, problems, server)


@pytest.mark.parametrize("dies_after", [20, 40])
def test_a_run_resumes_after_its_server_died(base, problems, dies_after):
    with ModelServer(base) as server:
        server.dies_after = dies_after
        with pytest.raises(UserError, match=r"cannot be reached.*saved after step \d in .*; --resume continues"):
            train(base, problems, server)
    with ModelServer(base, "sglang") as server:  # another server, at another port, with old weights
        summary = train(base, problems, server, resume=True)
    assert summary is not None and summary.steps == 3
    steps = [row for row in lines(Path(summary.path) / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(row["logprob_difference_max"] < 1e-4 for row in steps)
    assert [row["step"] for row in lines(Path(summary.path) / "rollouts.jsonl")] == [1] * 16 + [2] * 16 + [3] * 16


def test_faults_that_pass_are_outlived(base, problems, monkeypatch):
    monkeypatch.setattr("llmkit.generation.served_models.RETRIES", 6)
    with ModelServer(base) as server:
        server.faults = ["429", "500", "cut", "page", "429", "500"]
        summary = train(base, problems, server)
    assert summary is not None and summary.steps == 3


@pytest.mark.parametrize("kind", ["llamacpp", "strict"])
def test_a_server_that_cannot_load_weights_is_refused_before_the_work(base, problems, kind):
    with ModelServer(base, kind) as server, pytest.raises(UserError, match=f"expected vLLM or SGLang, .* found {kind}"):
        train(base, problems, server)
    assert not problems.with_name("policy.partial").exists()


def test_a_dry_run_leaves_the_server_as_it_is(base, problems):
    with ModelServer(base) as server:
        assert train(base, problems, server, dry_run=True) is None
    assert server.requests == [] and not problems.with_name("policy.partial").exists()


def test_tools_are_called_here_alone(base, problems):
    with ModelServer(base) as server, pytest.raises(UserError, match="--tools: cannot be combined with --engine"):
        train(base, problems, server, tools=("calc",))
