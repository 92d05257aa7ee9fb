"""`llmkit evaluate` as a user runs it: tasks and files in, scores, a report and gates out."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
from tiny import END, certain, make_model, save_folder

from llmkit.config import resolve
from llmkit.errors import GateError, UserError
from llmkit.evaluation import evaluator
from llmkit.evaluation.likelihood import Scorer, encode_pairs
from llmkit.evaluation.tasks import TASKS, load_items, load_tasks, read_task
from llmkit.io.manifest import write_manifest
from llmkit.model.folder import load_model
from llmkit.stages.evaluate import EvaluateConfig, run
from llmkit.tokenizer.encoding import load_tokenizer

CHOICES = [
    {"query": f"The {thing} is", "choices": ["blue", "made of cheese", "öd"], "gold": number % 3}
    for number, thing in enumerate(["sea", "sky", "moon", "sun", "fire", "wood"])
]
SCHEMAS = [
    {"context_options": ["The dog that Ann", "The dog that Ben"], "continuation": "saw barks.", "gold": 1},
    {"context_options": ["The key of the", "The keys of the"], "continuation": "door is lost.", "gold": 0},
]
WORDS = [{"context": "one two three", "continuation": "four"}, {"context": "a b c", "continuation": "d"}]
TEXTS = [{"text": "It was a dark and stormy night."}, {"text": "The rain fell in torrents, except at times."}]
PROBLEMS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "3 + 4 =", "answer": "7"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    save_folder(place / "base", make_model(context=256))
    save_folder(place / "other", make_model(context=256, seed=1))
    save_folder(place / "seven", certain(make_model(), *(ord(letter) - 33 for letter in "=7"), END))
    return place


def write_lines(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(*models: Path, tasks: str = "", **options):
    given = {"models": [str(model) for model in models], "tasks": [tasks] if tasks else [], "quiet": True, **options}
    return run(resolve(EvaluateConfig, {name: value for name, value in given.items()}))


# ---- kinds


def test_choices_are_scored_by_their_likelihoods(models, tmp_path, llmkit):
    file, out, report = write_lines(tmp_path / "things.jsonl", CHOICES), tmp_path / "scores.json", tmp_path / "i.jsonl"
    done = llmkit("evaluate", models / "base", "--tasks", file, "-o", out, "--report", report)
    assert done.returncode == 0, done.stderr
    assert "things  acc" in done.stderr
    scores = json.loads(out.read_text())["models"][0]
    score = {
        "model": str(models / "base"),
        "sha256": scores["sha256"],
        "tasks": {"things": scores["tasks"]["things"]["score"]},
    }
    assert json.loads(done.stdout) == {"path": str(out), "models": [score]}
    summary, items = scores["tasks"]["things"], read_lines(report)
    tokenizer, scorer = load_tokenizer(models / "base"), Scorer(load_model(models / "base"))
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0, "acc_tokens": 0}
    for row, item in zip(CHOICES, items, strict=True):
        found = scorer.score(encode_pairs(tokenizer, [(row["query"], " " + choice) for choice in row["choices"]]))
        assert item["logprobs"] == pytest.approx([likelihood.logprob for likelihood in found], abs=1e-4)
        lengths = {
            "acc": [1] * 3,
            "acc_norm": [len(choice) for choice in row["choices"]],  # in characters, as in lm-evaluation-harness
            "acc_bytes": [len(choice.encode()) for choice in row["choices"]],
            "acc_tokens": [likelihood.tokens for likelihood in found],
        }
        for name, each in lengths.items():
            best = max(range(3), key=lambda i, each=each: item["logprobs"][i] / each[i])
            right[name] += best == row["gold"]
            assert item["metrics"][name] == (best == row["gold"])
    assert {name: summary["metrics"][name] * 6 for name in right} == pytest.approx(right)
    p = summary["score"]
    assert summary["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))
    assert (summary["items"], summary["truncated"], len(summary["data_sha256"])) == (6, 0, 64)
    assert json.loads((tmp_path / "scores.json.manifest.json").read_text())["results"]


def test_schemas_language_modelling_and_texts(models, tmp_path):
    files = [
        write_lines(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("schemas", SCHEMAS), ("words", WORDS), ("texts", TEXTS))
    ]
    report = tmp_path / "report.jsonl"
    tasks = evaluate(models / "base", tasks=",".join(files), report=str(report)).models[0]["tasks"]
    items = read_lines(report)
    assert all(
        item["metrics"]["acc"] == (item["logprobs"][item["gold"]] == max(item["logprobs"])) for item in items[:2]
    )
    words = tasks["words"]["metrics"]
    logprobs = [item["logprobs"][0] for item in items if item["task"] == "words"]
    assert words["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / 2))
    texts = [item for item in items if item["task"] == "texts"]
    total = sum(len(row["text"].encode()) for row in TEXTS)
    bits = -sum(item["logprobs"][0] for item in texts) / math.log(2) / total
    assert tasks["texts"]["score"] == pytest.approx(bits)
    assert [item["tokens"] for item in texts] == [[len(row["text"])] for row in TEXTS]  # one token per byte


@pytest.mark.parametrize(("folder", "lie"), [(True, None), (False, None), (True, "no zero"), (False, "no zero")])
def test_likelihoods_from_a_server_are_those_of_its_model(models, tmp_path, folder, lie):
    from model_server import ModelServer
    from served import serving

    rows = {"choices": CHOICES, "schemas": SCHEMAS, "words": WORDS} | ({"texts": TEXTS} if folder else {})
    rows["choices"] = [{**row, "choices": [*row["choices"][:2], "old"]} for row in CHOICES]  # all of ASCII
    tasks = ",".join(write_lines(tmp_path / f"{name}.jsonl", some) for name, some in rows.items())
    here = evaluate(models / "base", tasks=tasks, report=str(tmp_path / "here.jsonl"), force=True)
    with ExitStack() as stack:
        if lie is None:
            server = stack.enter_context(serving(models / "base"))
        else:
            server = stack.enter_context(ModelServer(models / "base"))
            server.lies = {lie}
        of = [models / "base"] if folder else []
        there = evaluate(*of, tasks=tasks, engine=server.spec, report=str(tmp_path / "there.jsonl"), force=True)
    for first, second in zip(read_lines(tmp_path / "here.jsonl"), read_lines(tmp_path / "there.jsonl"), strict=True):
        assert second["logprobs"] == pytest.approx(first["logprobs"], abs=1e-4)
        assert [second[name] for name in ("where", "tokens", "metrics")] == [
            first[name] for name in ("where", "tokens", "metrics")
        ]
    scores = [{name: task["score"] for name, task in run.models[0]["tasks"].items()} for run in (here, there)]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.parametrize(
    ("rows", "lies", "options", "expected"),
    [
        (CHOICES, {"no echo"}, {}, "expected log-probabilities of the prompt .echo=true., found none; llmkit serve"),
        (
            TEXTS,
            {"no begin"},
            {},
            "expected log-probabilities of a continuation's tokens, found none for the first",
        ),
        (CHOICES, set(), {}, "expected a token boundary before ' öd', found .*; give MODEL with --engine"),
        (CHOICES, set(), {"chat": True}, "a: --chat needs the tokens of prompts; give MODEL with --engine"),
    ],
)
def test_a_server_that_gives_no_likelihoods_is_named(models, tmp_path, rows, lies, options, expected):
    from model_server import ModelServer

    with ModelServer(models / "base") as server, pytest.raises(UserError, match=expected):
        server.lies = lies
        evaluate(tasks=write_lines(tmp_path / "a.jsonl", rows), engine=server.spec, **options)


def test_a_server_with_another_tokenizer_is_named(models, tmp_path):
    from model_server import ModelServer

    folder = save_folder(tmp_path / "swapped")
    text = (folder / "tokenizer.json").read_text()
    swapped = text.replace('"s":', '"?":').replace('"q":', '"s":').replace('"?":', '"q":', 1)
    (folder / "tokenizer.json").write_text(swapped)
    with ModelServer(models / "base") as server, pytest.raises(UserError) as error:
        evaluate(folder, tasks=write_lines(tmp_path / "a.jsonl", CHOICES), engine=server.spec)
    assert f"expected the tokenizer of {folder}, whose token " in str(error.value)
    assert "give the served folder as MODEL" in str(error.value)


def test_completions_are_judged_as_rl_judges_them(models, tmp_path):
    file, report = write_lines(tmp_path / "sums.jsonl", PROBLEMS), tmp_path / "report.jsonl"
    summary = evaluate(models / "seven", tasks=file, report=str(report)).models[0]["tasks"]["sums"]
    assert (summary["score"], summary["metric"], summary["items"]) == (0.5, "pass@1", 2)
    assert [(item["completions"], item["right"]) for item in read_lines(report)] == [(["7"], [0.0]), (["7"], [1.0])]


def test_pass_at_k_counts_samples_of_each_problem(models, tmp_path):
    file, report = write_lines(tmp_path / "sums.jsonl", PROBLEMS * 3), tmp_path / "report.jsonl"
    options = {"samples": 4, "temperature": 1.0, "max_tokens": 4, "report": str(report)}
    metrics = evaluate(models / "base", tasks=file, **options).models[0]["tasks"]["sums"]["metrics"]
    items = read_lines(report)
    assert metrics["pass@1"] == pytest.approx(sum(sum(item["right"]) for item in items) / 24)
    assert metrics["pass@4"] == pytest.approx(sum(any(item["right"]) for item in items) / 6)


# ---- tasks


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_task_that_is_shipped_is_read(path):
    task = read_task(path)
    assert task.source and task.version and 0 <= task.baseline < 1


def test_a_user_task_reads_the_data_next_to_it(models, tmp_path):
    write_lines(
        tmp_path / "facts.jsonl", [{"subject": "Snow", "says": "white", "lies": ["red", "hot"], "topic": "t"}] * 2
    )
    (tmp_path / "facts.toml").write_text(
        'kind = "multiple_choice"\nversion = "1"\nmetric = "acc_norm"\nbaseline = 0.3\ngroup = "topic"\n'
        'description = "Facts.\\n\\n"\n[[form]]\nprompt = "{{subject}} is"\nchoices = "[says] + lies"\ngold = 0\n'
    )
    (task,) = load_tasks([str(tmp_path / "facts.toml")])
    (item, _) = load_items(task).items
    assert (item.contexts, item.continuations, item.gold, item.group) == (("Snow is",), ("white", "red", "hot"), 0, "t")
    summary = evaluate(models / "base", tasks=str(tmp_path / "facts.toml")).models[0]["tasks"]["facts"]
    assert summary["metric"] == "acc_norm" and summary["groups"]["t"]["items"] == 2


def test_a_file_in_the_format_of_another_task_is_named_with_that_task(models, tmp_path):
    path = write_lines(tmp_path / "commonsense_qa.jsonl", CHOICES)
    with pytest.raises(UserError, match="expected an item of commonsense_qa") as error:
        evaluate(models / "base", tasks="commonsense_qa", data_dir=str(tmp_path))
    assert str(error.value).endswith(f"--tasks {path} scores the file by its own form")
    assert evaluate(models / "base", tasks=str(path))


def test_both_forms_of_a_task_ask_the_same(tmp_path):
    hub = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    foundry = {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}
    asked = []
    for row in (hub, foundry):
        write_lines(tmp_path / "arc_easy.jsonl", [row])
        (task,) = load_tasks(["arc_easy"], str(tmp_path))
        (item,) = load_items(task).items
        asked.append((item.contexts, item.continuations, item.gold))
    assert asked[0] == asked[1] == (("Question: Why?\nAnswer:",), ("a", "b"), 1)


def test_examples_are_drawn_as_lm_evaluation_harness_draws_them(tmp_path):
    (task,) = load_tasks([write_lines(tmp_path / "things.jsonl", CHOICES)])
    items, draw = load_items(task, shots=2).items, Random(1234)
    for row, item in zip(CHOICES, items, strict=True):
        examples = [other for other in draw.sample(CHOICES, 3) if other != row][:2]
        said = "".join(f"{other['query']} {other['choices'][other['gold']]}\n\n" for other in examples)
        assert item.contexts == (said + row["query"],)


def test_a_limit_takes_as_many_items_of_each_group(tmp_path):
    rows = [{"sentence_good": f"good {i}", "sentence_bad": f"bad {i}", "UID": "ab"[i > 3]} for i in range(8)]
    write_lines(tmp_path / "blimp.jsonl", rows)
    (task,) = load_tasks(["blimp"], str(tmp_path))
    assert [item.continuations[0] for item in load_items(task, limit=4).items] == [
        "good 0",
        "good 1",
        "good 4",
        "good 5",
    ]


# ---- CORE


def write_bundle(folder: Path) -> Path:
    write_lines(folder / "eval_data" / "a" / "things.jsonl", CHOICES)
    write_lines(folder / "eval_data" / "schemas.jsonl", SCHEMAS)
    write_lines(folder / "eval_data" / "words.jsonl", WORDS)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: things, dataset_uri: a/things.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n"
        "- {label: schemas, dataset_uri: schemas.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        "- {label: words, dataset_uri: words.jsonl, num_fewshot: [1], icl_task_type: language_modeling,\n"
        '   continuation_delimiter: "\\nAnswer: "}\n'
    )
    with (folder / "eval_meta_data.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(
            [["Eval Task", "Random baseline"], ["things", "33"], ["schemas", "50.0"], ["words", 0]]
        )
    return folder


def test_core_is_the_mean_of_centred_scores(models, tmp_path):
    bundle, report = write_bundle(tmp_path / "bundle"), tmp_path / "report.jsonl"
    (scores,) = evaluate(models / "base", core=str(bundle), report=str(report)).models
    tasks = {name: task["score"] for name, task in scores["tasks"].items()}
    guesses = {"core/things": 0.33, "core/schemas": 0.5, "core/words": 0.0}
    centred = [(tasks[name] - guess) / (1 - guess) for name, guess in guesses.items()]
    assert scores["core"] == pytest.approx(sum(centred) / 3)
    items = read_lines(report)
    shuffled = CHOICES.copy()
    Random(1337).shuffle(shuffled)
    for number, (row, item) in enumerate(zip(shuffled, items, strict=False)):
        others = [shuffled[i] for i in range(6) if i != number]
        examples = Random(1234 + number).sample(others, 2)
        said = "".join(f"{other['query']} {other['choices'][other['gold']]}\n\n" for other in examples)
        assert item["contexts"] == [said + row["query"]]
        means = [logprob / tokens for logprob, tokens in zip(item["logprobs"], item["tokens"], strict=True)]
        assert item["chosen"] == means.index(max(means))
    assert items[-1]["contexts"][0].count("\nAnswer: ") == 1


# ---- many models, gates, training text


def test_models_are_compared_in_pairs(models, tmp_path):
    file = write_lines(tmp_path / "things.jsonl", CHOICES)
    report = tmp_path / "report.jsonl"
    done = evaluate(models / "base", models / "other", tasks=file, report=str(report))
    items = read_lines(report)
    right = [[item["metrics"]["acc"] for item in items if item["model"].endswith(name)] for name in ("base", "other")]
    (comparison,) = done.comparisons
    assert comparison["difference"] == pytest.approx((sum(right[1]) - sum(right[0])) / 6)
    assert not comparison["beyond_chance"]
    (same,) = evaluate(models / "base", f"{models}/./base", tasks=file).comparisons
    assert (same["difference"], same["p"]) == (0, 1)


@pytest.mark.parametrize(("right", "beyond"), [(10, True), (4, False)])
def test_a_difference_is_more_than_chance_by_the_sign_test(right, beyond):
    from llmkit.evaluation.scores import compare
    from llmkit.evaluation.tasks import Task

    records = [[{"metrics": {"acc": float(value and i < right)}} for i in range(20)] for value in (0, 1)]
    found = compare(Task("t", "multiple_choice"), *records)
    assert found["p"] == pytest.approx(2 * 0.5**right)
    assert found["beyond_chance"] is beyond


def test_a_gate_that_is_not_met_ends_with_code_3_and_the_scores(models, tmp_path, llmkit):
    file, out = write_lines(tmp_path / "sums.jsonl", PROBLEMS), tmp_path / "scores.json"
    done = llmkit("evaluate", models / "seven", "--tasks", file, "--fail-under", "sums=0.6", "-o", out, "--quiet")
    assert (done.returncode, out.exists()) == (3, True)
    assert "sums 0.5000 is under --fail-under 0.6" in done.stderr
    assert evaluate(models / "seven", tasks=file, gates=["sums=0.5"])


def test_items_of_the_training_text_are_scored_apart(models, tmp_path):
    items = [
        {"context": f"{letter}: it was the best of {letter} times, it was the worst of", "continuation": "times"}
        for letter in "abcd"
    ]
    file = write_lines(tmp_path / "words.jsonl", items)
    write_lines(tmp_path / "docs.jsonl", [{"text": f"... {items[1]['context'].upper()} times!"}, {"text": "Nothing."}])
    report = tmp_path / "report.jsonl"
    task = evaluate(models / "base", tasks=file, trained_on=[str(tmp_path / "d*.jsonl")], report=str(report))
    task = task.models[0]["tasks"]["words"]
    assert (task["in_training"]["items"], task["not_in_training"]["items"]) == (1, 3)
    assert [item["in_training"] for item in read_lines(report)] == [False, True, False, False]


def test_the_manifest_of_a_model_names_what_it_was_trained_on(models, tmp_path, llmkit):
    items = [
        {
            "query": f"What is the {word} sea that lies to the {word} of the island?",
            "choices": ["Deep.", "Dry."],
            "gold": 0,
        }
        for word in ("white", "black", "yellow", "red")
    ]
    file = write_lines(tmp_path / "seas.jsonl", items)
    docs = write_lines(tmp_path / "docs.jsonl", [{"text": items[0]["query"] + " Deep."}])
    chat = [{"role": "user", "content": items[1]["query"]}, {"role": "assistant", "content": "Deep."}]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": chat, "source": "seas"}])
    val = write_lines(tmp_path / "val.jsonl", [{"prompt": items[2]["query"], "answer": "Deep."}])
    base, policy = save_folder(tmp_path / "base", make_model()), save_folder(tmp_path / "policy", make_model())
    write_manifest(base, "pretrain", {}, inputs=[docs])
    options = {"model": str(base), "val": [str(tmp_path / "v*.jsonl")]}
    # items that sft --not-in removed are not training text
    write_manifest(policy, "rl", options, inputs=[chats, val, file], parents=[str(base)], not_in=[file])
    report, out = tmp_path / "report.jsonl", tmp_path / "scores.json"

    def found() -> list[bool]:
        options = {"report": str(report), "out": str(out), "force": True, "trained_on": [str(policy)]}
        evaluate(policy, tasks=file, **options)
        return [item["in_training"] for item in read_lines(report)]

    assert found() == [True, True, False, False]
    assert json.loads(out.read_text())["trained_on"] == {"files": [chats, docs], "missing": []}
    write_lines(tmp_path / "docs.jsonl", [{"text": "Other words."}])
    assert found() == [False, True, False, False]
    assert json.loads(out.read_text())["trained_on"] == {"files": [chats], "missing": [docs]}
    (tmp_path / "chats.jsonl").unlink()
    done = llmkit("evaluate", policy, "--tasks", file, "--trained-on", policy)
    assert done.returncode == 2 and f"found none of {chats}, {docs}" in done.stderr
    done = llmkit("evaluate", policy, "--tasks", file, "--trained-on", models / "base")
    assert done.returncode == 2 and "base: expected manifest.json" in done.stderr


def test_examples_are_counted_and_are_part_of_the_data(models, tmp_path):
    write_lines(tmp_path / "things.jsonl", CHOICES)
    form = '[[form]]\nprompt = "{{query}}"\nchoices = "choices"\ngold = "gold"\n'
    (tmp_path / "own.toml").write_text(f'kind = "multiple_choice"\nfile = "things"\nshots_file = "shown"\n{form}')
    hashes = []
    for shown in (CHOICES[0], CHOICES[1], CHOICES[1]):
        write_lines(tmp_path / "shown.jsonl", [shown])
        task = evaluate(models / "base", tasks=str(tmp_path / "own.toml"), few_shot=1).models[0]["tasks"]["own"]
        hashes.append(task["data_sha256"])
        assert task["shots"] == 1
    assert hashes[0] != hashes[1] == hashes[2]


# ---- resume


def test_a_resumed_run_ends_as_an_uninterrupted_one(models, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "CHUNK", 2)
    file, out, other = write_lines(tmp_path / "things.jsonl", CHOICES), tmp_path / "a.json", tmp_path / "b.json"
    evaluate(models / "base", models / "other", tasks=file, out=str(other))
    asked, whole = [], evaluator.Model.evaluate

    def dies(model, task, items):
        asked.append(items[0].where)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return whole(model, task, items)

    monkeypatch.setattr(evaluator.Model, "evaluate", dies)
    with pytest.raises(BaseException, match="--resume continues"):
        evaluate(models / "base", models / "other", tasks=file, out=str(out))
    with pytest.raises(UserError, match="an unfinished run"):
        evaluate(models / "base", models / "other", tasks=file, out=str(out))
    evaluate(models / "base", models / "other", tasks=file, out=str(out), resume=True)
    assert len(asked) == 7
    assert out.read_text() == other.read_text()
    assert not list(tmp_path.glob("*.state"))


def test_a_damaged_model_among_others_is_named(models, tmp_path):
    spoiled = make_model(context=256)
    spoiled.norm.data.fill_(math.nan)
    save_folder(tmp_path / "spoiled", spoiled)
    file = write_lines(tmp_path / "things.jsonl", CHOICES)
    with pytest.raises(UserError, match="spoiled: its logits are not finite"):
        evaluate(models / "base", tmp_path / "spoiled", tasks=file)


def test_a_finished_run_has_nothing_to_resume(models, tmp_path, monkeypatch, llmkit):
    file, out, report = write_lines(tmp_path / "things.jsonl", CHOICES), tmp_path / "a.json", tmp_path / "items.jsonl"
    first = evaluate(models / "base", tasks=file, out=str(out), report=str(report))
    made = out.read_bytes()
    monkeypatch.setattr(evaluator.Model, "evaluate", None)  # nothing is computed again
    again = {"tasks": file, "out": str(out), "resume": True}
    assert evaluate(models / "base", report=str(report), **again) == first and out.read_bytes() == made
    with pytest.raises(GateError, match=r"things .* is under --fail-under 2"):
        evaluate(models / "base", gates=("things=2",), **again)
    for options, message in (
        ({"gates": ("thing=0",)}, "--fail-under thing: expected a task among things"),
        ({"few_shot": 1}, "a.json: another run: --shots was none and is now 1"),
        ({"report": str(tmp_path / "r.jsonl")}, "r.jsonl: cannot be made from .*a.json, which is finished"),
        ({"report": "-"}, "--report: expected a file, found -"),
        ({"out": file}, "things.jsonl: not a finished evaluate run"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(models / "base", **{**again, **options})
    write_lines(tmp_path / "things.jsonl", CHOICES[:2])
    with pytest.raises(UserError, match=r"a.json: another run: .*things.jsonl has changed since; start over with"):
        evaluate(models / "base", **again)
    done = llmkit("evaluate", models / "base", "--tasks", file, "--report", "-")
    assert (done.returncode, done.stdout) == (2, "") and "--report: expected a file" in done.stderr


# ---- user errors


def test_choices_that_are_answered_in_text_are_reported(models, tmp_path, llmkit):
    rows = [{"question": "Why?", "choices": ["Because.", "Ice."], "answer": 1}]
    done = llmkit("evaluate", models / "base", "--tasks", write_lines(tmp_path / "why.jsonl", rows), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "why: answered in text; likelihoods score choices named query, choices and gold" in done.stderr
    file = write_lines(tmp_path / "things.jsonl", CHOICES)
    assert "answered in text" not in llmkit("evaluate", models / "base", "--tasks", file, "--dry-run").stderr


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"query": "a", "choices": ["b", "c"], "gold": 2}], "1: expected the right choice, from 0 to 1, found 2"),
        ([{"query": "a", "choices": ["b", " "], "gold": 0}], "1: expected a choice with text, found ' '"),
        ([{"query": "a", "choices": ["b"], "gold": 0}], "1: expected at least two choices, found ['b']"),
        ([*CHOICES, {"query": "a"}], "7: expected an item of bad, found ['query']"),
        ([*CHOICES, {"query": None, "choices": ["a", "b"], "gold": 0}], "7: expected an item of bad"),
        ([{"id": 7}], "1: expected an item (query, choices, gold;"),
        ([{"id": 7}], "found ['id']; name its task, as in arc_easy=FILE"),
        ([{"prompt": 7}], "found ['prompt']; expected 'prompt' to be text"),
        ([{"prompt": "2 + 2?"}], "expected field 'answer' for the verifier"),
        ([{"question": "a", "choices": [], "answer": "b"}], "expected 'choices' to be a list of strings, found []"),
        ([{"question": "a", "options": None, "choices": [3, 4], "answer": 0}], "list of strings, found [3, 4]"),
        ([], "expected items, found none"),
    ],
)
def test_bad_items_are_named(models, tmp_path, rows, expected):
    with pytest.raises(UserError) as error:
        evaluate(models / "base", tasks=write_lines(tmp_path / "bad.jsonl", rows))
    assert expected in str(error.value) and "bad.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"tasks": "arc_esy"},
            "--tasks arc_esy: expected a task or a file of items, found neither; did you mean arc_easy",
        ),
        ({"tasks": "arc_easy", "data_dir": "."}, "--tasks arc_easy: expected arc_easy.jsonl"),
        ({"tasks": ""}, "--tasks: expected a task"),
        ({"samples": 2}, "--samples 2: needs --temperature above 0"),
        ({"gates": ["thing=1"]}, "--fail-under thing: expected a task among things"),
        ({"gates": ["things"]}, "--fail-under things: expected TASK=SCORE"),
        ({"gates": ["0.5"]}, "--fail-under 0.5: expected TASK=SCORE"),
        ({"gates": ["things=1e400"]}, "--fail-under things=1e400: expected TASK=SCORE"),
        ({"gates": ["things=nan"]}, "--fail-under things=nan: expected TASK=SCORE"),
        ({"few_shot": 6}, "expected 6 examples (--shots), found 5"),
        ({"chat": True}, "llmkit sft"),
        ({"tools": ["calc"]}, "--tools: needs --chat"),
        ({"core": "."}, "--core .: expected core.yaml, eval_meta_data.csv and eval_data/, found no core.yaml"),
        ({"resume": True}, "--resume: expected --out"),
    ],
)
def test_user_errors_are_named(models, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "things.jsonl", CHOICES)
    with pytest.raises(UserError) as error:
        evaluate(models / "base", **{"tasks": "things.jsonl", **options})
    assert expected in str(error.value)


def test_unit_tests_require_the_sandbox_before_any_model_runs(models, tmp_path, monkeypatch):
    def missing() -> None:
        raise UserError("the Python sandbox does not work on this machine: no namespaces")

    test = {
        "task_id": "t/0",
        "prompt": "def two():\n",
        "test": "def check(f):\n    assert f() == 2",
        "entry_point": "two",
    }
    tasks = f"{write_lines(tmp_path / 'things.jsonl', CHOICES)},humaneval"
    write_lines(tmp_path / "HumanEval.jsonl", [test])
    monkeypatch.setattr("llmkit.rewards.code.check_sandbox", missing)
    options = {"tasks": tasks, "data_dir": str(tmp_path), "max_tokens": 4}
    with monkeypatch.context() as patched, pytest.raises(UserError, match="does not work on this machine"):
        patched.setattr(evaluator, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        evaluate(models / "seven", **options)
    (scores,) = evaluate(models / "seven", sandbox="none", **options).models
    assert scores["tasks"]["humaneval"]["score"] == 0


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ('kind = "choice"\n[[form]]\nprompt = ""\n', "kind: expected multiple_choice"),
        ('kind = "text"\nbasline = 1\n[[form]]\ntext = ""\n', "expected baseline, found 'basline'"),
        ('kind = "text"\n[[form]]\nprompt = ""\n', "[[form]]: expected 'text', required for kind text"),
        ('kind = "text"\nshots = "2"\n[[form]]\ntext = ""\n', "shots: expected int, found '2'"),
        ('kind = "text"\n', "expected at least one table [[form]]"),
        ('kind = "text"\nmetric = "acc"\n[[form]]\ntext = ""\n', "metric: expected bits_per_byte, found 'acc'"),
        ('kind = "text"\nshots = -1\n[[form]]\ntext = ""\n', "expected shots >= 0"),
        ('kind = "text"\nshots_order = "frist"\n[[form]]\ntext = ""\n', "shots_order: expected random"),
        ('kind = "text"\n[[form]]\ntext = 3\n', "[[form]]: text: expected a template, found 3"),
        ('kind = "text"\n[[form]]\ntext = "{{a"\n', "text: expected a Jinja template: unexpected end of template"),
        ('kind = "text"\ngroup = "a +"\n[[form]]\ntext = ""\n', "group: expected a Jinja expression: unexpected"),
        ('kind = "generation"\nverifier = "x"\n[[form]]\nprompt = ""\n', "verifier: expected number, gsm8k,"),
    ],
)
def test_errors_in_a_toml_are_named(tmp_path, toml, expected):
    (tmp_path / "own.toml").write_text(toml)
    with pytest.raises(UserError) as error:
        read_task(tmp_path / "own.toml")
    assert expected in str(error.value) and "own.toml" in str(error.value)


def test_report_shows_scores_and_the_curves_of_tasks(models, tmp_path, llmkit):
    out = tmp_path / "scores.json"
    evaluate(models / "base", tasks=write_lines(tmp_path / "things.jsonl", CHOICES), out=str(out))
    done = llmkit("report", out, "--json")
    assert done.returncode == 0, done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    score = json.loads(out.read_text())["models"][0]["tasks"]["things"]
    rows = [(row["model"], row["score"], row["stderr"]) for row in task["rows"]]
    assert (task["task"], task["metric"], rows) == (
        "things", "acc", [(str(models / "base"), score["score"], score["stderr"])]
    )  # fmt: skip


def test_report_draws_the_scores_of_several_models_and_files(models, tmp_path, llmkit):
    things, few = (
        write_lines(tmp_path / name / "things.jsonl", rows) for name, rows in (("a", CHOICES), ("b", CHOICES[:3]))
    )
    sums = write_lines(tmp_path / "sums.jsonl", PROBLEMS)
    evaluate(models / "base", models / "other", tasks=f"{things},{sums}", out=str(tmp_path / "both.json"))
    evaluate(models / "base", tasks=few, out=str(tmp_path / "few.json"))
    files = (tmp_path / "both.json", tmp_path / "few.json")
    first, second = json.loads(llmkit("report", *files, "--json").stdout)["tasks"]
    base, other = str(models / "base"), str(models / "other")
    assert [row["model"] for row in first["rows"]] == [f"{base}, {files[0]}", other, f"{base}, {files[1]}"]
    assert (first["same_items"], second["same_items"], second["form"]) == (False, True, "share")
    assert first["rows"][1]["against"]["model"] == base and first["rows"][0]["against"] is None
    page = tmp_path / "page.html"
    done = llmkit("report", *files, "-o", page)
    assert done.returncode == 0, done.stderr
    bars = re.findall(r'class="b(\d)" y="1" width="([\d.]+)"', page.read_text())
    assert [colour for colour, _ in bars] == ["0", "1", "2", "0", "1"]
    scores = [row["score"] for task in (first, second) for row in task["rows"]]
    assert [float(width) for _, width in bars] == pytest.approx([100 * score for score in scores], abs=0.01)
    (tmp_path / "odd.json").write_text('{"models": [{"model": 1, "tasks": {"a": {"score": null}, "b": 2}}]}')
    assert json.loads(llmkit("report", tmp_path / "odd.json", "--json").stdout)["tasks"] == []


def test_scores_and_items_need_files_of_their_own(models, tmp_path):
    things, out = write_lines(tmp_path / "things.jsonl", CHOICES), str(tmp_path / "scores.json")
    with pytest.raises(UserError, match="--report: expected another file than --out"):
        evaluate(models / "base", tasks=things, out=out, report=out)
    assert not os.path.exists(out)
