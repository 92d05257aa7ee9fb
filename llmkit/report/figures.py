"""All figures of a report, as one JSON object: the page shows them and computes none of its own.

    figures = report_figures(gather(["tok/", "base/", "probe.jsonl"]))

summary      of each stage the figure that tells how well it went
scores       effects.json, the scores of a whole pipeline
runs         nodes of the graph, parents first: name, stage, state, path, command, parents, key figures, ...
funnels      of crawl-filter: records by step and reason
tokenizers   report.json of train-bpe
trainings    by stage: charts with the curves of its runs; and samples over the training
probes       what is known by kind of question; `probe_changes` from the first report to the last
judges       evaluation.json of train-reward
samples      records to browse, by file
notes        what was left out, and why

`summarise` makes the summary of the figures, and `shorten` cuts records and points where the page grows too long.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llmkit import __version__
from llmkit.io.files import read_json
from llmkit.io.metrics import METRICS
from llmkit.io.progress import counted
from llmkit.report.ancestry import Graph, Node
from llmkit.report.curves import MOST_SAMPLES, charts_of, read_series
from llmkit.report.excerpts import read_excerpts
from llmkit.report.runs import KINDS, Gathered
from llmkit.report.values import (
    as_object,
    as_text,
    is_number,
    numbers,
    objects,
    parsed,
    raw_lines,
    read_or_note,
    thinned,
)

NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}
STAGES = ("crawl-filter", "train-bpe", "pretrain", "sft", "probe-knowledge", "train-reward", "rl", "sample")
# of a stage's curves, what its latest run is summarised by: the metric, its name, and its form on the page
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
MOST_POLICIES = 3  # of rl the latest runs; of the other stages the latest one
BEFORE_AND_AFTER = ("rl",)  # stages whose first value was measured before the first step
# what a manifest's results tell of a stage at a glance; of others, their first numbers
KEY_FIGURES = {
    "crawl-filter": ("records", "documents"),
    "train-bpe": ("vocab_size", "bytes", "bytes_per_token"),
    "pretrain": ("parameters", "tokens", "val_loss", "val_bits_per_byte", "loss", "seconds"),
    "sft": ("steps", "tokens", "val_loss", "loss", "seconds"),
    "probe-knowledge": ("questions", "known", "unknown", "mixed", "evasive", "refusals", "confirmations"),
    "train-reward": ("comparisons", "val_comparisons", "val_accuracy", "val_loss", "seconds"),
    "rl": ("steps", "attempts", "success", "val_success", "reward", "val_reward", "val_gold", "kept_step", "seconds"),
}
MOST_KEY_FIGURES = 7


def read_probe(
    path: str, note: Callable[[str], object], limit: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of a report (`probe-knowledge --report`), and what each question was found to be."""
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
        note(f"{path}: left out {counted(bad, 'line')}: no record of a probe")
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


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    """Count the questions of both reports by what they were and are: {"known": {"unknown": 3, ...}, ...}."""
    both = [question for question in before if question in after]
    moved = Counter((before[question], after[question]) for question in both)
    names = list(NAMES.values())
    return {"questions": len(both), "table": {old: {new: moved[old, new] for new in names} for old in names}}


def summarise(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`stage`, `path`, `figure`, `value` and `form` ("share" or ""), with `before` where the same was measured before
    the stage, `of` where the value is a count, and `interval` (95%) where there is one."""
    rows = [*_made(figures), *_trained(figures), *_asked(figures)]
    return sorted(rows, key=lambda row: STAGES.index(row["stage"]))


def _made(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for funnel in figures["funnels"][-1:]:
        documents = {"figure": "documents kept", "value": funnel["documents"], "of": funnel["records"], "form": ""}
        yield {"stage": "crawl-filter", "path": funnel["path"], **documents}
    for tokenizer in figures["tokenizers"][-1:]:
        value = tokenizer["rows"][0]["bytes_per_token"]
        yield {
            "stage": "train-bpe",
            "path": tokenizer["path"],
            "figure": "bytes per token, of a sample",
            "value": value,
            "form": "",
        }


def _trained(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for training in figures["trainings"]:
        stage, lines = training["stage"], [line for chart in training["charts"] for line in chart["lines"]]
        measures = MEASURES.get(stage, ())
        names = {metric for metric, _, _ in measures}
        measured = [run for run in training["runs"] if _metrics(lines, run) & names]
        for run in measured[-(MOST_POLICIES if stage == "rl" else 1) :]:
            known = [measure for measure in measures if measure[0] in _metrics(lines, run)]
            # right answers beside a reward; of each the first that was measured
            right = [measure for measure in known if "success" in measure[0]]
            others = [measure for measure in known if "success" not in measure[0]]
            for metric, figure, form in (*right[:1], *others[:1]):
                line = next(line for line in lines if (line["run"], line["metric"]) == (run["run"], metric))
                before = {"before": line["first"]} if stage in BEFORE_AND_AFTER and line["values"] > 1 else {}
                shown = {"figure": figure, "value": line["last"], "form": form, **before}
                yield {"stage": stage, "path": run["path"], **shown}


def _metrics(lines: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> set[str]:
    return {line["metric"] for line in lines if line["run"] == run["run"]}


def _asked(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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


def report_figures(gathered: Gathered, *, samples: int = 40, limit: int | None = None) -> dict[str, Any]:
    """The figures of all that was gathered.

    samples  records to browse of a file, at most
    limit    of records that are read of a file
    """
    notes = list(gathered.notes)
    graph = Graph(gathered.runs, gathered.files)
    nodes = list(graph.nodes.values())
    probes = [
        (file, read_or_note(notes, lambda file=file: read_probe(file.path, notes.append, limit)))
        for file in gathered.files
        if file.kind == "probed questions"
    ]
    probes = [(file, read) for file, read in probes if read]
    figures: dict[str, Any] = {
        "llmkit": __version__,
        "summary": [],
        "scores": [{"path": path, "effects": rows} for path, rows in gathered.scores.items()],
        "runs": [_run(node) for node in nodes],
        "funnels": list(_funnels(nodes)),
        "tokenizers": list(_tokenizers(nodes, gathered.tokenizers, notes)),
        "trainings": list(_trainings(nodes, notes, limit)),
        "probes": [read[0] for _, read in probes],
        "probe_changes": None,
        "judges": list(_judges(nodes, gathered.evaluations, notes)),
        "samples": [],
        "notes": notes,
    }
    if len(probes) > 1:
        (first, (_, before)), (last, (_, after)) = probes[0], probes[-1]
        figures["probe_changes"] = {"before": first.path, "after": last.path, **changes(before, after)}
    for run in figures["runs"]:
        probe = next((candidate for candidate in figures["probes"] if candidate["path"] == run["path"]), None)
        if probe and not run["key_figures"]:
            run["key_figures"] = {name: probe[name] for name in ("questions", *NAMES.values())}
    figures["summary"] = summarise(figures)
    kinds = list(KINDS)
    for file in sorted(gathered.files, key=lambda file: kinds.index(file.kind)):
        read = read_or_note(notes, lambda file=file: read_excerpts(file, samples, notes.append, limit))
        if read and read["rows"]:
            figures["samples"].append(read)
    return figures


# ---- the graph


def given_runs(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs without ancestors that were not given, and without models of foreign origin."""
    return [run for run in figures["runs"] if run["state"] not in ("told", "foreign")]


def _run(node: Node) -> dict[str, Any]:
    manifest = node.manifest
    results = as_object(manifest.get("results"))
    options = as_object(manifest.get("options"))
    return {
        "name": node.name,
        "stage": node.stage,
        "state": node.state,
        "path": node.path,
        "command": as_text(manifest.get("command")),
        "created": as_text(manifest.get("created")),
        "machine": as_text(manifest.get("machine")),
        "parents": node.parents,
        "key_figures": key_figures(node.stage, results),
        "results": {name: value for name, value in results.items() if not isinstance(value, (list, dict))},
        "options": {name: value for name, value in options.items() if _says_something(value)},
        "versions": {str(name): str(value) for name, value in as_object(manifest.get("versions")).items()},
        "inputs": [
            {"path": str(item.get("path")), "bytes": item.get("bytes"), "sha256": as_text(item.get("sha256"))}
            for item in objects(manifest.get("inputs"))
        ],
    }


def key_figures(stage: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Choose a few figures among a run's results."""
    numeric = {name: value for name, value in results.items() if is_number(value)}
    names = [name for name in KEY_FIGURES.get(stage, ()) if name in numeric] or list(numeric)
    return {name: numeric[name] for name in names[:MOST_KEY_FIGURES]}


def _says_something(value: Any) -> bool:
    """Off and empty options say nothing; nested ones (a recipe, a plan) are too long to be shown."""
    return value not in (None, False, "", [], {}) and not isinstance(value, dict)


# ---- what each stage has done


def _funnels(nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        results = as_object(node.manifest.get("results"))
        if steps := [step for step in objects(results.get("funnel")) if _is_step(step)]:
            first, last = steps[0], steps[-1]
            yield {
                "run": node.name,
                "path": node.path,
                "records": first["in"],
                "documents": last["kept"],
                "steps": steps,
            }


def _is_step(step: Mapping[str, Any]) -> bool:
    dropped = step.get("dropped")
    counted = is_number(step.get("in")) and is_number(step.get("kept")) and is_number(step.get("seconds"))
    return (
        isinstance(step.get("step"), str)
        and counted
        and isinstance(dropped, dict)
        and all(map(is_number, dropped.values()))
    )


def _tokenizers(
    nodes: Sequence[Node], given: Mapping[str, dict[str, Any]], notes: list[str]
) -> Iterator[dict[str, Any]]:
    reports = [(node.name, node.path, _report_of(node, "report.json", notes)) for node in nodes]
    for name, path, report in [*reports, *((None, path, report) for path, report in given.items())]:
        sample = as_object(report.get("sample")) if report else {}
        if report is None or not is_number(sample.get("bytes_per_token")):
            continue
        ours = {"tokenizer": path, "vocab_size": report.get("vocab_size"), **sample}
        others = [
            {"tokenizer": other, **as_object(comparison)}
            for other, comparison in as_object(report.get("compared")).items()
        ]
        yield {
            "run": name,
            "path": path,
            "bytes": report.get("bytes"),
            "bytes_per_token": report.get("bytes_per_token"),
            "sample_bytes": sample.get("bytes"),
            "round_trip": numbers(report.get("round_trip"), "texts", "lost"),
            "unused_tokens": as_object(report.get("unused_tokens")).get("count"),
            "longest_tokens": [
                token for token in objects(report.get("longest_tokens")) if {"token", "count"} <= set(token)
            ],
            "rows": [
                {
                    "tokenizer": row["tokenizer"],
                    "vocab_size": row.get("vocab_size"),
                    "bytes_per_token": row.get("bytes_per_token"),
                    "by_source": as_object(row.get("bytes_per_token_by_source")),
                }
                for row in [ours, *others]
            ],
        }


def _report_of(node: Node, name: str, notes: list[str]) -> dict[str, Any] | None:
    """A report that stands in the folder of a run."""
    path = node.run.folder / name if node.run and node.run.folder else None
    return read_or_note(notes, lambda: read_json(path)) if path is not None and path.is_file() else None


def _trainings(nodes: Sequence[Node], notes: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    read = {}
    for node in nodes:
        path = node.run.folder / METRICS if node.run and node.run.folder else None
        if path is not None and path.is_file():
            metrics = read_or_note(
                notes, lambda node=node, path=path: read_series(path, node.stage, notes.append, limit)
            )
            if metrics:
                read[node.name] = metrics
    of_stage: dict[str, list[Node]] = {}
    for node in nodes:
        if node.name in read:
            of_stage.setdefault(node.stage, []).append(node)
    order = {stage: position for position, stage in enumerate(STAGES)}
    for stage, trained in sorted(of_stage.items(), key=lambda item: order.get(item[0], len(order))):
        charts = charts_of(stage, [(node.name, node.path, read[node.name]) for node in trained])
        samples = [
            {
                "run": node.name,
                "path": node.path,
                "samples": samples.count,
                "rows": thinned(samples.values(), MOST_SAMPLES),
            }
            for node in trained
            if (samples := read[node.name].samples).count
        ]
        runs = [{"run": node.name, "path": node.path, "rows": read[node.name].rows} for node in trained]
        if charts or samples:
            yield {"stage": stage, "runs": runs, "charts": charts, "samples": samples}


def _judges(nodes: Sequence[Node], given: Mapping[str, dict[str, Any]], notes: list[str]) -> Iterator[dict[str, Any]]:
    reports = [(node.name, node.path, _report_of(node, "evaluation.json", notes)) for node in nodes]
    for name, path, report in [*reports, *((None, path, report) for path, report in given.items())]:
        if report is None:
            continue
        rows = {"held out": report.get("overall"), **as_object(report.get("by_source"))}
        if "baseline_length" in report:
            rows["baseline: length"] = report["baseline_length"]
        judged = [{"of": of, **_judged(as_object(row))} for of, row in rows.items()]
        judged = [row for row in judged if "accuracy" in row]
        biases = [
            {"feature": of, **{name: value for name, value in as_object(row).items() if is_number(value)}}
            for of, row in as_object(report.get("biases")).items()
        ]
        if judged:
            yield {"run": name, "path": path, "rows": judged, "biases": biases}


def _judged(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one part of an evaluation, and the interval, where it is one."""
    figures = {name: value for name, value in row.items() if is_number(value)}
    interval = row.get("accuracy_95")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        figures["accuracy_95"] = interval
    return figures


# ---- to fit


def shorten(figures: dict[str, Any], share: float) -> dict[str, Any]:
    """The figures with that share of the records to browse and of the points of curves, which make a page long."""
    trainings = [
        {
            **training,
            "charts": [
                {
                    **chart,
                    "lines": [
                        {**line, "points": thinned(line["points"], max(2, int(share * len(line["points"]))))}
                        for line in chart["lines"]
                    ],
                }
                for chart in training["charts"]
            ],
        }
        for training in figures["trainings"]
    ]
    samples = []
    for file in figures["samples"]:
        rows = thinned(file["rows"], max(2, int(share * len(file["rows"]))))
        samples.append({**file, "shown": len(rows), "rows": rows})
    return {**figures, "trainings": trainings, "samples": samples}
