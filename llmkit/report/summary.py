"""The figures that a report opens with: of each stage the one that tells how well it went, of its latest run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def summarise(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`stage`, `path`, `figure`, `value` and `form` ("share" or ""), with `before` where the same was measured before
    the stage, `of` where the value is a count, and `interval` (95%) where there is one."""
    found = [*_made(figures), *_trained(figures), *_asked(figures)]
    return sorted(found, key=lambda one: STAGES.index(one["stage"]))


def _made(figures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for funnel in figures["funnels"][-1:]:
        kept = {"figure": "documents kept", "value": funnel["documents"], "of": funnel["records"], "form": ""}
        yield {"stage": "crawl-filter", "path": funnel["path"], **kept}
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
        asked = [one for one in (figures["probes"][0], probe) if one["questions"]]
        shares = [one["known"] / one["questions"] for one in asked]
        if shares:
            before = {"before": shares[0]} if len(figures["probes"]) > 1 else {}
            known = {"figure": "questions known", "value": shares[-1], "form": "share", **before}
            yield {"stage": "probe-knowledge", "path": probe["path"], **known}
    for judge in figures["judges"][-1:]:
        row = judge["rows"][0]
        interval = {"interval": row["accuracy_95"]} if "accuracy_95" in row else {}
        shown = {"figure": "judge's accuracy", "value": row["accuracy"], "form": "share", **interval}
        yield {"stage": "train-reward", "path": judge["path"], **shown}
