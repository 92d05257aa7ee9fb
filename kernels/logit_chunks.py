"""Logits one chunk at a time: the losses or log-probabilities of their rows, and the gradients.

The logits of a complete batch are the largest tensor of training (4,096 tokens x 32,768 words: 512 MB in float32, three
times that in the usual formulation). Here one chunk of them is computed in a reused buffer and converted in place to
its rows' losses and the gradient of the logits, which is multiplied into the gradients of hidden states and weight. The
conversion is eager torch or the Triton kernel of kernels/triton/cross_entropy.py; the products are those of oneDNN or
cuBLAS either way. N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from llmkit.kernels.dispatch import backend, triton_module
from llmkit.kernels.linear import matmul_nn, matmul_nt, matmul_tn
from torch import Tensor

# On CPU a chunk's logits should stay in cache, and its tokens should be enough to make accumulating the weight gradient
# cheap: at 8,192 tokens x 256 hidden, chunks of 2,048 or 4,096 tokens are 1.2x as fast as 256.
CPU_CHUNK_BYTES = 32 * 2**20
CPU_LEAST_TOKENS = 1024
CHUNK_BYTES = 512 * 2**20
LEAST_TOKENS = 4096
# Below this probability -log(p) is recomputed from the logits, because p is near underflow.
LEAST_PROBABILITY = 1e-30
ROW_ALIGNMENT = 64  # numbers; with a vocabulary of 50257 only the first row would be at a 16-byte boundary
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Objective:
    """Loss of a row of logits z with the target y: logsumexp(z / t) - z[y] / t, t the temperature.

    With a `softcap` c, 0 for none, z is c * tanh(logit / c) (Gemma 2, arXiv:2408.00118, section 2).
    """

    ignore_index: int = -100
    temperature: float = 1.0
    with_entropy: bool = False
    softcap: float = 0.0


class Rows(NamedTuple):
    """Loss and entropy per token, in float32 or float64: 0 if the target is ignored; entropy None unless requested."""

    loss: Tensor
    entropy: Tensor | None


@dataclass
class Gradients:
    """Gradients of the losses' sum weighted by `upstream`: input (N, D) in its dtype, weight in float32 or float64."""

    input: Tensor | None = None
    weight: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def uses_triton(input: Tensor) -> bool:
    return input.dtype in TRITON_DTYPES and backend(input.device.type) in ("triton", "interpret")


def auto_chunk_tokens(weight: Tensor) -> int:
    row = weight.shape[0] * weight.element_size()
    if weight.device.type == "cpu":
        return max(CPU_LEAST_TOKENS, CPU_CHUNK_BYTES // row)
    return max(LEAST_TOKENS, CHUNK_BYTES // row // 512 * 512)


def rows_and_gradients(
    input: Tensor, weight: Tensor, target: Tensor, objective: Objective, chunk_tokens: int, *,
    upstream: Tensor | None = None, grad_entropy: Tensor | None = None, need: tuple[bool, bool] = (False, False),
) -> tuple[Rows, Gradients]:  # fmt: skip
    """Return the rows of every token, and the gradients of input and weight if `need`ed. No autograd.

    input (N, D), weight (V, D), target (N,). `upstream`, (N,) or a scalar on the device, is the gradient
    of each loss, 1 if None; `grad_entropy` (N,) is that of each entropy. Raises IndexError for a target outside
    [0, V) on CPU; on a GPU, where nothing is read back, the loss of such a token is NaN.
    """
    chunks = _Chunks(input, weight, objective, min(chunk_tokens, max(1, input.shape[0])))
    if upstream is not None:
        upstream = upstream.to(accumulation_dtype(input.dtype)).expand(input.shape[0])
    if not chunks.on_host:
        return chunks.run(input, target, upstream, grad_entropy, need)
    # on the host, where a check is free, ignored tokens are skipped, and their results are zeros
    target = target.long()
    counted = target != objective.ignore_index
    selected = None if bool(counted.all()) else counted.nonzero().squeeze(1)
    targets = target if selected is None else target.index_select(0, selected)
    if targets.numel():
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(f"target {low if low < 0 else high} is out of bounds with {weight.shape[0]} classes")
    if selected is None:
        return chunks.run(input, target, upstream, grad_entropy, need)

    def select(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, selected)

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(target.shape + x.shape[1:]).index_copy_(0, selected, x)

    rows, gradients = chunks.run(select(input), targets, select(upstream), select(grad_entropy), need)
    gradients.input = spread(gradients.input)
    return Rows(*map(spread, rows)), gradients  # type: ignore[arg-type]


class _Chunks:
    """The loop over chunks, and the one buffer of logits."""

    def __init__(self, input: Tensor, weight: Tensor, objective: Objective, chunk_tokens: int):
        self.weight, self.objective, self.chunk_tokens = weight, objective, chunk_tokens
        self.dtype = accumulation_dtype(input.dtype)
        self.fused = uses_triton(input)
        self.on_host = input.device.type == "cpu" and not self.fused
        self.plain = (  # the loss follows from the probabilities; those of float16 underflow at 6e-8
            self.on_host and input.dtype != torch.float16 and not objective.with_entropy
        )
        self._buffer: Tensor | None = None

    def run(self, input, target, upstream, grad_entropy, need) -> tuple[Rows, Gradients]:
        tokens, wanted = input.shape[0], (True, self.objective.with_entropy)
        rows = Rows(*(input.new_empty(tokens, dtype=self.dtype) if each else None for each in wanted))  # type: ignore
        gradients = Gradients(torch.empty_like(input, memory_format=torch.contiguous_format) if need[0] else None)
        compute = self._by_softmax if self.plain and any(need) else self._loss_and_gradient
        for start in range(0, tokens, self.chunk_tokens):
            span = slice(start, min(start + self.chunk_tokens, tokens))
            above, above_entropy = (None if x is None else x[span] for x in (upstream, grad_entropy))
            logits_NV, slope_NV = self._logits(input[span]), None
            if cap := self.objective.softcap:
                logits_NV.div_(cap).tanh_()
                slope_NV = 1 - logits_NV.square() if any(need) else None
                logits_NV.mul_(cap)
            pieces, grad_NV = compute(logits_NV, target[span], above, above_entropy, any(need))
            if grad_NV is not None and slope_NV is not None:
                grad_NV.mul_(slope_NV)
            for values, piece in zip(rows, pieces, strict=True):
                if values is not None and piece is not None:
                    values[span] = piece
            if grad_NV is not None:
                if gradients.input is not None and self.on_host:
                    gradients.input[span] = matmul_nn(grad_NV, self.weight)
                elif gradients.input is not None:
                    torch.mm(grad_NV, self.weight, out=gradients.input[span])
                if need[1]:
                    gradients.weight = self._sum_of_products(gradients.weight, grad_NV, input[span])
        if self.plain and any(need):
            unlikely = rows.loss > -math.log(LEAST_PROBABILITY)
            if unlikely.any():
                rows.loss[unlikely] = self.run(input[unlikely], target[unlikely], None, None, (False,) * 2)[0].loss
        if tokens == 0:
            gradients.weight = self.weight.new_zeros(self.weight.shape, dtype=self.dtype) if need[1] else None
        return rows, gradients

    def _logits(self, input: Tensor) -> Tensor:
        if not self.fused:
            return matmul_nt(input, self.weight)
        vocab = self.weight.shape[0]
        out = self._space(input, -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :vocab]
        return torch.mm(input, self.weight.t(), out=out)

    def _space(self, like: Tensor, width: int) -> Tensor:
        """Return as many rows of the buffer as `like` has."""
        if self._buffer is None:
            self._buffer = like.new_empty(self.chunk_tokens, width)
        return self._buffer[: like.shape[0]]

    def _loss_and_gradient(
        self, logits_NV, target, upstream, grad_entropy, need_gradient
    ) -> tuple[Rows, Tensor | None]:
        arguments = logits_NV, target, self.objective, upstream, grad_entropy, need_gradient
        if self.fused:
            rows = Rows(*triton_module("cross_entropy").loss_and_gradient(*arguments))
            return rows, logits_NV if need_gradient else None
        return loss_and_gradient_reference(*arguments)

    def _by_softmax(self, logits_NV, target, upstream, grad_entropy, need_gradient) -> tuple[Rows, Tensor]:
        """Use torch's softmax, whose exponential is several times faster than `exp` on CPU.

        It computes in float32 and rounds once to the dtype of the products; the loss is -log of the target's
        probability.
        """
        if self.objective.temperature != 1.0:
            logits_NV.div_(self.objective.temperature)
            upstream = logits_NV.new_ones(target.shape, dtype=self.dtype) if upstream is None else upstream
            upstream = upstream / self.objective.temperature
        grad_NV = torch.ops.aten._softmax.out(logits_NV, 1, False, out=self._space(logits_NV, logits_NV.shape[1]))
        row = torch.arange(target.shape[0])
        probability = grad_NV[row, target]
        grad_NV[row, target] = probability - 1
        if upstream is not None:
            grad_NV.mul_(upstream.unsqueeze(1).to(grad_NV.dtype))
        return Rows(-probability.to(self.dtype).log(), None), grad_NV

    def _sum_of_products(self, total: Tensor | None, grad_NV: Tensor, input: Tensor) -> Tensor:
        """Return `total` + grad_NV.T @ input in the accumulation dtype; total may be overwritten, None is zero."""
        if _adds_in_float32(grad_NV.dtype, grad_NV.device.type):
            beta = 0 if total is None else 1
            if total is None:  # contiguous, as the operators promise, whatever the layout of the weight
                total = torch.empty_like(self.weight, dtype=self.dtype, memory_format=torch.contiguous_format)
            add = torch.ops.aten.addmm.dtype_out
            return add(total, grad_NV.t(), input, torch.float32, beta=beta, out=total)
        if self.fused and grad_NV.device.type == "cpu":  # interpreted: as cuBLAS does
            grad_NV, input = grad_NV.to(self.dtype), input.to(self.dtype)
        product = matmul_tn(grad_NV, input) if self.on_host else grad_NV.t() @ input
        return product.to(self.dtype) if total is None else total.add_(product)


@cache
def _adds_in_float32(dtype: torch.dtype, device_type: str) -> bool:
    """Return True if cuBLAS can add a product of this dtype to a float32 matrix: torch 2.11 allows it, ROCm does not.

    Otherwise each chunk's part of the weight gradient is rounded to the dtype before it is added.
    """
    if device_type != "cuda" or dtype == torch.float32:
        return False  # the same either way
    a, total = torch.ones(16, 16, dtype=dtype, device="cuda"), torch.ones(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((total == 17).all())


def loss_and_gradient_reference(
    logits_NV: Tensor, target: Tensor, objective: Objective, upstream: Tensor | None, grad_entropy: Tensor | None,
    need_gradient: bool,
) -> tuple[Rows, Tensor | None]:  # fmt: skip
    """Return the rows of a chunk of logits and their gradient, step by step in float32 or float64."""
    z_NV = logits_NV.to(accumulation_dtype(logits_NV.dtype))
    if objective.temperature != 1.0:
        z_NV = z_NV / objective.temperature
    log_p = torch.log_softmax(z_NV, -1)
    ignored = target == objective.ignore_index
    valid = (target >= 0) & (target < logits_NV.shape[1])
    y = torch.where(valid, target, 0).long().unsqueeze(1)
    losses = torch.where(valid, -log_p.gather(1, y).squeeze(1), math.nan)  # as in the kernel, without a synchronization
    p_NV = log_p.exp() if need_gradient or objective.with_entropy else None
    entropy = torch.special.entr(p_NV).sum(-1) if p_NV is not None and objective.with_entropy else None
    gradient = None
    if need_gradient:
        assert p_NV is not None
        gradient = p_NV.clone()
        gradient.scatter_add_(1, y, -valid.to(gradient.dtype).unsqueeze(1))
        if upstream is not None:
            gradient *= upstream.unsqueeze(1)
        if grad_entropy is not None:
            assert entropy is not None
            gradient += grad_entropy.unsqueeze(1) * (torch.special.entr(p_NV) - p_NV * entropy.unsqueeze(1))
        if objective.temperature != 1.0:
            gradient /= objective.temperature
        gradient = gradient.masked_fill_(ignored.unsqueeze(1), 0.0).to(logits_NV.dtype)
    rows = (None if x is None else x.masked_fill(ignored, 0.0) for x in (losses, entropy))
    return Rows(*rows), gradient  # type: ignore[arg-type]
