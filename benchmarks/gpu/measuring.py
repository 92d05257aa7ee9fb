"""One case measured, contender by contender, and the rows of all cases as a table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, as_list
from clock import Clock


def measure(case: Case, clock: Clock, ceilings: dict[str, float]) -> list[dict]:
    """A row for each contender, ours first: checked, then timed."""
    rows = []
    for who, compute in case.contenders.items():
        row = {"kind": case.kind, "shape": case.shape, "who": who}
        if isinstance(compute, str):
            row["note"] = compute
        else:
            try:
                row |= check_and_time(case, compute, clock)
            except Exception as error:  # a peer's, whatever it is: its row says so and the others go on
                first = (str(error) or "no message").strip().splitlines()[0]
                row["note"] = f"failed: {type(error).__name__}: {first[:120]}"
        for name, work in (("forward", case.work), ("both", case.work_both)):
            if f"{name}_ms" in row:
                row[f"{name}_rate"] = work / row[f"{name}_ms"] / 1e9
                row[f"{name}_share"] = row[f"{name}_rate"] / ceilings[case.unit]
        rows.append(row | {"unit": case.unit})
    ours = rows[0]
    for name in ("forward", "both"):
        peers = [row[f"{name}_ms"] for row in rows[1:] if f"{name}_ms" in row]
        if peers and f"{name}_ms" in ours:
            ours[f"{name}_ratio"] = min(peers) / ours[f"{name}_ms"]
    return rows


def check_and_time(case: Case, compute: Callable, clock: Clock) -> dict:
    def forward():
        with torch.no_grad():
            return compute(*case.inputs)

    def both():
        outputs = as_list(compute(*case.inputs))
        return outputs, torch.autograd.grad(outputs, case.inputs, case.upstream)

    if case.work_both is None:
        found = [x.detach() for x in as_list(forward())]
    else:
        outputs, gradients = both()
        found = [*(x.detach() for x in outputs), *gradients]
        del outputs, gradients
    row = {"error": case.error(found)}
    del found
    if not row["error"] <= case.bound:
        return row | {"note": f"WRONG: error above {case.bound}; not timed"}
    row["forward_ms"] = clock.milliseconds(forward)
    if case.work_both is not None:
        row["both_ms"] = clock.milliseconds(both)
    row["peak_mb"] = clock.peak_megabytes(forward if case.work_both is None else both)
    return row


COLUMNS = ("case", "shape", "who", "fwd ms", "fwd+bwd ms", "fwd rate", "fwd+bwd rate", "share", "peak MB", "error",
           "x best fwd", "x best fwd+bwd", "note")  # fmt: skip


def markdown(report: dict) -> str:
    def number(row: dict, key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    smoke = "**A smoke run: tiny shapes on a CPU. Nothing was timed; the milliseconds are the interpreter's.**"
    lines = [
        *([smoke, ""] if "smoke" in report["machine"] else []),
        ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        "ceilings: " + ", ".join(f"{value:.4g} {unit}" for unit, value in report["ceilings"].items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in report["rows"]:
        last = "both" if "both_share" in row else "forward"
        rates = [number(row, f"{name}_rate", ".4g") for name in ("forward", "both")]
        cells = [
            row["kind"], row["shape"], row["who"], number(row, "forward_ms", ".4g"), number(row, "both_ms", ".4g"),
            *(f"{rate} {row['unit']}" if rate else "" for rate in rates), number(row, f"{last}_share", ".0%"),
            number(row, "peak_mb", ".0f"), number(row, "error", ".1e"), number(row, "forward_ratio", ".2f"),
            number(row, "both_ratio", ".2f"), row.get("note", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
