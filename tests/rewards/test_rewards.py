"""Rewards by their SPEC: their values, and their errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import VOCABULARY, make_model, save_folder, save_tokenizer

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, read_problem
from llmkit.io.records import Row
from llmkit.reward_model.head import RewardModel, save_reward_model
from llmkit.rewards import Attempt, Weighted, parse_rewards, reward
from llmkit.tokenizer.chat import CHAT_SPECIALS
from llmkit.tokenizer.encoding import load_tokenizer

PROBLEM = read_problem(Row({"prompt": "2 + 2?", "answer": "4", "id": 7}, "p.jsonl", 1))


def attempt(completion: str = "4", problem: Problem = PROBLEM, **changed) -> Attempt:
    details = {"token_count": 5, "finish_reason": "stop", "max_tokens": 20, **changed}
    return Attempt(problem, completion, **details)


def only(spec: str, **details) -> Weighted:
    (found,) = parse_rewards([spec], **details)
    found.reward.check(PROBLEM)
    return found


def scores(spec: str, *attempts: Attempt, **details) -> list[float]:
    reward = only(spec, **details).reward
    found = reward.score(attempts)
    reward.close()
    return found


# ---- SPEC[:WEIGHT]


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("verifier", "verifier", 1), ("verifier:2", "verifier", 2), ("verifier=number:0.5", "verifier=number", 0.5),
        ("length:-1e-3", "length", -0.001), ("length:.5", "length", 0.5), (r"format:\d+:2", r"format:\d+", 2),
        ("format:a:b", "format:a:b", 1), ("format:(?s).*:-1", "format:(?s).*", -1), ("cmd:cat:3", "cmd:cat", 3),
        ("cmd:cat -u", "cmd:cat -u", 1),
    ],
)  # fmt: skip
def test_the_last_number_is_the_weight(spec, name, weight):
    found = only(spec)
    assert (found.reward.name, found.weight) == (name, weight)


@pytest.mark.parametrize(("spec", "weight"), [("py:own.py:nan", 1), ("py:own.py:nan:2", 2)])
def test_a_function_name_may_look_like_a_float(spec, weight, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def nan(record):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    found = only(spec)
    assert (found.reward.name, found.weight) == ("py:own.py:nan", weight)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["verifer"], "--reward verifer: expected verifier, verifier=NAME, rm:FOLDER, spread:FOLDER"),
        ([""], "expected verifier"),
        (["verifier:number"], "expected verifier"), (["verifier=nubmer"], "did you mean 'number'?"),
        (["verifier="], "expected a verifier among"), (["length:0"], "a finite weight other than 0, found 0"),
        (["verifier:1e300"], "verifier:1e300: expected a weight from -1e+09 to 1e+09, found 1e300"),
        (["length:nan"], "found nan"), (["length:-inf"], "found -inf"), (["length:1e999"], "found 1e999"),
        (["length", "length:2"], "expected each reward once, found length twice"), (["length=2"], "expected verifier"),
        (["spread:"], "expected verifier"), (["spread:nowhere/"], "folder, found nothing"),
        (["rm"], "expected verifier"), (["rm:"], "expected verifier"), (["rm:nowhere/"], "folder, found nothing"),
        (["cmd:"], "expected verifier"), (["cmd:./nowhere.py"], "expected a program './nowhere.py', found none"),
        (["cmd:'a"], "expected a command"), (["cmd: "], "expected a command"), (["py:"], "expected verifier"),
        (["py:a.py"], "expected py:FILE.py:FUNCTION"), (["py:nowhere.py:f"], "expected a file nowhere.py, found none"),
        (["format:"], "expected verifier"), (["format:(a"], "expected a regular expression, found '(a'"),
        ([":2"], "expected verifier"), (["Verifier"], "expected verifier"),
    ],
)  # fmt: skip
def test_a_mistyped_spec_is_an_error_in_one_line(specs, message):
    with pytest.raises(UserError) as caught:
        parse_rewards(specs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_user_code_runs_and_no_model_loads_before_every_spec_is_right(tmp_path: Path):
    script, trace = tmp_path / "score.py", tmp_path / "trace"
    script.write_text(f"open({str(trace)!r}, 'w')\ndef reward(record): return 1\n")
    with pytest.raises(UserError, match="expected verifier"):
        parse_rewards([f"py:{script}:reward", "lenght"])
    assert not trace.exists()
    code = "import sys; from llmkit.rewards import parse_rewards\n"
    code += "parse_rewards(['verifier', 'length', 'format:a', 'cmd:cat'])\n"
    code += "print([name for name in ('torch', 'numpy', 'sympy', 'jsonschema_rs') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_total_is_the_weighted_sum():
    weighted = parse_rewards(["verifier", "length:-0.5"])
    judged = reward.judge([attempt("4"), attempt("5", token_count=20)], weighted)
    assert judged == [({"verifier": 1, "length": 0.25}, 0.875), ({"verifier": 0, "length": 1}, -0.5)]


def test_the_length_of_the_answer_does_not_count_thoughts() -> None:
    (weighted,) = parse_rewards(["length=answer:-1"])
    tokenizer = type("Letters", (), {"encode": lambda self, text: list(text)})()
    weighted.reward.check_policy(tokenizer)
    said = ("<think>\nTwo?\n</think>\n\nFour", "Four", "<think>\nTwo?\n</think>")
    thoughts = [attempt(text, max_tokens=8, token_count=8) for text in said]
    found = weighted.reward.score(thoughts)
    assert (weighted.reward.name, weighted.weight, found) == ("length=answer", -1, [0.5, 0.5, 0.0])


# ---- format and length


def test_format_takes_all_of_the_completion():
    said = ["Answer: 4", " Answer: 4\n", "The Answer: 4", "Answer: 4 or so", "", " "]
    assert scores(r"format:Answer: \d+", *map(attempt, said)) == [1, 1, 0, 0, 0, 0]
    assert scores("format:.*", attempt(""), attempt("a\nb"), attempt("a")) == [0, 0, 1]
    start = time.process_time()
    assert scores("format:(a+)+b", attempt("a" * 99), attempt("ab")) == [0, 1]
    assert time.process_time() - start < 5


def test_one_completion_of_many_is_judged_once_and_all_have_their_score():
    assert scores("verifier", *[attempt("4"), attempt("5"), attempt("4"), attempt("")] * 3) == [1, 0, 1, 0] * 3
    assert scores("verifier") == []


def test_a_completion_is_right_by_any_of_the_answers():
    for field in ("answer", "answers"):
        problem = read_problem(Row({"question": "Which?", field: ["4", "six", "Ada Lovelace"]}, "p.jsonl", 1))
        said = ["It is 4.", "#### 6", "ada lovelace", "5", "Ada"]
        assert scores("verifier", *[attempt(one, problem) for one in said]) == [1, 1, 1, 0, 0]
    with pytest.raises(UserError, match=r"p.jsonl:1: expected an answer with one number .* found 'Ada Lovelace'"):
        only("verifier=number").reward.check(problem)


def test_a_command_has_all_answers(tmp_path: Path):
    problem = read_problem(Row({"question": "?", "answer": ["4", "four"]}, "p.jsonl", 1))
    spec = script(tmp_path, "r = json.loads(input()); print(int((r['answer'], r['answers']) == ('4', ['4', 'four'])))")
    assert scores(spec, attempt("4", problem)) == [1]


# ---- commands


def script(folder: Path, body: str) -> str:
    path = folder / "score.py"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    path.chmod(0o755)
    return f"cmd:{path}"


def test_a_command_reads_records_and_prints_numbers(tmp_path: Path):
    spec = script(tmp_path, "for line in sys.stdin:\n    r = json.loads(line)\n"
                  "    print(json.dumps({'reward': r['token_count'] / 2} if r['completion'] else -1))\n"
                  "    assert [r[k] for k in ('prompt', 'answer', 'id')] == ['2 + 2?', '4', 7]\n"
                  "    assert r['finish_reason'] == 'stop'")  # fmt: skip
    assert scores(spec, attempt("4\n\u2028"), attempt("")) == [2.5, -1]
    assert scores(spec) == []


def test_a_command_may_answer_before_it_has_read_all(tmp_path: Path):
    spec = script(tmp_path, "print('\\n'.join(['1'] * 2000))")
    assert scores(spec, *[attempt("4" * 1000)] * 2000) == [1] * 2000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no model here')", "expected exit status 0, found exit status 1: no model here"),
        ("print(1); print(1); sys.exit(3)", "found exit status 3"),
        ("1 / 0", "found exit status 1: ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), 9)", "found signal SIGKILL"),
        ("print(1)", "expected 2 lines, one per completion, found 1"),
        ("pass", "expected 2 lines, one per completion, found 0"),
        ("print(1); print(1); print(1)", "expected 2 lines, one per completion, found more"),
        ("while True: print(1)", "expected 2 lines, one per completion, found more"),
        ("print(1); print(1); print(1, end=''); sys.stdout.flush(); time.sleep(99)", "found more"),
        ("while True: print('1' * 9999, end='')", "line 1: expected at most 1048576 bytes, found more"),
        ("while True: print('x' * 9999, file=sys.stderr)", "no answer within 2 seconds: x"),
        ("print(1); print(1); sys.stdout.flush(); os.close(1); os.close(2); time.sleep(99)", "within 2 seconds"),
        ("print(1); print('-1e300')", "expected rewards from -1e+09 to 1e+09, found -1e+300 for completion 2 of 2"),
        ("print(1); print()", "line 2: expected a number"), ("print(1); print('NaN')", "line 2: expected a number"),
        ("print(1); print('nan')", "line 2: expected a number"),
        ("print(1); print('Infinity')", "line 2: expected a number"),
        ("print(1); print('1e999')", "line 2: expected a number"), ("print(1); print('true')", "found a boolean"),
        ("print(1); print('[null]')", "found a list"), ("print(1); print('\"1\"')", "found a string"),
        ("print(1); print('{}')", "found an object"), ("print(1); print('{\"reward\": \"1\"}')", "found a string"),
        ("print(1); print('[1]')", "found a list"), ("print(1); print('one')", "line 2: expected a number"),
        ("print('loading', file=sys.stderr, flush=True); time.sleep(99)", "no answer within 2 seconds: loading"),
        ("os.fork(); time.sleep(99)", "no answer within 2 seconds"),
    ],
)  # fmt: skip
def test_a_failing_command_is_an_error_in_one_line(tmp_path: Path, body, message):
    spec = script(tmp_path, body)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        scores(spec, attempt(), attempt(), batch_timeout=2)
    assert message in str(caught.value) and str(caught.value).startswith(f"--reward {spec}: ")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_command_that_is_not_a_program_is_reported_first(tmp_path: Path):
    path = tmp_path / "score.py"
    path.write_text("print(1)\n")
    with pytest.raises(UserError, match=r"not executable; chmod \+x it"):
        parse_rewards([f"cmd:{path}"])
    path.chmod(0o755)  # neither a script with #! nor a binary
    with pytest.raises(UserError, match="cannot run the command"):
        scores(f"cmd:{path}", attempt())


# ---- functions


def test_a_function_has_the_record_and_gives_a_number(tmp_path: Path):
    path = tmp_path / "score.py"
    path.write_text("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
                    "def reward(record): return len(record['completion']) + record['id'] * A().x\n"
                    "def right(record): return record['completion'] == record['answer']\n")  # fmt: skip
    assert scores(f"py:{path}:reward:2", attempt("4"), attempt("")) == [8, 7]
    assert scores(f"py:{path}:right", attempt("4"), attempt("")) == [1, 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def reward(record):\n    return record['x']", "score.py:2: KeyError: 'x' for p.jsonl:1"),
        ("def reward(record):\n    import json\n    return json.loads('[')", "score.py:3: JSONDecodeError: Expecting"),
        ("def reward(record):\n    return [1]", "expected a number, found a list for p.jsonl:1"),
        ("def reward(record):\n    return '1'", "expected a number, found a string"),
        ("def reward(record):\n    return float('nan')", "expected finite rewards, found nan for completion 1 of 1"),
        ("def reward(record):\n    return -1e999", "found -inf"),
        ("def reward(record):\n    return 1e308", "expected rewards from -1e+09 to 1e+09, found 1e+308 for completion"),
        ("def reward(record):\n    return 10**400", "expected a finite number, found one that is not a float (Over"),
        ("def reward():\n    return 1", "TypeError: reward() takes 0"),
        ("def rewards(record):\n    return 1", "expected a function 'reward' in"),
        ("import nowhere_at_all", "score.py:1: ModuleNotFound"),
        ("x = 1\ndef reward(record) return 1", "score.py:2: SyntaxError"),
        ("raise SystemExit(0)", "score.py:1: SystemExit"),
        ("def reward(record):\n    raise SystemExit(3)", "score.py:2: SystemExit: 3 for p.jsonl:1"),
        ("reward = 5", "expected a function 'reward'"),
    ],
)  # fmt: skip
def test_a_failing_function_is_reported_with_its_line(tmp_path: Path, body, message):
    path = tmp_path / "score.py"
    path.write_text(body + "\n")
    with pytest.raises(UserError) as caught:
        scores(f"py:{path}:reward", attempt())
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["print('null'); print(2)", "print('{\"reward\": null}'); print(2)"])
def test_a_command_or_a_function_may_say_that_it_cannot_judge(tmp_path: Path, body):
    assert scores(script(tmp_path, body), attempt("4"), attempt("")) == [None, 2]
    path = tmp_path / "own.py"
    path.write_text("def reward(record): return 1.0 if record['completion'] else None\n")
    assert scores(f"py:{path}:reward", attempt("4"), attempt("")) == [1, None]


# ---- reward models


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """The folder of a reward model with two heads and a context of 60 tokens."""
    folder = tmp_path_factory.mktemp("judge")
    save_tokenizer(folder, *CHAT_SPECIALS)
    model = make_model(vocab_size=VOCABULARY + len(CHAT_SPECIALS), context=60)
    save_reward_model(RewardModel.of(model, heads=2, seed=3), folder, None)
    return folder


def test_a_reward_model_gives_prompts_and_messages_the_same_scores(judge: Path):
    asked = [{"role": "user", "content": "2 + 2?"}]
    as_messages = read_problem(Row({"messages": asked, "answer": "4"}, "p.jsonl", 2))
    reward = only(f"rm:{judge}/:0.5", device="cpu", dtype="float32").reward
    said = [attempt("4"), attempt("four"), attempt(""), attempt("4", as_messages), attempt("4", finish_reason="length")]
    found = reward.score(said)
    assert found[0] == found[3] == found[4] and len({*found[:3]}) == 3
    assert reward.score(said[::-1]) == pytest.approx(found[::-1], abs=1e-5)
    assert reward.name == f"rm:{judge}"
    reward.close()


def test_the_spread_is_minus_the_deviation_over_the_heads(judge: Path, tmp_path: Path, llmkit):
    rows = [{"prompt": "2 + 2?", "completion": text} for text in ("4", "four", "")]
    given = "".join(json.dumps(row) + "\n" for row in rows)
    done = llmkit("train-reward", "--score", judge, "-", "--device", "cpu", stdin=given)
    told = [json.loads(line)["reward_std"] for line in done.stdout.splitlines()]
    found = scores(f"spread:{judge}", *(attempt(row["completion"]) for row in rows), device="cpu")
    assert found == pytest.approx([-one for one in told], abs=1e-5) and max(found) < 0
    one_head = tmp_path / "one"
    one_head.mkdir()
    save_tokenizer(one_head, *CHAT_SPECIALS)
    model = make_model(vocab_size=VOCABULARY + len(CHAT_SPECIALS), context=60)
    save_reward_model(RewardModel.of(model, heads=1, seed=3), one_head, None)
    with pytest.raises(UserError, match="several heads, found one; train it with llmkit train-reward --ensemble"):
        parse_rewards([f"spread:{one_head}"], device="cpu")


def test_a_completion_that_the_judge_cannot_read_is_reported(judge: Path):
    for flag in ("--reward", "--gold"):
        with pytest.raises(UserError, match=f"^{flag} rm:.* context of 60 tokens, found one of 99; lower --max-tokens"):
            scores(f"rm:{judge}", attempt("4" * 99, token_count=99), device="cpu", flag=flag)
    long = read_problem(Row({"prompt": "2 + 2? " * 99, "answer": "4"}, "p.jsonl", 2))
    assert len(scores(f"rm:{judge}", attempt("4", long), device="cpu")) == 1


def test_a_judge_of_another_vocabulary_is_refused(judge: Path, tmp_path: Path):
    reward = only(f"rm:{judge}", device="cpu").reward
    reward.check_policy(load_tokenizer(judge))
    other = tmp_path / "other"
    other.mkdir()
    save_tokenizer(other)
    with pytest.raises(UserError, match=r"expected the vocabulary of .*other \(257 tokens\), found another"):
        reward.check_policy(load_tokenizer(other))


def test_a_folder_without_a_judge_is_an_error(tmp_path: Path):
    save_folder(tmp_path / "model")
    with pytest.raises(UserError, match="a reward model, as llmkit train-reward makes it"):
        parse_rewards([f"rm:{tmp_path / 'model'}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder, found a file"):
        parse_rewards([f"rm:{tmp_path / 'file'}"])
