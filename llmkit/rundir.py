"""A run folder, from the check of --out to its place, and what stands in it beside the model.

That is the manifest with its ancestry, the metrics, the loss curve and the model card. `RunFolder` is what a stage
that trains uses; the functions serve other outputs, too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from llmkit.errors import UserError
from llmkit.files import (
    JSON_LINE,
    PARTIAL,
    atomic_file,
    check_is_folder,
    check_output,
    output_folder,
    read_json,
    remove,
    replace_folder,
    write_json,
)
from llmkit.launch import launch
from llmkit.model_card import write_model_card
from llmkit.records import kind_of

LOSS_CURVE = {"training": "loss", "validation": "val_loss"}
COLOURS = ("#3b6fb6", "#d1495b", "#3c9d6b", "#b07d2b", "#7a5ba8")
MANIFEST_VERSION, MANIFEST, METRICS = 1, "manifest.json", "metrics.jsonl"
OF_FILE = ".manifest.json"  # after the name of the file whose manifest it is
NOTES = "state/run.json"  # in a run folder: what a resumption asks for
PACKAGES = ("llmkit", "torch", "triton", "numpy", "tokenizers", "safetensors")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_inputs(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Path, size in bytes and SHA-256 of each input file; stdin and pipes are named without a hash."""
    return [
        {"path": path, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}
        if os.path.isfile(path)
        else {"path": path}
        for path in paths
    ]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a folder, or None where a folder of foreign origin has none."""
    path = Path(folder) / MANIFEST
    return read_json(path) if path.exists() else None


def write_manifest(
    folder: Path,
    stage: str,
    options: Mapping[str, Any],
    *,
    inputs: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[str] = (),
    results: Mapping[str, Any] | None = None,
    name: str = MANIFEST,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """Write `manifest.json`: how the folder was made, by what, from what, back to the first ancestor.

    name: of the manifest of a single file, which stands beside it; packages: those whose versions matter.
    """
    from importlib.metadata import PackageNotFoundError, version  # 11 ms that no --help need pay

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "stage": stage,
        "command": shlex.join(["llmkit", *sys.argv[1:]]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": dict(options),
        "versions": versions,
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "inputs": [dict(item) for item in inputs],
        "parents": [{"path": path, "manifest": read_manifest(path)} for path in parents],
        "results": dict(results or {}),
    }
    write_json(folder / name, manifest)
    return manifest


def write_file_manifest(
    out: str,
    stage: str,
    options: Mapping[str, Any],
    *,
    inputs: Iterable[str],
    parents: Sequence[str] = (),
    results: Mapping[str, Any],
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Write the manifest of a stage whose output is a single file: beside it, as `out` + ".manifest.json"."""
    place, described = Path(out).absolute(), describe_inputs(inputs)
    details = {"inputs": described, "parents": parents, "results": results, "packages": packages}
    write_manifest(place.parent, stage, options, name=place.name + OF_FILE, **details)


class MetricsLog:
    """`metrics.jsonl`: one object a line, each on disk as soon as the first process has written it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = open(path if launch().leads else os.devnull, "a+b", buffering=0)  # noqa: SIM115
        if launch().leads:
            self.handle.seek(0)
            written = self.handle.read()
            self.handle.truncate(written.rfind(b"\n") + 1)  # a row that a kill cut in two

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self.handle.write(orjson.dumps(row, option=JSON_LINE))
        except OSError as error:
            error.filename = str(self.path)  # which the write of an open file does not know
            raise

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handle.close()


def scan_metrics(path: Path, unreadable: Callable[[int, str], object] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file, one at a time; a last line cut by a kill is left out.

    A line that is no JSON object raises UserError, unless `unreadable` takes its number and what is wrong with it,
    a cut last line too.
    """
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                if unreadable is not None:
                    unreadable(number, "cut")
                return
            try:
                row = orjson.loads(line)
                wrong = None if isinstance(row, dict) else f"found {kind_of(row)}"
            except orjson.JSONDecodeError as error:
                wrong = f"not JSON: {error}"
            if wrong is None:
                yield row
            elif unreadable is None:
                raise UserError(f"{path}:{number}: {wrong}; mend or remove the line")
            else:
                unreadable(number, wrong)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file, none where there is no file; errors are those of `scan_metrics`."""
    return list(scan_metrics(path)) if path.exists() else []


def last_figures(rows: Sequence[Mapping[str, Any]], kept_step: int | None) -> dict[str, Any]:
    """The last of each figure in the rows of `read_metrics`, and those of the evaluation whose parameters were kept."""
    kept = (row for row in rows if row["step"] == kept_step)
    last = {name: value for row in rows for name, value in row.items()}
    return last | {name: value for row in kept for name, value in row.items() if name.startswith("val_")}


def trim_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`, which a resumed run will write again."""
    kept = [row for row in read_metrics(path) if row.get("step", 0) <= step]
    with atomic_file(path) as handle:
        for row in kept:
            handle.write(orjson.dumps(row, option=JSON_LINE))


def write_curve(folder: Path, name: str, lines: Mapping[str, str]) -> None:
    """Draw `name` from `metrics.jsonl`: a line for each key of `lines`, by the name that people read."""
    rows = read_metrics(folder / METRICS)
    curves = {label: _curve(rows, key) for label, key in lines.items()}
    with atomic_file(folder / name, "w") as handle:
        handle.write(_svg({label: points for label, points in curves.items() if points}))


def _curve(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where the value is a finite number; JSON holds NaN and infinity as null."""
    return [(row["step"], row[key]) for row in rows if "step" in row and isinstance(row.get(key), (int, float))]


def _svg(curves: Mapping[str, list[tuple[float, float]]], width: int = 720, height: int = 360) -> str:
    colours = dict(zip(curves, COLOURS, strict=False))
    left, right, top, bottom = 56, 28, 12, 40
    points = [point for line in curves.values() for point in line] or [(0, 0)]
    losses = sorted(loss for _, loss in points)
    low, high = losses[0], losses[int(0.98 * (len(losses) - 1))]  # the first steps would flatten the rest
    high = high if high > low else low + 1
    last = max(step for step, _ in points) or 1

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + step / last * (width - left - right)
        y = top + (1 - (min(loss, high) - low) / (high - low)) * (height - top - bottom)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for quarter in range(5):
        step, loss = quarter / 4 * last, low + quarter / 4 * (high - low)
        x, y = place(step, loss)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{loss:.2f}</text>')
        parts.append(f'<text x="{x}" y="{height - 22}" text-anchor="middle">{step:,.0f}</text>')
    for number, (name, line) in enumerate(curves.items()):
        thin = [*line[:-1][:: max(1, len(line) // 1000)], line[-1]]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in thin))
        mark = f'fill="none" stroke="{colours[name]}" stroke-width="1.5" points="{path}"'
        parts.append(f"<polyline {mark}/>")
        parts.append(f'<text x="{width - 90}" y="{28 + 16 * number}" fill="{colours[name]}">{name}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">step</text></svg>')
    return "\n".join(parts) + "\n"


def check_model_folder(path: str | None, example: str) -> None:
    """Raise UserError where no model folder is given, or none stands there; `example` is a command that has one."""
    if path is None:
        raise UserError(f"MODEL is missing: a model folder, such as {example}")
    if not Path(path).is_dir():
        found = "a file" if Path(path).exists() else "nothing"
        raise UserError(f"{path}: expected a model folder, found {found}")


# ---- a run in the making


def check_identity(noted: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError naming the first part of a resumed run's identity that is not what was noted of the run."""
    for name, value in now.items():
        if noted.get(name) != value:
            raise UserError(
                f"{name} was {noted.get(name)} and is now {value}; "
                "resume with the same options and inputs, or start again with --force"
            )


class RunFolder:
    """The folder of a training run: it is made as `out` + ".partial" and takes its place, whole, at the end.

        folder = RunFolder(config.out, "base/", resume=config.resume, force=config.force)  # is --out fit for it?
        if folder.is_finished:
            return Summary(path=str(folder.out), **folder.results("pretrain"))
        notes = folder.notes(identity) or {"plan": make_plan()}  # those of the run that is resumed
        folder.begin(identity, notes)
        ...  # the trainer works in folder.work
        folder.document("pretrain", options, inputs=inputs, parents=[tokenizer], results=results)
        ...  # the model is saved in folder.work
        folder.finish()

    identity: what a run and its resumption must have in common, by the name that the user knows it by: flags
    (`lasting_options`), and what was in the files that they name. JSON values.

    The first process alone writes. A job that torchrun starts again resumes the run that it had begun, always.
    """

    def __init__(self, out: str | None, example: str, *, resume: bool, force: bool, dry_run: bool = False) -> None:
        """Raises UserError when --out is missing, when something stands there or a run is unfinished and neither
        --resume nor --force was given, and when there is nothing to resume. A dry run may stand anywhere."""
        self.out = output_folder(out, example)
        self.work = Path(f"{self.out}{PARTIAL}")
        self.resume = resume = resume or self._begun_by_this_job()
        if dry_run:
            return
        check_is_folder(self.out, str(self.out))
        check_output(str(self.out), force, resume)
        if resume and not self.work.is_dir() and not self.out.is_dir():
            raise UserError(f"{self.work}: nothing to resume; start without --resume")
        if self.work.exists() and not (resume or force):
            raise UserError(f"{self.work}: an unfinished run; --resume goes on with it, --force starts again")

    def _begun_by_this_job(self) -> bool:
        """Whether a former attempt of this job, which failed, has begun the run."""
        notes = next((place / NOTES for place in (self.work, self.out) if (place / NOTES).exists()), None)
        return launch().restarts > 0 and notes is not None and read_json(notes).get("job") == launch().job

    @property
    def is_finished(self) -> bool:
        """Whether the run to be resumed is done: that is no work, and no mistake."""
        return self.resume and self.out.is_dir() and not self.work.is_dir()

    def results(self, stage: str) -> dict[str, Any]:
        """The results of the finished run. Raises UserError when the folder comes from elsewhere."""
        manifest = read_manifest(self.out) or {}
        if manifest.get("stage") != stage:
            raise UserError(f"{self.out}: not a finished {stage} run; choose another --out, or replace it with --force")
        return manifest["results"]

    def notes(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `begin` noted for the run that is resumed; None for a new run.

        Raises UserError naming the first part of the identity that is not what it was.
        """
        if not self.resume or not (self.work / NOTES).exists():
            return None
        noted = read_json(self.work / NOTES)
        check_identity(noted["identity"], identity)
        return noted["notes"]

    def begin(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Make `work`, empty, or as it is for a resumed run, and note what a resumption will ask for."""
        if not launch().leads:
            return
        if not self.resume:
            remove(self.work)
        (self.work / NOTES).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.work / NOTES, {"identity": identity, "notes": notes, "job": launch().job})

    def document(
        self,
        stage: str,
        options: Mapping[str, Any],
        *,
        inputs: Sequence[str],
        parents: Sequence[str],
        results: Mapping[str, Any],
        curves: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Write all that stands beside the model: manifest, loss curve and others (see `write_curve`), model card."""
        described = describe_inputs(inputs)
        manifest = write_manifest(self.work, stage, options, inputs=described, parents=parents, results=results)
        for name, lines in {"loss.svg": LOSS_CURVE, **(curves or {})}.items():
            write_curve(self.work, name, lines)
        write_model_card(self.work, manifest)

    def abandon(self) -> None:
        """Remove what was begun and holds nothing."""
        if launch().leads:
            remove(self.work)

    def finish(self) -> None:
        """Put the finished folder in its place, whole."""
        replace_folder(self.work, self.out)
