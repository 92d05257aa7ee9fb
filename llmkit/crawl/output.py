"""Collects the parts in input order: drops duplicates, counts the funnel, writes the output."""

from __future__ import annotations

import io
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from time import thread_time
from typing import IO, Any, NamedTuple, TextIO

import orjson

from llmkit.config import as_options, comparable
from llmkit.crawl.filters.contamination import Findings
from llmkit.crawl.page import READ, Batch, Frame, Part
from llmkit.crawl.read.frames import Reader, Source, batches, sources
from llmkit.crawl.recipe import DUPLICATES, Recipe, as_json
from llmkit.display import printable
from llmkit.errors import UserError
from llmkit.io.jsonl import JSON_LINE, dump_json, load_json
from llmkit.io.manifest import check_sources, read_manifest
from llmkit.io.pool import Work, in_order
from llmkit.io.remote import is_remote, size_and_version
from llmkit.io.resume import STATE, Kept, check_identity

BAD = ("bad_json", "no_text", "bad_file", "truncated", "damaged")  # reasons that mean damaged input

Write = Callable[[bytes], object]
Versions = dict[str, tuple[int | None, str]]  # size and version of remote files, by URL
Parts = Generator[tuple[Any, Part], None, None]  # (work item with a `size` in bytes, its part), in input order


def parts_of(
    inputs: Sequence[str],
    make: Callable[[], Work],
    workers: int | None,
    *,
    state: Kept | None = None,
    engine: str = "local",
    on_bad: Callable[[UserError], object] | None = None,
    columns: Mapping[str, str] = {},
    versions: Versions | None = None,
) -> Parts:
    """Yield the parts of the input.

    make: factory of the worker. state: stores the parts, and provides those of an interrupted run.
    on_bad, columns: as in `Reader`; with Ray on_bad is not called, bad records appear only in the part.
    versions: filled with size and version of each remote file that was read, except with Ray.
    """
    reader_of = partial(Reader, on_bad=on_bad, columns=columns)
    works: Iterable[Any] = _batches(inputs, state, reader_of, {} if versions is None else versions)
    pool: Any = in_order
    if engine == "ray":
        from llmkit.crawl import on_ray

        works, pool = on_ray.files_of(inputs), on_ray.in_order
        make = partial(on_ray.FilesWorker, make, strict=on_bad is None, columns=columns)
    is_first = True

    def is_done(work: Any) -> bool:
        nonlocal is_first
        done = state is not None and work.key in state
        # a file that could not be opened in the earlier run is stored as a bad_file frame
        failed = Batch([Frame(work.frames[0].path, "bad", 0, "bad_file")], 0, 0.0) if isinstance(work, Batch) else None
        if state and is_first and not done and (failed is None or failed.key not in state):
            raise UserError(f"{state.path}: {work}: not what the unfinished run read; start over with --force")
        is_first = False
        return done

    for work, results in pool(works, make, workers, finished=is_done):
        results = list(results)
        if state is not None and not results:
            results = [Part.unpack(state[work.key])]
        elif state is not None:
            state.add(work.key, results[0].pack())
        yield work, results[0]


# the options that, with the recipe, determine the output
DECISIVE = ("inputs", "listed", "base", "take", "limit", "columns", "rejects")


def finished(config: Any, recipe: Recipe) -> dict[str, Any] | None:
    """Return the counts of a finished run from its manifest, or None if there is no finished run.

    Raises UserError if the recipe, an option that determines the output, or an input differs.
    """
    out = config.out
    if out is None or config.explain is not None:
        return None
    manifest = None if Path(f"{out.rstrip('/')}{STATE}").exists() or not Path(out).exists() else read_manifest(out)
    if manifest is None or not {"options", "results"} <= manifest.keys():
        return None
    noted, options = (comparable(type(config), values) for values in (manifest["options"], as_options(config)))
    now = {"recipe": as_json(recipe), **{name: options[name] for name in DECISIVE}}
    check_identity(out, {name: noted.get(name) for name in now}, now)
    check_sources(out, manifest)
    return {name: manifest["results"][name] for name in ("records", "documents", "dropped")}


class DoneBefore(NamedTuple):
    """A batch, by its key, of a remote file that an earlier run read to the end; it is not read again."""

    key: str
    size: int = 0


def _batches(
    inputs: Sequence[str],
    state: Kept | None,
    reader_of: Callable[[Iterable[Source]], Reader],
    versions: Versions,
) -> Iterator[Batch | DoneBefore]:
    """Yield the batches of the input; a remote file shares no batch with other files.

    state: gets the batch keys of each remote file that was read to the end.
    """
    resumed = bool(state)
    for at_address, group in groupby(sources(inputs), key=lambda source: is_remote(source.path)):
        if not at_address:
            yield from batches(reader_of(group))
            continue
        for source in group:
            versions[source.path] = None, ""
            with suppress(UserError):  # the reader raises it again
                versions[source.path] = size_and_version(source.path) if resumed else (None, "")
            identity = _identity(source.path, versions[source.path])
            known = orjson.loads(state[identity]) if state is not None and identity in state else []
            if state is not None and known and all(key in state for key in known):
                yield from map(DoneBefore, known)
                continue
            reader, keys = reader_of([source]), []
            for batch in batches(reader):
                keys.append(batch.key)
                yield batch
            versions[source.path] = reader.version
            if state is not None and keys and (identity := _identity(source.path, reader.version)):
                state.add(identity, orjson.dumps(keys))


def _identity(address: str, of: tuple[int | None, str]) -> str:
    """Return a key for this version of a remote file, or "" if its server reports no version."""
    return f"{address} {of[0]} {of[1]}" if of[1] else ""


class Collector:
    """Takes parts in order, drops duplicates, and writes documents and rejects."""

    def __init__(
        self,
        recipe: Recipe,
        document: Write,
        reject: Write | None = None,
        spill: Path | None = None,
        limit: int | None = None,
        on_bad: Callable[[str, str, int], object] = lambda where, reason, count: None,
    ) -> None:
        """on_bad is called for each damaged record with its place, the reason, and the count so far."""
        self.funnel, self.findings = Funnel([READ, *recipe.taken]), Findings()
        self.bad, self.limit, self.on_bad = 0, limit, on_bad
        self._document, self._reject = document, reject
        self._names = Names(spill) if reject else None
        self._last_step = recipe.taken[-1] if recipe.taken else READ
        exact, near = (step in recipe.steps for step in DUPLICATES)
        if exact or near:
            from llmkit.crawl.dedup.duplicates import Duplicates

            self._duplicates = Duplicates(spill, recipe.near_duplicates.min_similarity, exact, near)

    @property
    def full(self) -> bool:
        """True if `limit` pages were taken."""
        return self.limit is not None and self.funnel.pages >= self.limit

    def add(self, part: Part) -> None:
        """Take the next part."""
        self.funnel.spend(part.seconds)
        repeats: Iterator[Any] = iter(())
        if part.signatures is not None:
            started = thread_time()
            repeats = iter(self._duplicates.seen(part.signatures))
            self.funnel.spend({self._last_step: thread_time() - started})
        for outcome in part.outcomes:
            if self.full:
                return
            if outcome.items:
                self.findings.add(outcome.identity, outcome.items)
                if outcome.step != "contamination":
                    self.funnel.redacted["contamination"] += 1
            if outcome.step is not None:
                self._drop(outcome.step, outcome.reason, outcome.line)
            elif (repeat := next(repeats, None)) is None:
                self.funnel.count(None, None)
                self._document(outcome.line)
            else:
                step, line = f"{repeat.kind}_duplicates", b""
                if self._names is not None:
                    document = load_json(outcome.line)
                    entry = {key: document[key] for key in ("id", "url", "source") if key in document}
                    entry |= {"offset": outcome.offset, "step": step, "reason": "repeats"}
                    entry |= {"score": round(repeat.similarity, 4), "repeats": self._names[repeat.index]}
                    line = dump_json({**entry, "text": document["text"]}, JSON_LINE)
                self._drop(step, "repeats", line)
            if outcome.step is None and self._names is not None:
                self._names.add(outcome.line)
            if outcome.step == READ and outcome.reason in BAD:
                self.bad += 1
                self.on_bad(f"{outcome.path}:{outcome.offset}", outcome.reason, self.bad)

    def _drop(self, step: str, reason: str | None, line: bytes) -> None:
        self.funnel.count(step, reason)
        if self._reject:
            self._reject(line)


class Names:
    """Document ids by number, to report which document a duplicate repeats; on disk if there is a spill folder.

    In memory a WARC-Record-ID takes 57 bytes.
    """

    def __init__(self, spill: Path | None) -> None:
        self._ends = array("Q", [0])
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=spill) if spill else io.BytesIO()  # noqa: SIM115

    def add(self, line: bytes) -> None:
        """Append the id of the next document, given its JSON line."""
        self._file.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._file.write(dump_json(load_json(line)["id"])))

    def __getitem__(self, number: int) -> Any:
        start = self._file.seek(self._ends[number])
        return orjson.loads(self._file.read(self._ends[number + 1] - start))


class Funnel:
    """Counts of records by the step and reason that dropped them.

    >>> funnel = Funnel(["read", "language"])
    >>> funnel.count(None, None), funnel.count("language", "other_language")
    (None, None)
    >>> funnel.as_json()[1]
    {'step': 'language', 'in': 2, 'kept': 1, 'dropped': {'other_language': 1}, 'seconds': 0.0}
    """

    def __init__(self, steps: Sequence[str]) -> None:
        self.kept = 0
        self.dropped: dict[str, Counter[str]] = {step: Counter() for step in steps}
        self.seconds = dict.fromkeys(steps, 0.0)
        self.redacted = Counter[str]()  # records that a step changed and did not drop

    @property
    def records(self) -> int:
        """All records seen."""
        return self.kept + sum(counts.total() for counts in self.dropped.values())

    @property
    def pages(self) -> int:
        """Records that were pages."""
        return self.records - self.dropped[READ].total()

    def count(self, step: str | None, reason: str | None) -> None:
        """Count a record: kept if `step` is None, else dropped by `step` for `reason`."""
        if step is None:
            self.kept += 1
        else:
            assert reason, f"{step} dropped a record and did not say why"
            self.dropped[step][reason] += 1

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Add CPU seconds by step."""
        for step, amount in seconds.items():
            self.seconds[step] += amount

    def as_json(self) -> list[dict[str, Any]]:
        """Return one row per step: `{"step", "in", "kept", "dropped": {reason: count}, "redacted"?, "seconds"}`."""
        rows, left = [], self.records
        for step, counts in self.dropped.items():
            passed = left - counts.total()
            reasons = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
            rows.append({"step": step, "in": left, "kept": passed, "dropped": reasons})
            rows[-1] |= {"redacted": self.redacted[step]} if self.redacted[step] else {}
            rows[-1]["seconds"] = round(self.seconds[step], 3)
            left = passed
        assert left == self.kept, f"{left} records left the last step, {self.kept} were kept"
        return rows

    def show(self, to: TextIO, recipe: str) -> None:
        """Print the recipe's name and the funnel table."""
        rows: list[tuple[str, ...]] = [("step", "in", "kept", "dropped", "share", "seconds")]
        for step in self.as_json():
            share = lambda count, step=step: f"{count / step['in']:.1%}" if step["in"] else ""  # noqa: E731
            dropped = sum(step["dropped"].values())
            counts = [f"{count:,}" for count in (step["in"], step["kept"], dropped)]
            rows.append((step["step"], *counts, share(dropped), f"{step['seconds']:.2f}"))
            for reason, count in step["dropped"].items():
                rows.append((f"  {printable(reason)}", "", "", f"{count:,}", share(count), ""))
            if redacted := step.get("redacted"):
                rows.append(("  redacted", "", f"{redacted:,}", "", share(redacted), ""))
        print(f"recipe {printable(recipe)}", file=to)
        first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
            print("  ".join([name.ljust(first), *cells]).rstrip(), file=to)
        to.flush()
