"""Losses and log-probabilities that are shipped, in the form of `shipped.ATTENTION`."""

from collections.abc import Callable
from functools import partial

import torch
from llmkit.kernels.logit_chunks import Objective
from llmkit.kernels.triton import cross_entropy, logprobs

TOKENS, HIDDEN = 4096, 1600  # of the examples; compiled in is whether they are divisible by 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORDS = 50257, 128256  # no multiple of 16, and one
PLAIN = Objective()
EVERYTHING = Objective(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, with_lse=True, with_entropy=True)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_cross_entropy(
    words: int, dtype: torch.dtype, *, objective: Objective = PLAIN, gradient: bool = True
) -> None:
    """Start the kernel on a chunk without memory, within `compiling_for`; with class weights where all is asked."""
    logits = _empty(TOKENS, -(-words // 64) * 64, dtype=dtype)[:, :words]
    class_weight = _empty(words) if objective.label_smoothing else None
    grad_entropy = _empty(TOKENS) if gradient and objective.with_entropy else None
    target = _empty(TOKENS, dtype=torch.int64)
    cross_entropy.turn(logits, target, class_weight, objective, _empty(TOKENS), grad_entropy, gradient)


def launch_logprobs(hidden: int, dtype: torch.dtype, *, objective: Objective = PLAIN) -> None:
    input, weight = _empty(TOKENS, hidden, dtype=dtype), _empty(WORDS[0], hidden, dtype=dtype)
    logprobs.logprobs(input, weight, _empty(TOKENS, dtype=torch.int64), objective)


def _named(what: str, function: Callable[..., None], sizes: tuple[int, ...], **details) -> dict[str, Callable]:
    return {
        f"{what} {size} {str(dtype).removeprefix('torch.')}": partial(function, size, dtype, **details)
        for size in sizes
        for dtype in DTYPES
    }


LOSSES: dict[str, Callable[[], None]] = (
    _named("loss and gradient", launch_cross_entropy, WORDS)
    | _named("loss and gradient of every option", launch_cross_entropy, WORDS[:1], objective=EVERYTHING)
    | _named("loss alone", launch_cross_entropy, WORDS[:1], gradient=False)
    | _named("logprobs", launch_logprobs, (HIDDEN, HIDDEN + 16))
    | _named("logprobs and entropy, capped", launch_logprobs, (HIDDEN,), objective=EVERYTHING)
)
