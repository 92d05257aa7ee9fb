"""The life of a run folder: checks of --out, a partial folder with checkpoints, and the final rename.

Record files for remote addresses are also written to a local folder first, and then uploaded: `uploaded`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, make_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from llmkit.config import comparable, flag_of, lasting_options, option_fields, options_by_flag
from llmkit.errors import GateError, Interrupted, UserError
from llmkit.io.files import (
    PARTIAL,
    check_format,
    check_output,
    check_unfinished,
    is_empty_folder,
    output_folder,
    remove,
    replace_folder,
    sole_writer,
    sync,
)
from llmkit.io.hub import check_weights, commits, hub_hint, pin
from llmkit.io.jsonl import read_object, write_json
from llmkit.io.manifest import MANIFEST, OF_FILE, check_sources, read_manifest
from llmkit.io.progress import say
from llmkit.io.ranks import launch
from llmkit.io.remote import check_upload, is_remote, upload
from llmkit.io.resume import STATE as KEPT
from llmkit.io.resume import check_identity, read_sealed, write_sealed

STATE = "state"  # subfolder of a run folder for checkpoints and notes
NOTES = "state/run.json"  # read by --resume
UPLOAD = ".upload"  # appended to an address: the local folder of the files to upload
OPTIONS, SUMMARY = "options.json", "summary.json"  # in that folder: the run's options, and its result until uploaded
CHECKPOINTS_KEPT = 2  # during a run, because the newest may be damaged


def check_model_folder(path: str | None, example: str) -> None:
    """Raise UserError if `path` is None or not a model folder; `example` is a command with one, for the message."""
    if path is None:
        raise UserError(f"MODEL is missing: a model folder, such as {example}")
    if is_remote(path):
        check_weights(path)
    elif not Path(path).is_dir():
        instead = "a file" if Path(path).exists() else f"nothing{hub_hint(path)}"
        raise UserError(f"{path}: expected a model folder, found {instead}")


# ---- checkpoints, which training/checkpoint.py writes and reads


def checkpoint_place(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def keep_checkpoints(folder: Path, keep: int, newest: int | None = None) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`; later ones are damaged and will be rewritten."""
    steps = checkpoint_steps(folder)
    lasting = [step for step in steps if newest is None or step <= newest][-keep:]
    for step in set(steps).difference(lasting):
        remove(checkpoint_place(folder, step))


# ---- unfinished runs


def finished_results(output: str | Path, stage: str, config: Any, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return the results in the manifest of the finished run that `--resume` finds at its output.

    also: flags of free options that affect the output

    Raise UserError if no run of this stage, of these options or of these inputs wrote the output.
    """
    manifest = read_manifest(output) or {}
    if manifest.get("stage") != stage:
        raise UserError(f"{output}: not a finished {stage} run; choose another --out, or replace it with --force")
    noted, values = comparable(type(config), manifest.get("options", {})), options_by_flag(config)
    now = lasting_options(config) | {flag: values[flag] for flag in also}
    former = {flag_of(item): noted[item.name] for item in option_fields(type(config)) if item.name in noted}
    check_identity(output, {**now, **former}, now)
    check_sources(output, manifest)
    return dict(manifest.get("results", {}))


def check_files(
    config: Any, stage: str, other: str, left: Sequence[str] = (KEPT,), also: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Check `--out` and the file of the option `other` before a resumable command starts. Raise UserError.

    Return the results of the run if `--resume` finds it finished, else None.

    left: suffixes to --out of the files that a killed run leaves
    also: as in `finished_results`
    """
    out, path = config.out or "-", getattr(config, other)
    files, states = [name for name in (out, path) if name not in (None, "-")], [out + end for end in left if out != "-"]
    if path == "-":
        raise UserError(f"--{other}: expected a file, found -; stdout has the output, or its summary")
    if config.resume and out == "-":
        raise UserError("--resume: expected --out, the output of the killed run")
    if len({os.path.realpath(name) for name in files}) < len(files):
        raise UserError(f"--{other}: expected another file than --out, found {path} twice")
    for state in states:
        check_unfinished(config.force, config.resume, state)
    for name in files:
        check_output(name, config.force, config.resume, is_file=True)
    if not config.resume or not os.path.exists(out) or any(map(os.path.exists, states)):
        return None
    results = finished_results(out, stage, config, also)
    if path is not None and not os.path.exists(path):
        raise UserError(f"--{other} {path}: cannot be made from {out}, which is finished; --force makes both")
    say(f"{out}: already finished; to make it again, use --force without --resume", config.quiet)
    return results


class RunFolder:
    """The folder of a training run, created as `out` + ".partial" and renamed to `out` at the end.

    identity: the flags and file contents that a run and its resumption must share, JSON values by the user's names.

    Only rank 0 writes. A job that torchrun restarts always resumes its run.
    """

    def __init__(self, out: str | None, example: str, *, resume: bool, force: bool, dry_run: bool = False) -> None:
        """Raise UserError if --out cannot be written. With nothing to resume, a new run starts."""
        self.folder = output_folder(out or (example if dry_run else None), example)
        # next to a link's target: the target is replaced, not the link
        self.work = Path(f"{os.path.realpath(self.folder) if self.folder.is_symlink() else self.folder}{PARTIAL}")
        if not resume and launch().restarts > 0:  # a failed attempt of this job may have started the run
            notes = next((folder / NOTES for folder in (self.work, self.folder) if (folder / NOTES).exists()), None)
            resume = notes is not None and read_object(notes).get("job") == launch().job
        self.resume = resume
        if out is None:
            return
        check_output(str(self.folder), force, resume)
        if resume and not self.work.is_dir() and (not self.folder.is_dir() or is_empty_folder(self.folder)):
            self.resume = resume = False
            say(f"--resume: nothing at {self.work} yet: starting a new run")
        check_unfinished(force, resume, self.work)
        if resume and (self.work / NOTES).exists():
            with suppress(UserError):  # `notes` reports it
                pin(read_sealed(self.work / NOTES).get("commits", {}))

    @property
    def is_finished(self) -> bool:
        """True if the run to resume is already complete, which is no error."""
        return self.resume and self.folder.is_dir() and not self.work.is_dir()

    def notes(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the notes of `begin` if the run is resumed, else None. Raise UserError for another identity."""
        if not self.resume or not (self.work / NOTES).exists():
            if self.resume and checkpoint_steps(self.work / STATE):
                path = self.work / NOTES
                raise UserError(f"{path}: missing, so the run cannot be identified; start over with --force")
            return None
        try:
            noted = read_sealed(self.work / NOTES)
        except UserError as error:
            raise UserError(f"{error}; start over with --force") from None
        check_identity(self.work, noted["identity"], identity)
        return noted["notes"]

    def begin(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Create `work`, or keep it for a resumed run, and write the notes for a later resumption."""
        if not launch().leads:
            return
        if not self.resume:
            remove(self.work)
        (self.work / NOTES).parent.mkdir(parents=True, exist_ok=True)
        write_sealed(
            self.work / NOTES, {"identity": identity, "notes": notes, "job": launch().job, "commits": commits()}
        )
        sync(self.work)  # without these entries on disk a power cut loses the checkpoints
        sync(self.work.absolute().parent)

    @contextmanager
    def training(self, trainer: Any) -> Iterator[None]:
        """Wrap the training steps: delete a new run if a UserError ends it before its trainer `has_begun`.

        The corrected command then finds no unfinished run.
        """
        try:
            yield
        except UserError:
            if not self.resume and not trainer.has_begun:
                self.abandon()
            raise

    def abandon(self) -> None:
        """Delete the unfinished folder."""
        if launch().leads:
            remove(self.work)

    def put_in_place(self) -> None:
        """Rename the finished folder to `out` and keep only its last checkpoint."""
        replace_folder(self.work, Path(os.path.realpath(self.folder)))
        keep_checkpoints(self.folder / STATE, 1)


# ---- outputs at addresses


def uploaded(*names: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Decorate a stage's `run` so that the output files of these options may be remote addresses.

    The stage writes to a local folder ADDRESS.upload, where a killed run leaves its state. At the end its files and
    reports are uploaded, `--out` and its manifest last. Raise UserError if that fails: the files are kept, and
    `--resume` uploads them.
    """

    def decorate(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(run)
        def run_and_upload(config: Any) -> Any:
            addresses = {name: path for name in names if is_remote(path := getattr(config, name) or "")}
            return _at_addresses(run, config, addresses) if addresses else run(config)

        return run_and_upload

    return decorate


def _at_addresses(run: Callable[[Any], Any], config: Any, addresses: Mapping[str, str]) -> Any:
    folder = Path(re.sub(r"[^\w.=-]+", "-", next(iter(addresses.values())).partition("://")[2])[-200:] + UPLOAD)
    files = {name: folder / name / address.rpartition("/")[2] for name, address in addresses.items()}
    here = replace(config, **{name: str(path) for name, path in files.items()})
    if config.dry_run:
        return run(here)
    with sole_writer(str(folder)):
        resume = getattr(config, "resume", False) and folder.exists()
        check_unfinished(config.force, resume, folder)
        for address in addresses.values():
            check_format(address)
            check_upload(address, replaces=config.force or resume)
        distinct = {address.replace("s3a://", "s3://").replace("gcs://", "gs://") for address in addresses.values()}
        if len(distinct) < len(addresses):
            flags = " and ".join(f"--{name}" for name in addresses)
            raise UserError(f"{flags}: expected different files, found {next(iter(addresses.values()))} twice")
        options = {flag: value for flag, value in lasting_options(config).items() if flag != "--resume"}
        out = files.get("out")
        if resume and out is not None and out.is_file() and not list(out.parent.glob(f"*{KEPT}")):  # work is done
            check_identity(folder, read_sealed(folder / OPTIONS), options)
            noted: dict[str, Any] = read_object(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
        else:
            if not resume:
                remove(folder)
            for path in files.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(folder / OPTIONS, options)
            noted = {}
            try:
                shown = {str(path): addresses[name] for name, path in files.items()}
                if (summary := run(here)) is not None:
                    noted["summary"] = {name: shown.get(str(value), value) for name, value in asdict(summary).items()}
            except GateError as error:  # raised after the work is done
                noted["gate"] = str(error)
            finally:
                if not any(path.is_file() for path in folder.glob("*/*")):
                    remove(folder)
            if folder.exists():
                write_json(folder / SUMMARY, noted)
        _upload(config, files, addresses, folder)
        remove(folder)
    if noted.get("gate"):
        raise GateError(noted["gate"])
    values = noted.get("summary")
    return make_dataclass("Summary", values)(**values) if values else None


def _upload(config: Any, files: Mapping[str, Path], addresses: Mapping[str, str], folder: Path) -> None:
    try:
        for name, address in reversed(list(addresses.items())):
            path = files[name]
            if not path.is_file():
                continue
            for report in sorted(path.parent.glob("*.json")):  # as FILE.contamination.json
                if report.name not in (path.name, path.name + OF_FILE):
                    upload(str(report), address + report.name.removeprefix(path.name), quiet=True)
            upload(str(path), address, config.quiet)
            if manifest := read_manifest(path):
                noted = folder / MANIFEST
                write_json(noted, {**manifest, "options": manifest["options"] | dict(addresses)})
                upload(str(noted), address + OF_FILE, quiet=True)
            say(f"{address}: uploaded", config.quiet)
    except (UserError, KeyboardInterrupt) as error:
        way = "the same command with --resume uploads it" if hasattr(config, "resume") else "copy it to its address"
        advice = f"the output is in {folder}/; {way}"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {advice}") from error
        raise Interrupted(f"interrupted; {advice}") from None
