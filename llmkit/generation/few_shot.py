"""Prompts that make a base model answer: examples in front of a question.

A base model goes on with the document that it sees. A document of questions and answers is gone on with an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, read_conversation
from llmkit.io.jsonl import read_jsonl

ASKED, ANSWERED = "Question: ", "Answer: "
STOP = "\n" + ASKED.rstrip()  # where the model would ask the next question itself

# Lin et al. 2023 (arXiv 2312.01552): a few answers in the style of an assistant align a base model about as well as
# tuning does; what they teach is the form.
AS_ASSISTANT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How do I keep bread fresh?", "Wrap it in a cloth or paper bag, and freeze what you will not eat in two days."),
    ("What is 12 times 3?", "12 times 3 is 36."),
    ("Who will win the next election?", "I do not know. Nobody can say that before the votes are counted."),
    ("Say thank you in Spanish.", "Gracias."),
)


def load_shots(path: str | None, as_assistant: bool) -> list[tuple[str, str]]:
    """The examples in a file, or the built-in ones, or none."""
    if path is None:
        return list(AS_ASSISTANT) if as_assistant else []
    conversations = read_jsonl([path], None, read_conversation)
    return shots_of([one for one in conversations if not one.rejected], path)


def shots_of(conversations: Sequence[Conversation], path: str) -> list[tuple[str, str]]:
    """The first question and its answer of each conversation. Raises UserError for one that has none."""
    shots = []
    for one in conversations:
        roles = [turn.role for turn in one.messages]
        if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
            raise UserError(f"{one.where}: expected a question and an answer")
        asked = roles.index("user")
        shots.append((one.messages[asked].text, one.messages[roles.index("assistant", asked)].text))
    if not shots:
        raise UserError(f"{path}: expected examples, found none")
    return shots


def with_shots(shots: Sequence[tuple[str, str]], question: str) -> str:
    """A document of questions and answers that ends where the answer to `question` begins."""
    pairs = "".join(f"{ASKED}{asked}\n{ANSWERED}{answered}\n\n" for asked, answered in shots)
    return f"{pairs}{ASKED}{question}\n{ANSWERED.rstrip()}"
