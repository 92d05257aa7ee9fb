"""The work of crawl-filter as Ray tasks: every span, and every range of the keys that duplicates are found by.

    repeats = work_on_ray(spans, make, state, recipe, workers=None)

leaves the state folder, which must lie on storage that all machines share under one path, with a finished file for
every span, as an interrupted local run does; what is merged of it is therefore the same, byte for byte. Duplicates:

- a span's task hands back the signatures of its documents; the driver writes them to `signatures`, in order, and each
  column of their keys to `keys-COLUMN`;
- `band_firsts` of a column and a range of its keys is a task: it reads `keys-COLUMN`, writes `firsts-COLUMN-PART.npy`;
- `join` of these is done by the driver.

A document takes 256 bytes of signature, 17 keys and 17 numbers of 8 bytes on the shared storage, 528 in all.

A task whose process dies is done again by Ray, three times at most.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from llmkit.crawl.dedup.duplicates import Repeat, band_firsts, join, keys
from llmkit.crawl.funnel import READ
from llmkit.crawl.page import Part, Span
from llmkit.crawl.read.inputs import Seam
from llmkit.crawl.recipe import Recipe
from llmkit.crawl.state import State, write_span
from llmkit.errors import UserError
from llmkit.io.pool import AHEAD, Work, WorkerDied
from llmkit.io.ranks import available_cores

RETRIES = 3
CHUNK = 1 << 16  # keys read at once
RANGE_KEYS = 1 << 25  # sorted at once by a task, in 3 GB


class Worked(NamedTuple):
    """Result of a span's task; the rest is in its file."""

    began: int | None
    ended: int | None
    pages: int
    signatures: np.ndarray | None  # of the documents left, in order
    mistake: str | None = None  # a user's, to be raised again in the driver


class KnownRepeats:
    """Stands in for `Duplicates` where it is known already what every document repeats."""

    def __init__(self, repeats: Iterable[Repeat | None]) -> None:
        self._repeats = iter(repeats)

    def add(self, signatures: np.ndarray) -> list[Repeat | None]:
        """Return the repeat of each of the next documents, or None."""
        return [next(self._repeats) for _ in signatures]


def work_on_ray(
    spans: Iterable[Span],
    make: Callable[[], Work],
    state: State,
    recipe: Recipe,
    workers: int | None = None,
    limit: int | None = None,
) -> KnownRepeats:
    """Have every span worked on that the state has no file of; then find the duplicates of all.

    With a `limit` only as many of the first spans as have so many pages.

    `RAY_ADDRESS` names the cluster; without it Ray is started on this machine alone, with `workers` processes (all
    cores unless told). On a cluster `workers` is the number of tasks that run at once, the cluster's cores unless told.
    Raises UserError where Ray is not installed, and what the work raises.
    """
    ray = _import_ray()
    state.start()
    with _cluster(ray, workers) as count:
        pages = 0
        with _SignatureFiles(state.folder) as files:
            for worked in _in_order(ray, spans, make, state, count):
                if worked.signatures is not None:
                    files.write(worked.signatures)
                pages += worked.pages
                if limit is not None and pages >= limit:
                    break
        return KnownRepeats(_find_repeats(ray, files, recipe) if files.documents else [])


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'ray>=2.60', or leave --engine out") from None
    return ray


@contextmanager
def _cluster(ray: Any, workers: int | None) -> Iterator[int]:
    """Ray running: yields how many tasks are to run at once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no calls home
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "num_cpus": workers or available_cores(), "include_dashboard": False}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers, or not with this token; see docs/crawl-on-ray.md"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray's own word for a node that did not come up
            raise
        raise UserError(f"--engine ray: Ray does not start: {error}") from error
    with suppress(ValueError):  # not the main thread, in which Ray has set no handler
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


# ---- spans


def _in_order(ray: Any, spans: Iterable[Span], make: Callable[[], Work], state: State, count: int) -> Iterator[Worked]:
    """Yield the result of each span, in order, when its file is in place."""
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_work_on)
    pickled = [ray.put(pickle.dumps(make))]  # in a list, or Ray would hand its content to every task
    submit = lambda span: task.remote(span, pickled, str(_unchecked(state, span)), os.getcwd())  # noqa: E731
    seam, waiting = Seam(), deque[tuple[Span, Any]]()

    def next_one() -> Worked:
        span, reference = waiting.popleft()
        if reference is None:
            worked = _worked(state.load(span))
        else:
            worked = _got(ray, span, reference)
            if again := seam.check(span, worked.began):
                worked = _got(ray, span, submit(again))
            os.replace(_unchecked(state, span), state.path(span))
        seam.passed(span, worked.began, worked.ended)
        return worked

    for span in spans:
        waiting.append((span, None if state.has(span) else submit(span)))
        if len(waiting) >= AHEAD * count:
            yield next_one()
    while waiting:
        yield next_one()


def _unchecked(state: State, span: Span) -> Path:
    """Where a task leaves a span's parts: they count when it is known that the span began at the right place."""
    return state.path(span).with_suffix(".unchecked")


def _got(ray: Any, span: Span, reference: Any) -> Worked:
    try:
        worked = ray.get(reference)
    except ray.exceptions.WorkerCrashedError:
        raise WorkerDied(f"{span}: the process that worked on this was ended {RETRIES + 1} times") from None
    except ray.exceptions.OutOfMemoryError:
        raise WorkerDied(f"{span}: not enough memory for this; fewer --workers need less") from None
    if worked.mistake is not None:
        raise UserError(worked.mistake)
    return worked


_works: dict[Any, Work] = {}


def _work_on(span: Span, pickled: list[Any], file: str, folder: str) -> Worked:
    """The task: work on a span, leave its parts in the file."""
    import ray

    os.chdir(folder)  # the driver's: paths are relative to it
    try:
        if pickled[0] not in _works:
            _works[pickled[0]] = pickle.loads(ray.get(pickled[0]))()
        return _worked(write_span(Path(file), span, _works[pickled[0]](span)))
    except UserError as error:
        return Worked(None, None, 0, None, str(error))


def _worked(parts: Iterable[Part]) -> Worked:
    signatures, part, pages = [], None, 0
    for part in parts:
        pages += sum(outcome.step != READ for outcome in part.outcomes)
        if part.signatures is not None:
            signatures.append(part.signatures)
    assert part, "a span has a part at least"
    return Worked(part.began, part.ended, pages, np.concatenate(signatures) if signatures else None)


# ---- duplicates


class _SignatureFiles:
    """`signatures`, with those of all documents in order, and `keys-COLUMN` with a column of their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.documents, self.columns = folder.absolute(), 0, 0
        self.dtype = np.dtype(np.uint8)
        self._files = ExitStack()
        self._handles: list[IO[bytes]] = []

    def write(self, signatures: np.ndarray) -> None:
        """Add those of the next documents (n,)."""
        band_keys = keys(signatures)
        if not self._handles:
            self.dtype, self.columns = signatures.dtype, band_keys.shape[1]
            names = ["signatures", *(f"keys-{column}" for column in range(self.columns))]
            self._handles = [self._files.enter_context((self.folder / name).open("wb")) for name in names]
        self._handles[0].write(signatures.tobytes())
        for handle, column in zip(self._handles[1:], band_keys.T, strict=True):
            handle.write(column.tobytes())
        self.documents += len(signatures)

    def __enter__(self) -> _SignatureFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()


def _find_repeats(ray: Any, files: _SignatureFiles, recipe: Recipe) -> list[Repeat | None]:
    """Return the repeat of each document, or None."""
    folder, documents = files.folder, files.documents
    parts = -(-documents // RANGE_KEYS)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(write_firsts)
    jobs = [(column, part) for column in range(files.columns) for part in range(parts)]
    waiting = [task.remote(str(folder), column, part, parts) for column, part in jobs]
    firsts = np.memmap(folder / "firsts", np.int64, "w+", shape=(documents, files.columns))
    for start in range(0, documents, CHUNK):
        firsts[start : start + CHUNK] = np.arange(start, min(start + CHUNK, documents))[:, None]
    for (column, _), reference in zip(jobs, waiting, strict=True):
        numbers = np.load(ray.get(reference))
        firsts[numbers[0], column] = numbers[1]
    exact, near = (f"{kind}_duplicates" in recipe.steps for kind in ("exact", "near"))
    signatures = np.memmap(folder / "signatures", files.dtype, "r")
    return join(firsts, signatures, recipe.near_duplicates.min_similarity, exact, near)


def write_firsts(folder: str, column: int, part: int, parts: int) -> str:
    """The task: a file of (2, n) numbers of documents, and of the first with the same key, where that is another.

    part: of the keys by their upper 32 bits, whose range is cut into as many as `parts`.
    """
    column_keys = np.memmap(Path(folder, f"keys-{column}"), np.uint64, "r")
    rows, selected = [], []
    for start in range(0, len(column_keys), CHUNK):
        chunk = column_keys[start : start + CHUNK]
        chosen = np.flatnonzero((chunk >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part)
        rows.append(chosen + start)
        selected.append(chunk[chosen])
    numbers = np.concatenate(rows)
    firsts = numbers[band_firsts(np.concatenate(selected))]
    repeated = firsts != numbers
    out = Path(folder, f"firsts-{column}-{part}.npy")
    np.save(out, np.stack([numbers[repeated], firsts[repeated]]))
    return str(out)
