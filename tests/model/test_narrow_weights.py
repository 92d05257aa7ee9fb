"""Low-precision weights: close to the plain product, the same in any batch, and never silently wrong."""

import warnings

import pytest
import torch
from tiny import make_model

from llmkit.errors import UserError
from llmkit.generation.decode import Decoder
from llmkit.model.devices import Precision, can_narrow, choose_precision
from llmkit.model.quantized import narrow_linear

pytestmark = pytest.mark.skipif(not can_narrow(), reason="FBGEMM is not in this build of torch")


@pytest.mark.parametrize(("weights", "error"), [("half", 5e-4), ("int8", 0.02)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(96, 72), (257, 64), (64, 1000)])
def test_it_is_nearly_the_plain_product(weights, error, biased, shape):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(9, shape[1])
    bias = torch.randn(shape[0]) if biased else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a deprecated API is used, but users must not see the warning
        product = narrow_linear(weight, bias, weights)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert product is not None and (product(x) - expected).std() < error * expected.std()


def test_int8_sums_do_not_overflow_and_rows_have_scales_of_their_own():
    weight, x = torch.full((8, 512), 3.0), torch.full((3, 512), 5.0)
    x[1], x[2] = 1e-4, 0.0
    product = narrow_linear(weight, None, "int8")
    assert product is not None
    torch.testing.assert_close(product(x)[:, 0], torch.tensor([7680.0, 0.1536, 0.0]), rtol=1e-5, atol=0)


def test_int8_rows_do_not_see_their_neighbours():
    torch.manual_seed(0)
    product, x = narrow_linear(torch.randn(200, 136), None, "int8"), torch.randn(50, 136)
    assert product is not None
    for rows in (1, 2, 7, 31):
        assert torch.equal(product(x[:rows]), product(x)[:rows])


def test_weights_beyond_half_precision_are_not_converted():
    assert narrow_linear(torch.full((8, 8), 1e5), None, "half") is None
    model = make_model()
    model.layers[0].gate_up.data[3] *= 1e6
    prompt = list(range(9))
    with torch.no_grad():
        whole = model.logits(model(torch.tensor([prompt])))[0]
    _, logits = next(Decoder(model, 1, "half").logits_in_pieces(prompt, len(prompt)))
    torch.testing.assert_close(logits, whole, rtol=0, atol=0.05)


@pytest.mark.parametrize("weights", ["half", "int8"])
def test_nan_is_not_hidden(weights):
    for place in ("weight", "input"):
        weight, x = torch.randn(16, 16), torch.randn(2, 16)
        (weight if place == "weight" else x)[1, 3] = torch.nan
        product = narrow_linear(weight, None, weights)
        assert product is None or not product(x).isfinite().all()


def test_the_decoder_needs_its_model_no_more():
    model = make_model()
    decoder, prompt = Decoder(model, 2, "int8"), [1, 2, 3]
    before = decoder.prefill(prompt).logits_1V
    for layer in model.layers:
        layer.qkv.data.zero_()
        layer.down.data.zero_()
    assert torch.equal(decoder.prefill(prompt).logits_1V, before)


def test_precisions_are_chosen_for_the_machine(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has, expected in ((False, Precision(torch.float32, "half")), (True, Precision(torch.bfloat16, "dense"))):
        monkeypatch.setattr("llmkit.model.devices._cpu_has_bfloat16", lambda has=has: has)
        assert choose_precision("bfloat16", cpu) == expected
        assert choose_precision("auto", cpu) == Precision(torch.float32, "dense")
    assert choose_precision("auto", gpu) == Precision(torch.bfloat16, "dense")
    assert choose_precision("int8", cpu) == Precision(torch.float32, "int8")
    with pytest.raises(UserError, match="--dtype int8: expected an x86 CPU"):
        choose_precision("int8", gpu)
