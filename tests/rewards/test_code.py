"""Unit tests of programs: correct ones pass, and no trick of a program can fake a pass."""

from __future__ import annotations

import doctest
import time
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.formats.problems import Problem, read_problem
from llmkit.io.jsonl import read_jsonl
from llmkit.io.records import Row
from llmkit.rewards import Attempt, code, sandboxed_calls
from llmkit.rewards.code import code_of
from llmkit.rewards.verifiers import VerifierReward
from llmkit.tools.python import check_sandbox

try:
    check_sandbox()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPT = 'import math\n\n\ndef half(n):\n    return n / 2\n\n\ndef double(n):\n    """Twice n."""\n'
TEST = """
def check(candidate):
    assert candidate(3) == 6
    assert candidate(half(5.0)) == 5.0
    assert candidate([1]) == [1, 1]
    try:
        candidate(None)
    except TypeError:
        pass
    else:
        assert False
"""
RIGHT = "    return n * 2\n"


def problem(**value) -> Problem:
    return read_problem(Row({"prompt": PROMPT, "test": TEST, "entry_point": "double", **value}, "p.jsonl", 3))


def passes(completion: str, **value) -> float:
    reward = VerifierReward(seconds=3)
    asked = problem(**value)
    reward.check(asked)
    return reward.score([Attempt(asked, completion, 5, "stop", 9)])[0]


def test_the_examples_of_the_documentation_hold():
    assert doctest.testmod(code).failed == 0


@pytest.mark.parametrize(
    "completion",
    [
        RIGHT,
        f"```python\ndef double(n):\n{RIGHT}```",
        f"Here it is:\n\n```python\n{PROMPT}{RIGHT}```\nFor example:\n```python\nprint(double(2))\n```\n",
        f"```\ndef double(n):\n{RIGHT}```",
        f"```py\ndef double(n):\n{RIGHT}",
        "```python\ndouble = lambda n: n * 2\n```",
        "    print('doubling')\n    return n * 2\n",
        "    return Twice(n) if isinstance(n, int) else n * 2\n\n\nclass Twice(int):\n"
        "    def __new__(cls, n):\n        return super().__new__(cls, 2 * n)\n",
        RIGHT + "\nif __name__ == '__main__':\n    raise SystemExit(1)\n",
    ],
)
def test_a_right_program_passes(completion):
    assert passes(completion) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        f"Complete this function:\n\n```python\n{PROMPT}```\nThank you.",
        "import math\n\ndef half(n):\n    return n / 2\n\ndef double(n):\n    # twice n\n",
    ],
)
def test_a_prompt_may_be_words_around_code_or_code_without_a_body(prompt):
    code = f"```python\ndef double(n):\n    assert math and half(2) == 1\n{RIGHT}```"
    assert passes(code, prompt=prompt) == 1
    assert passes(code.replace("* 2", "* 3"), prompt=prompt) == 0


NEVER_EQUAL = "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
GAMES = {
    "nothing": "",
    "white space": " \n\t\n",
    "an empty block": "```python\n```",
    "another language": f"```js\n{RIGHT}```",
    "a wrong result": "    return n + 3\n",
    "no syntax": "    return n *\n",
    "words": "I am sorry, I cannot do that.",
    "only the prompt again": f"```python\n{PROMPT}    pass\n```",
    "exit 0": "    raise SystemExit(0)\n",
    "exit 0 at the start": RIGHT[:0] + "    return 1\n\nimport sys\nsys.exit(0)\n",
    "os._exit": "    import os\n    os._exit(0)\n",
    "os._exit at the start": "    return 1\n\nimport os\nos._exit(0)\n",
    "atexit": "    return 1\n\nimport atexit, os\natexit.register(lambda: os._exit(0))\n",
    "passed, it says": "    print('passed')\n    print('OK')\n    return 1\n",
    "a result that equals all": f"    return Any(0)\n\n{NEVER_EQUAL}",
    "a str that equals all": "    class S(str):\n        def __eq__(self, other): return True\n    return S('x')\n",
    "a list that equals all": "    class L(list):\n        def __eq__(self, other): return True\n    return L()\n",
    "an object that equals all": "    from unittest.mock import ANY\n    return ANY\n",
    "an argument changed to fit": "    if isinstance(n, list): n.append(1)\n    return n\n",
    "AssertionError undone": "    import builtins\n    builtins.AssertionError = KeyError\n    return 1\n",
    "no assert any more": "    import ast, builtins\n"
    "    builtins.compile = lambda *a, **k: (lambda: 0).__code__\n    return 1\n",
    "the checker's frames": (
        "    import gc, sys\n    frame = sys._getframe()\n    while frame:\n"
        "        for name, value in list(frame.f_globals.items()):\n"
        "            if name in ('check', 'test', 'word', 'module'):\n"
        "                try: frame.f_globals[name] = lambda *a, **k: None\n"
        "                except Exception: pass\n"
        "        frame = frame.f_back\n"
        "    for one in gc.get_objects():\n"
        "        if isinstance(one, dict) and 'check' in one: one['check'] = lambda *a: None\n    return 1\n"
    ),
    "the helper of the tests replaced": "    return 7\n\ndef half(n):\n    return 0\n",
    "the wire forged": (
        "    import os\n    for end in range(3, 64):\n"
        '        for line in (b\'["value", ["int", 6], ["list", []]]\\n\',) * 9:\n'
        "            try: os.write(end, line)\n            except OSError: pass\n    return 1\n"
    ),
    "the wire torn": "    import os\n    os.closerange(3, 64)\n    return 6\n",
    "the wire choked": "    import os\n    for end in range(3, 64):\n"
    "        try: os.write(end, b'[' * 60000 + b'\\n')\n"
    "        except OSError: pass\n    return 6\n",
    "a deep result": "    found = []\n    for _ in range(100000): found = [found]\n    return found\n",
    "a huge result": "    return '6' * (1 << 25)\n",
    "a flood": "    while True: print('6' * 1000)\n",
    "forks": "    import os\n    while True: os.fork()\n",
    "threads": "    import threading\n"
    "    while True: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n",
    "memory": "    return [0] * 10**10\n",
    "signals": "    import os, signal\n    os.kill(os.getppid(), signal.SIGKILL)\n"
    "    os.kill(0, signal.SIGKILL)\n    return 1\n",
    "its tests looked up": "    return open('/proc/self/environ').read() or open('/proc/1/cmdline').read()\n",
    "stdin read": "    import sys\n    return sys.stdin.read()\n",
    "a pickle": "    class P:\n        def __reduce__(self): return (print, ('passed',))\n    return P()\n",
}


@pytest.mark.parametrize("completion", GAMES.values(), ids=GAMES)
def test_a_program_cannot_say_that_it_passed(completion):
    assert passes(completion) == 0


@pytest.mark.parametrize("completion", ["    while True: pass\n", "    import time\n    time.sleep(1000)\n"])
def test_a_program_that_never_ends_costs_its_time_and_no_more(completion):
    start = time.monotonic()
    assert passes(completion) == 0
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("test", "program"),
    [
        ("assert all(map(lambda x: f(x) == x + 1, [1, 2, 3]))", "def f(x): raise StopIteration"),
        ("assert all(map(f, [1, 2]))", "class Stop(StopIteration): pass\ndef f(x): raise Stop"),
        ("assert all(x == 2 for x in iter(lambda: f(1), None))", "def f(x): raise StopIteration('all done')"),
        ("import itertools\nassert not [*itertools.filterfalse(f, [1, 2])]", "def f(x): raise StopAsyncIteration"),
        ("x = [1, 2]\nfor one in x: assert f(x) == 2\nassert f([1]) == 2", "def f(x):\n  x.clear()\n  return 2"),
        ("x = [3, 1, 2]\nassert all(f(x, i) == i for i in x[1:] + x)", "def f(x, i):\n  x[:] = []\n  return 1"),
        ("x = [3, 1, 2]\nassert all(f(x, i) == i for i in x)", "def f(x, i):\n  x[:] = []\n  return 3"),
        ("x = [3, 1]\nassert all(map(lambda a, b: f(x) == a, x, [3, 9]))", "def f(x):\n  x[:] = x[:1]\n  return 3"),
        ("x = {1, 5}\nfor one in x: assert f(x) == 1", "def f(x):\n  x.clear()\n  return 1"),
    ],
)
def test_a_program_cannot_end_the_loops_of_a_test(test, program):
    assert passes(program, prompt="Write f.", test=None, entry_point=None, tests=[test]) == 0


def test_arguments_that_a_function_changes_are_changed():
    tests = ["x = [3, 1, 2]\norder(x)\nassert x == [1, 2, 3]", "d = {}\nassert put(d) is None and d == {'a': (1, {2})}"]
    code = "def order(x): x.sort()\ndef put(d): d['a'] = (1, {2})"
    assert passes(code, prompt="Write order and put.", test=None, entry_point=None, tests=tests) == 1
    wrong = code.replace("x.sort()", "return sorted(x)")
    assert passes(wrong, prompt="Write order and put.", test=None, entry_point=None, tests=tests) == 0


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("def double(n): return n * 2", 1), ("```python\ndef double(n): return n * 2\n```", 1),
        ("double = 2", 0), ("", 0),
        ("def double(n): return 4", 0), ("double = {2: 4}.get", 0), ("def twice(n): return n * 2", 0),
    ],
)  # fmt: skip
def test_assertions_as_in_mbpp(completion, right):
    value = {"prompt": "Write double.", "test_list": ["assert double(2) == 4", "assert double(cube(1)) == 2"]}
    value["test_setup_code"] = "def cube(n): return n ** 3"
    asked = read_problem(Row(value, "p.jsonl", 3))
    reward = VerifierReward(seconds=3)
    reward.check(asked)
    assert reward.score([Attempt(asked, completion, 5, "stop", 9)]) == [right]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("print(2 * int(input()))", 1),
        ("```python\nimport sys\nfor line in sys.stdin:\n    print(int(line) * 2)\n```", 1),
        ("if __name__ == '__main__':\n    print(2 * int(input()), ' ')", 1), ("print(4)", 0),
        ("2 * int(input())", 0), ("", 0),
        ("print(2 * int(input())); raise SystemExit(1)", 0), ("print(2 * int(input())); print(1)", 0), ("input(", 0),
    ],
)  # fmt: skip
def test_inputs_and_outputs(completion, right):
    tests = [{"input": "2\n", "output": "4\n"}, {"input": "3", "output": "6"}]
    asked = read_problem(Row({"prompt": "Double it.", "tests": tests}, "p.jsonl", 3))
    reward = VerifierReward(seconds=3)
    reward.check(asked)
    assert reward.score([Attempt(asked, completion, 5, "stop", 9)]) == [right]


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -5, 10**50, 0.1, float("inf"), 1j, "", "\ud83d\ude00", b"\x00", [], [[1], (2,)], (), {1, 2},
     frozenset({1}), {}, {1: "a", (1, 2): [None]}],
)  # fmt: skip
def test_plain_values_round_trip(value):
    found = sandboxed_calls.unpack(sandboxed_calls.pack(value))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "sent",
    [["code", "x"], ["int", "5"], ["int", ["list", []]], ["bytes", 5], [], [[]], 5, ["list"], ["dict", [["list", []]]],
     ["dict", [[["list", []], None]]], {"a": 1}, ["set", [["list", []]]]],
)  # fmt: skip
def test_nothing_else_is_taken_from_the_wire(sent):
    with pytest.raises((TypeError, ValueError, KeyError)):
        sandboxed_calls.unpack(sent)


def test_code_is_taken_from_the_block_that_defines_the_function():
    text = "```python\ndef f(): pass\n```\n```bash\nls\n```\n```python\nf()\n```"
    assert code_of(text, ["f"]) == "def f(): pass\n"
    assert code_of(text) == "def f(): pass\n\nf()\n"  # the code of other blocks comes first
    assert code_of("```bash\nls\n```") == ""


def test_without_a_sandbox_programs_run_where_the_user_says_so(tmp_path: Path):
    reward = VerifierReward(sandbox=False, seconds=3)
    attempts = [Attempt(problem(), said, 5, "stop", 9) for said in (RIGHT, GAMES["exit 0"], RIGHT)]
    assert reward.score(attempts) == [1, 0, 1]


@pytest.mark.slow
def test_every_solution_of_human_eval_passes_and_none_without_a_body(shared_data: Path):
    problems = list(read_jsonl([str(shared_data / "eval/HumanEval.jsonl.gz")], None, read_problem))
    reward = VerifierReward()
    for one in problems:
        reward.check(one)
    right = [Attempt(one, one.record["canonical_solution"], 1, "stop", 9) for one in problems]
    assert sum(reward.score(right)) == 164
    assert sum(reward.score([Attempt(one, "    return None\n", 1, "stop", 9) for one in problems])) == 0
