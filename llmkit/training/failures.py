"""End a distributed job quickly, with one line, when a rank fails, hangs or disappears.

A rank that fails leaves a note in the job's store. The first one to do so waits a moment for the notes of the others
and reports for all. A thread on each rank sees the notes and ends the process, even if its main thread waits for a rank
that will never answer. A rank without a note has disappeared; one that does not wait for others hangs.

Before that, a rank that fails in training requests a checkpoint. The threads of the others write their parts: no rank
can update its weights without the failed one, so all are at the same step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from llmkit.display import write_message
from llmkit.errors import Interrupted, UserError
from llmkit.io.ranks import Launch, launch

POLL_SECONDS = 0.25
NOTES_SECONDS = 4.0  # to wait for the notes of the others; torchrun kills 30 s after its SIGTERM
SAVING_SECONDS = 15.0  # for all ranks to report their step: less than torchrun waits
OWN_SECONDS = 1.5  # for the main thread to report the failure itself
PACKAGE = str(Path(__file__).parents[1])

_watch: Watch | None = None
_ending = threading.Lock()


def connect(me: Launch, timeout: float) -> Any:
    """Open a separate connection to the store of the job. Raises UserError if that fails."""
    import torch.distributed as dist

    try:
        connected = dist.rendezvous("env://", timeout=timedelta(seconds=timeout))  # type: ignore[reportPrivateImportUsage]
        store, _, _ = next(connected)
    except Exception as error:
        raise UserError(f"the processes cannot reach one another: {error}; start them with torchrun") from None
    return dist.PrefixStore(f"llmkit/{me.restarts}", store)  # type: ignore[reportPrivateImportUsage]


class Watch(threading.Thread):
    """Ends this process when another rank has failed, or after waiting longer than `timeout` seconds for others."""

    def __init__(self, me: Launch, timeout: float) -> None:
        super().__init__(name="watch over the other processes", daemon=True)
        self.me, self.timeout = me, timeout
        self.store = connect(me, timeout)
        self._waiting_since: float | None = None
        self._over = threading.Event()
        # writes this rank's part of a checkpoint, if all ranks agree on the step
        self.save: Callable[[Callable[[Any], bool]], bool] | None = None
        self._saved: bool | None = None
        self._saving = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a wait for other ranks that should answer at once."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                if self.store.add("saving", 0) > 0:
                    self.save_together()
                failed = self.store.add("notes", 0) > 0
            except Exception:  # the store and the job are gone: the main thread will notice
                return
            since = self._waiting_since
            if failed:
                time.sleep(OWN_SECONDS)
                _end({"kind": "ended", "place": whereabouts()}, self.me, self.store)
            elif since is not None and time.monotonic() - since > self.timeout:
                _end(_lost(f"no answer for {self.timeout:g} s"), self.me, self.store)

    def call_for_saving(self) -> bool:
        """Have all ranks save their parts before this one ends. Return False if they cannot."""
        self.store.add("saving", 1)
        return self.save_together()

    def save_together(self) -> bool:
        """Save this rank's part, once. Return False unless all ranks have saved theirs."""
        with self._saving:
            if self._saved is None:
                self._saved, agreed = False, threading.Event()

                def agree_on_step(value: Any) -> bool:
                    if same := self._agree("step", value, SAVING_SECONDS):
                        agreed.set()
                    return same

                def save() -> None:
                    with suppress(Exception):  # the error that ended the job matters more
                        done = self.save is not None and self.save(agree_on_step)
                        self._saved = self._agree("saved", done or None, self.timeout)

                # in a thread that can be abandoned: a device may wait for a rank that will never answer
                thread = threading.Thread(target=save, daemon=True)
                thread.start()
                thread.join(SAVING_SECONDS)
                if agreed.is_set():  # writing a large checkpoint takes long
                    thread.join(self.timeout)
            return self._saved

    def _agree(self, what: str, value: Any, seconds: float) -> bool:
        """Return True if all ranks report the same value within `seconds`, and it is not None."""
        self.store.set(f"{what}/{self.me.rank}", json.dumps(value))
        keys = [f"{what}/{rank}" for rank in range(self.me.size)]
        deadline = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return value is not None and {self.store.get(key) for key in keys} == {json.dumps(value).encode()}

    def stop(self) -> None:
        """End the watch: this rank is done."""
        self._over.set()
        self.join()  # a thread inside torch while Python shuts down aborts the process
        self.store.set(f"note/{self.me.rank}", json.dumps({"kind": "done"}))


def watch(timeout: float) -> Watch:
    """Start to watch the other ranks."""
    global _watch
    _watch = Watch(launch(), timeout)
    _watch.start()
    return _watch


def fail_together(message: str, code: int) -> NoReturn:
    """End all ranks; one prints the message, with this rank's number unless all ranks have the same message."""
    kind = "interrupted" if code == Interrupted.exit_code and message == "interrupted" else "error"
    _end({"kind": kind, "message": message, "code": code})


def lose_together(error: Exception) -> NoReturn:
    """End all ranks after one did not answer; one prints which."""
    _end(_lost(str(error)))


def is_lost(error: BaseException) -> bool:
    """Return True if an error means that another rank did not answer."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def _lost(message: str) -> dict[str, Any]:
    return {"kind": "lost", "message": " ".join(message.split()), "code": UserError.exit_code}


def _end(note: dict[str, Any], me: Launch | None = None, store: Any = None) -> NoReturn:
    """Leave the note, and end this process after the failure has been reported."""
    me = me or launch()
    if not _ending.acquire(blocking=False):  # another thread is ending the process
        time.sleep(3600)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # sent by torchrun to the remaining ranks
            signal.signal(number, signal.SIG_IGN)
    code = note.get("code", UserError.exit_code)
    try:
        if store is None:
            store = _watch.store if _watch is not None else connect(me, 30.0)
        store.set(f"note/{me.rank}", json.dumps(note))
        deadline = time.monotonic() + NOTES_SECONDS
        if store.add("notes", 1) == 1:  # the first reports, the others wait for it
            keys = {rank: f"note/{rank}" for rank in range(me.size)}
            while not store.check([*keys.values()]) and time.monotonic() < deadline:
                time.sleep(0.05)
            notes = {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
            message, common_code = verdict(notes, me.size)
            _say(message)
            store.set("spoken", str(common_code))
            code = common_code
        else:
            while not store.check(["spoken"]) and time.monotonic() < deadline + 2 * POLL_SECONDS:
                time.sleep(0.05)
            code = int(store.get("spoken")) if store.check(["spoken"]) else code
    except Exception:  # the store is gone
        _say(f"rank {me.rank}: {note.get('message', 'the others are gone')}")
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(code)  # torch's threads and process groups would wait for the others forever


def _say(message: str) -> None:
    write_message(f"llmkit: error: {' '.join(message.split())}")


def verdict(notes: Mapping[int, Mapping[str, Any]], size: int) -> tuple[str, int]:
    """Turn the notes of some ranks into one message and an exit code.

    >>> verdict({1: {"kind": "error", "message": "no x", "code": 2}, 0: {"kind": "ended", "place": None}}, size=2)
    ('rank 1: no x', 2)
    """
    errors = {rank: note for rank, note in sorted(notes.items()) if note["kind"] == "error"}
    if errors:
        rank, note = next(iter(errors.items()))
        done = sum(other["kind"] == "done" for other in notes.values())
        common = len(errors) + done == size and len({other["message"] for other in errors.values()}) == 1
        return note["message"] if common else f"rank {rank}: {note['message']}", note["code"]
    gone = [rank for rank in range(size) if rank not in notes]
    if gone:
        return f"{_ranks(gone)}: no answer: killed, stopped or cut off; --resume continues", UserError.exit_code
    if all(note["kind"] == "interrupted" for note in notes.values()):
        return "interrupted", Interrupted.exit_code
    lost = [note for note in notes.values() if note["kind"] == "lost"]
    why = lost[0]["message"] if lost else "interrupted"
    places = {rank: note["place"] for rank, note in notes.items() if note["kind"] == "ended" and note["place"]}
    if lost and places:
        where = ", ".join(dict.fromkeys(places.values()))
        return f"{_ranks(sorted(places))}: the others waited in vain while it ran {where}", UserError.exit_code
    return f"the processes have lost contact: {why}", UserError.exit_code


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def whereabouts() -> str | None:
    """Locate the main thread in llmkit, such as "data/batches.py:88"; None if it waits for other ranks."""
    frame: Any = sys._current_frames().get(threading.main_thread().ident or 0)
    if _watch is not None and _watch._waiting_since is not None:
        return None
    location = None
    while frame is not None:
        name = frame.f_code.co_filename
        if "torch/distributed" in name:
            return None
        if location is None and name.startswith(PACKAGE):
            location = f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return location or "no place in llmkit"
