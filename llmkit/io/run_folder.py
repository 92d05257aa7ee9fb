"""A run folder, from the check of --out to its place, with manifest, model card, metrics and checkpoints.

Files of records that are to lie at addresses have a folder here, too, from which they are uploaded: `uploaded`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, make_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from llmkit.config import flag_of, lasting_options, option_fields
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
from llmkit.io.manifest import MANIFEST, OF_FILE, read_manifest
from llmkit.io.progress import say
from llmkit.io.ranks import launch
from llmkit.io.remote import check_upload, is_remote, upload
from llmkit.io.resume import STATE as KEPT
from llmkit.io.resume import check_identity, read_sealed, write_sealed

STATE = "state"  # in a run folder: its checkpoints, and
NOTES = "state/run.json"  # what a resumption asks for
UPLOAD = ".upload"  # after an address: the folder here of what is to be uploaded there,
OPTIONS, SUMMARY = "options.json", "summary.json"  # in which these are, and what a run that was not uploaded ends with
CHECKPOINTS_KEPT = 2  # while a run goes on: the newest may be damaged


def check_model_folder(path: str | None, example: str) -> None:
    """Raise UserError where no model folder is given, or none stands there; `example` is a command that has one."""
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
    """The steps at which checkpoints stand, ascending."""
    if not folder.is_dir():
        return []
    matches = [re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def keep_checkpoints(folder: Path, keep: int, newest: int | None = None) -> None:
    """Remove all but the last checkpoints up to the step `newest`. Later ones were damaged, and are written again."""
    steps = checkpoint_steps(folder)
    lasting = [step for step in steps if newest is None or step <= newest][-keep:]
    for step in set(steps).difference(lasting):
        remove(checkpoint_place(folder, step))


# ---- a run in the making


def check_finished(folder: str | Path, config: Any) -> None:
    """Raise UserError where the manifest of a finished run tells that it had other options than what resumes it."""
    noted, now = (read_manifest(folder) or {}).get("options", {}), lasting_options(config)
    former = {flag_of(item): noted[item.name] for item in option_fields(type(config)) if item.name in noted}
    check_identity(folder, {**now, **former}, now)


def check_files(config: Any, other: str, *left: str) -> None:
    """Check `--out` and the file of the option `other` before the work of a command that can be resumed.

    left  ends of the names beside --out of what a killed run leaves
    """
    files = [path for path in (config.out, getattr(config, other)) if path not in (None, "-")]
    has_out = config.out not in (None, "-")
    if config.resume and not has_out:
        raise UserError("--resume: expected --out, beside which a killed run has left its state")
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise UserError(f"--{other}: expected another file than --out, found {files[-1]} twice")
    if has_out and not config.dry_run:
        check_unfinished(config.force, config.resume, *(config.out + end for end in left))
    for path in files:
        check_output(path, config.force, config.resume, is_file=True)


class RunFolder:
    """The folder of a training run: it is made as `out` + ".partial" and takes its place, whole, at the end.

    identity: what a run and its resumption have in common, JSON values by names that the user knows: flags, and what
    was in the files that they name.

    The first process alone writes. A job that torchrun starts again resumes the run that it had begun, always.
    """

    def __init__(self, out: str | None, example: str, *, resume: bool, force: bool, dry_run: bool = False) -> None:
        """Raises UserError for an --out that cannot be had; with nothing to resume the run starts."""
        self.folder = output_folder(out, example)
        # beside what a link leads to: the folder there is replaced, not the link
        self.work = Path(f"{os.path.realpath(self.folder) if self.folder.is_symlink() else self.folder}{PARTIAL}")
        if not resume and launch().restarts > 0:  # a former attempt of this job, which failed, may have begun the run
            notes = next((folder / NOTES for folder in (self.work, self.folder) if (folder / NOTES).exists()), None)
            resume = notes is not None and read_object(notes).get("job") == launch().job
        self.resume = resume
        if dry_run:
            return
        check_output(str(self.folder), force, resume)
        if resume and not self.work.is_dir() and (not self.folder.is_dir() or is_empty_folder(self.folder)):
            self.resume = resume = False
            say(f"--resume: nothing at {self.work} yet: starting a new run")
        check_unfinished(force, resume, self.work)
        if resume and (self.work / NOTES).exists():
            with suppress(UserError):  # `notes` tells of it
                pin(read_sealed(self.work / NOTES).get("commits", {}))

    @property
    def is_finished(self) -> bool:
        """True if the run to be resumed is done: that is no work, and no mistake."""
        return self.resume and self.folder.is_dir() and not self.work.is_dir()

    def results(self, stage: str, config: Any) -> dict[str, Any]:
        """The results of the finished run. Raises UserError for a folder from elsewhere, and for other options."""
        manifest = read_manifest(self.folder) or {}
        if manifest.get("stage") != stage:
            instead = "choose another --out, or replace it with --force"
            raise UserError(f"{self.folder}: not a finished {stage} run; {instead}")
        check_finished(self.folder, config)
        return manifest["results"]

    def notes(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the notes of `begin` for a run that is resumed, else None. Raises UserError for another identity."""
        if not self.resume or not (self.work / NOTES).exists():
            if self.resume and checkpoint_steps(self.work / STATE):
                path = self.work / NOTES
                raise UserError(f"{path}: missing, so that nobody knows what was begun; start again with --force")
            return None
        try:
            noted = read_sealed(self.work / NOTES)
        except UserError as error:
            raise UserError(f"{error}; start again with --force") from None
        check_identity(self.work, noted["identity"], identity)
        return noted["notes"]

    def begin(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Make `work`, empty, or as it is for a resumed run, and note what a resumption will ask for."""
        if not launch().leads:
            return
        if not self.resume:
            remove(self.work)
        (self.work / NOTES).parent.mkdir(parents=True, exist_ok=True)
        write_sealed(
            self.work / NOTES, {"identity": identity, "notes": notes, "job": launch().job, "commits": commits()}
        )
        sync(self.work)  # and its own name: the checkpoints are lost without them
        sync(self.work.absolute().parent)

    @contextmanager
    def training(self, trainer: Any) -> Iterator[None]:
        """Around the steps: abandon a new run that a UserError ends before its trainer `has_begun`.

        The mended command shall not be refused.
        """
        try:
            yield
        except UserError:
            if not self.resume and not trainer.has_begun:
                self.abandon()
            raise

    def abandon(self) -> None:
        """Remove what was begun and holds nothing."""
        if launch().leads:
            remove(self.work)

    def put_in_place(self) -> None:
        """Put the finished folder in its place, whole; of the checkpoints the last stays."""
        replace_folder(self.work, Path(os.path.realpath(self.folder)))
        keep_checkpoints(self.folder / STATE, 1)


# ---- outputs at addresses


def uploaded(*names: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Let the options of these names, files that a stage writes, be addresses too: a decorator of its `run`.

    The stage writes in a folder ADDRESS.upload, in which a killed run leaves its state; when all is done its files and
    the reports beside them are uploaded, `--out` and its manifest last. Raises UserError where that fails: the files
    stay, and `--resume` uploads them.
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
        if resume and out is not None and out.is_file() and not list(out.parent.glob(f"*{KEPT}")):  # all is made
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
            except GateError as error:  # when all is made
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
        advice = f"all that was made is in {folder}/; {way}"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {advice}") from error
        raise Interrupted(f"interrupted; {advice}") from None
