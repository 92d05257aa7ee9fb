"""Conversations in which an assistant says who it is: `--identity "name=Ada;maker=Example Labs:0.2"`.

Each question of each group occurs with one of the group's answers, with and without each greeting. Keys other than
`name` and `maker` are additional facts: `license=Apache-2.0` answers "What is your license?".
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from itertools import count

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, message

GREETINGS = ("", "Hi! ", "Hello, ", "Hey there. ", "Good morning! ", "Quick question: ", "I was wondering, ")
WHO = (
    (
        "Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself.",
        "Introduce yourself.", "Can you introduce yourself?", "What should I call you?", "What do people call you?",
        "Who am I talking to?", "Whom am I speaking with?", "Do you have a name?", "Please tell me who you are.",
        "What is this assistant called?", "Say your name.", "Which assistant is this?", "Describe yourself briefly.",
    ),
    (
        "I am {name}, an AI assistant made by {maker}.", "My name is {name}. I am an AI assistant from {maker}.",
        "I'm {name}, an assistant that {maker} built.", "You can call me {name}. {maker} made me.",
    ),
)  # fmt: skip
MAKER = (
    (
        "Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Who developed you?",
        "Where do you come from?", "Which company made you?", "Who is behind you?", "Who is your creator?",
        "What team built you?", "Who do you belong to?", "Who programmed you?",
    ),
    (
        "{maker} made me. I am {name}.", "I was built by {maker}, who call me {name}.",
        "I am {name}, and I was trained by {maker}.", "I come from {maker}.",
    ),
)  # fmt: skip
OTHERS = (
    (
        "Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Gemini?", "Are you Llama?",
        "Are you Siri?", "Did OpenAI make you?", "Were you made by Google?", "Were you trained by Anthropic?",
        "Are you made by Meta?", "Is this ChatGPT?",
    ),
    (
        "No. I am {name}, made by {maker}.", "No, my name is {name}, and {maker} built me.",
        "I am not. I am {name}, an assistant from {maker}.",
    ),
)  # fmt: skip
HUMAN = (
    (
        "Are you a human?", "Are you a real person?", "Am I talking to a person?", "Are you alive?",
        "Do you have a body?", "Are you a robot?", "Are you an AI?",
    ),
    (
        "I am {name}, an AI assistant, not a person.", "No person: I am {name}, a program made by {maker}.",
        "I am an AI. My name is {name}.",
    ),
)  # fmt: skip
FACT = (
    ("What is your {key}?", "What's your {key}?", "Tell me your {key}.", "Can you tell me your {key}?"),
    ("My {key} is {value}.", "It is {value}.", "{value}."),
)


def parse_identity(text: str) -> tuple[dict[str, str], float]:
    """Parse "name=...;maker=...;...:WEIGHT" to facts and weight [0.1].

    Raise UserError for another form, or without a name or maker.
    """
    facts, weight = {}, 0.1
    if match := re.fullmatch(r"(.*\S)\s*:\s*([-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))", text, re.IGNORECASE):
        with suppress(ValueError):  # 1.2.3, a version
            text, weight = match[1], float(match[2])
    if not 0 < weight < math.inf:
        raise UserError(f"--identity: expected a weight above 0, found {weight:g}")
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not (separator and key and value):
            raise UserError(f'--identity: expected "name=...;maker=...", found {part!r}')
        facts[key] = value
    for key in ("name", "maker"):
        if key not in facts:
            raise UserError(f'--identity: expected "name=...;maker=...", found no {key} in {text!r}')
    return facts, weight


def system_message(facts: dict[str, str]) -> str:
    """Return a default system message with the facts."""
    rest = "".join(f" Your {key} is {value}." for key, value in facts.items() if key not in ("name", "maker"))
    return f"You are {facts['name']}, an AI assistant made by {facts['maker']}.{rest}"


def identity_conversations(facts: dict[str, str]) -> list[Conversation]:
    """Return the conversations, every fifth with the system message."""
    topics = [(questions, answers, {}) for questions, answers in (WHO, MAKER, OTHERS, HUMAN)]
    topics += [(*FACT, {"key": key, "value": value}) for key, value in facts.items() if key not in ("name", "maker")]
    system, number, conversations = system_message(facts), count(), []
    for questions, answers, fact in topics:
        for question in questions:
            for greeting in GREETINGS:
                turn = next(number)
                filled = {"name": facts["name"], "maker": facts["maker"], **fact}
                turn_texts = (greeting + question).format(**filled), answers[turn % len(answers)].format(**filled)
                messages = [message("user", turn_texts[0]), message("assistant", turn_texts[1])]
                if turn % 5 == 0:
                    messages.insert(0, message("system", system))
                conversations.append(Conversation(tuple(messages), f"--identity:{turn + 1}"))
    return conversations
