"""From one dial, `--depth`, to everything else: shape, tokens, batch, learning rates; and which depth a budget buys.

Every rule is here, so that what `pretrain` prints can be traced. Numbers marked [x] come from docs/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.model.config import ModelConfig

# Bits per byte expected of N active parameters after D tokens: E + A / N^alpha + B / D^beta. The exponents are those
# of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3); the rest is set by our runs of 1.5M to 2.6M parameters on 4M
# to 20M tokens of English (docs/experiments.md, "The scaling law"). Only differences matter: the law chooses a depth.
IRREDUCIBLE, PARAMETER_COEFFICIENT, TOKEN_COEFFICIENT = 0.74, 60.0, 40.0
PARAMETER_EXPONENT, TOKEN_EXPONENT = 0.34, 0.28
REPEATS_WORTH = 15.4  # epochs, see predicted_loss
TOKENS_PER_PARAMETER = 20
LONGEST_CONTEXT, ROWS_OF_STEP = 2048, 8  # of a context that is chosen by the documents
ANCHOR_TOKENS, ANCHOR_BATCH = 20e6, 8192  # about where the rates were tried [x]
# Above it a batch saves no steps, it only costs tokens (McCandlish et al. 2018, arXiv 1812.06162: the critical batch).
# The rule for it is known up to the longest trainings, of 36T tokens (Qwen3): 2M. At 1e18 it would say 103M.
LARGEST_BATCH = 2**21
ADAMW_RATE, ADAMW_WIDTH = 2e-3, 256  # of a model that has been trained, falling with the root of the width [x]


def shape_for_depth(depth: int, vocab_size: int, sequence_length: int, head_dim: int = 64) -> ModelConfig:
    """The model of a depth: width 64 x depth, heads of 64, a SwiGLU of 8/3 the width.

    Raises UserError through ModelConfig for a depth below 1.
    """
    hidden_size = 64 * depth
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=round_up(8 * hidden_size / 3, 64),
        num_hidden_layers=depth,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=hidden_size // head_dim,
        head_dim=head_dim,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=False,
        qk_norm=True,
    )


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple at or above a value: `round_up(171, 64) == 192`."""
    return math.ceil(value / multiple) * multiple


def active_parameters(config: ModelConfig) -> int:
    """Parameters that multiply an activation each token: the blocks and the output head."""
    return round(config.flops_per_token(context=0) / 6)


def predicted_loss(active_parameters: float, tokens: float, corpus_tokens: float) -> float:
    """The bits per byte that the scaling law expects, for comparing candidates.

    Tokens seen again count less, and after some 15 epochs hardly at all: Muennighoff et al. 2023 (arXiv 2305.16264,
    equation 5).
    """
    repeats = max(0.0, tokens / corpus_tokens - 1)
    worth = min(tokens, corpus_tokens) + corpus_tokens * REPEATS_WORTH * (1 - math.exp(-repeats / REPEATS_WORTH))
    return (
        IRREDUCIBLE
        + PARAMETER_COEFFICIENT / active_parameters**PARAMETER_EXPONENT
        + TOKEN_COEFFICIENT / max(1.0, worth) ** TOKEN_EXPONENT
    )


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters that follow from the horizon."""

    batch_tokens: int
    matrix_learning_rate: float
    embedding_learning_rate: float
    head_learning_rate: float
    gain_learning_rate: float
    weight_decay: float
    optimizer: str = "muon"  # of the matrices; or adamw, as all the rest


def recipe(tokens: float, hidden_size: int, sequence_length: int, batch_tokens: int | None = None) -> Recipe:
    """Batch ~ tokens^0.383 (nanochat, after Power Lines, arXiv 2505.13738), rates ~ sqrt(batch), anchors [x]."""
    if batch_tokens is None:
        batch_tokens = min(LARGEST_BATCH, round(ANCHOR_BATCH * (tokens / ANCHOR_TOKENS) ** 0.383))
    batch_tokens = max(1, round(batch_tokens / sequence_length)) * sequence_length
    boost = math.sqrt(batch_tokens / ANCHOR_BATCH)
    width = (hidden_size / 256) ** -0.5
    return Recipe(
        batch_tokens=batch_tokens,
        matrix_learning_rate=0.02 * boost,
        embedding_learning_rate=0.2 * boost * width,
        head_learning_rate=0.004 * boost * width,
        gain_learning_rate=0.01 * boost,
        weight_decay=0.0,
    )


def recipe_from_model(batch_tokens: int, hidden_size: int) -> Recipe:
    """AdamW for everything: Muon's steps, and those of an embedding that starts from nothing, undo what was learnt."""
    rate = ADAMW_RATE * math.sqrt(ADAMW_WIDTH / hidden_size)
    return Recipe(batch_tokens, rate, rate, rate, rate, weight_decay=0.0, optimizer="adamw")


def sequence_length_for_depth(depth: int) -> int:
    """The shortest context of a depth, at which attention is a small part of the work. Chosen, not measured."""
    return 256 if depth <= 4 else 512 if depth <= 8 else 1024 if depth <= 12 else 2048


def longer_context(shortest: int, room: int, documents_within: Callable[[int], float]) -> int:
    """The context that holds 9 of 10 documents whole, of `shortest` and its doubles to 2,048, as long as 8 rows fit
    into the `room`, the tokens of a step. Chosen, not measured.

    documents_within: the share of the documents that a context holds whole
    """
    length = shortest
    while length < LONGEST_CONTEXT and ROWS_OF_STEP * 2 * length <= room and documents_within(length) < 0.9:
        length *= 2
    return length


def training_memory(
    config: ModelConfig, micro_batch_tokens: float, trained: int | None = None, devices: int = 1
) -> tuple[float, float]:
    """Estimate the bytes of training: those of parameters, and those of activations.

    16 bytes a parameter (working copy, gradient, master, moments), 4 for one that is not among those `trained` [all],
    and, for each token of a micro-batch, the activations that the backward pass needs, 2 bytes each. Bytes
    of parameters are divided among `devices`."""
    layer = 10 * config.hidden_size + 4 * config.intermediate_size
    trained = config.parameter_count if trained is None else trained
    state = (4.0 * config.parameter_count + 12.0 * trained) / devices
    return state, 2.0 * micro_batch_tokens * config.num_hidden_layers * layer


def training_bytes(config: ModelConfig, micro_batch_tokens: float, trained: int | None = None) -> float:
    """The sum of `training_memory`."""
    return sum(training_memory(config, micro_batch_tokens, trained))
