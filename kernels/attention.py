"""Attention: one function for every machine, its eager reference, and a path for CPUs.

On a GPU it runs the Triton kernels of kernels/triton/; on CPU torch's flash kernel in float32, and batched products
over blocks of queries in bfloat16.

All masks have one form: the query at position q sees the keys from `lo[q]` to q, where lo is the start of its document,
or q - window + 1 if that is later. Blocks of queries skip the keys before their smallest `lo`.

B batch, H query heads, K key-value heads, G = H / K, T queries, S keys, D head size.
"""

import math
from contextlib import nullcontext
from functools import cached_property, lru_cache

import llmkit.kernels.fused_attention as fused_attention
import torch
import torch.nn.functional as F
from llmkit.kernels.dispatch import in_one_dtype, once_differentiable
from torch import Tensor

QUERY_BLOCK = 128  # queries; the fastest of 64, 128 and 256 up to 512 tokens
LONG_QUERY_BLOCK = 256  # 1.15x as fast as 128 at 1,024
LONGEST_KEPT = 512  # tokens up to which probabilities are kept for backward
LONGEST_DENSE_MASK = 1024  # tokens of packed bfloat16; beyond it no T x T mask is ever built
# The same for float32, because torch's flash kernel computes masked scores too: document by document takes 0.47x the
# time at 4 rows of 512 tokens and 19 documents, 0.13x at 2 of 1,024 and 207, 1.2x at 32 of 128 and 89; with branching
# documents 0.27x at 2 of 512 and 16.
LONGEST_FLASH_MASK = 128


class Branching:
    """Masks of branching documents, computed once per batch and used by every layer.

    doc_ids (B, T)       equal neighbours are one document
    branch_ids (B, T)    0 for tokens that all branches of a document share, 1, 2, ... for those of each branch
    position_ids (B, T)  of each token in its branch: a branch continues after the shared part

    A query sees the earlier keys of its document that are shared or of its own branch: those that it would see if its
    branch alone followed a copy of the shared part.
    """

    def __init__(self, doc_ids: Tensor, branch_ids: Tensor, position_ids: Tensor) -> None:
        self.doc_ids, self.branch_ids, self.position_ids = doc_ids, branch_ids, position_ids
        self._masks: dict[int | None, Tensor] = {}
        self.documents: Packing | None = Packing(doc_ids)

    @cached_property
    def _seen(self) -> Tensor:
        position = torch.arange(self.doc_ids.shape[1], device=self.doc_ids.device)
        same = self.doc_ids.unsqueeze(2) == self.doc_ids.unsqueeze(1)
        key_branch = self.branch_ids.unsqueeze(1)
        own = (key_branch == 0) | (key_branch == self.branch_ids.unsqueeze(2))
        return same & own & (position <= position.unsqueeze(1))

    def mask(self, window: int | None = None) -> Tensor:
        """Return a boolean mask (B, 1, T, T), true for visible keys; `window` keeps the last positions of a branch."""
        if window not in self._masks:
            seen = self._seen
            if window is not None:
                seen = seen & (self.position_ids.unsqueeze(1) > self.position_ids.unsqueeze(2) - window)
            self._masks[window] = seen.unsqueeze(1)
        return self._masks[window]


class Packing:
    """Document boundaries of a packed batch, computed once per batch and used by every layer.

    doc_ids (B, T): equal neighbours are one document. `starts` (B, T) is the first position of each position's
    document.
    """

    def __init__(self, doc_ids: Tensor):
        self.doc_ids, self.shape = doc_ids, doc_ids.shape
        self.starts = fused_attention.document_starts(doc_ids)
        self._blocks: dict = {}
        self._bounds: dict = {}

    @cached_property
    def is_single(self) -> bool:
        """True if no row has a second document; read on the host."""
        return not bool(self.starts.any())

    @cached_property
    def segments(self) -> list[list[int]]:
        """First positions of the documents of each row; read on the host."""
        position = torch.arange(self.starts.shape[1], device=self.starts.device)
        return [row.nonzero().flatten().tolist() for row in self.starts == position]

    def bounds(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first key that each query sees, and the last query that sees each key: int32 (B, T)."""
        length, device = self.starts.shape[1], self.starts.device
        if window is not None and window >= length:
            window = None
        if window not in self._bounds:
            self._bounds[window] = fused_attention.bounds(self.starts, window, length, device)
        return self._bounds[window]

    def blocks(self, dtype: torch.dtype, window: int | None = None) -> list["_Block"]:
        if (dtype, window) not in self._blocks:
            length = self.starts.shape[1]
            self._blocks[dtype, window] = _query_blocks(length, dtype, self.starts, window)
        return self._blocks[dtype, window]


class _Block:
    """Queries [q0, q1) against keys [k0, q1); `bias` (B or 1, 1, q1-q0, q1-m0) is added to scores of keys >= m0."""

    __slots__ = ("bias", "k0", "m0", "q0", "q1")

    def __init__(self, q0, q1, k0, m0, bias):
        self.q0, self.q1, self.k0, self.m0, self.bias = q0, q1, k0, m0, bias


def _query_blocks(length: int, dtype: torch.dtype, starts: Tensor | None, window: int | None) -> list[_Block]:
    blocks = []
    size = QUERY_BLOCK if length <= LONGEST_KEPT else LONG_QUERY_BLOCK
    for q0 in range(0, length, size):
        q1 = min(q0 + size, length)
        query = torch.arange(q0, q1).unsqueeze(1)
        lo = torch.zeros(1, q1 - q0, 1, dtype=torch.long) if starts is None else starts[:, q0:q1].unsqueeze(-1)
        if window is not None:
            lo = torch.maximum(lo, query - window + 1)
        k0, highest = int(lo.min()), int(lo.max())
        m0 = k0 if highest > k0 else q0
        key = torch.arange(m0, q1)
        seen = (key <= query) & (key >= lo)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf).unsqueeze(1)
        blocks.append(_Block(q0, q1, k0, m0, bias))
    return blocks


@lru_cache(maxsize=64)
def _causal_blocks(length: int, dtype: torch.dtype, window: int | None) -> list[_Block]:
    return _query_blocks(length, dtype, None, window)


def _grouped(x_BHTD: Tensor, block: _Block, kv_heads: int) -> Tensor:
    """Return the queries of a block, with the heads that share keys adjacent: (B*K, G*q, D)."""
    batch, heads, _, size = x_BHTD.shape
    query_BHqD = x_BHTD[:, :, block.q0 : block.q1]
    return query_BHqD.reshape(batch * kv_heads, heads // kv_heads * (block.q1 - block.q0), size)


def _probabilities(query: Tensor, key_XDS: Tensor, block: _Block, scale: float, batch: int, kv_heads: int):
    scores = torch.baddbmm(query.new_empty(()), query, key_XDS, beta=0, alpha=scale)
    by_query = scores.view(batch, kv_heads, -1, block.q1 - block.q0, scores.shape[-1])
    by_query[..., block.m0 - block.k0 :].add_(block.bias.unsqueeze(1))
    return torch.softmax(scores, -1)


class _BlockAttention(torch.autograd.Function):
    """Causal attention as batched matrix products over blocks of queries, in the dtype of its inputs.

    torch's CPU flash kernel runs bfloat16 at float32 speed or below; oneDNN's batched products run it at 4x.
    The probabilities of a block are kept for backward: 2 * H * T bytes per token, as much as the feed-forward
    layer keeps at T = 512. Longer inputs recompute them.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale, blocks, keep):
        batch, kv_heads, length, size = key.shape
        key_XSD = key.reshape(batch * kv_heads, length, size)
        value_XSD = value.reshape(batch * kv_heads, length, size)
        out = torch.empty(batch, length, query.shape[1], size, dtype=query.dtype, device=query.device).transpose(1, 2)
        saved = []
        for block in blocks:
            q = _grouped(query, block, kv_heads)
            p = _probabilities(q, key_XSD[:, block.k0 : block.q1].mT, block, scale, batch, kv_heads)
            o = torch.bmm(p, value_XSD[:, block.k0 : block.q1])
            out[:, :, block.q0 : block.q1] = o.view(batch, -1, block.q1 - block.q0, size)
            if keep:
                saved.append(p)
        ctx.save_for_backward(query, key_XSD, value_XSD, *saved)
        ctx.scale, ctx.blocks, ctx.kv_heads = scale, blocks, kv_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key_XSD, value_XSD, *saved = ctx.saved_tensors
        batch, heads, length, size = query.shape
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = torch.empty_like(key_XSD), torch.empty_like(value_XSD)
        # The last block first: if it sees every key, it initializes what the others add to, so nothing is zeroed.
        last = len(ctx.blocks) - 1
        if ctx.blocks[last].k0 > 0:
            grad_key.zero_()
            grad_value.zero_()
        for i in range(last, -1, -1):
            block = ctx.blocks[i]
            keys = slice(block.k0, block.q1)
            beta = 0.0 if i == last and block.k0 == 0 else 1.0
            q, do = (_grouped(x, block, ctx.kv_heads) for x in (query, grad))
            k, v = key_XSD[:, keys], value_XSD[:, keys]
            p = saved[i] if saved else _probabilities(q, k.mT, block, ctx.scale, batch, ctx.kv_heads)
            grad_value[:, keys].baddbmm_(p.mT, do, beta=beta)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
            # The scale goes into the products: one pass less over the scores.
            dq = torch.baddbmm(ds.new_empty(()), ds, k, beta=0, alpha=ctx.scale)
            grad_query[:, :, block.q0 : block.q1] = dq.view(batch, heads, block.q1 - block.q0, size)
            grad_key[:, keys].baddbmm_(ds.mT, q, beta=beta, alpha=ctx.scale)
        shape = (batch, ctx.kv_heads, length, size)
        return grad_query, grad_key.view(shape), grad_value.view(shape), None, None, None


def attention_mask(queries: int, keys: int, doc_ids: Tensor | None, window: int | None, device=None) -> Tensor:
    """Return a mask, true for visible keys: (T, S), or (B, 1, T, S) with documents. Queries are the last keys."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :].unsqueeze(1)
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if doc_ids is not None:
        same = doc_ids[:, keys - queries :].unsqueeze(2) == doc_ids.unsqueeze(1)
        seen = (seen & same).unsqueeze(1)
    return seen


def _attention_by_segments(query, key, value, scale, packing: Packing, window, mask: Tensor | None = None) -> Tensor:
    """Attend within each document separately, without scores across documents; `mask` (B, 1, T, T) replaces causality.

    Rows and documents are split in one step each, whose backward is one concatenation; that of a slice would fill a
    tensor of the full size with zeros.
    """
    inputs = zip(packing.segments, *(x.unbind(0) for x in (query, key, value)), strict=True)
    details = {"is_causal": mask is None, "scale": scale, "enable_gqa": True, "window": window}
    rows = []
    for number, (begins, *row) in enumerate(inputs):
        spans = list(zip(begins, [*begins[1:], query.shape[2]], strict=True))
        seen = [None if mask is None else mask[number, 0, start:end, start:end] for start, end in spans]
        lengths = [end - start for start, end in spans]
        documents = zip(*(x.unsqueeze(0).split(lengths, 2) for x in row), seen, strict=True)
        outputs = [scaled_dot_product_attention(*x, **details) for x in documents]
        rows.append(torch.cat(outputs, 2))
    return torch.cat(rows)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Compute attention (B, H, T, D) step by step, as the reference for tests.

    `mask` is true for visible keys and broadcasts to (B, H, T, S). Scores and softmax are in float32, or in float64 for
    float64 inputs; all T x S scores are kept.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores_BHTS = query.to(dtype) @ key.to(dtype).mT * scale
    if softcap is not None:
        scores_BHTS = torch.tanh(scores_BHTS / softcap) * softcap
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores_BHTS, -1, keepdim=True)
    return (torch.exp(scores_BHTS - lse) @ value.to(dtype)).to(query.dtype)


def _torch_attention(query, key, value, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Call torch's attention, but not cuDNN's with a mask: its gradients are NaN in torch 2.11 (pytorch #196678)."""
    within = nullcontext()
    if mask is not None and query.is_cuda:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        within = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with within:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _fused_attention(query, key, value, is_causal, scale, doc_ids, window) -> Tensor:
    lo = hi = None
    if doc_ids is not None:
        lo, hi = (Packing(doc_ids) if isinstance(doc_ids, Tensor) else doc_ids).bounds(window)
    elif window is not None and torch.compiler.is_compiling():
        lo, hi = fused_attention.bounds(None, window, query.shape[2], query.device)
    elif window is not None:
        lo, hi = fused_attention.window_bounds(window, query.shape[2], query.device)
    return fused_attention.attention(query, key, value, lo, hi, scale, is_causal)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    doc_ids: "Tensor | Packing | Branching | None" = None, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention with torch's signature, and with packed documents and sliding windows.

    query (B, H, T, D), key and value (B, K, S, D) -> (B, H, T, D). With `doc_ids` (B, T), or a `Packing` or
    `Branching` of them, a query sees its own document only; with `window` only the last `window` positions, its own
    included. Both need `is_causal` and T = S. `attn_mask` and `dropout_p` are passed to torch; with one of these two
    additions they raise NotImplementedError. With a `softcap` c scores are c * tanh(score / c), and all are kept.

    The inputs have one dtype (else TypeError), or get autocast's, and so does the output; softmax is in float32. It is
    differentiable once, in reverse: second and forward-mode derivatives raise, unless torch computes the attention.
    """
    query, key, value = in_one_dtype("scaled_dot_product_attention", query=query, key=key, value=value)
    length, keys = query.shape[2], key.shape[2]
    if isinstance(doc_ids, Branching):
        documents, attn_mask = doc_ids.documents, doc_ids.mask(window)
        is_causal, doc_ids, window = False, None, None
        eager = query.device.type == "cpu" and softcap is None and not torch.compiler.is_compiling()
        if eager and documents is not None and length > LONGEST_FLASH_MASK and not documents.is_single:
            return _attention_by_segments(query, key, value, scale, documents, window, attn_mask)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if doc_ids is not None and doc_ids.shape != (query.shape[0], length):
        raise ValueError(f"doc_ids: expected shape {(query.shape[0], length)}, found {tuple(doc_ids.shape)}")
    if softcap is not None:
        ids = doc_ids.doc_ids if isinstance(doc_ids, Packing) else doc_ids
        mask = attention_mask(length, keys, ids, window, query.device) if attn_mask is None else attn_mask
        return attention_reference(query, key, value, scale=factor, mask=mask, softcap=softcap)
    if attn_mask is not None or dropout_p > 0:
        given = {"doc_ids": doc_ids, "window": window}
        added = " and ".join(name for name, value in given.items() if value is not None)
        if added:
            name = "dropout_p" if attn_mask is None else "attn_mask"
            raise NotImplementedError(f"scaled_dot_product_attention: {name} with {added} is not implemented")
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if (doc_ids is not None or window is not None) and not (is_causal and length == keys):
        raise ValueError("doc_ids and window need is_causal=True and as many queries as keys")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query and {key.shape[1]} key heads need enable_gqa=True")
    if window is not None and window >= length:
        window = None
    if fused_attention.can_run(query, key, value, factor) and (length == keys or not is_causal):
        return _fused_attention(query, key, value, is_causal, factor, doc_ids, window)
    return _attention_by_torch(query, key, value, is_causal, factor, enable_gqa, doc_ids, window)


def _attention_by_torch(query, key, value, is_causal, scale, enable_gqa, doc_ids, window) -> Tensor:
    """Compute attention without Triton, in the fastest way."""
    length, keys = query.shape[2], key.shape[2]
    ids, packing = doc_ids.doc_ids if isinstance(doc_ids, Packing) else doc_ids, None
    eager_on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    # _BlockAttention is faster in bfloat16 training only
    blocks_pay = is_causal and eager_on_cpu and query.dtype == torch.bfloat16 and length == keys > 1
    if ids is not None and eager_on_cpu:
        packing = Packing(ids) if isinstance(doc_ids, Tensor) else doc_ids
        if packing.is_single:
            ids = packing = None
    if packing is not None and length > (LONGEST_DENSE_MASK if blocks_pay else LONGEST_FLASH_MASK):
        return _attention_by_segments(query, key, value, scale, packing, window)
    if blocks_pay:
        dtype = query.dtype
        blocks = _causal_blocks(length, dtype, window) if packing is None else packing.blocks(dtype, window)
        return _BlockAttention.apply(query, key, value, scale, blocks, length <= LONGEST_KEPT)
    mask = None if ids is None and window is None else attention_mask(length, keys, ids, window, query.device)
    return _torch_attention(query, key, value, mask, 0.0, is_causal and mask is None, scale, enable_gqa)


def attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the last T tokens of each row to all tokens of their row up to themselves: (B, H, T, D).

    query (B, H, T, D): one new token per row in decoding, a few in extending a prefix. key_cache and value_cache
    (B, K, S, D), H a multiple of K, already contain the new tokens' keys and values; `lengths` (B,) counts the
    positions in use, including the new ones. Query t is at position lengths - T + t. `window` is as in
    `scaled_dot_product_attention`. A query without keys, in a row shorter than T, gives zeros. No gradients.

    On a GPU the bits of a sequence's result depend neither on the batch nor on the capacity S. Raises TypeError if
    query and caches differ in dtype, and ValueError for lengths of another shape or a window below 1.
    """
    query, key_cache, value_cache = in_one_dtype(
        "attention_decode", query=query, key_cache=key_cache, value_cache=value_cache
    )
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"lengths: expected {query.shape[0]} of them, found shape {tuple(lengths.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if softcap is None and fused_attention.can_run(query, key_cache, value_cache, factor):
        return fused_attention.attention_decode(query, key_cache, value_cache, lengths, factor, window or 0)
    return attention_decode_reference(query, key_cache, value_cache, lengths, factor, window, softcap)


def attention_decode_reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, scale: float, window: int | None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute `attention_decode` step by step, with all scores in memory."""
    new, capacity = query.shape[2], key_cache.shape[2]
    key = torch.arange(capacity, device=query.device)
    last = (lengths.unsqueeze(1) - new + torch.arange(new, device=query.device)).unsqueeze(-1)
    seen = key <= last
    if window is not None:
        seen = seen & (key > last - window)
    mask = seen.unsqueeze(1)
    # a query without keys sees all, because a softmax over nothing is NaN, and its output is zeroed
    empty = ~mask.any(-1, keepdim=True)
    out = attention_reference(query, key_cache, value_cache, scale=scale, mask=mask | empty, softcap=softcap)
    return out.masked_fill(empty, 0.0)
