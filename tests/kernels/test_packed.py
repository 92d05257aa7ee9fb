"""Packed products: the values of the plain product, and the same bits of a row in any batch."""

import pytest
import torch
import torch.nn.functional as F
from llmkit.kernels.linear import can_pack, packed_linear

from llmkit.model import devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_plain_product(dtype, biased):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 72).to(dtype), torch.randn(5, 72).to(dtype)
    bias = torch.randn(96).to(dtype) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(packed_linear(weight, bias)(x).double(), expected, rtol=1e-2, atol=tolerance)


def test_later_changes_of_the_weight_do_not_reach_it():
    if not can_pack(torch.float32, "cpu"):
        pytest.skip("no packing on this build of torch")
    weight, x = torch.randn(32, 64), torch.randn(2, 64)
    product = packed_linear(weight)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before)


@pytest.mark.parametrize("shape", [(768, 256), (256, 704), (512, 1024), (512, 1376), (4096, 128)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_see_its_neighbours(shape, threads):
    if not can_pack(torch.float32, "cpu"):
        pytest.skip("no packing on this build of torch")
    torch.manual_seed(0)
    product, x = packed_linear(torch.randn(shape)), torch.randn(33, shape[1])
    with devices.threads(threads):
        together = product(x)
        for rows in (1, 2, 3, 5, 8, 16, 31):
            assert torch.equal(product(x[:rows]), together[:rows]), rows
        order = torch.randperm(33)
        assert torch.equal(product(x[order]), together[order])
