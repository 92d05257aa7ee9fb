"""Conversations written by a model that plays the person and the assistant (UltraChat, Ding et al. 2023, 2305.14233).

Each draft is a program (writing/scheduler.py): the source makes the person's first message, then the assistant and the
person answer each other. What is drawn by chance for a draft follows from (seed, index) alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random
from typing import Any

from llmkit.formats.conversations import Message, Part, message
from llmkit.generation.requests import REFUSED, Completion, split_thoughts
from llmkit.generation.sampler import Sampler
from llmkit.generation.tool_calls import ToolUse
from llmkit.writing.draft import Draft
from llmkit.writing.prompts import KINDS, TEXTS, read_message
from llmkit.writing.scheduler import Ask, Program

# of conversations, where --mix says nothing; a writer that was taught without system messages needs no guide
SHARES = {"guide": 1.0, "system": 0.2, "thinking": 0.0, "tools": 1.0, "refusals": 0.0}
ENDED = {"length": "cut answer", "tool_limit": "too many calls of tools", REFUSED: "refused by the server"}
UNKNOWN_TOOL = "call of a tool that is not there"
TOO_LONG = "longer than the context"
TRIES = 3  # of a request to a server whose reply is empty or broken, with one seed: another reply may come


class Fault(Exception):
    """Why a reply is of no use."""


@dataclass(frozen=True)
class Plan:
    """What chance has decided about a draft, without messages: `turns` of the person, which of `SHARES` it is among."""

    draft: Draft
    turns: int
    has: frozenset[str]
    chance: Random


@dataclass(frozen=True)
class Opening:
    """How a conversation begins: a draft whose messages end with the person's first.

    person    who talks, for the messages that follow
    passage   what the assistant is shown beside the messages
    """

    draft: Draft
    person: str = "somebody"
    passage: str | None = None


class Source:
    """Where prompts come from.

    count      of openings; None for no end
    is_given   whether the prompts are given, so that only answers are written
    """

    count: int | None = None
    is_given = False

    def open(self, writer: Writer, plan: Plan) -> Program[Opening]:
        """Make the person's first message."""
        raise NotImplementedError

    def make(self, writer: Writer, key: str) -> Program[Any]:
        """Make what several openings share."""
        raise NotImplementedError

    def fault(self, draft: Draft) -> str | None:
        """Return why a draft is too much like those kept before it, all of which are known by now."""
        return None

    def keep(self, draft: Draft) -> None:
        """Take note of a draft that is kept."""


class Writer:
    """Writes drafts.

    guide      labelling instructions, in the context of requests
    shares     of conversations with the guide in the assistant's context, a system message, thoughts, tools, and a
               request to be refused: see `SHARES`
    languages  of which each conversation has one; none leaves them to the writer
    turns      of the person, at most
    samples    answers to the person's last message
    """

    def __init__(
        self,
        sampler: Sampler,
        source: Source,
        guide: str,
        *,
        seed: int,
        shares: Mapping[str, float] = SHARES,
        languages: Sequence[str] = (),
        turns: int = 1,
        samples: int = 1,
        max_tokens: int | None = 1024,
    ) -> None:
        self.sampler, self.source, self.guide = sampler, source, guide.strip()
        self._seed, self._shares, self._languages = seed, {**SHARES, **shares}, tuple(languages)
        self._turns, self._samples, self._max_tokens = turns, samples, max_tokens
        self._no_tools = None if sampler.tools is None else sampler.tools.none()
        self._tries = TRIES if sampler.tokenizer is None else 1  # a folder says the same again

    def plan(self, index: int) -> Plan:
        """Draw what chance decides about a draft."""
        chance = Random(f"{self._seed} {index}")
        has = {name for name, share in self._shares.items() if chance.random() < share}
        kind = chance.choices(list(KINDS), [percentage for percentage, _ in KINDS.values()])[0]
        language = chance.choice(self._languages) if self._languages else None
        turns = 1 + chance.randrange(self._turns)
        seed = int.from_bytes(blake2b(f"{self._seed} {index}".encode(), digest_size=4).digest(), "little") >> 1
        if self.source.is_given:
            kind, language, turns, has = "", None, 1, has - {"system", "refusals"}
        steps, refusal = "thinking" in has, "refusals" in has
        draft = Draft(index, kind=kind, language=language, seed=seed, thinking=steps, refusal=refusal)
        return Plan(draft, turns, frozenset(has), chance)

    def write(self, index: int) -> Program[Draft]:
        """The program of a draft."""
        plan = self.plan(index)
        draft = plan.draft
        try:
            opening = yield from self.source.open(self, plan)
            draft = opening.draft
            messages, others = yield from self._converse(plan, opening)
        except Fault as fault:
            return replace(draft, messages=(), fault=str(fault))
        return replace(draft, messages=messages, others=others)

    def first_request(self, index: int) -> Ask:
        """Return what is asked first for a draft, or for what it shares with others."""
        ask = next(self.write(index))
        while isinstance(ask, str):  # later subtopics ask for those before them
            ask = next(self.source.make(self, ask))
        return ask

    def _converse(self, plan: Plan, opening: Opening) -> Program[tuple[tuple[Message, ...], tuple[Message, ...]]]:
        draft, messages = opening.draft, opening.draft.messages
        if "system" in plan.has:
            task = TEXTS["system"].format(topic=draft.topic or opening.person)
            system = read_message((yield from self.tell(task, draft.seed)))
            messages = (message("system", system), *messages)
        tools = self.sampler.tools if "tools" in plan.has else self._no_tools
        for turn in range(plan.turns):
            last = turn == plan.turns - 1
            instructions = self._instructions(plan, opening, messages)
            shown = (*([message("system", instructions)] if instructions else []), *_without_system(messages))
            samples = self._samples if last else 1
            completions = yield from self.ask(Ask(shown, self._max_tokens, draft.seed, samples, tools))
            answers = [self._answer(completion, draft.thinking) for completion in completions]
            good = [answer for answer in answers if isinstance(answer, Message)]
            if not good:
                raise next(answer for answer in answers if isinstance(answer, Fault))
            messages = (*messages, good[0])
            if last:
                return messages, tuple(good[1:])
            ask = Ask(self._as_person(opening.person, messages), self._max_tokens, draft.seed + turn)
            reply = _text_of((yield from self.ask(ask))[0])
            messages = (*messages, message("user", read_message(reply)))
        raise AssertionError("a conversation has a turn")

    def _instructions(self, plan: Plan, opening: Opening, messages: Sequence[Message]) -> str:
        """The system message that the assistant sees: the guide, and what else holds in this conversation."""
        guide = [self.guide] if "guide" in plan.has else []
        more = [messages[0].text] if messages[0].role == "system" else []
        more += [TEXTS["passage"].format(passage=opening.passage)] if opening.passage else []
        return "\n\n".join([*guide, *more, *([TEXTS["steps"]] if plan.draft.thinking else [])])

    def _as_person(self, person: str, messages: Sequence[Message]) -> list[Message]:
        """A conversation as the person sees it, who has the assistant's place."""
        swapped = {"user": "assistant", "assistant": "user"}
        seen = [
            message(swapped[turn.role], split_thoughts(turn.text)[1].strip())
            for turn in messages
            if turn.role != "system"
        ]
        task = TEXTS["guided"].format(guide=self.guide, task=TEXTS["next"].format(person=person))
        return [message("system", task), message("user", TEXTS["begins"]), *seen]

    def tell(self, task: str, seed: int) -> Program[str]:
        """Have the writer do a task beside the conversation, and return its text."""
        messages = [message("user", TEXTS["guided"].format(guide=self.guide, task=task))]
        (completion,) = yield from self.ask(Ask(messages, self._max_tokens, seed))
        return _text_of(completion)

    def ask(self, ask: Ask) -> Program[list[Completion]]:
        """Ask, again where nothing has come. Raises Fault for a prompt that does not fit, and where nothing comes."""
        ask = ask if ask.tools is not None else replace(ask, tools=self._no_tools)
        for _ in range(self._tries):
            completions: list[Completion] = yield ask
            if not completions:
                raise Fault(TOO_LONG)
            if any(each.text.strip() or each.tool_calls for each in completions):
                break
        return completions

    def _answer(self, completion: Completion, thinking: bool) -> Message | Fault:
        """Read the assistant's message from a completion."""
        if (ended := completion.finish_reason) not in ("stop", ""):
            return Fault(ENDED.get(ended, UNKNOWN_TOOL if ended in ("tool_calls", "no_tool") else f"ended by {ended}"))
        tools, pieces = self.sampler.tools, completion.parts or [Part("text", completion.text)]
        if completion.tool_calls and isinstance(tools, ToolUse):
            pieces = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
        written = "".join(part.text for part in pieces if part.kind == "text")
        thought, text = split_thoughts(written)
        thought = completion.thought.strip() or thought
        if not text.strip():
            return Fault("empty answer")
        if thinking and not thought:
            return Fault("answer without the steps before it")
        if thought:
            pieces = [replace(part, text=re.sub(r"(?s)\A.*</think>\s*", "", part.text)) for part in pieces]
        begins = f"<think>\n{thought}\n</think>\n\n" if thinking else ""
        if pieces[0].kind == "text":
            begins, pieces = begins + pieces[0].text.lstrip(), pieces[1:]
        if pieces and pieces[-1].kind == "text":
            pieces = [*pieces[:-1], replace(pieces[-1], text=pieces[-1].text.rstrip())]
        else:
            begins = begins if pieces else begins.rstrip()
        return Message("assistant", (*([Part("text", begins)] if begins else []), *pieces))


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[1:] if messages[0].role == "system" else messages


def _text_of(completion: Completion) -> str:
    """The text of a reply that is no answer. Raises Fault where it has none, and where it is cut."""
    text = split_thoughts(completion.text)[1].strip()
    if completion.finish_reason == REFUSED or not text:
        raise Fault(ENDED[REFUSED] if completion.finish_reason == REFUSED else "empty reply")
    if completion.finish_reason == "length":
        raise Fault("cut reply")
    return text
