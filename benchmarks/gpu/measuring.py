"""Measures one case: each contender is checked against float32, and timed if it is correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from cases import Case, as_list
from clock import Clock


def measure(case: Case, clock: Clock, who: Sequence[str] = ()) -> Iterator[dict]:
    """Yield a row for each contender whose name starts with one of `who` (all, if empty), in the order of the case.

    forward_ms, both_ms        forward pass; forward and backward pass
    forward_rate, both_rate, backward_rate   work per second, in `unit`; backward is the difference of the two
    """
    for name, compute in case.contenders.items():
        if who and not name.startswith(tuple(who)):
            continue
        row = {"stage": "kernel", "kind": case.kind, "shape": case.shape, "who": name, "unit": case.unit}
        if isinstance(compute, str):
            yield row | {"note": compute}
            continue
        try:
            row |= _check_and_time(case, compute, clock)
        except Exception as error:  # any error of a peer goes into its row
            first = (str(error) or "no message").strip().splitlines()[0]
            row["note"] = f"failed: {type(error).__name__}: {first[:120]}"
        if "forward_ms" in row:
            row["forward_rate"] = case.work / row["forward_ms"] / 1e9
        if "both_ms" in row and case.work_both is not None:
            row["both_rate"] = case.work_both / row["both_ms"] / 1e9
            backward_ms = row["both_ms"] - row["forward_ms"]
            row["backward_rate"] = (case.work_both - case.work) / backward_ms / 1e9 if backward_ms > 0 else None
        yield row


def _check_and_time(case: Case, compute: Callable, clock: Clock) -> dict:
    def forward():
        with torch.no_grad():
            return compute(*case.inputs)

    def both():
        outputs = as_list(compute(*case.inputs))
        return outputs, torch.autograd.grad(outputs, case.inputs, case.upstream)

    if case.work_both is None:
        computed = [x.detach() for x in as_list(forward())]
    else:
        outputs, gradients = both()
        computed = [*(x.detach() for x in outputs), *gradients]
        del outputs, gradients
    row = {"error": case.error(computed)}
    del computed
    if not row["error"] <= case.bound:
        return row | {"note": f"WRONG: error above {case.bound}; not timed"}
    row["forward_ms"] = clock.milliseconds(forward, graph=case.graph)
    if case.work_both is not None:
        row["both_ms"] = clock.milliseconds(both)
    row["peak_mb"] = clock.peak_megabytes(forward if case.work_both is None else both)
    return row
