"""Attention of new tokens to a cache of keys and values, in rows of different lengths."""

import llmkit.kernels.fused_attention as fused_attention
import torch
from llmkit.kernels.attention import attention_reference
from torch import Tensor


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of the last T tokens of each row to all tokens of their row up to themselves: (B, H, T, D).

    query (B, H, T, D): one new token a row in decoding, a few in extending a prefix. key_cache and value_cache
    (B, K, S, D), H a multiple of K, already hold the new tokens' keys and values; `lengths` (B,) counts the
    positions in use, the new ones among them. Query t stands at lengths - T + t. `window` is that of
    `scaled_dot_product_attention`. A query with no key, in a row shorter than T, gives zeros. No gradients.

    On a GPU a sequence's result has the same bits whatever the batch and the capacity S.
    """
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"lengths: expected {query.shape[0]} of them, found shape {tuple(lengths.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if fused_attention.can_run(query, key_cache, value_cache, factor):
        return fused_attention.attention_decode(query, key_cache, value_cache, lengths, factor, window or 0)
    return attention_decode_reference(query, key_cache, value_cache, lengths, factor, window)


def attention_decode_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same step by step, with all scores held."""
    new, capacity = query.shape[2], key_cache.shape[2]
    key = torch.arange(capacity, device=query.device)
    last = (lengths.unsqueeze(1) - new + torch.arange(new, device=query.device)).unsqueeze(-1)
    seen = key <= last
    if window is not None:
        seen = seen & (key > last - window)
    mask = seen.unsqueeze(1)
    # a query with no key: let it see all, for a softmax over nothing is NaN, and blank its output
    empty = ~mask.any(-1, keepdim=True)
    out = attention_reference(query, key_cache, value_cache, scale=scale, mask=mask | empty)
    return out.masked_fill(empty, 0.0)
