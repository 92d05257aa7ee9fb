"""Host time of the GPU kernels: what a call costs in Python and torch before a kernel is launched, measured on a CPU.

    python benchmarks/host_time.py

The launch itself is replaced: nothing is computed, and Triton's own time is not counted. The rest is what the host of a
GPU does, except allocation. CPU time of one thread, the minimum of 15 rounds.
"""

import os
import time
from collections.abc import Callable

os.environ["LLMKIT_KERNELS"] = "interpret"

import torch
import torch.nn.functional as F
from llmkit.kernels.attention import Packing, attention_decode, scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.dispatch import triton_module
from llmkit.kernels.logprobs import linear_logprobs

CALLS, ROUNDS = 100, 15


def microseconds(function: Callable[[], object]) -> float:
    def round_of_calls() -> float:
        start = time.process_time()
        for _ in range(CALLS):
            function()
        return time.process_time() - start

    return min(round_of_calls() for _ in range(ROUNDS)) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    for name in ("attention", "attention_backward", "decode", "cross_entropy", "logprobs"):
        triton_module(name).launch = lambda *_, **__: None
    query = torch.randn(1, 4, 16, 64)
    leaf = query.clone().requires_grad_()
    packing = Packing(torch.zeros(1, 16, dtype=torch.long))
    hidden = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(64, 16, requires_grad=True)
    target, lengths = torch.arange(4), torch.tensor([16])

    def attention(x: torch.Tensor, **options) -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x, is_causal=True, **options)

    def torch_attention() -> torch.Tensor:
        return F.scaled_dot_product_attention(query[:, :, :1], query[:, :, :1], query[:, :, :1])

    rows = {
        "torch's attention of one token": (False, torch_attention),
        "attention": (False, lambda: attention(query)),
        "attention, packed": (False, lambda: attention(query, doc_ids=packing)),
        "attention to a cache": (False, lambda: attention_decode(query[:, :, :1], query, query, lengths)),
        "attention, forward and backward": (True, lambda: torch.autograd.grad(attention(leaf), leaf, query)),
        "loss and gradients": (True, lambda: linear_cross_entropy(hidden, weight, target).backward()),
        "log-probabilities": (False, lambda: linear_logprobs(hidden, weight, target)),
    }
    print("| call | us |\n|---|---|")
    for name, (gradients, function) in rows.items():
        with torch.set_grad_enabled(gradients):
            print(f"| {name} | {microseconds(function):.0f} |")


if __name__ == "__main__":
    main()
