"""The thread that runs all models of a server, and its queues to and from the event loop.

    engine = Engine({"chat": generator}, asyncio.get_running_loop())
    async for job, delta in engine.run("chat", [Job(request)], timeout=600): ...

Continuous batching: requests join the running batch between two steps. A step generates one token of every sequence
of a model; models take turns. The results of a step are passed to the event loop in one call, for all clients.
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
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from llmkit.display import write_message
from llmkit.errors import UserError
from llmkit.generation.generator import Generator, Pool
from llmkit.generation.next_token import likeliest
from llmkit.generation.requests import Completion, Request
from llmkit.serving.protocol import ApiError

TOOL_POLL = 0.005  # seconds between checks of running tools when there is nothing to compute
BEYOND_LIMITS = "'response_format' exceeds the limits of llguidance; use fewer alternatives or simpler patterns"
SCORE_POSITIONS = 256  # prompt positions whose logits (V each) are in memory at a time


@dataclass
class Delta:
    """What a step adds to a sample: text, and tokens if requested; or a tool call, or its result.

    sample  index within the job; None for the prompt, whose first token has no log-probability
    call    a tool call; `result` is its result as the model sees it, or None when the call starts
    """

    sample: int | None
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float | None] = ()
    sampled: Sequence[bool] = ()
    top_logprobs: Sequence[Sequence[tuple[int, float]] | None] = ()
    call: Mapping[str, Any] | None = None
    result: str | None = None


@dataclass(eq=False)
class Job:
    """A request to the engine.

    stream  send text while it is generated
    tokens  also send tokens
    echo    the prompt, repeated before each sample
    score   add the prompt's tokens to `echo`, with log-probabilities and `request.top_logprobs` alternatives

    The engine thread sets `completions`, the event loop sets `events`.
    """

    request: Request
    stream: bool = False
    tokens: bool = False
    echo: Delta | None = None
    score: bool = False
    completions: list[Completion] = field(default_factory=list)
    events: Any = None  # asyncio.Queue
    created: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    unsent: dict[int, str] = field(default_factory=dict)  # text by sample
    sent: Counter[int] = field(default_factory=Counter)  # tokens by sample


Event = tuple[Job | None, Delta | ApiError | None]  # None ends a job


class _Worker:
    """A model, its waiting jobs, and its running jobs by their number in the pool."""

    def __init__(self, generator: Generator, outbox: list[Event], deliver: Callable[[], None]) -> None:
        self.generator, self._outbox, self._deliver = generator, outbox, deliver
        self.waiting: deque[Job] = deque()
        self.reset()

    def reset(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.pool = Pool(self.generator, self._arrivals(), self._take_text, self._take_call)

    @property
    def busy(self) -> bool:
        return self.pool.busy or (bool(self.waiting) and self.pool.may_begin)

    def step(self) -> None:
        """Start jobs in free slots, and generate one token of each sequence."""
        with self.generator.computing():
            self.pool.advance()
        self._send_running()
        for index in [index for index, samples in self.pool.done.items() if None not in samples]:
            job = self.jobs.pop(index)
            job.completions = [completion for completion in self.pool.done.pop(index) if completion is not None]
            for sample, completion in enumerate(job.completions):
                self._send(job, sample, completion)
            is_cut = any(completion.finish_reason == "error" for completion in job.completions)
            self._outbox.append((job, ApiError(BEYOND_LIMITS, "response_format") if is_cut else None))

    def fail(self, reason: str) -> None:
        """Fail the running jobs; the waiting ones start in a new pool."""
        self._outbox += ((job, ApiError(reason, status=500)) for job in self.jobs.values())
        self.pool.close()
        self.reset()

    def cancel(self, job: Job) -> None:
        with suppress(ValueError):
            self.waiting.remove(job)
        for index in [index for index, other in self.jobs.items() if other is job]:
            del self.jobs[index]
            self.pool.cancel(index)

    def _arrivals(self) -> Iterator[Request | None]:
        number = 0
        while True:
            if not self.waiting:
                yield None
                continue
            self._send_running()  # so that first tokens need not wait for other prompts
            self._deliver()
            job = self.jobs[number] = self.waiting.popleft()  # from here on an error fails this job
            if job.echo is not None:
                if job.score:
                    self._score(job.echo, job.request)
                if job.stream:
                    self._outbox.append((job, job.echo))
            if job.request.max_tokens == 0:
                del self.jobs[number]
                job.completions = [Completion("", [], "length", [], [], [], []) for _ in range(job.request.samples)]
                self._outbox.append((job, None))
                yield None  # let other jobs run a step before the next prompt
                continue
            number += 1
            yield job.request

    def _score(self, echo: Delta, request: Request) -> None:
        """Add a prompt's tokens, their log-probabilities under softmax(logits), and the top alternatives."""
        prompt, top = list(request.prompt), request.top_logprobs
        logprobs: list[float | None] = [None]
        top_logprobs: list[list[tuple[int, float]] | None] = [None]
        for start, logits_NV in self.generator.decoder.logits_in_pieces(prompt, SCORE_POSITIONS):
            following = torch.tensor(prompt[start + 1 : start + 1 + len(logits_NV)], device=logits_NV.device)
            rows_NV = torch.log_softmax(logits_NV[: len(following)].float(), -1)
            logprobs += rows_NV.gather(-1, following.unsqueeze(-1)).squeeze(-1).tolist()
            if top:
                top_logprobs += likeliest(logits_NV[: len(following)], top, 1.0, self.generator.tokenizer.vocab_size)
        echo.token_ids, echo.logprobs, echo.top_logprobs = prompt, logprobs, top_logprobs

    def _take_text(self, index: int, sample: int, text: str) -> None:
        job = self.jobs[index]
        job.first_token = job.first_token or time.monotonic()
        if job.stream:
            job.unsent[sample] = job.unsent.get(sample, "") + text

    def _take_call(self, index: int, sample: int, call: Mapping[str, Any], seen: str | None) -> None:
        job = self.jobs[index]
        if job.stream:
            if text := job.unsent.pop(sample, ""):
                self._outbox.append((job, Delta(sample, text)))
            self._outbox.append((job, Delta(sample, call=dict(call), result=seen)))

    def _send_running(self) -> None:
        for sequence in self.pool.running:
            self._send(self.jobs[sequence.index], sequence.sample, sequence)

    def _send(self, job: Job, sample: int, sequence: Any) -> None:
        """Send the new text and tokens of a sequence or completion to its stream."""
        if not job.stream:
            return
        delta, new = Delta(sample, job.unsent.pop(sample, "")), slice(job.sent[sample], len(sequence.token_ids))
        job.sent[sample] = new.stop
        if job.tokens:
            delta.token_ids, delta.logprobs = sequence.token_ids[new], sequence.logprobs[new]
            delta.sampled, delta.top_logprobs = sequence.sampled[new], sequence.top_logprobs[new]
        if delta.text or delta.token_ids:
            self._outbox.append((job, delta))


class Engine:
    """The models of a server, by name. Call its public methods only from the event loop's thread."""

    def __init__(self, generators: Mapping[str, Generator], loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._inbox = loop, SimpleQueue[Callable[[], object] | None]()  # None ends the thread
        self._outbox: list[Event] = []
        self._workers = {
            name: _Worker(generator, self._outbox, self._deliver) for name, generator in generators.items()
        }
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def run(
        self, model: str, jobs: Sequence[Job], timeout: float
    ) -> AsyncGenerator[tuple[Job, Delta | None], None]:
        """Yield the events of jobs: the deltas of streams, and None at the end of each job.

        Closing the generator cancels the jobs. Raises ApiError if one fails, or after `timeout` seconds.
        """
        worker, events, running = self._workers[model], asyncio.Queue[Event](), set(jobs)
        late = ApiError(
            f"no complete answer within {timeout:g} s; request fewer tokens, or restart serve with a longer --timeout",
            status=504,
        )
        timer = self._loop.call_later(timeout, events.put_nowait, (None, late))
        try:
            for job in jobs:
                job.events = events
                self._inbox.put(partial(worker.waiting.append, job))
            while running:
                job, event = await events.get()
                if isinstance(event, ApiError):
                    raise event
                assert job is not None
                if event is None:
                    running.remove(job)
                yield job, event
        finally:
            timer.cancel()
            for job in running:
                self._inbox.put(partial(worker.cancel, job))

    def close(self) -> None:
        """Stop the thread after the current step."""
        self._inbox.put(None)
        self._thread.join()

    # ---- on the engine's thread

    def _work(self) -> None:
        while self._receive():
            for worker in [worker for worker in self._workers.values() if worker.waiting or not worker.pool.idle]:
                try:
                    worker.step()
                except UserError as error:  # NaN in the weights, or a failed user function
                    worker.fail(str(error))
                except Exception:
                    write_message(traceback.format_exc().rstrip("\n"))
                    worker.fail("internal error; the traceback is on the server's stderr")
            self._deliver()
        for worker in self._workers.values():
            worker.pool.close()

    def _deliver(self) -> None:
        """Pass new events to the event loop."""
        if self._outbox:
            events = self._outbox[:]
            self._outbox.clear()

            def put() -> None:
                for job, event in events:
                    if job is not None:
                        job.events.put_nowait((job, event))

            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(put)

    def _receive(self) -> bool:
        """Run actions from the event loop; wait for one if there is nothing to compute. Return False to stop."""
        busy = any(worker.busy for worker in self._workers.values())
        idle = all(worker.pool.idle for worker in self._workers.values())
        timeout = 0 if busy else None if idle else TOOL_POLL
        while True:
            try:
                action = self._inbox.get(timeout != 0, timeout or None)
            except Empty:
                return True
            if action is None:
                return False
            action()
            timeout = 0
