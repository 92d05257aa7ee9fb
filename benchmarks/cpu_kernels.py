"""The kernels' CPU path compared with torch's operations: forward + backward, CPU milliseconds, one thread.

    python benchmarks/cpu_kernels.py [--shape tiny|middle|large] [--repeats 12]

CPU time of one thread rather than wall time, because other programs disturb it less; the second best of the repeats.
Each row is one operation of a decoder layer of the given shape: ours, torch's counterpart, and their ratio.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmkit.kernels.attention import scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.linear import linear
from llmkit.kernels.projections import feed_forward, qkv_rotary
from llmkit.kernels.rowwise import rms_norm
from torch import Tensor

from llmkit.model.devices import keep_freed_memory

# rows, tokens per row, hidden size, intermediate size, heads, head size, vocabulary
SHAPES = {
    "tiny": (12, 64, 128, 344, 4, 32, 512),
    "middle": (32, 256, 256, 704, 4, 64, 4096),
    "large": (16, 512, 512, 1408, 8, 64, 32768),
}


def cpu_ms(step: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], repeats: int) -> float:
    """Return the CPU milliseconds of one forward and backward pass."""
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    times = []
    for _ in range(repeats):
        for x in inputs:
            x.grad = None
        start = time.process_time()
        outputs = step(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        elapsed = time.process_time() - start
        upstream = [torch.full_like(output, 1e-3) for output in outputs]
        start = time.process_time()
        torch.autograd.backward(outputs, upstream)
        times.append(elapsed + time.process_time() - start)
    return 1e3 * sorted(times)[1]


def rotate_half_split(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos + torch.cat((-second, first), -1) * sin


def rows(shape: str, dtype: torch.dtype):
    """Yield (name, ours, torch's, inputs) of each operation."""
    batch, length, hidden, intermediate, heads, size, vocab = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*dimensions: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(dimensions, generator=generator) * scale).to(dtype)

    x, gain, eps = normal(batch, length, hidden), normal(hidden), 1e-6
    qkv = normal(3 * heads * size, hidden, scale=hidden**-0.5)
    gate_up, down = normal(2 * intermediate, hidden, scale=hidden**-0.5), normal(hidden, intermediate, scale=0.02)
    angles = torch.rand(length, size // 2, generator=generator)
    table = torch.stack((angles.cos(), angles.sin()), -1)
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in table.unbind(-1))
    target = torch.randint(0, vocab, (batch, length), generator=generator)

    def torch_qkv(x: Tensor, weight: Tensor):
        q, k, v = F.linear(x, weight).view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (size,), eps=eps), F.rms_norm(k, (size,), eps=eps)
        return rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin), v

    def torch_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def torch_loss(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), target.flatten())

    yield "linear", linear, F.linear, [x, normal(hidden, hidden)]
    yield "RMSNorm", lambda x, w: rms_norm(x, w, eps), lambda x, w: F.rms_norm(x, (hidden,), w, eps), [x, gain]
    ours_qkv = lambda x, w: qkv_rotary(x, w, table, heads=heads, kv_heads=heads, eps=eps)  # noqa: E731
    yield "q, k, v: norm, rotary", ours_qkv, torch_qkv, [x, qkv]
    yield "feed-forward", feed_forward, torch_mlp, [x, gate_up, down]
    qkv_inputs = [normal(batch, heads, length, size) for _ in range(3)]
    attend = lambda f: lambda q, k, v: f(q, k, v, is_causal=True)  # noqa: E731
    ours_attention, torch_attention = attend(scaled_dot_product_attention), attend(F.scaled_dot_product_attention)
    yield "attention", ours_attention, torch_attention, qkv_inputs
    yield "loss", lambda x, w: linear_cross_entropy(x, w, target), torch_loss, [x, normal(vocab, hidden, scale=0.05)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides
    print("| shape | dtype | step | ours ms | torch ms | torch / ours |\n|---|---|---|---|---|---|")
    for shape in arguments.shape or ["tiny", "middle"]:
        for dtype in (torch.float32, torch.bfloat16):
            for name, ours, theirs, inputs in rows(shape, dtype):
                mine, other = (cpu_ms(step, inputs, arguments.repeats) for step in (ours, theirs))
                kind = str(dtype).removeprefix("torch.")
                print(f"| {shape} | {kind} | {name} | {mine:.2f} | {other:.2f} | {other / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()
