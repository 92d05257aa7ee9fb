"""The plan of a pretraining, derived from the user's options: shape, tokens, batch, learning rates.

    plan = make_plan(config, vocab_size=8192, corpus_tokens=20_000_000, device="cpu", speed=measure)
    print(plan_table(plan))

One dial, `--depth`, sets everything else, and a budget buys a depth. Every rule is here, so that each number
that `pretrain` prints can be traced. Numbers marked [x] come from docs/experiments.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from llmkit.errors import UserError
from llmkit.io.progress import counted, quantity
from llmkit.kernels.dispatch import backend
from llmkit.model.config import ModelConfig

# Bits per byte expected of N active parameters after D tokens: E + A / N^alpha + B / D^beta. The exponents are those
# of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3); the rest fits our runs of 1.5M to 2.6M parameters on 4M to
# 20M tokens of English (docs/experiments.md, "The scaling law"). Only differences matter: the law chooses a depth.
IRREDUCIBLE, PARAMETER_COEFFICIENT, TOKEN_COEFFICIENT = 0.74, 60.0, 40.0
PARAMETER_EXPONENT, TOKEN_EXPONENT = 0.34, 0.28
REPEATS_WORTH = 15.4  # epochs, see predicted_loss
TOKENS_PER_PARAMETER = 20
LONGEST_CONTEXT, ROWS_OF_STEP = 2048, 8  # limits of a context that is chosen for the documents
ANCHOR_TOKENS, ANCHOR_BATCH = 20e6, 8192  # about where the learning rates were tuned [x]
# A larger batch saves no steps and only costs tokens (McCandlish et al. 2018, arXiv 1812.06162: the critical batch
# size). The rule is known up to the longest trainings, of 36T tokens (Qwen3): 2M. At 1e18 tokens it would give 103M.
LARGEST_BATCH = 2**21
ADAMW_RATE, ADAMW_WIDTH = 2e-3, 256  # to train a model further; falls with the square root of the width [x]
MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536, "mps": 16384}
SEARCH_SHARE = 0.03  # maximum share of a time budget for measuring the machine
DECAY_FRACTION = 0.6  # the last part of the run, over which the learning rate decays
HEAD_DIM = 64


class PlanOptions(Protocol):
    """Options of `pretrain` that fix a part of the plan; those that are None are derived."""

    model: str | None
    depth: int | None
    hidden_size: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    sequence_length: int | None
    tie_word_embeddings: bool
    tokens: int | None
    flops: float | None
    time_budget: float | None
    max_steps: int | None
    epochs: float | None
    batch_tokens: int | None
    micro_batch_size: int | None
    learning_rate: float | None
    weight_decay: float | None
    warmup_steps: int | None


# ---- rules


def shape_for_depth(
    depth: int,
    vocab_size: int,
    sequence_length: int,
    *,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    tie_word_embeddings: bool = False,
    special_ids: tuple[int | None, int | None] = (None, None),
) -> ModelConfig:
    """Return the model of a depth: width 64 x depth, heads of 64, a SwiGLU of 8/3 the width, unless given otherwise.

    special_ids: begin and end token of the configuration

    Raises UserError for an impossible shape.
    """
    hidden = hidden_size or 64 * depth
    heads = num_attention_heads or max(1, hidden // HEAD_DIM)
    kv_heads = num_key_value_heads or heads
    if hidden % heads:
        raise UserError(f"--hidden-size {hidden}: not a multiple of {heads} attention heads; choose another")
    if (hidden // heads) % 2:  # RoPE rotates channels in pairs
        flag = f"--hidden-size {hidden}" if hidden_size else f"--num-attention-heads {heads}"
        raise UserError(
            f"{flag}: expected heads of an even number of channels, found {counted(heads, 'head')} of {hidden // heads}"
            f"; choose a --hidden-size that is a multiple of {2 * heads}, or another --num-attention-heads"
        )
    if heads % kv_heads:
        raise UserError(f"--num-key-value-heads: expected a divisor of {heads} attention heads, found {kv_heads}")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=64 * math.ceil(8 * hidden / 3 / 64),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=tie_word_embeddings,
        qk_norm=True,
        bos_token_id=special_ids[0],
        eos_token_id=special_ids[1],
    )


def active_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that each token uses: the blocks and the output head."""
    return round(config.flops_per_token(context=0) / 6)


def predicted_loss(active_parameters: float, tokens: float, corpus_tokens: float) -> float:
    """Return the bits per byte that the scaling law predicts, to compare candidates.

    Repeated tokens count less, and after about 15 epochs hardly at all: Muennighoff et al. 2023 (arXiv 2305.16264,
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
    """Hyperparameters that follow from the number of tokens."""

    batch_tokens: int
    matrix_learning_rate: float
    embedding_learning_rate: float
    head_learning_rate: float
    gain_learning_rate: float
    weight_decay: float
    optimizer: str = "muon"  # of the matrices; or adamw, as for the rest


def recipe(tokens: float, hidden_size: int, sequence_length: int, batch_tokens: int | None = None) -> Recipe:
    """Derive batch ~ tokens^0.383 (nanochat, after arXiv 2505.13738) and rates ~ sqrt(batch) from the anchors [x]."""
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


def training_memory(
    config: ModelConfig,
    micro_batch_tokens: float,
    trained: int | None = None,
    devices: int = 1,
    working_bytes: float | None = None,
) -> tuple[float, float]:
    """Estimate the bytes of training, for parameters and for activations.

    A parameter takes 16 bytes (working copy, gradient, master, moments), or 4 if it is not among the `trained` [all];
    each activation that the backward pass needs takes 2 bytes per token of a micro-batch. `working_bytes` is the size
    of all working copies, if not 4 bytes per parameter. Bytes of parameters are divided among `devices`.
    """
    layer = 10 * config.hidden_size + 4 * config.intermediate_size
    trained = config.parameter_count if trained is None else trained
    state = ((4.0 * config.parameter_count if working_bytes is None else working_bytes) + 12.0 * trained) / devices
    return state, 2.0 * micro_batch_tokens * config.num_hidden_layers * layer


# ---- the plan


@dataclass(frozen=True)
class Plan:
    """All settings of a training. `seconds` is the part of a time budget that is left for training."""

    model: ModelConfig
    recipe: Recipe
    sequence_length: int
    batch_rows: int
    micro_batch_rows: int
    total_steps: int
    seconds: float | None
    warmup_steps: int
    decay_fraction: float
    corpus_tokens: int
    kernels: str
    reasons: tuple[str, ...] = ()

    @property
    def batch_tokens(self) -> int:
        return self.batch_rows * self.sequence_length

    @property
    def tokens(self) -> int:
        return self.total_steps * self.batch_tokens

    @property
    def flops(self) -> float:
        return self.tokens * self.model.flops_per_token(self.sequence_length)

    def training_memory(self, devices: int = 1) -> dict[str, float]:
        """Estimate the bytes of training on each of some devices, by the advice that lowers them."""
        rows = min(self.micro_batch_rows, -(-self.batch_rows // devices))
        state, activations = training_memory(self.model, rows * self.sequence_length, devices=devices)
        smaller = "lower --depth or --hidden-size"
        if self.recipe.optimizer == "adamw":
            smaller = "choose a smaller model for --from"
        return {smaller: state, "lower --micro-batch-size or --sequence-length": activations}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        model, recipe = ModelConfig.from_dict(values["model"]), Recipe(**values["recipe"])
        return cls(**{**values, "model": model, "recipe": recipe, "reasons": tuple(values["reasons"])})


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Derives a plan.

    speed             measures tokens/s of a model, a recipe, and rows of a length; called only for a time budget
    seconds_used      seconds since the command started
    closing_tokens    validation tokens to be scored at the end, inside the budget
    check_fits        raises UserError if a plan does not fit into memory; called before a speed is measured
    special_ids       begin and end token of the model's configuration
    model             the model of `options.model`, which is trained further; its context is the length of the rows
    documents_within  fraction of the documents that fit into a context
    """

    options: PlanOptions
    vocab_size: int
    corpus_tokens: int = 0
    device: str = "cpu"
    speed: Callable[[ModelConfig, Recipe, int, int], float] = lambda model, recipe, rows, length: 0.0
    seconds_used: Callable[[], float] = lambda: 0.0
    closing_tokens: int = 0
    check_fits: Callable[[Plan], None] = lambda plan: None
    special_ids: tuple[int | None, int | None] = (None, None)
    model: ModelConfig | None = None
    documents_within: Callable[[int], float] = lambda length: 1.0

    def plan(self) -> Plan:
        """Return the plan. Raises UserError for an impossible shape, or a budget too short to train in."""
        options = self.options
        if options.time_budget is not None:
            plan = self._for_time(float(options.time_budget))
            return self._with_context(plan, plan.tokens)
        depth, why_depth = self._depth()
        model = self.shape(depth)
        tokens, why_tokens = self._horizon(model)
        return self._with_context(self._filled(model, tokens, None, (*why_depth, *why_tokens)), tokens)

    def shape(self, depth: int) -> ModelConfig:
        """Return the model of a depth, or that of --from."""
        if self.model is not None:
            return self.model
        options = self.options  # the context at which attention is a small part of the work; chosen, not measured
        shortest = 256 if depth <= 4 else 512 if depth <= 8 else 1024 if depth <= 12 else 2048
        return shape_for_depth(
            depth,
            self.vocab_size,
            options.sequence_length or shortest,
            hidden_size=options.hidden_size,
            num_attention_heads=options.num_attention_heads,
            num_key_value_heads=options.num_key_value_heads,
            tie_word_embeddings=options.tie_word_embeddings,
            special_ids=self.special_ids,
        )

    def _ideal_tokens(self, model: ModelConfig) -> float:
        return TOKENS_PER_PARAMETER * active_parameters(model)

    def _expected_loss(self, model: ModelConfig, tokens: float) -> float:
        return predicted_loss(active_parameters(model), tokens, self.corpus_tokens)

    def _depth(self) -> tuple[int, list[str]]:
        """Return the depth, and the reason if it was not given."""
        given = self.options.depth if self.model is None else self.model.num_hidden_layers
        if given is not None:
            return given, []
        if (flops := self.options.flops) is not None:
            models = map(self.shape, range(1, 65))
            best = min(models, key=lambda model: self._expected_loss(model, flops / _flops_per_token(model)))
            depth = best.num_hidden_layers
            return depth, [f"depth {depth} promises the lowest loss for {flops:.2g} FLOPs"]
        if (tokens := self.options.tokens) is not None:
            depth = min(range(1, 65), key=lambda depth: abs(self._ideal_tokens(self.shape(depth)) - tokens))
            return depth, [f"depth {depth} has about {TOKENS_PER_PARAMETER} tokens a parameter"]
        return 4, ["depth 4 is the default"]

    def _horizon(self, model: ModelConfig) -> tuple[float, list[str]]:
        """Return the number of tokens to train on, and the reason if it was not given."""
        options = self.options
        if options.tokens is not None:
            return options.tokens, []
        if options.flops is not None:
            return options.flops / _flops_per_token(model), []
        if options.epochs is not None:
            return options.epochs * self.corpus_tokens, []
        if options.max_steps is not None:
            tokens = self._ideal_tokens(model)
            for _ in range(50):  # to a fixed point, because the batch itself depends on the tokens
                tokens = options.max_steps * float(options.batch_tokens or self._recipe(tokens, model).batch_tokens)
            return tokens, []
        if self.model is not None:
            return float(self.corpus_tokens), ["one pass over the documents is the default of --from"]
        return self._ideal_tokens(model), [f"{TOKENS_PER_PARAMETER} tokens a parameter are the default horizon"]

    def _recipe(self, tokens: float, model: ModelConfig, batch_tokens: int | None = None) -> Recipe:
        return recipe(tokens, model.hidden_size, model.max_position_embeddings, batch_tokens)

    def _for_time(self, budget: float) -> Plan:
        """Measure candidates on this machine; choose the one with the lowest predicted loss within the time."""
        fixed = self.options.depth if self.model is None else self.model.num_hidden_layers
        started = time.monotonic()
        best: tuple[float, ModelConfig, float, float] | None = None
        reasons = []
        for depth in [fixed] if fixed is not None else range(1, 33):
            model = self.shape(depth)
            draft = self._filled(model, self._ideal_tokens(model), None)
            self.check_fits(draft)
            rate = self.speed(model, draft.recipe, min(draft.batch_rows, draft.micro_batch_rows), draft.sequence_length)
            # scoring is forward only (assumed at 2.5 times the rate, a run of ten minutes was 5 s late [x]), and saving
            # takes time too
            seconds = budget - self.seconds_used() - self.closing_tokens / (2.0 * rate) - 1.0 - 0.01 * budget
            tokens = max(0.0, seconds) * rate
            loss = self._expected_loss(model, tokens)
            figures = f"{rate:,.0f} tokens/s, {tokens / 1e6:.1f}M tokens"
            reasons.append(f"depth {depth}: {figures}, {loss:.3f} bits per byte expected")
            if best is None or loss < best[0]:
                best = (loss, model, tokens, seconds)
            elif fixed is None:
                break  # deeper ones are slower still
            if time.monotonic() - started > SEARCH_SHARE * budget:
                break
        assert best is not None
        _, model, tokens, seconds = best
        if seconds <= 0:
            scoring = f" and about {self.closing_tokens / (2.0 * rate):.0f} s for "
            scoring += f"{counted(self.closing_tokens, 'token')} of validation"
            raise UserError(
                f"--time-budget {budget:g}s: no time is left for training after {self.seconds_used():.0f} s of "
                f"preparation{scoring if self.closing_tokens else ''}; give more time"
                f"{' or less validation text' if self.closing_tokens else ''}"
            )
        if fixed is None:
            seconds -= time.monotonic() - started
            reasons.append(f"depth {model.num_hidden_layers} promises the lowest loss in {budget:g} s")
        return self._filled(model, tokens, max(1.0, seconds), tuple(reasons))

    def _with_context(self, plan: Plan, tokens: float) -> Plan:
        """Return the plan with a context chosen for the documents, unless it was given.

        It is doubled, up to 2,048, until 9 of 10 documents fit, as long as 8 rows fit into a step. Chosen, not
        measured.
        """
        options, length, within = self.options, plan.sequence_length, self.documents_within
        if options.sequence_length is None and self.model is None:
            room = min(plan.batch_tokens, plan.corpus_tokens)
            while length < LONGEST_CONTEXT and ROWS_OF_STEP * 2 * length <= room and within(length) < 0.9:
                length *= 2
        model = replace(plan.model, max_position_embeddings=length)
        if options.flops is not None:
            tokens = options.flops / _flops_per_token(model)
        reasons = plan.reasons
        if (longer := 1 - within(length)) >= 0.01:
            more = next((more for more in (512, 1024, 2048, 4096) if more > length and within(more) >= 0.9), 8192)
            advice = f"--sequence-length {more} would fit {within(more):.0%} of all documents"
            if self.model is not None:
                advice = "--sequence-length may be up to the context of --from"
            reasons += (
                f"{longer:.0%} of the documents are longer than the context of {length} tokens, and sft cuts answers "
                f"there; {advice}",
            )
        return self._filled(model, tokens, plan.seconds, reasons)

    def _filled(self, model: ModelConfig, tokens: float, seconds: float | None, reasons: tuple[str, ...] = ()) -> Plan:
        """Return the plan for a model and a number of tokens: batch, rates and schedule are derived unless given."""
        options, length = self.options, model.max_position_embeddings
        rate, chosen = options.learning_rate, self._recipe(tokens, model, options.batch_tokens)
        if self.model is not None:
            # AdamW for everything: Muon's steps, and embedding rates meant for training from scratch, undo what was
            # learnt
            rate = rate or ADAMW_RATE * math.sqrt(ADAMW_WIDTH / model.hidden_size)
            chosen = Recipe(chosen.batch_tokens, rate, rate, rate, rate, weight_decay=0.0, optimizer="adamw")
        elif rate is not None:
            chosen = replace(chosen, matrix_learning_rate=rate, head_learning_rate=rate / 4)
        if options.weight_decay is not None:
            chosen = replace(chosen, weight_decay=options.weight_decay)
        rows = max(1, round(chosen.batch_tokens / length))
        steps = options.max_steps or max(1, round(tokens / (rows * length)))
        micro_rows = options.micro_batch_size or max(1, MICRO_BATCH_TOKENS[self.device] // length)
        return Plan(
            model=model,
            recipe=chosen,
            sequence_length=length,
            batch_rows=rows,
            micro_batch_rows=min(rows, micro_rows),
            total_steps=steps,
            seconds=seconds,
            warmup_steps=min(50, steps // 10) if options.warmup_steps is None else options.warmup_steps,
            decay_fraction=DECAY_FRACTION,
            corpus_tokens=self.corpus_tokens,
            kernels=backend(self.device),
            reasons=reasons,
        )


def _flops_per_token(model: ModelConfig) -> float:
    return model.flops_per_token(model.max_position_embeddings)


def plan_table(plan: Plan) -> str:
    """Format the derived values, one per line, with the reasons."""
    model, recipe, tokens = plan.model, plan.recipe, plan.tokens
    expected = " expected" if plan.seconds is not None else ""
    rates = (
        f"matrices {recipe.matrix_learning_rate:.3g}, embedding {recipe.embedding_learning_rate:.3g}, "
        f"head {recipe.head_learning_rate:.3g}"
    )
    rows = {
        "layers x width": f"{model.num_hidden_layers} x {model.hidden_size}",
        "heads": f"{model.num_attention_heads} of {model.head_dim}, {model.num_key_value_heads} for keys",
        "SwiGLU width": f"{model.intermediate_size}",
        "vocabulary": f"{model.vocab_size:,}",
        "parameters": f"{model.parameter_count:,} ({active_parameters(model):,} active)",
        "context": f"{plan.sequence_length} tokens",
        "batch": f"{plan.batch_tokens:,} tokens ({counted(plan.batch_rows, 'row')}, {plan.micro_batch_rows} at a time)",
        "steps": f"{plan.total_steps:,}{expected}, {plan.warmup_steps} warm-up, last {plan.decay_fraction:.0%} decay",
        "tokens": f"{tokens:,} ({tokens / plan.corpus_tokens:.2f} epochs of {plan.corpus_tokens:,})",
        "FLOPs": f"{plan.flops:.3g}",
        "learning rates": rates if recipe.optimizer == "muon" else f"AdamW {recipe.matrix_learning_rate:.3g}",
        "weight decay": f"{recipe.weight_decay:g}",
        "memory": f"about {quantity(sum(plan.training_memory().values()))}B",
        "kernels": plan.kernels,
    }
    lines = [f"  {name:<15} {value}" for name, value in rows.items()] + [f"  {reason}" for reason in plan.reasons]
    return "the plan:\n" + "\n".join(lines)
