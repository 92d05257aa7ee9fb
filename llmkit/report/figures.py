"""All figures of a report as one JSON object; the page only displays them.

    figures = report_figures(gather(["tok/", "base/", "probe.jsonl"]))

summary      the main figure of each stage
scores       effects.json, the scores of a complete pipeline
runs         nodes of the graph, parents first: name, stage, state, path, command, parents, key figures, ...
funnels      crawl-filter's records by step and reason
tokenizers   train-bpe's report.json
trainings    by stage: charts with the curves of its runs, and samples during training
tasks        evaluate's scores of models, by task
probes       known and unknown questions by kind; `probe_changes`: from the first report to the last
judges       train-reward's evaluation.json
samples      records to browse, by file
notes        what was left out, and why

`shorten` drops records and points if the page gets too long.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llmkit import __version__
from llmkit.io.jsonl import read_object
from llmkit.io.metrics import METRICS
from llmkit.io.progress import counted
from llmkit.report.ancestry import Node, ancestry
from llmkit.report.charts import Metrics, charts_of, read_series
from llmkit.report.records import (
    KINDS,
    as_object,
    as_text,
    is_number,
    noting,
    objects,
    parsed,
    raw_lines,
    read_excerpts,
    thinned,
)
from llmkit.report.runs import Gathered

NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}
STAGES = ("crawl-filter", "train-bpe", "pretrain", "sft", "probe-knowledge", "train-reward", "rl", "sample")
# the metrics that summarise the latest run of a stage: key, name, format
MEASURES = {
    "pretrain": (("val_bits_per_byte", "bits per byte, held out", ""), ("val_loss", "loss, held out", "")),
    "sft": (("val_loss", "loss, held out", ""),),
    "rl": (
        ("val_success", "right answers, held out", "share"),
        ("success", "right answers, in training", "share"),
        ("val_gold", "gold reward, held out", ""),
        ("val_reward", "reward, held out", ""),
        ("reward", "reward, in training", ""),
    ),
}
MOST_POLICIES = 3  # latest runs of rl in the summary; of other stages only the latest one
# results in a manifest that are shown at a glance; for other stages, the first numbers
KEY_FIGURES = {
    "crawl-filter": ("records", "documents"),
    "train-bpe": ("vocab_size", "bytes", "bytes_per_token"),
    "pretrain": ("parameters", "tokens", "val_loss", "val_bits_per_byte", "loss", "seconds"),
    "sft": ("steps", "tokens", "val_loss", "loss", "seconds"),
    "probe-knowledge": ("questions", "known", "unknown", "mixed", "evasive", "refusals", "confirmations"),
    "write-chats": ("conversations", "drafts", "pairs"),
    "train-reward": ("comparisons", "val_comparisons", "val_accuracy", "val_loss", "seconds"),
    "rl": ("steps", "attempts", "success", "val_success", "reward", "val_reward", "val_gold", "kept_step", "seconds"),
}
MOST_KEY_FIGURES = 7


def report_figures(gathered: Gathered, *, samples: int = 40, limit: int | None = None) -> dict[str, Any]:
    """Compute the figures of everything gathered.

    samples  most records to browse per file
    limit    most records to read per file
    """
    notes = list(gathered.notes)
    nodes = ancestry(gathered.runs, gathered.files)
    probes, verdicts = [], []
    for file in gathered.files:
        if file.kind == "probed questions":
            with noting(notes):
                figures_of_probe, known_of = _read_probe(file.path, notes.append, limit)
                probes.append(figures_of_probe)
                verdicts.append(known_of)
    runs = [_run(node) for node in nodes]
    for run in runs:
        probe = next((probe for probe in probes if probe["path"] == run["path"]), None)
        if probe and not run["key_figures"]:
            run["key_figures"] = {name: probe[name] for name in ("questions", *NAMES.values())}
    figures: dict[str, Any] = {
        "llmkit": __version__,
        "summary": [],
        "scores": [{"path": path, "effects": rows} for path, rows in gathered.scores.items()],
        "runs": runs,
        "funnels": list(_funnels(nodes)),
        "tokenizers": list(_tokenizers(nodes, gathered.tokenizers, notes)),
        "trainings": list(_trainings(nodes, notes, limit)),
        "tasks": _tasks(gathered.task_scores),
        "probes": probes,
        "probe_changes": None,
        "judges": list(_judges(nodes, gathered.evaluations, notes)),
        "samples": [],
        "notes": notes,
    }
    if len(probes) > 1:
        ends = {"before": probes[0]["path"], "after": probes[-1]["path"]}
        figures["probe_changes"] = {**ends, **_changes(verdicts[0], verdicts[-1])}
    summary = [*_trained(figures), *_measured(figures)]
    figures["summary"] = sorted(summary, key=lambda row: STAGES.index(row["stage"]))
    kinds = list(KINDS)
    for file in sorted(gathered.files, key=lambda file: kinds.index(file.kind)):
        with noting(notes):
            excerpts = read_excerpts(file, samples, notes.append, limit)
            if excerpts["rows"]:
                figures["samples"].append(excerpts)
    return figures


# ---- the graph


def given_runs(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs except ancestors that were not given and models that llmkit did not make."""
    return [run for run in figures["runs"] if run["state"] not in ("told", "foreign")]


def _run(node: Node) -> dict[str, Any]:
    manifest = node.manifest
    results = as_object(manifest.get("results"))
    options = as_object(manifest.get("options"))
    numeric = _numbers(results)
    names = [name for name in KEY_FIGURES.get(node.stage, ()) if name in numeric] or list(numeric)
    return {
        "name": node.name,
        "stage": node.stage,
        "state": node.state,
        "path": node.path,
        "command": as_text(manifest.get("command")),
        "created": as_text(manifest.get("created")),
        "machine": as_text(manifest.get("machine")),
        "parents": node.parents,
        "key_figures": {name: numeric[name] for name in names[:MOST_KEY_FIGURES]},
        "results": {name: value for name, value in results.items() if not isinstance(value, (list, dict))},
        # without options that are off or empty, and nested ones (a recipe, a plan), which are too long
        "options": {
            name: value
            for name, value in options.items()
            if value not in (None, False, "", []) and not isinstance(value, dict)
        },
        "versions": {str(name): str(value) for name, value in as_object(manifest.get("versions")).items()},
        "inputs": [
            {"path": str(item.get("path")), "bytes": item.get("bytes"), "sha256": as_text(item.get("sha256"))}
            for item in objects(manifest.get("inputs"))
        ],
    }


# ---- stages


def _funnels(nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        steps = [
            step
            for step in objects(as_object(node.manifest.get("results")).get("funnel"))
            if isinstance(step.get("step"), str)
            and all(is_number(step.get(name)) for name in ("in", "kept", "seconds"))
            and isinstance(dropped := step.get("dropped"), dict)
            and all(map(is_number, dropped.values()))
        ]
        if steps:
            counts = {"records": steps[0]["in"], "documents": steps[-1]["kept"]}
            yield {"run": node.name, "path": node.path, **counts, "steps": steps}


def _reports(
    nodes: Sequence[Node], name: str, files: Mapping[str, dict[str, Any]], notes: list[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the reports with this name in run folders, and those given as files, each with its run and path."""
    for node in nodes:
        path = node.run.folder / name if node.run and node.run.folder else None
        if path is not None and path.is_file():
            with noting(notes):
                yield {"run": node.name, "path": node.path}, read_object(path)
    for path, report in files.items():
        yield {"run": None, "path": path}, report


def _tokenizers(
    nodes: Sequence[Node], files: Mapping[str, dict[str, Any]], notes: list[str]
) -> Iterator[dict[str, Any]]:
    for origin, report in _reports(nodes, "report.json", files, notes):
        sample = as_object(report.get("sample"))
        if not is_number(sample.get("bytes_per_token")):
            continue
        rows = {origin["path"]: {"vocab_size": report.get("vocab_size"), **sample}}
        rows |= {other: as_object(comparison) for other, comparison in as_object(report.get("compared")).items()}
        round_trip = as_object(report.get("round_trip"))
        yield {
            **origin,
            "bytes": report.get("bytes"),
            "bytes_per_token": report.get("bytes_per_token"),
            "sample_bytes": sample.get("bytes"),
            "round_trip": {name: round_trip[name] for name in ("texts", "lost")}
            if all(is_number(round_trip.get(name)) for name in ("texts", "lost"))
            else None,
            "unused_tokens": as_object(report.get("unused_tokens")).get("count"),
            "longest_tokens": [
                token for token in objects(report.get("longest_tokens")) if {"token", "count"} <= set(token)
            ],
            "rows": [
                {
                    "tokenizer": tokenizer,
                    "vocab_size": row.get("vocab_size"),
                    "bytes_per_token": row.get("bytes_per_token"),
                    "by_source": as_object(row.get("bytes_per_token_by_source")),
                }
                for tokenizer, row in rows.items()
            ],
        }


def _trainings(nodes: Sequence[Node], notes: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    of_stage: dict[str, list[tuple[Node, Metrics]]] = defaultdict(list)
    for node in nodes:
        path = node.run.folder / METRICS if node.run and node.run.folder else None
        if path is not None and path.is_file():
            with noting(notes):
                of_stage[node.stage].append((node, read_series(path, node.stage, notes.append, limit)))
    for stage in sorted(of_stage, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES)):
        trained = of_stage[stage]
        charts = charts_of(stage, [(node.name, node.path, metrics) for node, metrics in trained])
        runs = [{"run": node.name, "path": node.path, "rows": metrics.rows} for node, metrics in trained]
        samples = [
            {
                "run": node.name,
                "path": node.path,
                "samples": metrics.samples.count,
                "rows": metrics.samples.values(),
            }
            for node, metrics in trained
            if metrics.samples.count
        ]
        if charts or samples:
            yield {"stage": stage, "runs": runs, "charts": charts, "samples": samples}


def _judges(nodes: Sequence[Node], files: Mapping[str, dict[str, Any]], notes: list[str]) -> Iterator[dict[str, Any]]:
    for origin, report in _reports(nodes, "evaluation.json", files, notes):
        rows = {"held out": report.get("overall"), **as_object(report.get("by_source"))}
        if "baseline_length" in report:
            rows["baseline: length"] = report["baseline_length"]
        judged = [{"of": of, **_judged(as_object(row))} for of, row in rows.items()]
        judged = [row for row in judged if "accuracy" in row]
        biases = [{"feature": of, **_numbers(as_object(row))} for of, row in as_object(report.get("biases")).items()]
        if judged:
            yield {**origin, "rows": judged, "biases": biases}


def _tasks(files: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores from `llmkit evaluate` by task: a row per model, with the identity of its items."""
    tasks: dict[str, dict[str, Any]] = {}
    models = [(path, content, model) for path, content in files.items() for model in objects(content.get("models"))]
    counts = Counter((str(model.get("model")), task) for *_, model in models for task in as_object(model.get("tasks")))
    twice = {name for (name, _), count in counts.items() if count > 1}  # in two files: labelled with the file
    for path, content, model in models:
        name = str(model.get("model"))
        scores = {**as_object(model.get("tasks"))}
        if is_number(model.get("core")):
            scores = {"CORE": {"score": model["core"], "metric": "mean, centred"}} | scores
        against: dict[str, dict[str, Any]] = {}  # by task: the comparison with the first model
        for comparison in objects(content.get("comparisons")):
            pair, compared = comparison.get("models"), _numbers(comparison)
            if isinstance(pair, list) and len(pair) == 2 and pair[1] == name and {"difference", "p"} <= set(compared):
                against[str(comparison.get("task"))] = {"model": str(pair[0]), **compared}
        for task, summary in scores.items():
            figures = _numbers(as_object(summary))
            if "score" not in figures:
                continue
            metric = str(summary.get("metric"))
            row = {"model": f"{name}, {path}" if name in twice else name, **figures}
            row |= {"data": as_text(summary.get("data_sha256")), "against": against.get(task)}
            tasks.setdefault(f"{task}, {metric}", {"task": task, "metric": metric, "rows": []})["rows"].append(row)
    labels = list(dict.fromkeys(row["model"] for task in tasks.values() for row in task["rows"]))
    for task in tasks.values():
        values = [row["score"] for row in task["rows"]]
        task["models"] = labels  # of all tasks, so that a model keeps its colour
        task["form"] = "share" if all(0 <= value <= 1 for value in values) and "bits" not in task["metric"] else ""
        task["same_items"] = len({(row.get("data"), row.get("items"), row.get("shots")) for row in task["rows"]}) == 1
    return list(tasks.values())


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if is_number(value)}


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of one part of an evaluation, and its interval if valid."""
    figures = _numbers(row)
    interval = row.get("accuracy_95")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        figures["accuracy_95"] = interval
    return figures


def _read_probe(
    path: str, note: Callable[[str], object], limit: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the figures of a report (`probe-knowledge --report`), and the verdict on each question."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    verdicts: Counter[str] = Counter()
    makers: dict[str, set[str]] = {"written_by": set(), "judged_by": set()}
    known_of: dict[str, str] = {}
    bad = 0
    for _, line in islice(raw_lines(path), limit):
        record = parsed(line)
        known = NAMES.get(str(record.get("known"))) if record else None
        if record is None or known is None or not isinstance(record.get("question"), str):
            bad += 1
            continue
        kinds[str(record.get("kind", "other"))][known] += 1
        known_of[record["question"]] = known
        judgements = record.get("judgements")
        verdicts.update(map(str, judgements if isinstance(judgements, list) else ()))
        for name, values in makers.items():
            values.add(str(record.get(name, "")))
    if bad:
        note(f"{path}: left out {counted(bad, 'line')}: not a probe record")
    totals = sum(kinds.values(), Counter[str]())
    ordered = sorted(kinds.items(), key=lambda kind: (-kind[1].total(), kind[0]))
    figures = {
        "path": path,
        "questions": totals.total(),
        **{name: totals[name] for name in NAMES.values()},
        "by_kind": {kind: {name: counts[name] for name in NAMES.values()} for kind, counts in ordered},
        "answers": dict(verdicts.most_common()),
        **{name: sorted(values - {""}) for name, values in makers.items()},
    }
    return figures, known_of


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Count the questions in both reports by verdict before and after: {"known": {"unknown": 3, ...}, ...}."""
    both = [question for question in before if question in after]
    moved = Counter((before[question], after[question]) for question in both)
    names = list(NAMES.values())
    return {"questions": len(both), "table": {old: {new: moved[old, new] for new in names} for old in names}}


# ---- the summary: the main figure of each stage. `form`: "share" or ""; `before`: value before the stage; `of`: total
# of a count; `interval`: 95%


def _trained(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for training in figures["trainings"]:
        stage = training["stage"]
        lines = {(line["run"], line["metric"]): line for chart in training["charts"] for line in chart["lines"]}
        measured = []
        for run in training["runs"]:
            of_run = [measure for measure in MEASURES.get(stage, ()) if (run["run"], measure[0]) in lines]
            # success and reward: the first metric of each that was measured
            right = [measure for measure in of_run if "success" in measure[0]]
            others = [measure for measure in of_run if "success" not in measure[0]]
            if of_run:
                measured.append((run, (*right[:1], *others[:1])))
        for run, chosen in measured[-(MOST_POLICIES if stage == "rl" else 1) :]:
            for metric, figure, form in chosen:
                line = lines[run["run"], metric]
                # rl's first value was measured before its first step
                before = {"before": line["first"]} if stage == "rl" and line["values"] > 1 else {}
                shown = {"figure": figure, "value": line["last"], "form": form, **before}
                yield {"stage": stage, "path": run["path"], **shown}


def _measured(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for funnel in figures["funnels"][-1:]:
        documents = {"figure": "documents kept", "value": funnel["documents"], "of": funnel["records"], "form": ""}
        yield {"stage": "crawl-filter", "path": funnel["path"], **documents}
    for tokenizer in figures["tokenizers"][-1:]:
        value = tokenizer["rows"][0]["bytes_per_token"]
        measured = {"figure": "bytes per token, of a sample", "value": value, "form": ""}
        yield {"stage": "train-bpe", "path": tokenizer["path"], **measured}
    for probe in figures["probes"][-1:]:
        reports = [report for report in (figures["probes"][0], probe) if report["questions"]]
        shares = [report["known"] / report["questions"] for report in reports]
        if shares:
            before = {"before": shares[0]} if len(figures["probes"]) > 1 else {}
            known = {"figure": "questions known", "value": shares[-1], "form": "share", **before}
            yield {"stage": "probe-knowledge", "path": probe["path"], **known}
    for judge in figures["judges"][-1:]:
        row = judge["rows"][0]
        interval = {"interval": row["accuracy_95"]} if "accuracy_95" in row else {}
        shown = {"figure": "judge's accuracy", "value": row["accuracy"], "form": "share", **interval}
        yield {"stage": "train-reward", "path": judge["path"], **shown}


# ---- shortening


def shorten(figures: dict[str, Any], share: float) -> dict[str, Any]:
    """Keep only this share of the records to browse and of the points of curves."""

    def fewer(values: Sequence[Any]) -> list[Any]:
        return thinned(values, max(2, int(share * len(values))))

    trainings = []
    for training in figures["trainings"]:
        charts = [
            {**chart, "lines": [{**line, "points": fewer(line["points"])} for line in chart["lines"]]}
            for chart in training["charts"]
        ]
        trainings.append({**training, "charts": charts})
    samples = [{**file, "rows": fewer(file["rows"])} for file in figures["samples"]]
    samples = [{**file, "shown": len(file["rows"])} for file in samples]
    return {**figures, "trainings": trainings, "samples": samples}
