"""crawl-filter as Ray tasks, each for one archive or a few small files.

    parts_of(files_of(paths), partial(FilesWorker, make, strict), workers, state, in_order)

A task reads its files and returns their part. The driver stores the parts and merges them in input order, as in a
local run: the output is the same, byte for byte. Ray retries a task whose process dies up to three times.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmkit.crawl.page import Part
from llmkit.crawl.read.frames import Reader, Source, batches, sources
from llmkit.errors import UserError
from llmkit.io.pool import AHEAD, Work, WorkerDied
from llmkit.io.ranks import available_cores
from llmkit.io.remote import is_remote, size_and_version

RETRIES = 3
TASK_BYTES = 4 << 20  # small files per task


@dataclass(frozen=True)
class Files:
    """The input of one task."""

    sources: tuple[Source, ...]
    size: int  # bytes of local files

    @cached_property
    def key(self) -> str:
        """Hash of paths, sizes, and modification times (or versions, of remote files)."""
        digest = hashlib.blake2b(digest_size=16)
        for path, _ in self.sources:
            status = os.stat(path) if os.path.exists(path) else None
            version = status and (status.st_size, status.st_mtime_ns)
            digest.update(repr((path, size_and_version(path) if is_remote(path) else version)).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        """Return the name used in error messages."""
        first, last = self.sources[0].path, self.sources[-1].path
        return first if first == last else f"{first} to {last}"


def files_of(paths: Iterable[str]) -> Iterator[Files]:
    """Split the input into tasks."""
    group: list[Source] = []
    size = 0
    for source in sources(paths):
        group.append(source)
        size += os.path.getsize(source.path) if os.path.isfile(source.path) else 0
        if size >= TASK_BYTES or is_remote(source.path):
            yield Files(tuple(group), size)
            group, size = [], 0
    if group:
        yield Files(tuple(group), size)


class FilesWorker:
    """Turns the files of a task into one part.

    make: factory of the worker of batches; strict: raise UserError for a bad file; columns: as in `Reader`.
    """

    def __init__(self, make: Callable[[], Work], strict: bool, columns: Mapping[str, str] = {}) -> None:
        self.work, self.on_bad, self.columns = make(), None if strict else lambda error: None, columns

    def __call__(self, files: Files) -> tuple[Part]:
        """Return the part of these files."""
        reader = Reader(files.sources, on_bad=self.on_bad, columns=self.columns)
        return (Part.joined([part for batch in batches(reader) for part in self.work(batch)]),)


def in_order(
    items: Iterable[Any], make: Callable[[], Work], workers: int | None, *, finished: Callable[[Any], bool]
) -> Iterator[tuple[Any, Iterable[Any]]]:
    """Yield (item, its results) in the order of `items`, as `llmkit.io.pool.in_order` does.

    `RAY_ADDRESS` names the cluster; without it Ray is started on this machine only, with `workers` processes (default:
    all cores). On a cluster `workers` is the number of concurrent tasks (default: the cluster's cores).
    Raises UserError if Ray is not installed, and whatever the work raises.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'ray>=2.60', or leave --engine out") from None

    def results(item: Any, reference: Any) -> Iterable[Any]:
        try:
            answer = ray.get(reference) if reference is not None else ()
        except ray.exceptions.WorkerCrashedError:
            raise WorkerDied(f"{item}: the worker process was killed {RETRIES + 1} times") from None
        except ray.exceptions.OutOfMemoryError:
            raise WorkerDied(f"{item}: out of memory; use fewer --workers") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    with _cluster(ray, workers) as count:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_work_on)
        pickled = [ray.put(pickle.dumps(make))]  # in a list, or Ray would pass its content to every task
        waiting = deque[tuple[Any, Any]]()
        for item in items:
            waiting.append((item, None if finished(item) else task.remote(item, pickled, os.getcwd())))
            if len(waiting) >= AHEAD * count:
                item, reference = waiting.popleft()
                yield item, results(item, reference)
        for item, reference in waiting:
            yield item, results(item, reference)


@contextmanager
def _cluster(ray: Any, workers: int | None) -> Iterator[int]:
    """Start Ray or connect to it; yield the number of concurrent tasks."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no calls home
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        options |= {"address": "local", "num_cpus": workers or available_cores(), "include_dashboard": False}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers, or it rejects the token; see docs/crawl-on-ray.md"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # a plain Exception is how Ray reports a node that did not come up
            raise
        raise UserError(f"--engine ray: Ray does not start: {error}") from error
    with suppress(ValueError):  # not in the main thread: Ray has set no handler
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


_works: dict[Any, Work] = {}


def _work_on(item: Any, pickled: list[Any], folder: str) -> list[Any] | str:
    """Run the task: return the results of an item, or the message of a UserError for the driver to raise again."""
    import ray  # pyright: ignore[reportMissingImports]

    os.chdir(folder)  # the driver's: paths are relative to it
    try:
        if pickled[0] not in _works:
            _works[pickled[0]] = pickle.loads(ray.get(pickled[0]))()
        return list(_works[pickled[0]](item))
    except UserError as error:
        return str(error)
