"""Read the paths that a user gave: runs by their manifests, and files of records by their fields."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.io.files import PARTIAL, read_json
from llmkit.io.foreign import check_no_adapter, read_object
from llmkit.io.manifest import LARGEST_MANIFEST, MANIFEST, OF_FILE, read_manifest
from llmkit.io.metrics import METRICS
from llmkit.io.run_folder import NOTES
from llmkit.report.values import is_number, objects, parsed, raw_lines, read_or_note

LOOKED_AT = 100  # lines, for one that tells what a file holds
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
# an option that one stage alone has, by which a run that is not finished is known
STAGE_OF_FLAG = {"--depth": "pretrain", "--identity": "sft", "--ensemble": "train-reward", "--algo": "rl"}


@dataclass(frozen=True)
class Kind:
    """Fields by which a record is known and shown.

    has     all of which a record of the kind has
    input, output, worth  what went in, what came out, what it was worth
    about   told beside, by their names
    stage   that alone writes such files
    """

    has: tuple[str, ...]
    input: str
    output: str
    worth: str
    about: tuple[str, ...]
    stage: str | None = None


# by what people call them: a record is of the first kind whose fields it has; a page has files in this order
KINDS = {
    "rollouts": Kind(
        ("prompt", "completion", "reward", "group", "step"),
        "prompt", "completion", "reward", ("answer", "finish_reason"),
    ),
    "disagreements": Kind(
        ("prompt", "completion", "gold", "difference"),
        "prompt", "completion", "reward", ("gold", "difference"),
    ),
    "recitations": Kind(
        ("prefix", "completion", "matched"),
        "prefix", "completion", "share", ("repeats",), "probe-knowledge",
    ),
    "completions": Kind(
        ("completion", "finish_reason"),
        "prompt", "completion", "reward", ("finish_reason",), "sample",
    ),
    "probed questions": Kind(
        ("question", "responses", "judgements", "known"),
        "question", "responses", "known", ("answer", "judgements"), "probe-knowledge",
    ),
    # that people have written, as those of sft are
    "examples": Kind(("prompt", "completion"), "prompt", "completion", "reward", ("source",)),
    "conversations": Kind(("messages",), "messages", "messages", "known", ("source",)),
    "rejected documents": Kind(("source", "step", "reason"), "url", "text", "reason", ("step", "score")),
    "documents": Kind(("text",), "url", "text", "reward", ("language", "source")),
}  # fmt: skip


def kind_of_record(record: Mapping[str, Any]) -> str | None:
    """Return the name of a record's kind in KINDS, or None."""
    return next((name for name, kind in KINDS.items() if all(field in record for field in kind.has)), None)


@dataclass
class Run:
    """One run: its manifest, and the paths of its files.

    manifest  of an unfinished run what can be told of it; None for a model folder of foreign origin
    state     "finished", "unfinished", "foreign", or "file" for records that no manifest tells of
    folder    None where the run wrote a single file
    output    that file, or the folder
    """

    path: str
    manifest: dict[str, Any] | None
    state: str
    folder: Path | None
    output: Path


@dataclass(frozen=True)
class RecordsFile:
    """A file of JSONL: `kind` is one of KINDS; `run` the path of the run that wrote it, where that is known."""

    path: str
    kind: str
    run: str | None = None


@dataclass
class Gathered:
    """The material of a report: `evaluations`, `tokenizers` and `scores` are reports given as files, by path; `notes`
    name what was left out."""

    runs: list[Run] = field(default_factory=list)
    files: list[RecordsFile] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """True if nothing was found."""
        return not (self.runs or self.files or self.evaluations or self.tokenizers or self.scores)


def gather(paths: Sequence[str]) -> Gathered:
    """Gather run folders, folders that hold some, and files that stages write.

    A file that cannot be read, or is of no stage, becomes a note. Raises UserError for a missing path, and where
    nothing at all was found.
    """
    gathered = Gathered()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: expected a run folder, or a file that a stage has written; found nothing there")
        read_or_note(gathered.notes, lambda path=path: _gather_one(gathered, path, listed=False))
    _once(gathered)
    if gathered.is_empty:
        more = f"; so for {len(gathered.notes) - 1} more" if len(gathered.notes) > 1 else ""
        raise UserError((gathered.notes or ["expected a run folder, found none"])[0] + more)
    return gathered


def _once(gathered: Gathered) -> None:
    """Each thing once, however it was named."""
    gathered.runs = list({run.output.resolve(): run for run in gathered.runs}.values())
    gathered.files = list({Path(file.path).resolve(): file for file in gathered.files}.values())


def _gather_one(gathered: Gathered, path: str, listed: bool) -> None:
    """`listed`: it is in a folder that was given, and may be anything."""
    location = Path(path)
    if location.is_dir():
        if not _gather_run(gathered, location, path) and not listed:
            _gather_folder(gathered, location, path)
    elif not location.is_file():
        raise UserError(f"{path}: expected a file or a folder, found a pipe or a device, which cannot be read twice")
    elif location.name in (MANIFEST, METRICS):
        _gather_run(gathered, location.parent, str(location.parent))
    elif location.name.endswith(OF_FILE):
        _gather_file_run(gathered, location, path.removesuffix(OF_FILE))
    elif location.name.endswith(".json"):
        _gather_json(gathered, location, path, listed)
    else:
        beside = Path(path + OF_FILE)
        if beside.is_file():
            _gather_file_run(gathered, beside, path)
        elif not listed or location.name.endswith(RECORDS):
            _gather_records(gathered, path, None, listed)


def _gather_run(gathered: Gathered, folder: Path, path: str) -> bool:
    """Note the run whose folder this is; False where it is none."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        gathered.runs.append(Run(path, _checked(manifest, folder / MANIFEST), "finished", folder, folder))
    elif (folder / NOTES).is_file() and folder.name.endswith(PARTIAL):
        identity = read_json(folder / NOTES).get("identity")
        options = identity if isinstance(identity, dict) else {}
        stage = next((stage for flag, stage in STAGE_OF_FLAG.items() if flag in options), "training")
        parents = [_parent(folder, options[name]) for name in ("MODEL", "--tokenizer") if options.get(name)]
        described = {"stage": stage, "options": options, "parents": parents}
        gathered.runs.append(Run(path, described, "unfinished", folder, folder))
    elif (folder / "config.json").is_file():
        gathered.runs.append(Run(path, None, "foreign", folder, folder))
        if (folder / METRICS).is_file():
            gathered.notes.append(f"{path}: no {MANIFEST} beside its {METRICS}: what made the model is not known")
    elif (folder / METRICS).is_file():
        raise UserError(f"{path}: expected {MANIFEST} beside {METRICS}, found none; name the folder as the run left it")
    else:
        return False
    for name in ("rollouts.jsonl", "disagreements.jsonl"):
        if (folder / name).is_file():
            read_or_note(
                gathered.notes, lambda name=name: _gather_records(gathered, str(folder / name), path, listed=True)
            )
    return True


def _parent(folder: Path, path: Any) -> dict[str, Any]:
    """Return a parent of an unfinished run in the form that its manifest will have."""
    places = (
        candidate for candidate in (Path(str(path)), folder.parent / str(path)) if (candidate / MANIFEST).is_file()
    )
    location = next(places, None)
    return {"path": str(path), "manifest": read_manifest(location) if location else None}


def changed(path: Path) -> str:
    """When a file, or the metrics of a run, was last written, in the form of a manifest's `created`."""
    metrics = path / METRICS
    stamp = (metrics if metrics.is_file() else path).stat().st_mtime
    return datetime.fromtimestamp(stamp, timezone.utc).isoformat(timespec="seconds")


def _checked(manifest: Any, path: Path) -> dict[str, Any]:
    if not isinstance(manifest.get("stage"), str):
        raise UserError(f"{path}: expected a manifest that llmkit wrote, with 'stage', found {sorted(manifest)[:8]}")
    return manifest


def _gather_file_run(gathered: Gathered, manifest: Path, output: str) -> None:
    """A run that wrote a single file."""
    gathered.runs.append(
        Run(output, _checked(read_object(manifest, LARGEST_MANIFEST), manifest), "finished", None, Path(output))
    )
    if output.endswith(RECORDS) and os.path.isfile(output):  # not a .gguf, whose lines have no end
        _gather_records(gathered, output, output, listed=True)


def _gather_folder(gathered: Gathered, folder: Path, path: str) -> None:
    """The runs and files in a folder that is no run."""
    before = len(gathered.runs) + len(gathered.files)
    for child in sorted(folder.iterdir(), key=lambda child: (changed(child), child.name)):
        if not child.name.startswith("."):
            read_or_note(gathered.notes, lambda child=child: _gather_one(gathered, str(child), listed=True))
    if len(gathered.runs) + len(gathered.files) == before:
        check_no_adapter(path)
        raise UserError(f"{path}: expected a run folder (with {MANIFEST}), or a folder of some; found none")


def _gather_json(gathered: Gathered, location: Path, path: str, listed: bool) -> None:
    value = read_json(location)
    evaluation = value.get("evaluation", value)
    if "stage" in value and "manifest_version" in value:
        _gather_run(gathered, location.parent, str(location.parent))
    elif isinstance(evaluation, dict) and isinstance(evaluation.get("overall"), dict):
        gathered.evaluations[path] = evaluation
    elif "bytes_per_token" in value and "sample" in value:
        gathered.tokenizers[path] = value
    elif scores := [effect for effect in objects(value.get("effects")) if _is_score(effect)]:
        gathered.scores[path] = scores
    elif not listed:
        raise UserError(
            f"{path}: expected a manifest, evaluation.json, report.json or effects.json, found {sorted(value)[:8]}"
        )


def _is_score(effect: dict[str, Any]) -> bool:
    """True if this is a row of effects.json: a figure of a stage, its value, and what it is held against."""
    named = all(isinstance(effect.get(name), str) for name in ("stage", "figure", "against"))
    return named and all(effect.get(name) is None or is_number(effect[name]) for name in ("value", "beside"))


def _gather_records(gathered: Gathered, path: str, run: str | None, listed: bool) -> None:
    fields = next((row for _, line in islice(raw_lines(path), LOOKED_AT) if (row := parsed(line)) is not None), None)
    kind = None if fields is None else kind_of_record(fields)
    if kind is not None:
        gathered.files.append(RecordsFile(path, kind, run))
    elif not listed:
        content = f"a record with {sorted(fields)[:8]}" if fields else "no JSON object a line"
        raise UserError(f"{path}: expected a file that a stage has written, found {content}")
