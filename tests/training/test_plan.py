"""The plan of a run: given options are kept, the rest is derived, and a budget is converted by the machine's speed."""

import pytest

from llmkit.errors import UserError
from llmkit.stages.pretrain import PretrainConfig
from llmkit.training import plan as rules
from llmkit.training.plan import Plan, Planner, plan_table


def no_measurement(*shape):
    raise AssertionError("the machine is measured for time budgets alone")


def plan(speed=no_measurement, used=0.0, closing=0, within=lambda length: 1.0, **options):
    return Planner(
        options=PretrainConfig(**options),
        vocab_size=4096,
        corpus_tokens=20_000_000,
        speed=speed,
        seconds_used=lambda: used,
        closing_tokens=closing,
        documents_within=within,
    ).plan()


def machine(flops_per_second):
    """Return a machine with this many FLOP/s on any model."""
    return lambda model, recipe, rows, length: flops_per_second / model.flops_per_token(length)


def test_depth_sets_the_rest():
    found = plan(depth=6)
    assert (found.model.hidden_size, found.model.num_attention_heads) == (384, 6)
    assert found.tokens == pytest.approx(20 * rules.active_parameters(found.model), rel=0.01)


def test_options_fixed_by_the_user_are_kept():
    found = plan(
        depth=3,
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        sequence_length=64,
        batch_tokens=640,
        learning_rate=0.5,
        weight_decay=0.25,
        warmup_steps=7,
        micro_batch_size=3,
        max_steps=11,
    )
    model = found.model
    assert (model.num_hidden_layers, model.hidden_size, model.intermediate_size) == (3, 96, 256)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (4, 2, 24)
    assert (found.sequence_length, found.batch_rows, found.micro_batch_rows) == (64, 10, 3)
    rates = found.recipe.matrix_learning_rate, found.recipe.head_learning_rate
    assert (rates, found.recipe.weight_decay) == ((0.5, 0.125), 0.25)
    assert (found.warmup_steps, found.total_steps) == (7, 11)


@pytest.mark.parametrize("horizon", [{"tokens": 3_000_000}, {"epochs": 0.15}, {"flops": 3e6 * 24117248}])
def test_horizons_agree(horizon):
    found = plan(depth=4, **horizon)
    assert found.model.flops_per_token(256) == pytest.approx(24117248, rel=0.3)
    reference = plan(depth=4, tokens=3_000_000)
    if "flops" in horizon:
        assert found.flops == pytest.approx(horizon["flops"], rel=0.01)
    else:
        assert found.total_steps == reference.total_steps


def test_steps_are_exactly_the_requested_ones():
    found = plan(depth=4, max_steps=123)
    assert found.total_steps == 123
    assert found.batch_tokens == pytest.approx(
        rules.recipe(found.tokens, found.model.hidden_size, 256).batch_tokens, rel=0.1
    )


def test_more_compute_buys_a_deeper_model():
    depths = [plan(flops=flops).model.num_hidden_layers for flops in (1e12, 1e14, 1e17, 1e20)]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    speeds = [plan(speed=machine(rate), time_budget=600).model.num_hidden_layers for rate in (1e9, 1e11, 1e14)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


def test_the_budget_pays_for_start_up_and_scoring():
    generous = plan(speed=machine(1e11), time_budget=600, depth=4)
    late = plan(speed=machine(1e11), time_budget=600, depth=4, used=100.0, closing=2_000_000)
    assert late.seconds < generous.seconds - 100
    assert late.tokens < generous.tokens


def test_the_plan_gives_reasons():
    table = plan_table(plan(speed=machine(1e11), time_budget=60))
    assert "tokens/s" in table and "promises the lowest loss in 60 s" in table and "learning rates" in table


def test_a_plan_survives_the_file_of_a_checkpoint():
    import json

    found = plan(depth=5, tokens=1_000_000)
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_many_epochs_over_a_small_corpus_favour_a_smaller_model():
    large = rules.predicted_loss(2e6, 100e6, corpus_tokens=1e9)
    small = rules.predicted_loss(2e6, 100e6, corpus_tokens=1e6)
    assert large == rules.predicted_loss(2e6, 100e6, corpus_tokens=100e6)  # no repeats, no penalty
    assert small > large
    assert small == pytest.approx(rules.predicted_loss(2e6, 1000e6, corpus_tokens=1e6), abs=1e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 1, "hidden_size": 33}, "--hidden-size 33: expected heads of an even .* 1 head of 33; .* of 2"),
        ({"depth": 1, "num_attention_heads": 64}, "--num-attention-heads 64: expected .* 64 heads of 1; .* of 128"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "--hidden-size 100: not a multiple of 3 attention heads"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "--num-key-value-heads: expected a divisor of 4 attention heads, found 3",
        ),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused_by_its_option(options, message):
    with pytest.raises(UserError, match=message):
        Planner(options=PretrainConfig(**options), vocab_size=500).shape(options.get("depth", 4))


def test_a_budget_that_is_over_before_training_is_refused():
    with pytest.raises(UserError, match=r"after 6 s of preparation; give more time$"):
        plan(speed=machine(1e11), time_budget=5, used=6.0)


def test_rates_grow_with_the_root_of_the_batch():
    small, large = (rules.recipe(20e6, 256, 256, batch) for batch in (8192, 4 * 8192))
    assert large.matrix_learning_rate == pytest.approx(2 * small.matrix_learning_rate)


def test_no_number_of_tokens_makes_a_batch_of_a_hundred_million() -> None:
    assert rules.recipe(15e12, 256, 256).batch_tokens < rules.LARGEST_BATCH
    assert rules.recipe(1e18, 256, 256).batch_tokens == rules.LARGEST_BATCH
    assert rules.recipe(1e18, 256, 256, 2**23).batch_tokens == 2**23  # a given value is kept


def test_active_parameters_are_those_of_the_matrices():
    from llmkit.model.transformer import Transformer

    config = rules.shape_for_depth(2, 512, 64)
    model = Transformer(config, seed=0)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embed_tokens")
    assert rules.active_parameters(config) == matrices


def test_a_model_that_the_memory_cannot_hold_is_not_measured():
    def refuse(plan):
        assert sum(plan.training_memory().values()) > 1e12
        raise UserError("too large")

    with pytest.raises(UserError, match="too large"):
        Planner(
            options=PretrainConfig(depth=200, time_budget=60),
            vocab_size=512,
            corpus_tokens=10**6,
            speed=lambda *shape: pytest.fail("measured"),
            check_fits=refuse,
        ).plan()


@pytest.mark.parametrize(
    "options, longest, context",
    [
        ({"depth": 4, "tokens": 20_000_000}, 100, 256),  # all documents fit
        ({"depth": 4, "tokens": 20_000_000}, 400, 512),
        ({"depth": 4, "tokens": 20_000_000}, 5000, 1024),  # a step has no room for 8 rows of 2,048
        ({"depth": 4, "tokens": 1_000_000}, 5000, 256),
        ({"depth": 4, "tokens": 1_000_000, "batch_tokens": 65536}, 5000, 2048),
        ({"depth": 4, "tokens": 20_000_000, "sequence_length": 64}, 5000, 64),
        ({"depth": 10, "tokens": 20_000_000}, 100, 1024),
    ],
)
def test_the_context_follows_from_the_documents_as_far_as_a_step_has_room(options, longest, context):
    """Document lengths are uniform up to the longest."""
    found = plan(within=lambda length: min(1.0, length / longest), **options)
    assert found.sequence_length == found.model.max_position_embeddings == context
    told = [reason for reason in found.reasons if "sft cuts answers there; --sequence-length" in reason]
    assert len(told) == (context < longest)
