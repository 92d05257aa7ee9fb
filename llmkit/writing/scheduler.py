"""Run many programs against one model; each continues as soon as its reply arrives.

A program is a generator that returns its result. It yields a `Request` with messages as the prompt and is sent the
completions, or it yields a `Shared` program, which runs only once, and is sent its result.

    def greet(name):
        (completion,) = yield Request([message("user", f"Greet {name}.")], max_tokens=64)
        return completion.text

    run_all(sampler, iter([("ada", greet("Ada")), ("bob", greet("Bob"))]), {}, on_result=print)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count as count_from
from typing import Any, TypeVar

from llmkit.generation.next_token import request_number
from llmkit.generation.requests import Request
from llmkit.generation.sampler import Sampler

T = TypeVar("T")


@dataclass(frozen=True)
class Shared:
    """A program whose result several others need; `key` identifies it."""

    key: str
    program: Program[Any]


Program = Generator[Request | Shared, Any, T]
Running = tuple[int, Any, Program[Any]]  # start order, name, program


def run_all(
    sampler: Sampler,
    programs: Iterator[tuple[Any, Program[Any]] | None],
    known: Mapping[str, Any],
    on_result: Callable[[Any, Any], object],
) -> None:
    """Run programs to completion; `on_result` gets the name (or key) and the result of each.

    Requests of programs that began earlier go first, so that few are unfinished at any time.

    programs  names and programs, read lazily; None if there is no other until one of these has ended
    known     results of shared programs that have ended, by key
    """
    results, waiting = dict(known), dict[str, list[Running]]()
    ready: list[tuple[int, int, Running, Request]] = []  # a heap
    under_way: dict[int, Running] = {}
    places = count_from()

    def step(running: Running, value: Any) -> None:
        place, name, program = running
        try:
            ask = program.send(value)
            while isinstance(ask, Shared) and ask.key in results:
                ask = program.send(results[ask.key])
        except StopIteration as end:
            if name in waiting:
                results[name] = end.value
            on_result(name, end.value)
            for other in waiting.pop(name, ()):
                step(other, end.value)
            return
        if isinstance(ask, Request):
            prompt = sampler.encode(ask.prompt, ask.tools)
            request = replace(ask, prompt=prompt, number=request_number(prompt), where=f"draft {name}")
            heappush(ready, (place, next(places), running, request))
        elif ask.key in waiting:
            waiting[ask.key].append(running)
        else:
            waiting[ask.key] = [running]
            step((place, ask.key, ask.program), None)

    def requests() -> Iterator[Request | None]:
        index, more = 0, True
        while more or ready or under_way:
            while more and not ready and (entry := next(programs, ())) is not None:
                more = entry != ()
                if entry:
                    step((next(places), *entry), None)
            if ready:
                _, _, under_way[index], request = heappop(ready)
                index += 1
                yield request
            elif under_way:
                yield None
            else:
                assert not more, "nothing is running, and no program begins"

    for _ in sampler.complete(requests(), on_done=lambda index, samples: step(under_way.pop(index), samples)):
        pass
