"""Scores of tasks from the records of their items, and the CORE score from its tasks."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.evaluation.tasks import FILE_FORMS, KINDS, Loaded, Task

CORE_KINDS = {kind: form for kind, form in FILE_FORMS if kind != "text"}
LIKELY = 0.05  # significance level


def values_of(kind: str, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return each item's values by metric. A metric's score is their mean."""
    values = {name: np.array([record["metrics"][name] for record in records]) for name in records[0]["metrics"]}
    if kind in ("text", "language_modeling"):
        bits = np.array([-record["logprobs"][0] for record in records]) / math.log(2)
        values["bits_per_byte"] = bits / np.mean([record["bytes"] for record in records])
    return values


def metric_of(task: Task) -> str:
    """Return the metric used as the score of a task."""
    return task.metric or KINDS[task.kind][1]


def summarise(loaded: Loaded, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return score, standard error and all metrics of a task, with their provenance.

    The standard error of the mean over items uses the sample variance, as in lm-evaluation-harness.
    """
    task = loaded.task
    values = values_of(task.kind, records)
    metric = metric_of(task)
    metrics: dict[str, float | None] = {}
    for name, each in values.items():
        metrics[name] = float(each.mean())
        if name == "bits_per_byte":  # ratio of two sums: use the residuals
            sizes = np.array([record["bytes"] for record in records])
            each = each - each.mean() * sizes / sizes.mean()
        metrics[f"{name}_stderr"] = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    if "bits_per_byte" in values:
        logprobs = np.array([record["logprobs"][0] for record in records])
        if task.kind == "text":
            words = sum(record["words"] for record in records)
            metrics["word_perplexity"] = math.exp(min(-logprobs.sum() / words, 700))
        else:
            metrics["perplexity"] = math.exp(min(-logprobs.mean(), 700))
    summary: dict[str, Any] = {
        "score": metrics[metric],
        "stderr": metrics[f"{metric}_stderr"],
        "metric": metric,
        "baseline": task.baseline,
        "items": len(records),
        "metrics": metrics,
        "shots": task.shots,
        "truncated": sum(record["truncated"] for record in records),
        "source": task.source or task.path,
        "version": task.version,
        "data_sha256": loaded.data_sha256,
    }
    if unjudged := sum(verdict is None for record in records for verdict in record.get("right", ())):
        summary["unjudged"] = unjudged
    if task.group:
        groups: dict[str, list[float]] = defaultdict(list)
        for item, value in zip(loaded.items, values[metric].tolist(), strict=True):
            groups[item.group].append(value)
        summary["groups"] = {name: {"score": float(np.mean(some)), "items": len(some)} for name, some in groups.items()}
    return summary


def summarise_apart(loaded: Loaded, records: Sequence[Mapping[str, Any]], contaminated: set[str]) -> dict[str, Any]:
    """Return separate scores for items that occur in training text (given as FILE:LINE), and for the others."""
    values = values_of(loaded.task.kind, records)[metric_of(loaded.task)]
    inside = np.array([item.where in contaminated for item in loaded.items])
    return {
        name: {"score": float(values[chosen].mean()) if chosen.any() else None, "items": int(chosen.sum())}
        for name, chosen in (("in_training", inside), ("not_in_training", ~inside))
    }


# ---- two models


def compare(task: Task, first: Sequence[Mapping], second: Sequence[Mapping]) -> dict[str, Any]:
    """Compare two models on the same items: mean difference (second - first), standard error, and p-value.

    p: for right and wrong answers by the exact sign test (McNemar); for other metrics by a normal approximation of the
    paired differences (Miller 2024, arXiv:2411.00640).
    """
    metric = metric_of(task)
    difference = values_of(task.kind, second)[metric] - values_of(task.kind, first)[metric]
    mean = float(difference.mean())
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    if set(np.unique(difference)) <= {-1.0, 0.0, 1.0}:
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        either = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * either / 2 ** (wins + losses))
    else:
        p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0 or len(difference) < 2)
    return {"difference": mean, "stderr": error, "p": p, "beyond_chance": p < LIKELY}


# ---- CORE


def core_tasks(bundle: str) -> list[Task]:
    """Return the tasks of CORE, from the folder `eval_bundle` of DCLM and nanochat.

    core.yaml lists the tasks, eval_meta_data.csv has the random baselines in percent, and eval_data/ the items.
    Raises UserError if one of these is missing or malformed.
    """
    import yaml

    folder = Path(bundle)
    for name in ("core.yaml", "eval_meta_data.csv", "eval_data"):
        if not (folder / name).exists():
            raise UserError(f"--core {bundle}: expected core.yaml, eval_meta_data.csv and eval_data/, found no {name}")
    tasks = []
    try:
        with (folder / "eval_meta_data.csv").open(newline="") as handle:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(handle)}
        for values in yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]:
            kind, label = values["icl_task_type"], values["label"]
            form = CORE_KINDS[kind]
            task = Task(
                f"core/{label}",
                kind,
                (replace(form, prompt="{{context | trim}}") if kind == "language_modeling" else form,),
                source="CORE (DCLM; nanochat core_eval.py)",
                version="1",
                baseline=baselines[label],
                delimiter=values.get("continuation_delimiter", " "),
                shots=values["num_fewshot"][0],
                shots_order="core",
                tokens="core",
                path=str(folder / "eval_data" / values["dataset_uri"]),
            )
            tasks.append(task)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"--core {bundle}: not a CORE bundle: {type(error).__name__}: {error}") from None
    return tasks


def core_score(tasks: Iterable[tuple[Task, float]]) -> float | None:
    """Return the CORE metric: the mean of its tasks' scores, centred so that a guess is 0 and all right is 1."""
    centred = [(score - task.baseline) / (1 - task.baseline) for task, score in tasks if task.tokens == "core"]
    return sum(centred) / len(centred) if centred else None
