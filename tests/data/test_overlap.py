"""Exact and near copies of held-out records are found in the training data, and others are not."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.data.overlap import Overlap

HELD_OUT = [
    "What is the capital of France? Paris is the capital of France.",
    "Who was the first keeper of the lighthouse of Port Ellis? John Abel.",
    "2 + 2?",
    "\u706f\u53f0\u306f1889\u5e74\u306b\u958b\u304b\u308c\u307e\u3057\u305f",
]


@pytest.mark.parametrize(
    ("training", "exact", "near"),
    [
        ([], 0, 0),
        (["what is the capital of france\nparis is the capital of France"], 1, 0),
        (["Tell me: what is the capital of France? Paris is the capital of France!"], 0, 1),
        (["What is the capital of France? Lyon is the capital of France."], 0, 0),
        (["What is the capital of Spain? Madrid is the capital of Spain."], 0, 0),
        (["Who was the first keeper", "of the lighthouse", "of Port Ellis?", "John Abel."], 0, 0),  # of four records
        (["2 + 3?", "2 + 2 = 4"], 0, 0),
        (["2 + 2?"], 1, 0),
        ([HELD_OUT[3] + "\u3002", HELD_OUT[3] + "\u304b"], 1, 0),
        ([HELD_OUT[3] + "\u304b"], 0, 1),
        (HELD_OUT, 4, 0),
    ],
)
def test_exact_and_near_copies_are_found(training, exact, near):
    overlap = Overlap.of_texts(HELD_OUT)
    overlap.compare_texts(training)
    assert (overlap.exact, overlap.near, overlap.records) == (exact, near, 4)


def test_common_text_of_many_records_is_not_an_overlap():
    asked = "Please read the question below and answer it in one short sentence of plain English without any list: "
    names = [
        "Oslo",
        "Bergen",
        "Tromso",
        "Bodo",
        "Narvik",
        "Alta",
        "Molde",
        "Hamar",
        "Moss",
        "Skien",
        "Arendal",
        "Larvik",
    ]
    overlap = Overlap.of_texts(f"{asked}where does {name} lie exactly?" for name in names)
    overlap.compare_texts(f"{asked}where does {name} lie exactly?" for name in ("Paris", "Rome"))
    assert (overlap.exact, overlap.near) == (0, 0)


def test_tokens_of_documents_are_sampled():
    drawn = np.random.default_rng(0)
    held_out = [drawn.integers(0, 999, 400) for _ in range(5)]
    changed = held_out[1].copy()
    changed[::60] = 0
    overlap = Overlap(held_out, run=8, every=4)
    overlap.compare(
        [held_out[0].astype(np.uint16), np.concatenate([drawn.integers(0, 999, 90), changed]), held_out[2][:200]]
    )
    assert (overlap.exact, overlap.near) == (1, 1)


@pytest.mark.parametrize("held_out", [[], [""], ["", "a"]])
def test_empty_data_has_no_overlap(held_out):
    overlap = Overlap.of_texts(held_out)
    overlap.compare_texts(["", "b", "a b c"])
    assert (overlap.exact, overlap.near) == (0, 0)
