"""One thread that computes for all models of a server, and what passes between it and the event loop.

    engine = Engine([generator], asyncio.get_running_loop())
    async for index, event in engine.answers(generator.name, [Job(request)], timeout=600): ...

Requests join the running batch between two steps. A step is one token of every sequence of a model, so models take
turns by steps. What a step made goes to the event loop in one call, however many clients it is for.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import torch

from llmkit.display import write_message
from llmkit.errors import UserError
from llmkit.generation.generator import Generator, Pool
from llmkit.generation.next_token import likeliest
from llmkit.generation.requests import Completion, Request

TOOL_POLL = 0.005  # seconds between looks at tools while nothing else is to do
SCORED_AT_ONCE = 256  # positions whose logits (V each) are held at a time


@dataclass
class Piece:
    """What a step has added to a sample: text that is decided, and the tokens where the job asks for them."""

    sample: int
    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    sampled: Sequence[bool] = ()
    top_logprobs: Sequence[Sequence[tuple[int, float]]] = ()


@dataclass
class Called:
    """A tool is called (`seen` None), or has answered what the model sees as `seen`."""

    sample: int
    call: dict[str, Any]
    seen: str | None


@dataclass
class Scored:
    """Log-probabilities of a prompt's tokens but the first, under softmax(logits), and the likeliest ones there."""

    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]


@dataclass
class Finished:
    """The end of a job, with its samples."""

    completions: list[Completion]


@dataclass
class Failed:
    """The end of a job that has no result: the HTTP status and the reason."""

    status: int
    reason: str


Event = Piece | Called | Scored | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request on its way.

    stream      whether its text is told as it comes
    tokens      whether its tokens are, too
    scored      how many of the likeliest tokens are told at each position of the prompt; None does not score it
    max_tokens  0 where the prompt is scored alone
    """

    request: Request
    stream: bool = False
    tokens: bool = False
    scored: int | None = None
    generates: bool = True
    tell: Any = None  # takes (job, event), on the event loop
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    over: bool = False
    texts: dict[int, str] = field(default_factory=dict)  # by sample, not yet told
    told: Counter[int] = field(default_factory=Counter)  # tokens, by sample


class _Worker:
    """A model with the jobs that wait for a slot of it and those under way."""

    def __init__(self, generator: Generator, outbox: list[tuple[Job, Event]], send: Callable[[], None]) -> None:
        self.generator, self._outbox, self._send = generator, outbox, send
        self.waiting: deque[Job] = deque()
        self.open()

    def open(self) -> None:
        self.jobs: dict[int, Job] = {}  # by the pool's number
        self.pool = Pool(self.generator, self._arriving(), self._take_text, self._take_call)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.pool.running)

    def advance(self) -> None:
        """Let jobs in where slots are free, make one token of each sequence, and tell of both."""
        with self.generator.computing():
            self.pool.advance()
        self._tell_pieces()
        for index in [index for index, samples in self.pool.done.items() if None not in samples]:
            job, completions = self.jobs.pop(index), [one for one in self.pool.done.pop(index) if one is not None]
            for sample, completion in enumerate(completions):
                self._tell_piece(job, sample, completion)
            self._outbox.append((job, Finished(completions)))

    def fail(self, reason: str) -> None:
        """Give up all that is under way, and begin again with what waits."""
        self._outbox += ((job, Failed(500, reason)) for job in self.jobs.values())
        self.pool.close()
        self.open()

    def cancel(self, job: Job) -> None:
        with suppress(ValueError):
            self.waiting.remove(job)
        for index in [index for index, other in self.jobs.items() if other is job]:
            del self.jobs[index]
            self.pool.cancel(index)

    def _tell_pieces(self) -> None:
        for sequence in self.pool.running:
            self._tell_piece(self.jobs[sequence.index], sequence.sample, sequence)

    def _arriving(self) -> Iterator[Request | None]:
        number = 0
        while True:
            if not self.waiting:
                yield None
                continue
            self._tell_pieces()  # first tokens, which do not wait for the prompts of others
            self._send()
            job = self.waiting.popleft()
            if job.scored is not None:
                self._outbox.append((job, self._score(job.request.prompt, job.scored)))
            if not job.generates:
                self._outbox.append((job, Finished([])))
                yield None  # others have a step before the next one
                continue
            self.jobs[number] = job
            number += 1
            yield job.request

    def _score(self, prompt: Sequence[int], top: int) -> Scored:
        logprobs: list[float] = []
        top_logprobs: list[list[tuple[int, float]]] = []
        for start, logits_NV in self.generator.decoder.logits_in_pieces(list(prompt), SCORED_AT_ONCE):
            following = torch.tensor(prompt[start + 1 : start + 1 + len(logits_NV)], device=logits_NV.device)
            rows_NV = torch.log_softmax(logits_NV[: len(following)].float(), -1)
            logprobs += rows_NV.gather(-1, following.unsqueeze(-1)).squeeze(-1).tolist()
            if top:
                top_logprobs += likeliest(logits_NV[: len(following)], top, 1.0, self.generator.tokenizer.vocab_size)
        return Scored(logprobs, top_logprobs)

    def _take_text(self, index: int, sample: int, text: str) -> None:
        job = self.jobs[index]
        if job.first_token is None:
            job.first_token = time.monotonic()
        if job.stream:
            job.texts[sample] = job.texts.get(sample, "") + text

    def _take_call(self, index: int, sample: int, call: Mapping[str, Any], seen: str | None) -> None:
        job = self.jobs[index]
        if job.stream:
            if text := job.texts.pop(sample, ""):
                self._outbox.append((job, Piece(sample, text)))
            self._outbox.append((job, Called(sample, dict(call), seen)))

    def _tell_piece(self, job: Job, sample: int, made: Any) -> None:
        if not job.stream:
            return
        text, start, end = job.texts.pop(sample, ""), job.told[sample], len(made.token_ids)
        job.told[sample] = end
        if job.tokens and end > start:
            new = slice(start, end)
            columns = made.token_ids[new], made.logprobs[new], made.sampled[new], made.top_logprobs[new]
            self._outbox.append((job, Piece(sample, text, columns[0], columns[1], columns[2], columns[3])))
        elif text:
            self._outbox.append((job, Piece(sample, text)))


class Engine:
    """The models of a server, by name. Made and used on the thread of the event loop."""

    def __init__(self, generators: Mapping[str, Generator], loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._inbox = loop, SimpleQueue[tuple[str, str, Job | None]]()
        self._outbox: list[tuple[Job, Event]] = []
        self._workers = {name: _Worker(generator, self._outbox, self._send) for name, generator in generators.items()}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answers(self, model: str, jobs: Sequence[Job], timeout: float) -> AsyncGenerator[tuple[int, Event], None]:
        """Have jobs done together; what becomes of each, by its place among them, until all are finished.

        The jobs are cancelled when this is closed, and after `timeout` seconds, which is told as a failure.
        """
        events: asyncio.Queue[tuple[Job | None, Event]] = asyncio.Queue()
        place, left = {job: index for index, job in enumerate(jobs)}, len(jobs)
        late = Failed(504, f"no whole answer within {timeout:g} s; ask for fewer tokens, or start the server with a "
                      "longer --timeout")  # fmt: skip
        timer = self._loop.call_later(timeout, events.put_nowait, (None, late))
        try:
            for job in jobs:
                job.tell = events.put_nowait
                self._inbox.put(("add", model, job))
            while left:
                job, event = await events.get()
                if isinstance(event, (Finished, Failed)) and job is not None:
                    job.over = True
                    left -= 1
                yield (0 if job is None else place[job]), event
                if isinstance(event, Failed):
                    return
        finally:
            timer.cancel()
            for job in jobs:
                if not job.over:
                    self._inbox.put(("cancel", model, job))

    def close(self) -> None:
        """End the thread after its step."""
        self._inbox.put(("stop", "", None))
        self._thread.join()

    # ---- on the engine's thread

    def _work(self) -> None:
        while self._receive():
            for worker in self._workers.values():
                if not worker.busy and worker.pool.idle:
                    continue
                try:
                    worker.advance()
                except UserError as error:  # weights that are no numbers, a function of the user's that fails
                    worker.fail(str(error))
                except Exception:
                    write_message(traceback.format_exc().rstrip("\n"))
                    worker.fail("a bug in llmkit; its lines are on the server's stderr")
            self._send()

    def _send(self) -> None:
        """Pass to the event loop what is to be told."""
        if self._outbox:
            told = self._outbox[:]
            self._outbox.clear()
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_tell, told)

    def _receive(self) -> bool:
        """Take what the event loop has sent, and wait for it where there is nothing else to do; False to stop."""
        busy = any(worker.busy for worker in self._workers.values())
        idle = all(worker.pool.idle for worker in self._workers.values())
        timeout = 0 if busy else None if idle else TOOL_POLL
        while True:
            try:
                kind, model, job = self._inbox.get(timeout != 0, timeout or None)
            except Empty:
                return True
            timeout = 0
            if kind == "stop":
                for worker in self._workers.values():
                    worker.pool.close()
                return False
            assert job is not None
            if kind == "add":
                self._workers[model].waiting.append(job)
            else:
                self._workers[model].cancel(job)


def _tell(told: Sequence[tuple[Job, Event]]) -> None:
    for job, event in told:
        job.tell((job, event))
