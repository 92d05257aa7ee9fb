"""Answers apart from the thoughts before them."""

from __future__ import annotations

import pytest

from llmkit.generation.requests import split_thoughts


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Four.", "", "Four."),
        ("<think>\nTwo\nand two.\n</think>\n\nFour.\n", "Two\nand two.", "Four.\n"),
        ("<think>\n\n</think>\n\nFour.", "", "Four."),
        ("Two.\n</think>\n\nFour.", "Two.", "Four."),  # begun by the prompt
        ("Two.</think>Four.<think>Again.</think>5", "Two.\n\nAgain.", "Four.5"),  # behind a call of a tool
        ("<think>\nTwo and", "Two and", ""),  # cut
        ("Wait. <think>Two.</think>Four.", "Two.", "Wait. Four."),
    ],
)
def test_thoughts_and_answer_are_divided(text: str, thought: str, answer: str) -> None:
    assert split_thoughts(text) == (thought, answer)
