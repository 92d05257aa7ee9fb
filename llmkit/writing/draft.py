"""A draft: a generated conversation, before it is kept or dropped.

draft = Draft(3, (message("user", "2 + 2?"), message("assistant", "4")), kind="closed QA", answer="4")
draft.as_line(guide="9f86d081", writer="qwen")  # what sft reads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.formats.conversations import Message, as_record, read_messages
from llmkit.io.records import PROMPT_FIELDS, THOUGHTS, Row, with_made

SAID = ("completion", "response", "output")  # fields of a record that the new answer replaces


@dataclass(frozen=True)
class Draft:
    """A generated conversation.

    index       number of the draft; seed, index and replies determine it
    messages    end with the assistant's answer; empty if there is a `fault`
    others      alternative answers to the last message
    kind        kind of task, one of `prompts.KINDS`; "" if unknown
    topic       path in the tree of topics, or the topic of the document or record
    language    requested language; None for any
    answer      reference answer; None if there is none to check
    refusal     whether a refusal is right
    thinking    whether thinking in <think> was requested before the answer
    seed        of its random numbers
    fault       why the replies are not a conversation, or None
    record      the given record that it answers; its other fields pass through
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
        """Text of the first user message."""
        return next((message.text for message in self.messages if message.role == "user"), "")

    def versions(self) -> list[Draft]:
        """Return a draft per answer: this one's, then the others."""
        versions = [self.messages, *((*self.messages[:-1], last) for last in self.others)]
        return [replace(self, messages=messages, others=()) for messages in versions]

    def as_line(self, **made: Any) -> dict[str, Any]:
        """Return a line of the output, which `sft` reads; `made` are further fields, such as the writer and scores."""
        gone = (*PROMPT_FIELDS, *THOUGHTS, *SAID)
        rest = {name: value for name, value in self.record.items() if name not in gone}
        fields = {"messages": as_record(self.messages), "topic": self.topic, "kind": self.kind, **made}
        return with_made(rest, {**fields, "seed": self.seed})

    def as_state(self) -> dict[str, Any]:
        """Return all fields as JSON, for `read_draft`."""
        return {**vars(self), "messages": as_record(self.messages), "others": as_record(self.others)}


def read_draft(state: Mapping[str, Any]) -> Draft:
    """Read what `Draft.as_state` wrote."""
    row = Row({}, "draft", 0)
    messages, others = (
        tuple(read_messages(row, [entry])[0] for entry in state.get(name, ())) for name in ("messages", "others")
    )
    return Draft(**{**state, "messages": messages, "others": others})
