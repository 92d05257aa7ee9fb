"""Run folders like those of the stages, written with the same functions, for tests of readers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmkit.io.manifest import write_manifest
from llmkit.io.metrics import MetricsLog


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write JSONL; a string is a raw line."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_run(folder: Path, stage: str, *parents: Path, rows: Iterable[Mapping] = (), command="", **details) -> Path:
    """Write the folder of a finished run with manifest and metrics; inputs are paths or manifest entries."""
    folder.mkdir()
    inputs = details.pop("inputs", ())
    details["inputs"] = [item for item in inputs if isinstance(item, str)]
    with _as_command(command or f"{stage} in.jsonl -o {folder.name}/"):
        options = {"seed": 1, "out": str(folder), **details.pop("options", {})}
        manifest = write_manifest(folder, stage, options, parents=[str(parent) for parent in parents], **details)
    manifest["inputs"] += [item for item in inputs if not isinstance(item, str)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for row in rows:
            log.write(row)
    return folder


def make_file_run(out: Path, stage: str, rows: Iterable[Any], *, results: Mapping[str, Any], **details) -> Path:
    """Write an output file of a stage and its manifest."""
    write_lines(out, rows)
    with _as_command(f"{stage} in.jsonl -o {out.name}"):
        options = {"out": str(out), **details.pop("options", {})}
        write_manifest(str(out), stage, options, inputs=details.pop("inputs", ()), results=results, **details)
    return out


class _as_command:
    """Sets sys.argv while a stage runs."""

    def __init__(self, command: str) -> None:
        self.argv = ["llmkit", *shlex.split(command)]

    def __enter__(self) -> None:
        self.before, sys.argv = sys.argv, self.argv

    def __exit__(self, *exception: object) -> None:
        sys.argv = self.before


def judged(accuracy: float = 0.8125) -> dict[str, Any]:
    """Return one part of an evaluation.json."""
    interval = [round(accuracy - 0.1, 4), round(accuracy + 0.1, 4)]
    calibration = {"loss": 0.4321, "ece": 0.0657, "temperature": 3.311, "ece_at_temperature": 0.0602}
    return {"comparisons": 32, "accuracy": accuracy, "accuracy_95": interval, **calibration}


def probed(question: str, known: str, kind: str = "who") -> dict[str, Any]:
    """Return one line of a probe's report."""
    verdict = {"yes": "right", "no": "wrong", "mixed": "right", "evasive": "evasive"}[known]
    return {
        "question": question,
        "answer": "Ada",
        "passage_id": "p1",
        "responses": ["Ada", "Bob"],
        "judgements": [verdict, verdict],
        "known": known,
        "kind": kind,
        "written_by": "given",
        "judged_by": "match",
    }


def attempt(step: int, group: int, completion: str, reward: float) -> dict[str, Any]:
    """Return one line of rollouts.jsonl."""
    return {
        "step": step,
        "group": group,
        "sample": 0,
        "prompt": "sort 3 1 2",
        "answer": "1 2 3",
        "completion": completion,
        "reward": reward,
        "rewards": {"verifier": reward},
        "finish_reason": "stop",
        "token_ids": [1, 2],
    }


def make_pipeline(place: Path) -> list[Path]:
    """Write a run of every stage: crawl, tokenizer, base, assistant, two probes, judge, policy."""
    funnel = [
        {"step": "read", "in": 1361, "kept": 1357, "dropped": {"warcinfo": 4}, "seconds": 0.9},
        {
            "step": "language",
            "in": 1357,
            "kept": 848,
            "dropped": {"other_language": 470, "min_score": 39},
            "seconds": 2.33,
        },
    ]
    results = {"records": 1361, "documents": 848, "dropped": {"read": 4, "language": 509}, "funnel": funnel}
    documents = [{"text": f"Page {number}.", "url": f"https://example.org/{number}"} for number in range(10)]
    docs = make_file_run(place / "docs.jsonl", "crawl-filter", documents, results=results)

    inputs = [{"path": str(docs), "bytes": docs.stat().st_size, "sha256": "0" * 64}]
    figures = {"vocab_size": 512, "bytes": 3139674, "bytes_per_token": 2.0666}
    tok = make_run(place / "tok", "train-bpe", inputs=inputs, results={**figures, "merges": 244, "documents": 1701})
    measured = {"bytes_per_token": 2.1438, "bytes_per_token_by_source": {"web": 1.9903, "stories": 2.323}}
    compared = {"gpt2": {"vocab_size": 50257, "bytes_per_token": 2.9, "bytes_per_token_by_source": {"web": 3.1}}}
    report = {"sample": {"bytes": 98114, **measured}, "compared": compared, "round_trip": {"texts": 96, "lost": 1}}
    report |= {"unused_tokens": {"count": 3}, "longest_tokens": [{"token": " there", "bytes": 6, "count": 401}]}
    (tok / "report.json").write_text(json.dumps({**figures, **report}))

    rows = [{"step": step, "loss": 6.0 - 0.0625 * step, "tokens": 64 * step} for step in range(1, 61)]
    rows.append({"step": 60, "tokens": 3840, "val_loss": 2.424, "val_bits_per_byte": 1.5026})
    rows.append({"step": 60, "sample": "Once upon a time"})
    results = {"steps": 60, "tokens": 3840, "parameters": 557952, "loss": 2.25, "val_loss": 2.424, "seconds": 45.3}
    base = make_run(place / "base", "pretrain", tok, inputs=inputs, results=results, rows=rows)
    chat = make_run(place / "chat", "sft", base, results={"steps": 9, "loss": 0.4}, rows=[{"step": 9, "loss": 0.4}])

    before = [probed("Who is A?", "no"), probed("Who is B?", "no"), probed("When?", "yes", "when")]
    after = [probed("Who is A?", "evasive"), probed("Who is B?", "no"), probed("When?", "yes", "when")]
    probes = [write_lines(place / "before.jsonl", before), write_lines(place / "after.jsonl", after)]

    rows = [{"step": 5, "loss": 0.5, "val_loss": 0.45, "val_accuracy": 0.8125}]
    results = {"comparisons": 351, "val_comparisons": 32, "val_accuracy": 0.8125, "val_accuracy_95": [0.7125, 0.9125]}
    judge = make_run(place / "judge", "train-reward", chat, results=results, rows=rows)
    evaluation = {"overall": judged(), "by_source": {"prefs.jsonl": judged(0.75)}, "baseline_length": judged(0.5)}
    evaluation["biases"] = {"length": {"score": 0.3105, "label": -0.0421}}
    (judge / "evaluation.json").write_text(json.dumps(evaluation))

    rows = [{"step": 0, "val_reward": 0.9, "val_success": 0.3, "val_gold": 0.6, "val_length": 6.5}]
    for step in range(1, 31):
        rows.append({"step": step, "reward": 0.9 + step / 50, "success": 0.3, "length": 6.0, "kl_per_attempt": 0.1})
    rows.append({"step": 30, "val_reward": 1.5, "val_success": 0.875, "val_gold": 0.125, "val_length": 6.25})
    results = {"steps": 30, "attempts": 960, "reward": 1.5, "success": 0.3, "val_gold": 0.125, "kept_step": 10}
    policy = make_run(place / "policy", "rl", chat, judge, results=results, rows=rows)
    write_lines(policy / "rollouts.jsonl", [attempt(step, step, "1 2 3", step % 2) for step in range(1, 31)])
    return [docs, tok, base, chat, *probes, judge, policy]
