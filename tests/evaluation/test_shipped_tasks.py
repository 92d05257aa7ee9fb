"""Shipped tasks: published records become the same prompts as in lm-evaluation-harness.

shipped_tasks.jsonl has the records and prompts, one task per line (`Case`). If lm-evaluation-harness is installed
(`pip install lm-eval`, and its extra `math` for minerva_math), the prompts are also compared with its output.
"""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmkit.errors import UserError
from llmkit.evaluation.scores import metric_of
from llmkit.evaluation.tasks import TASKS, Item, Loaded, is_exact_match, load_items, load_tasks, read_task

DOCS = Path(__file__).parents[2] / "docs" / "evaluate.md"


class Case(NamedTuple):
    """Records of a task's files, by stem, and the expected requests for the last record of the first file.

    texts  each context with each continuation, or, for generation, with the answer of an example
    right  index of the right one, or the answers
    peer   the file in lm_eval/tasks that defines the task, the splits of `files` in order, and examples
    """

    task: str
    files: dict[str, list[dict[str, Any]]]
    texts: list[str]
    right: int | list[str | None]
    peer: list[Any] | None = None


TEXT = Path(__file__).with_name("shipped_tasks.jsonl").read_text(encoding="utf-8")
CASES = [Case(**json.loads(line)) for line in TEXT.splitlines()]


def loaded(case: Case, folder: Path, shots: int | None) -> Loaded:
    for stem, rows in case.files.items():
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks([case.task], str(folder))
    return load_items(task, shots=shots)


def texts_of(item: Item, delimiter: str) -> list[str]:
    return [item.description + context + rest for context, rest in item.pairs(delimiter)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_published_record_has_the_standard_prompt(case, tmp_path):
    one = loaded(case, tmp_path, case.peer[2] if case.peer else None)
    item = one.items[-1]
    ends = [text[-len(wanted) :] for text, wanted in zip(texts_of(item, one.task.delimiter), case.texts, strict=True)]
    assert ends == case.texts
    if isinstance(case.right, int):
        assert item.gold == case.right
    elif item.problem is not None:
        assert [item.problem.answer, *item.problem.alternatives] == case.right


def test_the_page_lists_every_task_with_its_version_kind_and_examples():
    listed = re.findall(r"^\| `(\w+)` \| ([\d.]+)[^|]*\| (\w+) \| (\d+) \| ([\w@]+) \|", DOCS.read_text(), re.MULTILINE)
    tasks = [read_task(path) for path in sorted(TASKS.glob("*.toml"))]
    assert {task.name for task in tasks} == {case.task for case in CASES}
    assert sorted(listed) == [(task.name, task.version, task.kind, str(task.shots), metric_of(task)) for task in tasks]


def test_the_page_makes_the_files_of_bbh_from_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (case,) = (case for case in CASES if case.task == "bbh")
    for place in ("bbh", "cot-prompts"):
        (tmp_path / "BIG-Bench-Hard" / place).mkdir(parents=True)
    items = [{name: row[name] for name in ("input", "target")} for row in case.files["bbh"]]
    (tmp_path / "BIG-Bench-Hard/bbh/boolean_expressions.json").write_text(json.dumps({"examples": items}))
    steps = "A: Let's think step by step.\n"
    shown = [f"Q: {row['input']}\n{steps}{row['target']}" for row in case.files["bbh.cot"]]
    shown = "\n\n".join(["A warning.\n-----\nEvaluate it.", *shown])
    (tmp_path / "BIG-Bench-Hard/cot-prompts/boolean_expressions.txt").write_text(shown)
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    exec(program, {})
    for stem, rows in case.files.items():
        assert [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text().splitlines()] == rows


def test_examples_in_the_toml_come_before_every_group(tmp_path):
    one = loaded(next(case for case in CASES if case.task == "minerva_math"), tmp_path, None)
    (item,) = one.items
    assert item.contexts[0].startswith("Problem:\nFind the domain of the expression  $")
    last = "\nFinal Answer: The final answer is $16$. I hope it is correct.\n\nProblem:\nIf the system of equations"
    assert last in item.contexts[0] and item.contexts[0].count("Problem:\n") == 5


@pytest.mark.parametrize(
    ("name", "completion", "is_right"),
    [
        ("triviaqa", " l m montgomery", True),  # punctuation and case aside
        ("triviaqa", " the Montgomery", False),  # articles count
        ("nq_open", " the rain", True),
        ("nq_open", " rain or snow", False),
        ("bbh", "not is. So the answer is True.", True),
        ("bbh", "So the answer is true.", False),
        ("bbh", "True", False),
    ],
)
def test_answers_are_compared_as_lm_evaluation_harness_compares_them(name, completion, is_right, tmp_path):
    case = next(case for case in CASES if case.task == name)
    one = loaded(case, tmp_path, 0)
    problem = one.items[0].problem
    assert problem is not None and is_exact_match(one.task, completion, problem) is is_right


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('ignore = ["("]', "own.toml: expected a regular expression, found '('"),
        ('stop = "a"', "own.toml: stop: expected list, found 'a'"),
        ('example = [{query = "a"}]\nshots = 1', "own.toml, [[example]]:1: expected an item of own, found ['query']"),
        ("shots = 0", "own.jsonl:2: expected an answer for exact_match, found ['question']"),
    ],
)
def test_mistakes_in_answers_are_named(line, expected, tmp_path):
    toml = f'kind = "generation"\nverifier = "exact_match"\n{line}\n[[form]]\nprompt = "{{{{question}}}}"\n'
    (tmp_path / "own.toml").write_text(toml)
    (tmp_path / "own.jsonl").write_text('{"question": "Why?", "answer": "So."}\n{"question": "Why?"}\n')
    with pytest.raises(UserError) as error:
        load_items(load_tasks([str(tmp_path / "own.toml")])[0], limit=1 if "example" in line else None)
    assert expected in str(error.value)


def test_a_training_file_that_is_not_there_leaves_the_other_items_as_examples(tmp_path, llmkit):
    rows = [{"query": f"Is {n}?", "choices": ["yes", "no"], "gold": 0} for n in range(3)]
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks(["arc_easy"], str(tmp_path))
    assert all(item.contexts[0].count("Answer: yes\n\n") == 2 for item in load_items(task, shots=2).items)
    (tmp_path / "arc_easy.train.jsonl").write_text(json.dumps({**rows[0], "query": "Was it?"}) + "\n")
    (task,) = load_tasks(["arc_easy"], str(tmp_path))
    assert {item.contexts[0].partition("\n")[0] for item in load_items(task, shots=1).items} == {"Was it?"}
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(UserError, match=r"expected gsm8k.train.jsonl next to it"):
        load_items(load_tasks(["gsm8k"], str(tmp_path))[0])


# ---- compared with lm-evaluation-harness


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install lm-eval")
@pytest.mark.parametrize("case", [case for case in CASES if case.peer], ids=lambda case: case.task)
def test_prompts_and_verdicts_are_those_of_lm_evaluation_harness(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert case.peer is not None
    path, splits, shots = case.peer
    one = loaded(case, tmp_path, shots)
    task = harness_task(Path(path), dict(zip(splits, case.files, strict=False)), tmp_path, case)
    task.set_fewshot_seed(1234)  # like simple_evaluate
    document = list(task.eval_docs)[-1]
    context = task.fewshot_context(document, shots)
    item = one.items[-1]
    if item.problem is None:
        asked = task.construct_requests(document, context)
        asked = asked if isinstance(asked, list) else [asked]
        assert ["".join(request.args) for request in asked] == texts_of(item, one.task.delimiter)
        return
    assert context == item.description + item.contexts[0]
    until = task.config.generation_kwargs["until"]
    limit = task.config.generation_kwargs.get("max_gen_toks", 256)
    assert (tuple(until), limit) == (one.task.stop, one.task.max_tokens)
    if one.task.verifier == "exact_match":
        answers = ("the answer is True.", "the answer is true.", "Montgomery", "The L.M. montgomery", "a RAIN ")
        for completion in ("", "rain", *answers, item.problem.answer):
            (request,) = [task.construct_requests(document, context)]
            request.resps = [completion]
            task._instances = [request]
            task.apply_filters()
            (name,) = request.filtered_resps
            judged = task.process_results(document, [request.filtered_resps[name]])["exact_match"]
            assert float(judged) == is_exact_match(one.task, completion, item.problem), completion


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install lm-eval")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.peer and len(case.files) == 1], ids=lambda case: case.task
)
def test_examples_are_drawn_from_training_files_as_lm_evaluation_harness_draws_them(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    if case.task in ("minerva_math", "lambada_openai", "blimp"):
        pytest.skip("it has no training file")
    assert case.peer is not None
    ((stem, (row,)),) = case.files.items()
    names = ("question_stem", "ctx_a", "goal", "premise", "sentence", "text", "question")
    asked = next(name for name in names if name in row)
    rows = [{**row, asked: f"{n} {row[asked]}"} for n in range(11)]
    files = {stem: rows[:4], f"{stem}.train": rows[4:]}
    one = loaded(case._replace(files=files), tmp_path, 2)
    task = harness_task(Path(case.peer[0]), {case.peer[1][0]: stem, "train": f"{stem}.train"}, tmp_path, case)
    task.set_fewshot_seed(1234)
    for document, item in zip(task.eval_docs, one.items, strict=True):
        context = task.fewshot_context(document, 2)
        if item.problem is not None:
            assert context == item.description + item.contexts[0]
            continue
        requests = task.construct_requests(document, context)
        assert ["".join(request.args) for request in requests] == texts_of(item, one.task.delimiter)


def harness_task(path: Path, files: dict[str, str], folder: Path, case: Case) -> Any:
    """Load the task of lm-evaluation-harness with local files: {split: stem}."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(Path(os.path.dirname(lm_eval.tasks.__file__)) / path, resolve_func=True)
    except (ImportError, AssertionError) as error:
        pytest.skip(f"needs lm-eval[math]: {error}")
    for name in ("tag", "group", "dataset_name"):
        config.pop(name, None)
    data = {split: str(folder / f"{stem}.jsonl") for split, stem in files.items()}
    for split in ("training", "validation", "test", "fewshot"):
        if config.get(f"{split}_split") not in data:
            config.pop(f"{split}_split", None)
    if case.task == "bbh":
        config["fewshot_config"] = {"sampler": "first_n", "samples": case.files["bbh.cot"]}
    return ConfigurableTask(config={**config, "dataset_path": "json", "dataset_kwargs": {"data_files": data}})
