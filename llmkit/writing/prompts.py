"""What the writer of conversations is asked, and how its lists are read."""

from __future__ import annotations

import re

# InstructGPT's kinds of task: their percentages of its prompts (Ouyang et al. 2022, arXiv 2203.02155, table 1), and
# what the person wants
KINDS = {
    "generation": (45.6, "a text of some form to be written"),
    "open QA": (12.4, "a question that general knowledge answers"),
    "brainstorming": (11.2, "several ideas or suggestions"),
    "chat": (8.4, "a conversation about it, as with a knowledgeable friend"),
    "rewrite": (6.6, "a text to be changed in style, tone, language or form; the message holds the text"),
    "summarization": (4.2, "a summary; the message holds the text"),
    "classification": (3.5, "things to be sorted into classes; the message names the classes and holds the things"),
    "other": (
        3.5,
        "anything but a text, an answer, ideas, a summary or a class: a plan, code, a correction, a calculation",
    ),
    "closed QA": (2.6, "a question about a text; the message holds the text, which has the answer"),
    "extraction": (1.9, "facts to be taken out of a text; the message holds the text and says which"),
}
GUIDED = """\
These are the instructions by which an assistant is to answer:
<instructions>
{guide}
</instructions>

{task}"""
SUBTOPICS = """\
List {count} narrower topics within the topic below that people bring to such an assistant, as unlike one another as \
can be, one a line and nothing else.

Topic: {topic}"""
NOT_THESE = "\nNot these, which are there already: "
PEOPLE = """\
List {count} people who talk to such an assistant about the topic below, unlike one another in age, work, knowledge \
and purpose, each in at most twelve words, one a line and nothing else.

Topic: {topic}"""
OPENING = """\
Write the first message of this person to the assistant, word for word, and nothing else.

Person: {person}
Topic: {topic}
Wanted: {wanted}"""
NEW_TASK = """\
These are messages to an assistant:
{examples}

Write another one, word for word and nothing else, that is unlike all of these.
Wanted: {wanted}"""
TO_REFUSE = "\nThe message asks for something that the instructions tell the assistant to refuse."
IN_LANGUAGE = "\nLanguage of the message: {language}"
NEXT = """\
You are this person, who talks to the assistant: {person}
Write the person's next message, word for word and nothing else: a question that follows, a correction, a doubt or \
another wish. The messages below are the conversation so far, as the person sees it."""
BEGINS = "(The conversation begins.)"
SYSTEM = """\
Write the system message by which somebody sets up such an assistant for the purpose below: its task, tone and limits, \
in at most four sentences, and nothing else.

Purpose: {topic}"""
STEPS = "Before each answer write the steps that lead to it between <think> and </think>; then write the answer."
PASSAGE = "A passage that the person does not see has the answer:\n<passage>\n{passage}\n</passage>"

_ITEM = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.):])\s+")  # noqa: RUF001 -- marks of lists
_QUOTED = re.compile(r'"(.*)"|“(.*)”|«(.*)»', re.DOTALL)


def read_list(reply: str) -> list[str]:
    """Read the lines of a reply, without bullets and numbers; a line that introduces or repeats others is none of them.

    >>> read_list("Sure, here they are:\\n\\n1. Boats\\n2) **Tides**\\n- Boats\\n")
    ['Boats', 'Tides']
    """
    lines = [_ITEM.sub("", line).strip().strip("*").strip() for line in reply.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.endswith(":") and len(line) <= 200))


def read_message(reply: str) -> str:
    """Read a message from a reply, without quotation marks around the whole.

    >>> read_message(' "How deep is the sea?"\\n'), read_message('"A" or "B"?')
    ('How deep is the sea?', '"A" or "B"?')
    """
    text = reply.strip()
    if (quoted := _QUOTED.fullmatch(text)) and not re.search(
        r'["“”«»]', inner := "".join(filter(None, quoted.groups()))
    ):
        return inner.strip()
    return text
