"""`llmkit rl` as a user runs it: a policy that improves, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import END, VOCABULARY, certain, make_model, save_assistant, save_folder, save_tokenizer

from llmkit.errors import UserError
from llmkit.formats.conversations import read_conversation
from llmkit.io.records import Row
from llmkit.model.folder import save_model
from llmkit.reward_model.head import RewardModel, save_reward_model
from llmkit.stages.rl import RlConfig, run
from llmkit.tokenizer.chat import CHAT_SPECIALS
from llmkit.tokenizer.encoding import load_tokenizer
from tests.helpers.jsonl import lines, write

QUICK = ["--group", "8", "--batch-size", "4", "--max-tokens", "6", "--learning-rate", "0.003"]


def train(model: Path, problems: Path, out: Path, **options):
    """Run in this process, which has already imported torch."""
    quick = {"group": 8, "batch_size": 4, "max_tokens": 6, "learning_rate": 0.003, "max_steps": 2}
    return run(RlConfig(model=str(model), data=(str(problems),), out=str(out), **quick | options))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def coin(base, llmkit, tmp_path_factory) -> Path:
    """An assistant trained to answer heads or tails, independent of the number of the throw."""
    folder = tmp_path_factory.mktemp("coin")
    sides = ("heads", "tails")
    chats = write(folder / "c.jsonl", *({"prompt": f"Throw {i}", "completion": s} for i in range(10) for s in sides))
    speed = ["--sequence-length", "96", "--batch-tokens", "192", "--learning-rate", "0.004", "--warmup-steps", "2"]
    done = llmkit("sft", base, "--data", chats, "--max-steps", "100", *speed, "-o", folder / "coin")
    assert done.returncode == 0, done.stderr
    return folder / "coin"


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    rows = ({"prompt": f"Throw {i}", "answer": "heads", "verifier": "exact", "id": i} for i in range(8))
    return write(tmp_path_factory.mktemp("data") / "problems.jsonl", *rows)


@pytest.fixture(scope="module")
def policy(coin, problems, llmkit, tmp_path_factory) -> Path:
    """A policy that always answers heads."""
    out = tmp_path_factory.mktemp("policy") / "policy"
    done = llmkit("rl", coin, "--data", problems, "--val", problems, "--max-steps", "12", *QUICK, "-o", out)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["path"] == str(out) and summary["val_success"] == 1.0
    assert 8 <= summary["steps"] <= 12  # it may end when every rollout is right, and CPUs round differently
    return out


# ---- output


def test_it_gets_better_than_its_examples(policy):
    steps = [row for row in lines(policy / "metrics.jsonl") if "reward" in row]
    assert 0.2 < steps[0]["success"] < 0.8 and steps[-1]["success"] > 0.95
    assert all(row["logprob_difference_max"] < 1e-4 for row in steps)


def test_the_log_has_every_rollout(policy, problems):
    rollouts = lines(policy / "rollouts.jsonl")
    steps = [row for row in lines(policy / "metrics.jsonl") if "reward" in row]
    assert len(rollouts) == sum(row["groups"] for row in steps) * 8
    for row in rollouts:
        assert len(row["token_ids"]) == len(row["logprobs"]) and row["finish_reason"] in ("stop", "length")
        assert row["rewards"]["verifier"] == row["reward"] == float(row["completion"] == "heads")
    by_group: dict[int, list[dict]] = {}
    for row in rollouts:
        by_group.setdefault(row["group"], []).append(row)
    for group in by_group.values():
        assert len({row["prompt"] for row in group}) == 1 and len(group) == 8
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
        if len({row["reward"] for row in group}) == 1:
            assert not any(row["trained"] for row in group)


def test_its_log_is_input_of_other_stages(policy, coin, llmkit, tmp_path):
    best = [row for row in lines(policy / "rollouts.jsonl") if row["reward"] == 1][:50]
    kept = write(tmp_path / "best.jsonl", *best)
    done = llmkit("sft", coin, "--data", kept, "--max-steps", "1", "--sequence-length", "96", "-o", tmp_path / "chat")
    assert done.returncode == 0, done.stderr
    prefs = [{"prompt": f"Throw {i}", "chosen": "heads", "rejected": "tails"} for i in range(20)]
    arguments = ["--data", write(tmp_path / "p.jsonl", *prefs), "--max-steps", "1", "-o", tmp_path / "judge"]
    assert llmkit("train-reward", coin, *arguments).returncode == 0
    done = llmkit("train-reward", "--score", tmp_path / "judge", kept)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 50


def test_the_folder_has_its_curves(policy):
    for name in ("reward.svg", "success.svg", "length.svg"):
        assert (policy / name).read_text().count('stroke-width="1.5"') == 2  # training and held out
    manifest = json.loads((policy / "manifest.json").read_text())
    assert manifest["stage"] == "rl" and len(manifest["inputs"]) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"algo": "dapo", "updates": 2},
        {"algo": "gspo"},
        {"algo": "rloo", "kl_coef": 0.1},
        {"algo": "reinforce++", "kl_coef": 0.1},
        {"algo": "reinforce++", "group": 1, "batch_size": 32},
        {"algo": "dr-grpo", "kl_coef": 0.1, "lora_rank": 4},
        {"algo": "rloo", "kl_coef": 0.1, "lora_rank": 4, "quantize": "int8"},
        {"reward": ("verifier", "length:-0.1"), "temperature": 0.8},
    ],
)
def test_every_algorithm_runs(coin, problems, tmp_path, more):
    train(coin, problems, tmp_path / "p", **more)
    steps = [row for row in lines(tmp_path / "p" / "metrics.jsonl") if "reward" in row]
    assert len(steps) == 2 and all(row["logprob_difference_max"] < 1e-4 for row in steps)
    assert ("kl_per_attempt" in steps[0]) == ("kl_coef" in more)


# ---- selection of groups


def scripted(coin: Path, folder: Path, worth: str, **options):
    """Train a step with rewards `worth`, a function of the group's number; return its metrics and all rollouts."""
    problems = write(folder / "p.jsonl", *({"prompt": f"Throw {i}", "answer": "heads"} for i in range(100)))
    size = options.setdefault("group", 2)
    (folder / "score.py").write_text(
        f"CALLS = []\ndef reward(record):\n    number, sample = divmod(len(CALLS), {size})\n    CALLS.append(1)\n"
        f"    return ({worth})[sample]\n"
    )
    reward = (f"py:{folder / 'score.py'}:reward",)
    train(coin, problems, folder / "p", reward=reward, **{"max_steps": 1} | options)
    (step,) = [row for row in lines(folder / "p" / "metrics.jsonl") if "reward" in row]
    return step, lines(folder / "p" / "rollouts.jsonl")


@pytest.mark.parametrize(
    ("worth", "groups", "silent", "trained"),
    [
        ("(0, number % 2)", 8, 4, 4),  # groups without signal are replaced
        ("(0, number % 4 == 0)", 8, 6, 2),  # by as many at most
        ("(0, number != 1)", 6, 2, 4),  # one surplus group is logged and counted, but not trained on
    ],
)
def test_groups_without_signal_are_replaced(coin, tmp_path, worth, groups, silent, trained):
    step, rollouts = scripted(coin, tmp_path, worth)
    assert (step["groups"], step["groups_without_signal"]) == (groups, silent)
    assert len({row["group"] for row in rollouts}) == groups
    assert len({row["group"] for row in rollouts if row["trained"]}) == trained


@pytest.mark.parametrize("group", [1, 2])
def test_a_baseline_of_the_batch_learns_from_groups_whose_rewards_are_all_equal(coin, tmp_path, group):
    """REINFORCE++ (arXiv 2501.03262) normalizes over the batch: solved problems have a higher advantage."""
    step, rollouts = scripted(coin, tmp_path, f"(number % 2,) * {group}", algo="reinforce++", group=group)
    assert (step["groups"], step["groups_without_signal"]) == (4, 0)
    assert [row["advantage"] for row in rollouts] == ([-1] * group + [1] * group) * 2


def test_a_run_ends_where_nothing_is_left_to_learn(coin, tmp_path, capsys):
    scripted(coin, tmp_path, "(1, 0 if number in (1, 3) else 1)", max_steps=3)
    said = "stopping after step 1: nothing left to learn: all attempts at each of 32 problems had the same reward (the"
    assert said in capsys.readouterr().err


def test_a_rollout_that_cannot_be_judged_is_excluded_from_its_group(coin, tmp_path):
    step, rollouts = scripted(coin, tmp_path, "(1.0, None, 0.0, 0.0)", group=4, batch_size=2)
    assert step["unjudged"] == 0.25 and step["reward"] == pytest.approx(1 / 3, abs=1e-4)
    assert step["groups_without_signal"] == 0
    assert [row["reward"] for row in rollouts[:4]] == [1, None, 0, 0]
    assert [row["trained"] for row in rollouts[:4]] == [True, False, True, True]
    assert sum(row["advantage"] for row in rollouts[:4]) == pytest.approx(0, abs=1e-4)


def test_a_reward_that_can_judge_nothing_ends_the_run(coin, tmp_path):
    with pytest.raises(UserError, match=r"score.py:reward: expected a number for some of \d+ attempts, found None"):
        scripted(coin, tmp_path, "(None, None)")


# ---- tools


@pytest.fixture(scope="module")
def unsure(tmp_path_factory) -> Path:
    """An assistant that calls the calculator and then says x in half of its answers, and says z in the others."""
    folder = tmp_path_factory.mktemp("unsure")
    save_tokenizer(folder, *CHAT_SPECIALS)
    tokenizer = load_tokenizer(folder)
    names = ("im_sep", "calc_start", "calc_end", "result_end", "im_end")
    header, start, end, result_end, turn = (tokenizer.specials[f"<|{name}|>"] for name in names)
    model = make_model(vocab_size=tokenizer.vocab_size, eos_token_id=(END, turn))
    x, z = tokenizer.encode("xz")
    certain(model, header, start, *tokenizer.encode("1+2"), end)
    with torch.no_grad():
        for place, (token, following) in enumerate([(result_end, x), (x, turn), (z, turn)], 20):
            model.embed_tokens[token, place] = 1.0
            model.lm_head[following, place] = 10.0
        model.lm_head[z] += model.lm_head[start]
    save_model(model, folder)
    return folder


def test_calls_are_learnt_from_what_follows_them(unsure, tmp_path):
    rows = [{"prompt": f"Sum {i}", "answer": "x", "verifier": "exact"} for i in range(8)]
    problems = write(tmp_path / "p.jsonl", *rows)
    train(unsure, problems, tmp_path / "p", tools=("calc",), max_tokens=16, max_steps=6, learning_rate=0.05)
    steps = [row for row in lines(tmp_path / "p" / "metrics.jsonl") if "reward" in row]
    assert 0.2 < steps[0]["called"] < 0.8 and steps[-1]["called"] > 0.85
    assert all(row["logprob_difference_max"] < 1e-4 for row in steps)
    called = [row for row in lines(tmp_path / "p" / "rollouts.jsonl") if row["tool_calls"]]
    for row in called:
        given = [token for token, own in zip(row["token_ids"], row["sampled"], strict=True) if not own]
        assert len(given) == 3 and chr(given[1] + 33) == "3"  # between its two tokens; byte tokens start at 33
        assert row["completion"] == "x" and row["reward"] == 1
    answer = read_conversation(Row(called[0], "rollouts.jsonl", 1)).messages[-1]
    assert [(part.kind, part.text) for part in answer.parts] == [("calc", "1+2"), ("result", "3"), ("text", "x")]


def test_a_call_beyond_the_limit_ends_a_rollout_which_is_judged_by_its_text(unsure, tmp_path):
    rows = [{"prompt": f"Sum {i}", "answer": "z", "verifier": "exact"} for i in range(8)]
    problems = write(tmp_path / "p.jsonl", *rows)
    train(unsure, problems, tmp_path / "p", tools=("calc",), max_tokens=16, max_tool_calls=0)
    ends = {row["finish_reason"]: row["reward"] for row in lines(tmp_path / "p" / "rollouts.jsonl")}
    assert ends == {"tool_limit": 0, "stop": 1}


def test_calls_of_a_tool_that_was_not_given_are_counted(unsure, tmp_path, capsys):
    rows = [{"prompt": f"Sum {i}", "answer": "z", "verifier": "exact"} for i in range(8)]
    problems = write(tmp_path / "p.jsonl", *rows)
    start = load_tokenizer(unsure).specials["<|calc_start|>"]
    for tools in ((), ("python",), ("calc",)):
        out = tmp_path / f"p{len(tools) and tools[0]}"
        train(unsure, problems, out, tools=tools, max_tokens=16)
        calls = sum(row["token_ids"].count(start) for row in lines(out / "rollouts.jsonl"))
        said = (
            f"llmkit: {calls} calls of calc stayed text in the completions, because it is not enabled; enable it with "
        )
        assert (said in capsys.readouterr().err) == (tools != ("calc",)) and calls > 1


# ---- early stops


def test_a_constant_reward_stops_the_run(coin, tmp_path):
    never = write(tmp_path / "never.jsonl", *({"prompt": f"Throw {i}", "answer": "edge"} for i in range(4)))
    with pytest.raises(UserError, match=r"nothing left to learn.*sometimes solved"):
        train(coin, never, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_policy_that_solves_all_is_saved(coin, problems, tmp_path):
    summary = train(coin, problems, tmp_path / "p", max_steps=60)
    assert summary.steps < 60 and "nothing left to learn" in summary.stopped
    assert (tmp_path / "p" / "model.safetensors").exists()


def test_a_time_budget_that_is_over_makes_one_step(coin, problems, tmp_path):
    assert train(coin, problems, tmp_path / "p", max_steps=None, time_budget=0.001).steps == 1


def test_a_divergence_beyond_its_limit_stops_it(coin, problems, tmp_path):
    summary = train(coin, problems, tmp_path / "p", max_kl=1e-9, max_steps=9)
    assert summary.steps < 9 and "--max-kl" in summary.stopped


def test_a_reward_that_is_gamed_stops_it_and_the_best_is_kept(coin, problems, tmp_path):
    """Longer answers are rewarded, while the gold reward wants heads: the coin becomes wordy."""
    watching = {"val": (str(problems),), "gold": "verifier", "stop_on_hack": True, "eval_every": 2, "eval_samples": 8}
    faster = {"batch_size": 8, "max_tokens": 24, "learning_rate": 0.002, "max_steps": 40}
    summary = train(coin, problems, tmp_path / "p", reward=("length",), **watching, **faster)
    assert "the reward is gamed" in summary.stopped and summary.steps < 40
    looks = [row for row in lines(tmp_path / "p" / "metrics.jsonl") if "val_gold" in row]
    best = max(looks, key=lambda row: row["val_gold"])
    assert looks[-1]["val_gold"] < best["val_gold"] and looks[-1]["val_reward"] > best["val_reward"]
    assert summary.kept_step == best["step"]
    assert (summary.val_gold, summary.val_reward) == (best["val_gold"], best["val_reward"])  # of the saved policy
    shown = lines(tmp_path / "p" / "disagreements.jsonl")
    assert len(shown) == 20 and all(row["gold"] == 0 for row in shown)
    assert [row["difference"] for row in shown] == sorted((row["difference"] for row in shown), reverse=True)


# ---- bad input


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """A reward model with one head, and one token more than the coin."""
    folder = tmp_path_factory.mktemp("judge")
    specials = (*CHAT_SPECIALS, "<|more|>")
    save_tokenizer(folder, *specials)
    model = make_model(vocab_size=VOCABULARY + len(specials))
    save_reward_model(RewardModel.of(model, heads=1, seed=3), folder, None)
    return folder


@pytest.mark.parametrize("algo", ["grpo", "dr-grpo", "dapo", "rloo", "gspo"])
def test_a_single_rollout_has_no_group_to_compare_with(coin, problems, tmp_path, algo):
    with pytest.raises(UserError, match=f"--group 1: --algo {re.escape(algo)} compares .* reinforce"):
        train(coin, problems, tmp_path / "policy", group=1, algo=algo)
    with pytest.raises(UserError, match="--group 1 --batch-size 1: expected at least two attempts"):
        train(coin, problems, tmp_path / "policy", group=1, batch_size=1, algo="reinforce++")


def test_a_rollout_may_use_the_rest_of_the_context(problems, tmp_path, capsys):
    """The default of 256 tokens would exclude every problem for a model with a context of 256."""
    chat = save_assistant(tmp_path / "chat", context=256)
    train(chat, problems, tmp_path / "policy", max_tokens=None, batch_size=16, dry_run=True)
    said = capsys.readouterr().err
    assert 200 < int(re.search(r"--max-tokens (\d+): all that the context of 256 leaves", said)[1]) < 256
    assert "8 problems\n" in said and "--batch-size 16: more than the 8 problems" in said


def test_long_answers_in_the_data_lead_to_longer_rollouts(tmp_path, capsys):
    """The default is twice the tokens of nearly all answers, at least 256; the plan shows it."""
    chat = save_assistant(tmp_path / "chat", context=2048)
    for length, said in ((300, "--max-tokens 600: twice the 300 tokens"), (3, "each, at most 256 tokens; reward: ")):
        rows = [{"prompt": f"Throw {i}", "solution": "h" * length, "answer": "h"} for i in range(8)]
        data = write(tmp_path / f"{length}.jsonl", *rows)
        train(chat, data, tmp_path / "policy", max_tokens=None, group=2, batch_size=1, dry_run=True)
        assert said in capsys.readouterr().err


MISTAKES = [
    ({"data": "{nothing}"}, "nothing.jsonl: expected a readable file: no such file"),
    ({"data": "{empty}"}, "empty.jsonl: expected problems, found none"),
    ({"data": "{wrong}"}, "wrong.jsonl:1: expected field 'prompt'"),
    ({"data": "{unanswered}"}, "unanswered.jsonl:1"),
    ({"reward": ("vibes",)}, "--reward vibes: expected verifier"),
    ({"max_tokens": 600}, "8 longer than the context"),
    ({"tools": ("py:{tool}:look",), "max_tokens": 600}, "tokens, with --tools' definitions"),
    ({"gold": "length"}, "--gold: needs --val"),
    ({"val": ("{problems}",), "gold": "verifier"}, "not trained on"),
    ({"time_budget": 1.0}, "expected one limit of the training length"),
    ({"model": "{base}", "system": "Be kind."}, "is a base model, which has no chat format"),
    ({"reward": ("rm:{judge}",)}, "expected the vocabulary of"),
    ({"val": ("{problems}",), "gold": "spread:{judge}"}, "expected a reward model of several heads, found one"),
    ({"model": "nowhere"}, "nowhere: expected a model folder, found nothing"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_user_error_is_one_line(coin, base, judge, problems, tmp_path, options, message):
    files = {
        "base": base,
        "judge": judge,
        "problems": problems,
        "nothing": tmp_path / "nothing.jsonl",
        "empty": write(tmp_path / "empty.jsonl"),
        "wrong": write(tmp_path / "wrong.jsonl", {"text": "?"}),
        "unanswered": write(tmp_path / "unanswered.jsonl", {"prompt": "2 + 2?"}),
        "tool": tmp_path / "tool.py",
    }
    files["tool"].write_text('def look(word: str) -> str:\n    """Look a word up."""\n    return word\n')

    def named(value):
        if isinstance(value, tuple):
            return tuple(map(named, value))
        return value.format(**files) if isinstance(value, str) else value

    options = {name: named(value) for name, value in options.items()}
    data = options.pop("data", problems)
    with pytest.raises(UserError) as mistake:
        train(options.pop("model", coin), data, tmp_path / "out", **options)
    assert message in str(mistake.value) and "\n" not in str(mistake.value)
    assert not list(tmp_path.glob("out*"))


RAISES = "def reward(record):\n    return len(record['completion']) / (record['id'] != {})\n"


@pytest.mark.parametrize("held_out", [False, True])
def test_a_reward_that_is_mended_trains_by_the_same_command(coin, problems, tmp_path, held_out):
    score = tmp_path / "score.py"
    more = {"reward": (f"py:{score}:reward",), "batch_size": 8, **({"val": (str(problems),)} if held_out else {})}
    score.write_text(RAISES.format(3))
    with pytest.raises(UserError, match=r"score\.py:2: ZeroDivisionError: .* for .*problems\.jsonl:4$"):
        train(coin, problems, tmp_path / "p", **more)
    assert not list(tmp_path.glob("p*"))
    score.write_text(RAISES.format(99))
    assert train(coin, problems, tmp_path / "p", **more).steps == 2


def test_a_reward_that_fails_in_the_second_step_leaves_the_first(coin, problems, tmp_path):
    score = tmp_path / "score.py"
    body = "CALLS = []\ndef reward(record):\n    CALLS.append(1)\n    return (record['completion'] == 'heads')"
    score.write_text(f"{body} / (len(CALLS) <= 70)\n")
    more = {"reward": (f"py:{score}:reward",), "max_steps": 3}
    told = r"ZeroDivisionError: division by zero for .*; saved after step [12] in .*; --resume continues"
    with pytest.raises(UserError, match=told):
        train(coin, problems, tmp_path / "p", **more)
    assert next(row["step"] for row in lines(tmp_path / "p.partial" / "metrics.jsonl") if "reward" in row) == 1
    score.write_text(body + "\n")
    with pytest.raises(UserError, match="an unfinished run"):
        train(coin, problems, tmp_path / "p", **more)
    assert train(coin, problems, tmp_path / "p", resume=True, **more).steps == 3
    assert [row["step"] for row in lines(tmp_path / "p" / "metrics.jsonl") if "reward" in row] == [1, 2, 3]


def test_a_base_model_is_warned_of(base, tmp_path, capsys):
    problems = write(tmp_path / "p.jsonl", *({"prompt": "a", "answer": "x"} for _ in range(4)))
    assert train(base, problems, tmp_path / "policy", reward=("length",), temperature=3.0, dry_run=True) is None
    assert "may never stop" in capsys.readouterr().err


def test_a_dry_run_reports_the_success_of_the_initial_policy(coin, problems, tmp_path, capsys):
    assert train(coin, problems, tmp_path / "policy", dry_run=True) is None
    told = capsys.readouterr().err
    assert (
        "of the attempts are right" in told and "of 4 groups have different rewards" in told and "GB of memory" in told
    )
    assert not list(tmp_path.glob("policy*"))


def test_a_batch_that_no_memory_holds_is_refused_by_its_option(base, problems, llmkit, tmp_path):
    done = llmkit(
        "rl", base, "--data", problems, "--batch-size", "1e13", "--max-tokens", "8", "-o", tmp_path / "policy"
    )
    assert done.returncode == 2 and done.stderr.endswith("; lower --batch-size or --group\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
