"""Answers are separated from the thoughts before them."""

from __future__ import annotations

import pytest

from llmkit.generation.requests import split_thoughts


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Four.", "", "Four."),
        ("<think>\nTwo\nand two.\n</think>\n\nFour.\n", "Two\nand two.", "Four.\n"),
        ("<think>\n\n</think>\n\nFour.", "", "Four."),
        ("Two.\n</think>\n\nFour.", "Two.", "Four."),  # opened by the prompt
        ("Two.</think>Four.<think>Again.</think>5", "Two.\n\nAgain.", "Four.5"),  # after a tool call
        ("<think>\nTwo and", "Two and", ""),  # truncated
        ("Wait. <think>Two.</think>Four.", "Two.", "Wait. Four."),
    ],
)
def test_thoughts_and_answer_are_divided(text: str, thought: str, answer: str) -> None:
    assert split_thoughts(text) == (thought, answer)
