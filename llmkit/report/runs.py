"""Read the user's paths: recognizes runs by their manifests, and files of records by their fields."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.io.files import PARTIAL
from llmkit.io.foreign import check_no_adapter
from llmkit.io.jsonl import PARTS, read_object
from llmkit.io.manifest import LARGEST_MANIFEST, MANIFEST, OF_FILE, read_manifest
from llmkit.io.metrics import METRICS
from llmkit.io.remote import is_remote
from llmkit.io.run_folder import NOTES
from llmkit.report.records import KINDS, RecordsFile, as_object, is_number, noting, objects, parsed, raw_lines

LOOKED_AT = 100  # lines; the first record among them decides the kind of the file
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".parquet")
# options of only one stage, to recognize the stage of an unfinished run
STAGE_OF_FLAG = {"--depth": "pretrain", "--identity": "sft", "--ensemble": "train-reward", "--algo": "rl"}


@dataclass
class Run:
    """One run: its manifest, and the paths of its files.

    manifest  what is known so far, if the run is unfinished; None for a model folder that llmkit did not write
    state     "finished", "unfinished", "foreign", or "file" for records without a manifest
    folder    None if the run wrote a single file
    output    that file, or the folder
    """

    path: str
    manifest: dict[str, Any] | None
    state: str
    folder: Path | None
    output: Path


def gather(paths: Sequence[str]) -> Gathered:
    """Gather run folders, folders that contain some, and files that stages write, each once.

    Unreadable and unknown files become notes. Raises UserError for a missing path, and if nothing was found.
    """
    gathered = Gathered()
    for path in paths:
        if is_remote(path):
            raise UserError(f"{path}: expected a run folder of this machine, found a URL; download it first")
        if not os.path.exists(path):
            raise UserError(f"{path}: expected a run folder, or a file written by a stage, found nothing")
        with noting(gathered.notes):
            gathered.add(path)
    gathered.runs = list({run.output.resolve(): run for run in gathered.runs}.values())
    gathered.files = list({Path(file.path).resolve(): file for file in gathered.files}.values())
    if not (
        gathered.runs
        or gathered.files
        or gathered.evaluations
        or gathered.tokenizers
        or gathered.scores
        or gathered.task_scores
    ):
        more = f" (and {len(gathered.notes) - 1} more)" if len(gathered.notes) > 1 else ""
        raise UserError((gathered.notes or ["expected a run folder, found none"])[0] + more)
    return gathered


@dataclass
class Gathered:
    """The material of a report.

    evaluations, tokenizers, scores, task_scores  reports given as files, by path
    notes  what was left out
    """

    runs: list[Run] = field(default_factory=list)
    files: list[RecordsFile] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    task_scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, listed: bool = False) -> None:
        """Add what is at a path. `listed`: the path is from a given folder, so it may be anything."""
        location = Path(path)
        if location.is_dir():
            if os.path.isfile(beside := path.rstrip("/") + OF_FILE):  # a folder of Parquet
                self._add_file_run(Path(beside), path.rstrip("/"))
                return
            if self._add_run(location, path) or listed:
                return
            before = len(self.runs) + len(self.files)
            for child in sorted(filter(Path.exists, location.iterdir()), key=lambda path: (changed(path), path.name)):
                if not child.name.startswith("."):
                    with noting(self.notes):
                        self.add(str(child), listed=True)
            if len(self.runs) + len(self.files) == before:
                check_no_adapter(path)
                raise UserError(f"{path}: expected a run folder (with {MANIFEST}) or a folder of them, found none")
        elif not location.is_file():
            raise UserError(f"{path}: expected a file or a folder, found a pipe or a device")
        elif location.name in (MANIFEST, METRICS):
            self._add_run(location.parent, str(location.parent))
        elif location.name.endswith(OF_FILE):
            self._add_file_run(location, path.removesuffix(OF_FILE))
        elif location.name.endswith(".json"):
            self._add_json(location, path, listed)
        elif os.path.isfile(path + OF_FILE):
            self._add_file_run(Path(path + OF_FILE), path)
        elif not listed or location.name.endswith(RECORDS):
            self._add_records(path, None, listed)

    def _add_run(self, folder: Path, path: str) -> bool:
        """Add the run in this folder; return False if it is not a run folder."""
        has_metrics = (folder / METRICS).is_file()
        if (folder / MANIFEST).is_file():
            manifest = _checked(read_manifest(folder), folder / MANIFEST)
            self.runs.append(Run(path, manifest, "finished", folder, folder))
        elif (folder / NOTES).is_file() and folder.name.endswith(PARTIAL):
            identity = read_object(folder / NOTES).get("identity")
            options = identity if isinstance(identity, dict) else {}
            stage = next((stage for flag, stage in STAGE_OF_FLAG.items() if flag in options), "training")
            parents: list[dict[str, Any]] = []  # in the format of manifests
            for parent in (str(options[name]) for name in ("MODEL", "--tokenizer") if options.get(name)):
                candidates = (Path(parent), folder.parent / parent)
                existing = next((path for path in candidates if (path / MANIFEST).is_file()), None)
                parents.append({"path": parent, "manifest": existing and read_manifest(existing)})
            described = {"stage": stage, "options": options, "parents": parents}
            self.runs.append(Run(path, described, "unfinished", folder, folder))
        elif (folder / "config.json").is_file():
            self.runs.append(Run(path, None, "foreign", folder, folder))
            if has_metrics:
                self.notes.append(f"{path}: {METRICS} without {MANIFEST}: the origin of the model is unknown")
        elif has_metrics:
            raise UserError(
                f"{path}: expected {MANIFEST} next to {METRICS}, found none; give the folder as the run left it"
            )
        else:
            return False
        for records in (folder / "rollouts.jsonl", folder / "disagreements.jsonl"):
            if records.is_file():
                with noting(self.notes):
                    self._add_records(str(records), path, listed=True)
        return True

    def _add_file_run(self, manifest: Path, output: str) -> None:
        """Add a run that wrote a single file."""
        content = _checked(read_object(manifest, LARGEST_MANIFEST), manifest)
        self.runs.append(Run(output, content, "finished", None, Path(output)))
        first = os.path.join(output, PARTS.format(0)) if os.path.isdir(output) else output
        if first.endswith(RECORDS) and os.path.isfile(first):  # not a .gguf, which has no lines
            self._add_records(first, output, listed=True)

    def _add_json(self, location: Path, path: str, listed: bool) -> None:
        value = read_object(location)
        evaluation = value.get("evaluation", value)
        if "stage" in value and "manifest_version" in value:
            self._add_run(location.parent, str(location.parent))
        elif isinstance(evaluation, dict) and isinstance(evaluation.get("overall"), dict):
            self.evaluations[path] = evaluation
        elif "bytes_per_token" in value and "sample" in value:
            self.tokenizers[path] = value
        elif any(as_object(model.get("tasks")) for model in objects(value.get("models"))):
            self.task_scores[path] = value
        elif scores := [  # rows of effects.json: a stage's figure, its value, and what it is compared with
            effect
            for effect in objects(value.get("effects"))
            if all(isinstance(effect.get(name), str) for name in ("stage", "figure", "against"))
            and all(effect.get(name) is None or is_number(effect[name]) for name in ("value", "beside"))
        ]:
            self.scores[path] = scores
        elif not listed:
            raise UserError(
                f"{path}: expected a manifest, evaluation.json, report.json or effects.json, found {sorted(value)[:8]}"
            )

    def _add_records(self, path: str, run: str | None, listed: bool) -> None:
        records = (parsed(line) for _, line in islice(raw_lines(path), LOOKED_AT))
        first = next((record for record in records if record is not None), {})
        kind = next((name for name, kind in KINDS.items() if all(field in first for field in kind.has)), None)
        if kind is not None:
            self.files.append(RecordsFile(path, kind, run))
        elif not listed:
            content = f"a record with {sorted(first)[:8]}" if first else "no JSON object per line"
            raise UserError(f"{path}: expected a file written by a stage, found {content}")


def changed(path: Path) -> str:
    """Return when a file or a run's metrics were last written, in the format of a manifest's `created`."""
    metrics = path / METRICS
    stamp = (metrics if os.path.isfile(metrics) else path).stat().st_mtime  # False in a folder that may not be read
    return datetime.fromtimestamp(stamp, timezone.utc).isoformat(timespec="seconds")


def _checked(manifest: Any, path: Path) -> dict[str, Any]:
    if not isinstance(manifest.get("stage"), str):
        raise UserError(f"{path}: expected a manifest of llmkit, with 'stage', found {sorted(manifest)[:8]}")
    return manifest
