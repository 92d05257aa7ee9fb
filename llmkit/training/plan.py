"""Plan of a pretraining run: shape, horizon and hyperparameters, derived from what the user fixed.

plan = make_plan(Wishes(depth=4, tokens=10_000_000), vocab_size=8192, corpus_tokens=20_000_000, ...)
print(plan_table(plan))
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmkit.errors import UserError
from llmkit.io.progress import counted, quantity
from llmkit.kernels.dispatch import backend
from llmkit.model.config import ModelConfig
from llmkit.training import scaling
from llmkit.training.scaling import Recipe

MICRO_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536, "mps": 16384}
RATES = ("matrix", "embedding", "head", "gain")  # that a recipe has
SEARCH_SHARE = 0.03  # of a time budget may go into measuring the machine
Speed = Callable[[ModelConfig, Recipe, int, int], float]  # (model, recipe, rows, sequence_length) -> tokens/s
DECAY_FRACTION = 0.6  # the last part of the run, over which the learning rate decays


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Options of `pretrain` that fix a part of the plan; those that are None are derived."""

    model: str | None = None
    depth: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    sequence_length: int | None = None
    tie_word_embeddings: bool = False
    tokens: int | None = None
    flops: float | None = None
    time_budget: float | None = None
    max_steps: int | None = None
    epochs: float | None = None
    batch_tokens: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that training needs to know. `seconds` is the deadline of a time budget, for training alone."""

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

    def training_memory(self, devices: int = 1) -> dict[str, float]:
        """About the bytes that training takes, on each of some devices; by advice."""
        rows = min(self.micro_batch_rows, -(-self.batch_rows // devices))
        tokens = rows * self.sequence_length
        state, activations = scaling.training_memory(self.model, tokens, devices=devices)
        smaller = "lower --depth, --hidden-size or --intermediate-size"
        if self.recipe.optimizer == "adamw":
            smaller = "choose a smaller model for --from"
        return {smaller: state, "lower --micro-batch-size or --sequence-length": activations}

    def training_bytes(self) -> float:
        """The sum of `training_memory`."""
        return sum(self.training_memory().values())

    @property
    def flops(self) -> float:
        return self.tokens * self.model.flops_per_token(self.sequence_length)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        model, recipe = ModelConfig.from_dict(values["model"]), Recipe(**values["recipe"])
        return cls(**{**values, "model": model, "recipe": recipe, "reasons": tuple(values["reasons"])})


def make_plan(
    wishes: Wishes,
    *,
    vocab_size: int,
    corpus_tokens: int,
    device: str,
    speed: Speed,
    seconds_used: Callable[[], float] = lambda: 0.0,
    closing_tokens: int = 0,
    check_fits: Callable[[Plan], None] = lambda plan: None,
    special_ids: tuple[int | None, int | None] = (None, None),
    model: ModelConfig | None = None,
    documents_within: Callable[[int], float] = lambda length: 1.0,
) -> Plan:
    """Derive a plan.

    speed: measures tokens/s of a shape; called only for a time budget
    seconds_used: seconds since the command started
    closing_tokens: validation tokens to be scored at the end, inside the budget
    check_fits: raises UserError where the memory does not do for a plan; called before a speed is measured
    special_ids: begin and end token of the model's configuration
    model: that of `wishes.model`, which is trained further, with rows for its context
    documents_within: the share of the documents that a context holds whole

    Raises UserError for a shape that no model can have, or a budget too short to train in.
    """
    horizons = ("tokens", "flops", "time_budget", "max_steps", "epochs")
    given = any(getattr(wishes, name) is not None for name in horizons)

    def shape(depth: int) -> ModelConfig:
        return model or _shape(wishes, depth, vocab_size, special_ids)

    if model is not None:
        wishes = replace(wishes, depth=model.num_hidden_layers, epochs=wishes.epochs if given else 1.0)
    if wishes.time_budget is not None:
        plan = _plan_for_time(wishes, shape, corpus_tokens, device, speed, seconds_used, closing_tokens, check_fits)
        return _with_context(plan, wishes, plan.tokens, device, documents_within)
    depth, why_depth = _depth(wishes, shape, corpus_tokens)
    shaped = shape(depth)
    tokens, why_tokens = _horizon(wishes, shaped, corpus_tokens)
    if model is not None and not given:
        why_tokens = ["one pass over the documents is the default of --from"]
    plan = _filled(wishes, shaped, tokens, None, corpus_tokens, device, (*why_depth, *why_tokens))
    return _with_context(plan, wishes, tokens, device, documents_within)


def _with_context(
    plan: Plan, wishes: Wishes, tokens: float, device: str, documents_within: Callable[[int], float]
) -> Plan:
    """The plan with the context that the documents ask for and the batch has room for, where none was given."""
    length = plan.sequence_length
    if wishes.sequence_length is None and wishes.model is None:
        length = scaling.longer_context(length, min(plan.batch_tokens, plan.corpus_tokens), documents_within)
    model = replace(plan.model, max_position_embeddings=length)
    if wishes.flops is not None:
        tokens = wishes.flops / model.flops_per_token(length)
    longer = 1 - documents_within(length)
    reasons = plan.reasons
    if longer >= 0.01:
        more = next((more for more in (512, 1024, 2048, 4096) if more > length and documents_within(more) >= 0.9), 8192)
        cut = (
            f"{longer:.0%} of the documents are longer than the context of {length} tokens, and sft cuts answers there"
        )
        advice = f"; --sequence-length {more} holds {documents_within(more):.0%} whole"
        reasons += (cut + (advice if wishes.model is None else "; the model of --from has no longer one"),)
    return _filled(wishes, model, tokens, plan.seconds, plan.corpus_tokens, device, reasons)


def check_wishes(wishes: Wishes, vocab_size: int) -> None:
    """Raise UserError for a shape that no model can have, before the work on the documents."""
    _shape(wishes, wishes.depth or 4, vocab_size, (None, None))


def _depth(wishes: Wishes, shape: Callable[[int], ModelConfig], corpus_tokens: int) -> tuple[int, list[str]]:
    """The depth, and why where it was not given."""
    if wishes.depth is not None:
        return wishes.depth, []
    if wishes.flops is not None:
        depth = _depth_for_flops(shape, wishes.flops, corpus_tokens)
        return depth, [f"depth {depth} promises the lowest loss for {wishes.flops:.2g} FLOPs"]
    if (tokens := wishes.tokens) is not None:
        depth = min(range(1, 65), key=lambda d: abs(_ideal_tokens(shape(d)) - tokens))
        return depth, [f"depth {depth} has about {scaling.TOKENS_PER_PARAMETER} tokens a parameter"]
    return 4, ["depth 4 is the default"]


def _horizon(wishes: Wishes, model: ModelConfig, corpus_tokens: int) -> tuple[float, list[str]]:
    """The tokens to train on, and why where no horizon was given."""
    if wishes.tokens is not None:
        return wishes.tokens, []
    if wishes.flops is not None:
        return wishes.flops / model.flops_per_token(model.max_position_embeddings), []
    if wishes.epochs is not None:
        return wishes.epochs * corpus_tokens, []
    if wishes.max_steps is not None:
        return _tokens_of_steps(wishes, model, wishes.max_steps), []
    return _ideal_tokens(model), [f"{scaling.TOKENS_PER_PARAMETER} tokens a parameter are the default horizon"]


def _ideal_tokens(model: ModelConfig) -> float:
    return scaling.TOKENS_PER_PARAMETER * scaling.active_parameters(model)


def _shape(wishes: Wishes, depth: int, vocab_size: int, special_ids: tuple[int | None, int | None]) -> ModelConfig:
    sequence_length = wishes.sequence_length or scaling.sequence_length_for_depth(depth)
    base = scaling.shape_for_depth(depth, vocab_size, sequence_length)
    hidden = wishes.hidden_size or base.hidden_size
    heads = wishes.num_attention_heads or max(1, hidden // base.head_dim)
    kv_heads = wishes.num_key_value_heads or heads
    if hidden % heads:
        raise UserError(f"--hidden-size {hidden}: not a multiple of {heads} attention heads; choose another")
    if (hidden // heads) % 2:  # rotary positions turn channels in pairs
        flag = f"--hidden-size {hidden}" if wishes.hidden_size else f"--num-attention-heads {heads}"
        raise UserError(
            f"{flag}: expected heads of an even number of channels, found {counted(heads, 'head')} of {hidden // heads}"
            f"; choose a --hidden-size that is a multiple of {2 * heads}, or another --num-attention-heads"
        )
    if heads % kv_heads:
        raise UserError(f"--num-key-value-heads {kv_heads}: {heads} attention heads are no multiple; choose another")
    return replace(
        base,
        hidden_size=hidden,
        intermediate_size=wishes.intermediate_size or scaling.round_up(8 * hidden / 3, 64),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=wishes.tie_word_embeddings,
        bos_token_id=special_ids[0],
        eos_token_id=special_ids[1],
    )


def _depth_for_flops(shape: Callable[[int], ModelConfig], flops: float, corpus_tokens: int) -> int:
    def loss(depth: int) -> float:
        model = shape(depth)
        tokens = flops / model.flops_per_token(model.max_position_embeddings)
        return scaling.predicted_loss(scaling.active_parameters(model), tokens, corpus_tokens)

    return min(range(1, 65), key=loss)


def _tokens_of_steps(wishes: Wishes, model: ModelConfig, steps: int) -> float:
    """Tokens of a number of steps, where the batch itself depends on the tokens: a fixed point."""
    tokens = float(_ideal_tokens(model))
    for _ in range(50):
        batch = (
            wishes.batch_tokens or scaling.recipe(tokens, model.hidden_size, model.max_position_embeddings).batch_tokens
        )
        tokens = steps * batch
    return tokens


def _plan_for_time(
    wishes: Wishes,
    shape: Callable[[int], ModelConfig],
    corpus_tokens: int,
    device: str,
    speed: Speed,
    seconds_used: Callable[[], float],
    closing_tokens: int,
    check_fits: Callable[[Plan], None],
) -> Plan:
    """Measure candidates on this machine and take the one whose tokens in the time promise the lowest loss."""
    budget = float(wishes.time_budget or 0)
    started = time.monotonic()
    best: tuple[float, ModelConfig, float, float] | None = None
    reasons = []
    for depth in [wishes.depth] if wishes.depth is not None else range(1, 33):
        model = shape(depth)
        draft = _filled(wishes, model, _ideal_tokens(model), None, corpus_tokens, device, ())
        check_fits(draft)
        rate = speed(model, draft.recipe, min(draft.batch_rows, draft.micro_batch_rows), draft.sequence_length)
        # scoring is forward only (counted at 2.5 times the rate, ten minutes were 5 s late [x]), and saving takes some
        seconds = budget - seconds_used() - closing_tokens / (2.0 * rate) - 1.0 - 0.01 * budget
        tokens = max(0.0, seconds) * rate
        loss = scaling.predicted_loss(scaling.active_parameters(model), tokens, corpus_tokens)
        figures = f"{rate:,.0f} tokens/s, {tokens / 1e6:.1f}M tokens"
        reasons.append(f"depth {depth}: {figures}, {loss:.3f} bits per byte expected")
        if best is None or loss < best[0]:
            best = (loss, model, tokens, seconds)
        elif wishes.depth is None:
            break  # deeper ones are slower still
        if time.monotonic() - started > SEARCH_SHARE * budget:
            break
    assert best is not None
    _, model, tokens, seconds = best
    if seconds <= 0:
        scoring = (
            f" and some {closing_tokens / (2.0 * rate):.0f} s for {counted(closing_tokens, 'token')} of validation"
        )
        raise UserError(
            f"--time-budget {budget:g}s: nothing is left to train in, after {seconds_used():.0f} s of preparation"
            f"{scoring if closing_tokens else ''}; give more time{' or less validation text' if closing_tokens else ''}"
        )
    if wishes.depth is None:
        seconds -= time.monotonic() - started
        reasons.append(f"depth {model.num_hidden_layers} promises the lowest loss in {budget:g} s")
    return _filled(wishes, model, tokens, max(1.0, seconds), corpus_tokens, device, tuple(reasons))


def _filled(
    wishes: Wishes,
    model: ModelConfig,
    tokens: float,
    seconds: float | None,
    corpus_tokens: int,
    device: str,
    reasons: tuple[str, ...],
) -> Plan:
    """The plan for a model and a number of tokens: batch, rates and schedule follow, unless they were fixed."""
    length = model.max_position_embeddings
    derived = scaling.recipe(tokens, model.hidden_size, length, wishes.batch_tokens)
    if wishes.model is not None:
        derived = scaling.recipe_from_model(derived.batch_tokens, model.hidden_size)
    rows = max(1, round(derived.batch_tokens / length))
    steps = wishes.max_steps or max(1, round(tokens / (rows * length)))
    chosen = {
        "matrix_learning_rate": wishes.learning_rate,
        "head_learning_rate": wishes.head_learning_rate,
        "weight_decay": wishes.weight_decay,
    }
    if wishes.model is not None and wishes.learning_rate is not None:
        derived = replace(derived, **{f"{kind}_learning_rate": wishes.learning_rate for kind in RATES})
    micro = wishes.micro_batch_size or max(1, MICRO_BATCH_TOKENS[device] // length)
    return Plan(
        model=model,
        recipe=replace(derived, **{name: value for name, value in chosen.items() if value is not None}),
        sequence_length=length,
        batch_rows=rows,
        micro_batch_rows=min(rows, micro),
        total_steps=steps,
        seconds=seconds,
        warmup_steps=wishes.warmup_steps if wishes.warmup_steps is not None else min(50, steps // 10),
        decay_fraction=DECAY_FRACTION,
        corpus_tokens=corpus_tokens,
        kernels=backend(device),
        reasons=reasons,
    )


def plan_table(plan: Plan) -> str:
    """The derived values, a line each, with the reasons."""
    model, recipe, tokens = plan.model, plan.recipe, plan.tokens
    expected = " expected" if plan.seconds is not None else ""
    rates = recipe.matrix_learning_rate, recipe.embedding_learning_rate, recipe.head_learning_rate
    rows = {
        "layers x width": f"{model.num_hidden_layers} x {model.hidden_size}",
        "heads": f"{model.num_attention_heads} of {model.head_dim}, {model.num_key_value_heads} for keys",
        "SwiGLU width": f"{model.intermediate_size}",
        "vocabulary": f"{model.vocab_size:,}",
        "parameters": f"{model.parameter_count:,} ({scaling.active_parameters(model):,} active)",
        "context": f"{plan.sequence_length} tokens",
        "batch": f"{plan.batch_tokens:,} tokens ({counted(plan.batch_rows, 'row')}, {plan.micro_batch_rows} at a time)",
        "steps": f"{plan.total_steps:,}{expected}, {plan.warmup_steps} warm-up, last {plan.decay_fraction:.0%} decay",
        "tokens": f"{tokens:,} ({tokens / plan.corpus_tokens:.2f} epochs of {plan.corpus_tokens:,})",
        "FLOPs": f"{plan.flops:.3g}",
        "learning rates": "matrices {:.3g}, embedding {:.3g}, head {:.3g}".format(*rates)
        if recipe.optimizer == "muon"
        else f"AdamW {recipe.matrix_learning_rate:.3g}",
        "weight decay": f"{recipe.weight_decay:g}",
        "memory": f"about {quantity(plan.training_bytes())}B",
        "kernels": plan.kernels,
    }
    lines = [f"  {name:<15} {value}" for name, value in rows.items()] + [f"  {reason}" for reason in plan.reasons]
    return "the plan:\n" + "\n".join(lines)
