"""Kernels to compile without a GPU: attention by head size, dtype and kind; losses and log-probabilities.

>>> with compiling_for("sm_90") as kernels:             # doctest: +SKIP
...     ATTENTION["attention packed 128 bfloat16"]()    # `kernels` now holds the three kernels, compiled
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from llmkit.kernels.logit_chunks import Objective
from llmkit.kernels.triton import attention, attention_backward, cross_entropy, decode, logprobs, tiles
from llmkit.kernels.triton.tiles import SIZES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from shapes import specialized_tiles

LENGTH = 1024  # of the examples; code is specialized on the divisibility of strides by 16, not on lengths
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Specializations besides head size and dtype: grouped queries, bounds (documents or windows).
KINDS = {
    "causal": {},
    "packed": {"packed": True},
    "packed grouped": {"packed": True, "group": 8},
    "full": {"is_causal": False},
}
TOKENS, HIDDEN = 4096, 1600  # of the examples; code is specialized on their divisibility by 16
WORDS = 50257, 128256  # not a multiple of 16, and a multiple
PLAIN = Objective()
ENTROPY = Objective(with_entropy=True)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_attention(
    size: int, dtype: torch.dtype, *, packed: bool = False, group: int = 1, is_causal: bool = True
) -> None:
    """Launch forward and backward on tensors without memory, inside `compiling_for`."""
    query = _empty(2, 8 * group, LENGTH, size, dtype=dtype)
    key = _empty(2, 8, LENGTH, size, dtype=dtype)
    bounds = _empty(2, LENGTH, dtype=torch.int32) if packed else None
    out, lse = attention.forward(query, key, key, bounds, size**-0.5, is_causal)
    attention_backward.backward(out, query, key, key, out, lse, bounds, bounds, size**-0.5, is_causal)


def specialized(run: Callable[[], None]) -> None:
    """Run a function with warp specialization, for bfloat16 and head size 128."""
    with ExitStack() as stack:
        for name, chosen in specialized_tiles(tiles).items():
            stack.enter_context(tiles.trying(name, chosen))
        run()


def launch_decode(size: int, dtype: torch.dtype, *, new: int = 1, group: int = 8, window: int = 0) -> None:
    """Launch attention to a cache, inside `compiling_for`."""
    query = _empty(2, 8 * group, new, size, dtype=dtype)
    key = _empty(2, 8, LENGTH, size, dtype=dtype)
    decode.decode(query, key, key, _empty(2, dtype=torch.int64), size**-0.5, window)


def launch_cross_entropy(
    words: int, dtype: torch.dtype, *, objective: Objective = PLAIN, gradient: bool = True, mean: bool = False
) -> None:
    """Launch the kernel on a chunk without memory, inside `compiling_for`; for a mean, tokens share one gradient."""
    logits = _empty(TOKENS, -(-words // 64) * 64, dtype=dtype)[:, :words]
    grad_entropy = _empty(TOKENS) if gradient and objective.with_entropy else None
    target = _empty(TOKENS, dtype=torch.int64)
    upstream = _empty(1).expand(TOKENS) if mean else _empty(TOKENS)
    cross_entropy.loss_and_gradient(logits, target, objective, upstream, grad_entropy, gradient)


def launch_logprobs(hidden: int, dtype: torch.dtype, *, objective: Objective = PLAIN, words: int = WORDS[0]) -> None:
    input, weight = _empty(TOKENS, hidden, dtype=dtype), _empty(words, hidden, dtype=dtype)
    logprobs.logprobs(input, weight, _empty(TOKENS, dtype=torch.int64), objective)


def _named(what: str, function: Callable[..., None], sizes: tuple[int, ...] = SIZES, **details) -> dict[str, Callable]:
    return {
        f"{what} {size} {str(dtype).removeprefix('torch.')}": partial(function, size, dtype, **details)
        for size in sizes
        for dtype in DTYPES
    }


ATTENTION: dict[str, Callable[[], None]] = {}
for _kind, _details in KINDS.items():
    ATTENTION |= _named(f"attention {_kind}", launch_attention, **_details)
for _kind in ("causal", "packed", "packed grouped"):
    _case = ATTENTION[f"attention {_kind} 128 bfloat16"]
    ATTENTION[f"attention {_kind} specialized 128 bfloat16"] = partial(specialized, _case)
ATTENTION |= _named("decode", launch_decode) | _named("decode windowed", launch_decode, window=512, new=4)
LOSSES: dict[str, Callable[[], None]] = (
    _named("loss and gradient", launch_cross_entropy, WORDS)
    | _named("loss, entropy and gradients", launch_cross_entropy, WORDS[:1], objective=ENTROPY)
    | _named("loss alone", launch_cross_entropy, WORDS[:1], gradient=False)
    | _named("logprobs", launch_logprobs, (HIDDEN, HIDDEN + 16))
    | _named("logprobs and entropy", launch_logprobs, (HIDDEN,), objective=ENTROPY)
)
LOSSES["logprobs specialized 1600 bfloat16"] = partial(specialized, LOSSES["logprobs 1600 bfloat16"])
