"""Read and write the `metrics.jsonl` of a run, and copy its rows to TensorBoard and Weights & Biases.

with MetricsLog(folder / METRICS) as log:
    log.write({"step": 1, "loss": 2.5})
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from llmkit.config import TrainingConfig, as_options
from llmkit.errors import UserError
from llmkit.io.files import PARTIAL, atomic_file, check_file, cut_torn_line, remove
from llmkit.io.jsonl import JSON_LINE, json_row
from llmkit.io.ranks import launch
from llmkit.io.records import kind_of

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl`, written by rank 0, one object per line without buffering.

    mirrors: functions that open trackers (see `mirrors`), which first get the rows of the resumed run
    """

    def __init__(self, path: Path, mirrors: Iterable[Callable[[], TensorBoard | WeightsAndBiases]] = ()) -> None:
        self.path = path
        self.handle = open(path if launch().leads else os.devnull, "a+b", buffering=0)  # noqa: SIM115
        self.mirrors = [make() for make in mirrors] if launch().leads else []
        if launch().leads:
            cut_torn_line(self.handle)
        for row in read_metrics(path) if self.mirrors else ():
            for mirror in self.mirrors:
                mirror.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self.handle.write(orjson.dumps(row, option=JSON_LINE))
        except OSError as error:
            error.filename = str(self.path)  # a write to an open file does not set it
            raise
        for mirror in self.mirrors:
            mirror.write(row)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.close()
        for mirror in self.mirrors:
            mirror.close()


def scan_metrics(path: Path, unreadable: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics file, without a last line truncated by a kill.

    An invalid line raises UserError, or is passed to `unreadable` as a message; a truncated one is "cut".
    """
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                if unreadable is not None:
                    unreadable("cut")
                return
            try:
                row = json_row(line, str(path), number)
                if row is not None and not isinstance(step := row.value.get("step", 0), int):
                    raise UserError(f"{row.where}: expected an integer for 'step', found {kind_of(step)}; fix the line")
            except UserError as error:
                if unreadable is None:
                    raise
                unreadable(str(error))
                continue
            if row is not None:
                yield row.value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the figures and samples of a metrics file, which may be missing; null becomes NaN."""
    return [
        {
            name: math.nan if value is None else value
            for name, value in row.items()
            if isinstance(value, int | float | None) or name == "sample"
        }
        for row in (scan_metrics(path) if path.exists() else ())
    ]


def last_figures(rows: Sequence[Mapping[str, Any]], kept_step: int | None) -> dict[str, Any]:
    """Return the last value of each figure; val_ figures are those of `kept_step`, whose parameters were kept."""
    best_rows = (row for row in rows if row.get("step") == kept_step)
    last = {name: value for row in rows for name, value in row.items()}
    return last | {name: value for row in best_rows for name, value in row.items() if name.startswith("val_")}


def trim_metrics(path: Path, step: int) -> dict[str, Any] | None:
    """Drop rows after `step`, which a resumed run writes again; return the last row that is left, or None."""
    last = None
    if path.exists():
        check_file(path)
        with atomic_file(path) as handle:
            for row in scan_metrics(path):
                if row.get("step", 0) <= step:
                    handle.write(orjson.dumps(row, option=JSON_LINE))
                    last = row
    return last


# ---- trackers


def mirrors(options: TrainingConfig, folder: Path) -> list[Callable[[], TensorBoard | WeightsAndBiases]]:
    """Return functions that open the trackers of `--log-to` for a run folder."""
    makers = {
        "tensorboard": partial(TensorBoard, folder),
        "wandb": partial(WeightsAndBiases, folder, as_options(options), options.quiet),
    }
    return [makers[name] for name in dict.fromkeys(options.log_to)]


class TensorBoard:
    """An event file in the run folder, written by the tensorboard package.

    Event files of a killed run are replaced: they may be truncated and contain steps that are run again.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        remove(folder / "tensorboard")
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        self._started: float | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        # protobuf creates these names at import
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        # wall time is the run's own clock, so that pauses before a resumption do not show
        self._started = self._started or time.time() - row.get("seconds", 0.0)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        if values:
            at = self._started + row["seconds"] if "seconds" in row else time.time()
            self._writer.add_event(Event(wall_time=at, step=row["step"], summary=Summary(value=values)))
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, named like the folder, in the project WANDB_PROJECT or else llmkit.

    A resumed run continues the same W&B run, which ignores steps that it already has.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], quiet: bool) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        known = folder / "state/wandb-id.txt"
        if not known.exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llmkit"),
            name=folder.name.removesuffix(PARTIAL),
            id=known.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(options),
            settings=wandb.Settings(console="off", silent=quiet),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite figures of a row, without its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
