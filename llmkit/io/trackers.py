"""`metrics.jsonl` for the eyes of others: TensorBoard and Weights & Biases, beside the run's own file.

A mirror is given every row of the run when it is opened, those of a run that is resumed among them, and each new one;
so what it shows is what `metrics.jsonl` has.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llmkit.config import TrainingConfig, as_options
from llmkit.io.files import PARTIAL, remove
from llmkit.io.metrics import MetricsLog, read_metrics
from llmkit.io.ranks import launch

TENSORBOARD = "tensorboard"  # in a run folder
WANDB_ID = "state/wandb-id.txt"


class Mirror(Protocol):
    """Takes rows of metrics."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Show a row; `step` tells where."""
        ...

    def close(self) -> None:
        """All rows are there."""
        ...


def mirrors(options: TrainingConfig, folder: Path) -> list[Callable[[], Mirror]]:
    """Return functions that open the mirrors that the options ask for, of a run in a folder."""
    trackers: list[Callable[[], Mirror]] = []
    if options.tensorboard:
        trackers.append(partial(TensorBoard, folder))
    if options.wandb:
        trackers.append(partial(WeightsAndBiases, folder, as_options(options), options.quiet))
    return trackers


class MirroredLog(MetricsLog):
    """`metrics.jsonl` and its mirrors, which the first process opens with it, and gives the rows that it has."""

    def __init__(self, path: Path, mirrors: Iterable[Callable[[], Mirror]] = ()) -> None:
        super().__init__(path)
        self._mirrors = [make() for make in mirrors] if launch().leads else []
        for row in read_metrics(path) if self._mirrors else ():
            self._show(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, to the file first."""
        super().write(row)
        self._show(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        for mirror in self._mirrors:
            mirror.write(row)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for mirror in self._mirrors:
            mirror.close()


class TensorBoard:
    """An event file in the run's folder, of the tensorboard package's own writer.

    Files of a former start are replaced: a kill may have torn them, and they hold steps that are made again.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        remove(folder / TENSORBOARD)
        self._writer = EventFileWriter(str(folder / TENSORBOARD))
        self._started: float | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Mirror`."""
        # their names are made as they are imported
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        # what is shown over time is shown over the seconds of the run, whenever they were
        self._started = self._started or time.time() - row.get("seconds", 0.0)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        if values:
            at = self._started + row["seconds"] if "seconds" in row else time.time()
            self._writer.add_event(Event(wall_time=at, step=row["step"], summary=Summary(value=values)))
            self._writer.flush()

    def close(self) -> None:
        """See `Mirror`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes by the folder's name; its project is WANDB_PROJECT's, or llmkit.

    A resumed run is the same run there, which passes over steps that it has.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], quiet: bool) -> None:
        import wandb

        known = folder / WANDB_ID
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
        """See `Mirror`."""
        self._run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        """See `Mirror`."""
        self._run.finish()


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a row but its step, without numbers that are not finite."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
