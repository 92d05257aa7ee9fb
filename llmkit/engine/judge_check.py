"""How far a judge of answers agrees with people, and how far a model's own certainty agrees with the judge.

check_judge(MatchJudge(), read_jsonl(["labelled.jsonl"], None, labelled))
calibration(records)  # of a probe's report
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.engine.matching import EVASIVE, RIGHT, VERDICTS, WRONG, Answered, Judge
from llmkit.engine.statistics import auroc, calibration_error, wilson
from llmkit.errors import UserError
from llmkit.questions import read_question
from llmkit.records import Row

EXPECTED = "right, wrong, evasive, true or false"
LABELS = {**{name: name for name in VERDICTS}, "correct": RIGHT, "incorrect": WRONG}


@dataclass(frozen=True)
class Checked:
    """What the command line prints of a judge; see `check_judge`."""

    answers: int
    agreement: float
    agreement_95: list[float]
    kappa: float | None
    table: dict[str, int]


def check_judge(judge: Judge, answers: Iterable[Answered]) -> dict[str, Any]:
    """The agreement of a judge with people, with its 95% interval, Cohen's kappa (1960), and who said what how often.

    A record that is `labelled` is a question with its answer, a `response` and its `label`: "right", "wrong" or
    "evasive"; or a line of a probe's report with `labels`, one for each of `responses`. Labels true and false (or 1 and
    0) say only whether it is right: then, in all records, evasive counts as wrong. A reply of the judge's that cannot
    be read agrees with nothing. kappa is None where one side says the same of all.
    """
    pairs: list[tuple[str, str]] = []  # what people say, what the judge says
    only_right = False
    for answered, verdicts in judge.judge_each(answers):
        for label, verdict in zip(answered.details, verdicts, strict=True):
            only_right |= not isinstance(label, str)
            pairs.append((label if isinstance(label, str) else RIGHT if label else WRONG, verdict))
    if not pairs:
        raise UserError("--judge-check: expected labelled answers, found none")
    if only_right:
        pairs = [(_as_wrong(label), _as_wrong(verdict)) for label, verdict in pairs]
    agreed = sum(label == verdict for label, verdict in pairs) / len(pairs)
    low, high = wilson(agreed, len(pairs))
    labels, verdicts = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(labels[name] * verdicts[name] for name in VERDICTS) / len(pairs) ** 2
    table = Counter(f"{label}, judged {verdict}" for label, verdict in pairs)
    return {
        "answers": len(pairs),
        "agreement": round(agreed, 4),
        "agreement_95": [round(low, 4), round(high, 4)],
        "kappa": None if math.isclose(chance, 1.0) else round((agreed - chance) / (1 - chance), 4),
        "table": dict(sorted(table.items())),
    }


def _as_wrong(verdict: str) -> str:
    return WRONG if verdict == EVASIVE else verdict


def labelled(row: Row) -> Answered:
    """The responses of a record, with their labels as details. Raises UserError that names it for one without."""
    question = read_question(row)
    if isinstance(question, str):
        raise UserError(f"{row.where}: expected an answer to judge by, found {question}")
    pairs = list(_labelled(row))
    return Answered(question, [response for response, _ in pairs], [label for _, label in pairs])


def _labelled(row: Row) -> Iterable[tuple[str, str | bool]]:
    """The responses of a record and their labels: a verdict, or whether it is right."""
    several = "labels" in row.value
    names = ("responses", "labels") if several else ("response", "label")
    missing = [name for name in names if name not in row.value]
    if missing:
        raise UserError(f"{row.where}: expected fields 'response' and 'label', found {sorted(row.value)}")
    responses, labels = (row.value[name] if several else [row.value[name]] for name in names)
    if not isinstance(responses, list) or not isinstance(labels, list) or len(responses) != len(labels):
        raise UserError(f"{row.where}: expected as many 'labels' as 'responses'")
    for response, label in zip(responses, labels, strict=True):
        if not isinstance(response, str):
            raise UserError(f"{row.where}: expected a response of text, found {response!r}")
        if isinstance(label, (bool, int)) and label in (0, 1):
            yield response, bool(label)
        elif isinstance(label, str) and label.lower() in LABELS:
            yield response, LABELS[label.lower()]
        else:
            raise UserError(f"{row.where}: expected 'label' to be {EXPECTED}, found {label!r}")


def calibration(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Does a model's certainty of an answer, exp of its tokens' mean log-probability, tell that it is right?

    `auroc` is the chance that a right answer is more certain than a wrong one, ties half; None where all are right or
    all wrong. `ece` is the expected calibration error (Guo et al. 2017, arXiv:1706.04599). Evasive answers are no
    answers, and of those whose judgement was unreadable nothing is known. Log-probabilities are those under the
    temperature of the probe.
    """
    judged = [
        (math.exp(logprob), verdict == RIGHT)
        for record in records
        for logprob, verdict in zip(record["logprobs"], record["judgements"], strict=True)
        if verdict in (RIGHT, WRONG) and logprob is not None
    ]
    if not judged:
        return {"answers": 0, "right": 0, "auroc": None, "ece": None}
    certainty, right = np.array([one for one, _ in judged]), np.array([one for _, one in judged])
    return {
        "answers": len(judged),
        "right": int(right.sum()),
        "auroc": auroc(certainty[right], certainty[~right]),
        "ece": round(calibration_error(certainty, right), 4),
    }


def describe_check(found: dict[str, Any]) -> Iterator[str]:
    """What `check_judge` found, in lines for people."""
    low, high = found["agreement_95"]
    yield (
        f"the judge agrees with {found['agreement']:.1%} of {found['answers']} labels (95%: {low:.1%} to {high:.1%}); "
        f"Cohen's kappa {_figure(found['kappa'])}"
    )
    yield from (f"labelled {pair}: {count}" for pair, count in found["table"].items())


def describe_calibration(found: dict[str, Any]) -> str:
    """What `calibration` found, in a line for people."""
    return (
        f"certainty of {found['answers']} answers, {found['right']} of them right: AUROC {_figure(found['auroc'])}, "
        f"calibration error {_figure(found['ece'])}"
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
