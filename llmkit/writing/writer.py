"""Conversations by a model that plays both user and assistant (UltraChat, Ding et al. 2023, arXiv 2305.14233).

Each draft is a program (writing/scheduler.py): the source makes the first user message, then assistant and user answer
each other. Random choices of a draft depend only on (seed, index).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Any

from llmkit.formats.conversations import Message, Part, message
from llmkit.generation.requests import REFUSED, Completion, Request, split_thoughts
from llmkit.generation.sampler import Sampler
from llmkit.generation.tool_calls import Functions, ToolUse
from llmkit.writing.draft import Draft
from llmkit.writing.prompts import KINDS, TEXTS, read_message
from llmkit.writing.scheduler import Program, Shared

# defaults of --mix: shares of conversations with the guide in the assistant's context, a system message, thinking,
# tools, and a request to be refused
SHARES = {"guide": 1.0, "system": 0.2, "thinking": 0.0, "tools": 1.0, "refusals": 0.0}
ENDED = {
    "length": "cut answer",
    "tool_limit": "too many calls of tools",
    **dict.fromkeys(("tool_calls", "no_tool"), "call of an unknown tool"),
    REFUSED: "refused by the server",
}
TOO_LONG = "longer than the context"
TRIES = 3  # of a request to a server with an empty reply: the same seed may give another


class Fault(Exception):
    """Why a reply is unusable."""


@dataclass(frozen=True)
class Plan:
    """Random choices of a draft, and those of its source.

    draft     without messages at first, then with those up to the first user message
    turns     number of user messages
    has       which of `SHARES` apply to the draft
    chance    random generator for the source
    person    description of the user, for the following messages
    passage   shown to the assistant in addition to the messages
    """

    draft: Draft
    turns: int
    has: frozenset[str]
    chance: Random
    person: str = "somebody"
    passage: str | None = None

    def opening(
        self, messages: Sequence[Message], *, person: str = "somebody", passage: str | None = None, **fields: Any
    ) -> Plan:
        """Return the plan with these first messages and fields of the draft."""
        draft = replace(self.draft, messages=tuple(messages), **fields)
        return replace(self, draft=draft, person=person, passage=passage)


class Source:
    """A source of prompts.

    count     number of prompts; None if unlimited
    is_given  whether prompts are given, so that only answers are written
    """

    count: int | None = None
    is_given = False

    def open(self, writer: Writer, plan: Plan) -> Program[Plan]:
        """Make the first user message."""
        raise NotImplementedError

    def fault(self, draft: Draft) -> str | None:
        """Return why a draft is too similar to the drafts kept before it, or None."""
        return None

    def keep(self, draft: Draft) -> None:
        """Record a kept draft."""


@dataclass(frozen=True)
class Writer:
    """Writes drafts.

    guide      labelling instructions, in the context of requests
    shares     replace `SHARES`
    languages  one is chosen per conversation; empty: the writer chooses
    turns      maximum of user messages
    samples    answers to the last user message
    """

    sampler: Sampler
    source: Source
    guide: str
    _: KW_ONLY
    seed: int
    shares: Mapping[str, float] = field(default_factory=dict)
    languages: Sequence[str] = ()
    turns: int = 1
    samples: int = 1
    max_tokens: int | None = 1024

    @cached_property
    def _no_tools(self) -> Functions | None:
        return None if self.sampler.tools is None else self.sampler.tools.none()

    def plan(self, index: int) -> Plan:
        """Make the random choices of a draft."""
        chance = Random(f"{self.seed} {index}")
        has = {name for name, share in {**SHARES, **self.shares}.items() if chance.random() < share}
        kind = chance.choices(list(KINDS), [percentage for percentage, _ in KINDS.values()])[0]
        language = chance.choice(self.languages) if self.languages else None
        turns = 1 + chance.randrange(self.turns)
        seed = int.from_bytes(blake2b(f"{self.seed} {index}".encode(), digest_size=4).digest(), "little") >> 1
        if self.source.is_given:
            kind, language, turns, has = "", None, 1, has - {"system", "refusals"}
        steps, refusal = "thinking" in has, "refusals" in has
        draft = Draft(index, kind=kind, language=language, seed=seed, thinking=steps, refusal=refusal)
        return Plan(draft, turns, frozenset(has), chance)

    def write(self, index: int) -> Program[Draft]:
        """Return the program of a draft."""
        plan = self.plan(index)
        try:
            plan = yield from self.source.open(self, plan)
            return (yield from self._converse(plan))
        except Fault as fault:
            return replace(plan.draft, messages=(), fault=str(fault))

    def first_request(self, index: int) -> Request:
        """Return the first request of a draft, or of a shared program that it needs."""
        ask = next(self.write(index))
        while isinstance(ask, Shared):  # later subtopics need earlier ones
            ask = next(ask.program)
        return ask

    def _converse(self, plan: Plan) -> Program[Draft]:
        """Write the conversation after the first user message."""
        draft, turns, good = plan.draft, [*plan.draft.messages], list[Message]()
        system = [turns.pop(0)] if turns[0].role == "system" else []
        if "system" in plan.has:
            text = yield from self.tell(TEXTS["system"].format(topic=draft.topic or plan.person), draft.seed)
            system = [message("system", read_message(text))]
        instructions = [self.guide] if "guide" in plan.has else []
        instructions += [each.text for each in system]
        instructions += [TEXTS["passage"].format(passage=plan.passage)] if plan.passage else []
        instructions += [TEXTS["steps"]] if draft.thinking else []
        shown = [message("system", text)] if (text := "\n\n".join(instructions)) else []
        tools = self.sampler.tools if "tools" in plan.has else self._no_tools
        for turn in range(plan.turns):
            is_last = turn == plan.turns - 1
            samples = self.samples if is_last else 1
            request = Request([*shown, *turns], samples, self.max_tokens, draft.seed, tools=tools)
            completions = yield from self._ask(request)
            answers = [self._answer(completion, draft.thinking) for completion in completions]
            good = [answer for answer in answers if isinstance(answer, Message)]
            if not good:
                raise next(answer for answer in answers if isinstance(answer, Fault))
            turns.append(good[0])
            if not is_last:  # the user, in the assistant's role, sees no thinking
                swapped = {"user": "assistant", "assistant": "user"}
                seen = [message(swapped[each.role], split_thoughts(each.text)[1].strip()) for each in turns]
                task = TEXTS["next"].format(person=plan.person)
                text = yield from self.tell(task, draft.seed + turn, [message("user", TEXTS["begins"]), *seen])
                turns.append(message("user", read_message(text)))
        return replace(draft, messages=(*system, *turns), others=tuple(good[1:]))

    def tell(self, task: str, seed: int, seen: Sequence[Message] = ()) -> Program[str]:
        """Have the writer do a task, with messages `seen` as context, and return the text of its reply.

        Raises Fault if the reply is empty or truncated.
        """
        prompt = message("system" if seen else "user", TEXTS["guided"].format(guide=self.guide, task=task))
        (completion,) = yield from self._ask(Request([prompt, *seen], 1, self.max_tokens, seed, tools=self._no_tools))
        text = split_thoughts(completion.text)[1].strip()
        if completion.finish_reason == REFUSED:
            raise Fault(ENDED[REFUSED])
        if not text or completion.finish_reason == "length":
            raise Fault("cut reply" if text else "empty reply")
        return text

    def _ask(self, request: Request) -> Program[list[Completion]]:
        """Send a request, again if the reply is empty. Raises Fault if the prompt does not fit."""
        for _ in range(TRIES if self.sampler.tokenizer is None else 1):  # a local model would repeat itself
            completions: list[Completion] = yield request
            if not completions:
                raise Fault(TOO_LONG)
            if any(each.text.strip() or each.tool_calls for each in completions):
                break
        return completions

    def _answer(self, completion: Completion, thinking: bool) -> Message | Fault:
        """Read the assistant's message from a completion."""
        if (ended := completion.finish_reason) not in ("stop", ""):
            return Fault(ENDED.get(ended, f"ended by {ended}"))
        tools, pieces = self.sampler.tools, completion.parts or [Part("text", completion.text)]
        if completion.tool_calls and isinstance(tools, ToolUse):
            pieces = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
        thought, text = split_thoughts("".join(part.text for part in pieces if part.kind == "text"))
        thought = completion.thought.strip() or thought
        if not text.strip():
            return Fault("empty answer")
        if thinking and not thought:
            return Fault("answer without thinking before it")
        if thought:
            pieces = [replace(part, text=re.sub(r"(?s)\A.*</think>\s*", "", part.text)) for part in pieces]
        first, *rest = pieces if pieces[0].kind == "text" else [Part("text", ""), *pieces]
        begins = f"<think>\n{thought}\n</think>\n\n" if thinking else ""
        parts = [Part("text", begins + first.text.lstrip()), *rest]
        if parts[-1].kind == "text":
            parts[-1] = Part("text", parts[-1].text.rstrip())
        return Message("assistant", tuple(parts if parts[0].text else parts[1:]))
