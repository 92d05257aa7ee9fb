"""Estimates for GPUs that are not here follow from the plan by arithmetic."""

import pytest

from llmkit.engine.estimating import GPUS, SHARE, estimate
from llmkit.engine.planning import Wishes, make_plan
from llmkit.errors import UserError
from llmkit.stages.pretrain import GPU_KINDS


def plan(**wishes):
    return make_plan(
        Wishes(**wishes), vocab_size=32768, corpus_tokens=10_000_000_000, device="cpu", speed=lambda *shape: 1.0
    )


def test_one_gpu_sends_nothing_and_computes_at_its_share_of_the_peak():
    one = plan(depth=12, batch_tokens=524_288, max_steps=100)
    found = estimate(one, "h200", nodes=1, gpus=1)
    assert found.sending == 0 and found.fits
    assert found.seconds == pytest.approx(one.flops / (SHARE * GPUS["h200"].flops))
    assert found.tokens_per_second * found.seconds == pytest.approx(one.tokens)


def test_eight_gpus_take_an_eighth_of_the_time_and_of_the_state():
    large = plan(depth=20, batch_tokens=1_048_576, max_steps=100)
    one, eight = estimate(large, "h100", 1, 1, micro_batch_rows=8), estimate(large, "h100", 1, 8, micro_batch_rows=8)
    assert eight.computing == pytest.approx(one.computing / 8) and eight.sending > 0
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    state, waiting = 16.0 * large.model.parameter_count, 4.0 * large.model.parameter_count
    assert one.bytes - eight.bytes == pytest.approx(state * 7 / 8 - waiting)


def test_gpus_that_divide_each_layer_hold_less_and_wait_for_sums():
    few, more = (plan(depth=20, batch_tokens=rows * 2048, max_steps=100) for rows in (8, 16))
    whole, cut = estimate(more, "h100", 2, 8, 1), estimate(few, "h100", 2, 8, 1, tensor=2)  # a row at a time
    head = 6 * few.model.vocab_size * few.model.hidden_size
    flops = few.model.flops_per_token(few.sequence_length)
    assert whole.summing == 0 and cut.summing > 0 and cut.bytes < whole.bytes
    assert cut.computing / whole.computing == pytest.approx((head + flops) / 2 / flops)
    with pytest.raises(UserError, match="8 rows in a batch are fewer than 16 GPUs"):
        estimate(few, "h100", 2, 8)
    with pytest.raises(UserError, match="divides the 8 GPUs of a machine, found 3"):
        estimate(few, "h100", 1, 8, tensor=3)


def test_a_slow_network_is_what_a_step_waits_for():
    small = plan(depth=12, batch_tokens=524_288, max_steps=10)
    found = estimate(small, "h100", nodes=64, gpus=1)
    assert found.sending > found.computing
    assert found.tokens_per_second == pytest.approx(small.batch_tokens / found.sending)


def test_more_gpus_than_rows_are_refused():
    with pytest.raises(UserError, match="--batch-tokens"):
        estimate(plan(depth=2, batch_tokens=8192, max_steps=2), "h100", nodes=100, gpus=8)


def test_every_kind_is_an_option():
    assert set(GPU_KINDS) == set(GPUS)
