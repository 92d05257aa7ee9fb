"""A draft: a conversation that a model has written, before it is kept or dropped.

draft = Draft(3, (message("user", "2 + 2?"), message("assistant", "4")), kind="closed QA", answer="4")
draft.as_line(guide="9f86d081", writer="qwen")  # what sft reads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.formats.conversations import Message, as_record, read_messages
from llmkit.io.records import PROMPT_FIELDS, THOUGHTS, Row, with_made

SAID = ("completion", "response", "output")  # of a record: what the new answer takes the place of


@dataclass(frozen=True)
class Draft:
    """A conversation that a model has written.

    index       of the draft: the same seed, index and replies make the same draft
    messages    end with the assistant's answer; empty where there is a `fault`
    others      further answers in the place of the last message
    kind        of task, one of `prompts.KINDS`; empty where nobody knows
    topic       path in the tree of topics, or what the document or the record names
    language    in which it was to be written; None for any
    answer      short answer that a right one agrees with; None where there is none to check
    refusal     whether a refusal is right
    thinking    whether steps in <think> were asked for before the answer
    seed        of its random numbers
    fault       why the replies make no conversation; None where they do
    record      given one that was answered; its further fields pass through
    """

    index: int
    messages: tuple[Message, ...] = ()
    others: tuple[Message, ...] = ()
    kind: str = ""
    topic: str = ""
    language: str | None = None
    answer: str | None = None
    refusal: bool = False
    thinking: bool = False
    seed: int = 0
    fault: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Text of the person's first message."""
        return next((message.text for message in self.messages if message.role == "user"), "")

    def versions(self) -> list[Draft]:
        """Return a draft for each answer: this one's, then the others."""
        said = [self.messages, *((*self.messages[:-1], last) for last in self.others)]
        return [replace(self, messages=messages, others=()) for messages in said]

    def as_line(self, **made: Any) -> dict[str, Any]:
        """Write a line of the output, which `sft` reads; `made` are further fields, such as the writer and scores."""
        gone = (*PROMPT_FIELDS, *THOUGHTS, *SAID)
        rest = {name: value for name, value in self.record.items() if name not in gone}
        fields = {"messages": as_record(self.messages), "topic": self.topic, "kind": self.kind, **made}
        return with_made(rest, {**fields, "seed": self.seed})

    def as_state(self) -> dict[str, Any]:
        """Write all of it as JSON, for `read_draft`."""
        return {**vars(self), "messages": as_record(self.messages), "others": as_record(self.others)}


def read_draft(state: Mapping[str, Any]) -> Draft:
    """Read what `Draft.as_state` wrote."""
    row = Row({}, "draft", 0)
    messages, others = (
        tuple(read_messages(row, [entry])[0] for entry in state.get(name, ())) for name in ("messages", "others")
    )
    return Draft(**{**state, "messages": messages, "others": others})
