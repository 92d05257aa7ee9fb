"""From logits to the next token: temperature, truncation and reproducible random numbers.

The random number of a token is a pure function of (seed, request, sample, position), by a counter-based generator: no
state is carried from one draw to the next, so batch size, order and neighbours cannot change a text. One uniform number
picks a token by inverting the cumulative distribution over tokens in the order of their ids.

B rows, V vocabulary, k most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature below which float32 logits overflow or all but the best vanish
HEAD_TOKENS = 256  # most likely tokens tried first for top-p: sorting 32,000 costs 20 times as much


@dataclass(frozen=True)
class Sampling:
    """Distribution to sample from: temperature, then top-k, top-p of what is left, and min-p.

    temperature  divides the logits; 0 decodes greedily
    top_k        keep the k most likely tokens
    top_p        keep the fewest tokens whose probabilities add up to at least this (Holtzman et al. 2019,
                 arXiv:1904.09751)
    min_p        keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)

    Tokens that tie with the last one kept are kept too, so the result does not depend on a sort's order.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Choice(NamedTuple):
    """The next token of each row, all (B,).

    tokens              int64
    logprobs            float32, natural logarithms under softmax(logits / temperature) over the model's complete
                        vocabulary; under softmax(logits) at temperature 0
    truncated_logprobs  float32, under the truncated, renormalized distribution that the token was sampled from
    sound               whether the row's logits were finite
    """

    tokens: Tensor
    logprobs: Tensor
    truncated_logprobs: Tensor
    sound: Tensor


@torch.inference_mode()
def choose_tokens(
    logits_BV: Tensor,
    uniforms_B: np.ndarray,
    sampling: Sampling,
    vocab_size: int | None = None,
    allowed_BV: Tensor | None = None,
) -> Choice:
    """Sample the next token of each row from the first `vocab_size` tokens, or from those of them that are allowed.

    `uniforms_B`: float64 in [0, 1), one number per row.
    """
    logits_BV = logits_BV.float()
    drawn_BV = logits_BV[:, :vocab_size]
    if allowed_BV is not None:
        drawn_BV = drawn_BV.masked_fill(~allowed_BV, float("-inf"))
    if sampling.temperature < GREEDY_BELOW:
        best = drawn_BV.max(-1)
        # log_softmax computes each row on one thread, logsumexp splits a single row among threads
        logprobs_B = torch.log_softmax(logits_BV, -1).gather(-1, best.indices.unsqueeze(-1)).squeeze(-1)
        return Choice(best.indices, logprobs_B, torch.zeros_like(logprobs_B), best.values.isfinite())
    all_BV = _softmax(logits_BV, sampling.temperature)
    drawn_BV = all_BV[:, :vocab_size] if allowed_BV is None else _softmax(drawn_BV, sampling.temperature)
    probabilities_BV = truncate(drawn_BV, sampling)
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=_double(logits_BV.device))
    total_B1 = cumulative_BV[:, -1:].contiguous()
    target_B1 = torch.as_tensor(uniforms_B, dtype=total_B1.dtype).to(total_B1.device).unsqueeze(-1) * total_B1
    chosen_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # Rounding may lift the product to the total itself, beyond every token.
    chosen_B1 = chosen_B1.minimum(torch.searchsorted(cumulative_BV, total_B1))
    sound_B = total_B1.squeeze(-1).isfinite()
    chosen_B1 = chosen_B1.clamp_(max=probabilities_BV.shape[-1] - 1)  # with NaN the index is past the end
    logprobs_B1 = all_BV.gather(-1, chosen_B1).log()
    drawn_B1 = logprobs_B1 if allowed_BV is None else drawn_BV.gather(-1, chosen_B1).log()
    truncated_B1 = drawn_B1 - total_B1.log().float()
    return Choice(chosen_B1.squeeze(-1), logprobs_B1.squeeze(-1), truncated_B1.squeeze(-1).clamp_(max=0.0), sound_B)


def _softmax(logits_BV: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits_BV if temperature == 1.0 else logits_BV / temperature, -1)


def likeliest(
    logits_NV: Tensor, count: int, temperature: float = 1.0, vocab_size: int | None = None
) -> list[list[tuple[int, float]]]:
    """Return each row's likeliest tokens, among the first `vocab_size`, with log-probabilities as in `Choice`."""
    scaled_NV = logits_NV.float() / (1.0 if temperature < GREEDY_BELOW else temperature)
    best = torch.log_softmax(scaled_NV, -1)[:, :vocab_size].topk(min(count, vocab_size or scaled_NV.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(tokens, values, strict=True)) for tokens, values in rows]


def truncate(probabilities_BV: Tensor, sampling: Sampling) -> Tensor:
    """Set probabilities to zero where top-k, top-p or min-p cut, without renormalizing the rest.

    Each rule amounts to the smallest probability that a row keeps; the strictest one applies.
    """
    size = probabilities_BV.shape[-1]
    top_k = min(sampling.top_k or size, size)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    cutoff_B1: Tensor | None = None
    if top_p < 1.0:
        cutoff_B1 = _nucleus_cutoff(probabilities_BV, top_k, top_p)
    elif top_k < size:
        cutoff_B1 = probabilities_BV.topk(top_k).values[:, -1:]
    if sampling.min_p:
        least_B1 = probabilities_BV.amax(-1, keepdim=True) * sampling.min_p
        cutoff_B1 = least_B1 if cutoff_B1 is None else torch.maximum(cutoff_B1, least_B1)
    return probabilities_BV if cutoff_B1 is None else probabilities_BV.masked_fill(probabilities_BV < cutoff_B1, 0.0)


def _nucleus_cutoff(probabilities_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the smallest probability (B, 1) inside the nucleus of the `top_k` most likely tokens.

    The running sum over the likeliest tokens is the same however many follow, so a row's cutoff does not depend
    on whether its neighbours need the full sort.
    """
    size, double = probabilities_BV.shape[-1], _double(probabilities_BV.device)
    best_Bk = probabilities_BV.topk(top_k if top_k < size else min(HEAD_TOKENS, size)).values
    running_Bk = best_Bk.cumsum(-1, dtype=double)
    if top_k < size:
        needed_B1 = running_Bk[:, -1:] * top_p
    else:
        needed_B1 = probabilities_BV.sum(-1, keepdim=True, dtype=double) * top_p
        if bool((running_Bk[:, -1:] < needed_B1).any()):
            best_Bk = probabilities_BV.sort(-1, descending=True).values
            running_Bk = best_Bk.cumsum(-1, dtype=double)
    last_B1 = torch.searchsorted(running_Bk, needed_B1).clamp_(max=best_Bk.shape[-1] - 1)
    return best_Bk.gather(-1, last_B1)


def _double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


# ---- random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3")

_WORD, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_SEED_DOMAIN = 0xFFFFFFFF  # in place of the sample's number in a draw; no sample has this one


def philox(counter: tuple[np.ndarray | int, ...], key: int) -> list[np.ndarray]:
    """Return four random 32-bit words (as uint64) for each counter of four such words, under a 64-bit key."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter))
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _SHIFT) ^ b ^ np.uint64(low),
            second & _WORD,
            (first >> _SHIFT) ^ d ^ np.uint64(high),
            first & _WORD,
        )
        low, high = (low + _KEY_STEPS[0]) & 0xFFFFFFFF, (high + _KEY_STEPS[1]) & 0xFFFFFFFF
    return [a, b, c, d]


def uniforms(seed: int, request: int, sample: int, start: int, count: int) -> np.ndarray:
    """Return the random numbers in [0, 1), float64, of positions `start` ... `start + count - 1` of one sample.

    seed and request are taken modulo 2^64; positions and samples stay below 2^32 - 1.
    """
    positions = np.arange(start, start + count, dtype=np.uint64)
    words = philox((positions, sample, request & 0xFFFFFFFF, request >> 32 & 0xFFFFFFFF), seed & (2**64 - 1))
    return ((words[0] >> np.uint64(5)) * 67108864.0 + (words[1] >> np.uint64(6))) / 9007199254740992.0


def request_number(ids: Sequence[Any]) -> int:
    """Hash a prompt to 64 bits, so that prompts with equal seeds draw different random numbers, wherever they are.

    The hash is of token ids, or of the text or messages if a server tokenizes them.
    """
    return int.from_bytes(blake2b(",".join(map(str, ids)).encode(), digest_size=8).digest(), "little")


def seed_of_repeat(seed: int, repeat: int) -> int:
    """Return the seed of the `repeat`-th repetition of a request; the first occurrence, 0, keeps `seed`.

    New seeds are below 2^53, so that every JSON reader keeps them exactly.
    """
    if repeat == 0:
        return seed
    words = philox((repeat & 0xFFFFFFFF, _SEED_DOMAIN, repeat >> 32, 0), seed & (2**64 - 1))
    return int(words[0]) >> 11 << 32 | int(words[1])
