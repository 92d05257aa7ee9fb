"""The cases to measure: inputs, contenders, the reference result, and the work in FLOPs or bytes.

A contender is a function of the inputs; one that cannot run here is a string with the reason.

B batch, H query heads, K key-value heads, G = H / K, T tokens, D head size; N tokens, V words.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from llmkit.kernels.attention import (
    Packing,
    attention_decode,
    attention_decode_reference,
    attention_mask,
    attention_reference,
    scaled_dot_product_attention,
)
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.logprobs import linear_logprobs
from report import OURS
from shapes import Attention, Decode, Linear, Shapes
from torch import Tensor

DTYPE = torch.bfloat16
CHECKED_TOKENS, CHECKED_WORDS = 256, 64  # checked rows of a loss's gradients, for inputs and weight
Contender = Callable[..., Tensor] | str


@dataclass
class Case:
    """`work` is the FLOPs or bytes of a forward pass, `work_both` of forward and backward; None without a backward.

    `error` maps a contender's outputs, followed by the gradients of the inputs, to the largest relative error.
    """

    kind: str
    shape: str
    inputs: list[Tensor]
    contenders: dict[str, Contender]
    error: Callable[[list[Tensor]], float]
    work: float
    unit: str = "TFLOP/s"
    work_both: float | None = None
    upstream: list[Tensor] | None = None  # upstream gradient of each output; None: ones
    bound: float = 0.02  # bfloat16 has 8 bits: 0.004 per rounding
    graph: bool = False  # timed as a CUDA graph, as in decoding


class Makers:
    """Makes the cases on one device; smoke runs do not use torch.compile."""

    def __init__(self, device: str):
        self.device, self.on_gpu = device, device == "cuda"

    def cases(self, shapes: Shapes) -> Iterator[tuple[str, str, Callable[[], Case]]]:
        """Yield (kind, shape, function that makes the case), those of the goals first in case time runs out."""
        for kind in ("causal", "packed", "windowed"):
            for shape in shapes.attention:
                yield f"attention {kind}", str(shape), partial(self.attention, shape, kind)
        for shape in shapes.loss:
            yield "loss", str(shape), partial(self.loss, shape)
        for sequences, shape in shapes.grpo:
            yield "logprobs", str(shape), partial(self.logprobs, shape)
            yield "grpo", str(shape), partial(self.grpo, sequences, shape)
        for shape in shapes.decode:
            yield "decode", str(shape), partial(self.decode, shape)

    def _normal(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        x = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32)
        return (x * scale).to(DTYPE).requires_grad_(grad)

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if self.on_gpu else function

    # ---- attention

    def attention(self, shape: Attention, kind: str) -> Case:
        B, H, K, T, D = shape.batch, shape.heads, shape.kv_heads, shape.length, shape.size
        query, key, value = self._normal(B, H, T, D), self._normal(B, K, T, D), self._normal(B, K, T, D, scale=0.5)
        upstream = self._normal(B, H, T, D, scale=0.25, grad=False)
        documents = shape.documents().to(self.device) if kind == "packed" else None
        window = shape.window if kind == "windowed" else None
        packing = None if documents is None else Packing(documents)

        def ours(q, k, v):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, doc_ids=packing, window=window
            )

        def exact() -> list[Tensor]:
            """Return the output of the first row's first group of heads, in float32, and its gradients."""
            heads, first = slice(0, H // K), slice(0, 1)
            pairs = (query, heads), (key, first), (value, first)
            parts = [x[:1, part].detach().float().requires_grad_() for x, part in pairs]
            mask = attention_mask(T, T, None if documents is None else documents[:1], window, self.device)
            out = attention_reference(*parts, scale=D**-0.5, mask=mask)
            return [out.detach(), *torch.autograd.grad(out, parts, upstream[:1, heads].float())]

        def error(found: list[Tensor]) -> float:
            wanted = exact()
            return max(_off(x[:1, : y.shape[1]], y) for x, y in zip(found, wanted, strict=True))

        pairs = _seen_pairs(shape, documents, window)
        return Case(
            f"attention {kind}", str(shape), [query, key, value],
            {OURS: ours, **self._attention_peers(kind, shape, documents, window)}, error,
            work=4 * H * D * pairs, work_both=14 * H * D * pairs, upstream=[upstream],
        )  # fmt: skip

    def _attention_peers(self, kind: str, shape: Attention, documents, window) -> dict[str, Contender]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def sdpa(backend, q, k, v):
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        flash = partial(sdpa, SDPBackend.FLASH_ATTENTION)
        # never with a mask: its gradients are NaN then (pytorch #196678)
        cudnn = partial(sdpa, SDPBackend.CUDNN_ATTENTION) if self.on_gpu else "absent: needs an NVIDIA GPU"
        if kind != "causal":
            flash, cudnn = "absent: takes no mask", "absent: never with a mask"
        return {"SDPA flash": flash, "SDPA cuDNN": cudnn, "flex_attention": self._flex(shape, documents, window)}

    def _flex(self, shape: Attention, documents, window) -> Contender:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError:
            return "absent: this torch has no flex_attention"

        def seen(b, h, q, k):
            visible = q >= k
            if documents is not None:
                visible = visible & (documents[b, q] == documents[b, k])
            return visible if window is None else visible & (q - k < window)

        rows = None if documents is None else shape.batch
        try:
            blocks = create_block_mask(seen, rows, None, shape.length, shape.length, device=self.device)
        except Exception as error:  # any error of a peer
            return _absent(error)
        function = self.compiled(flex_attention)
        return lambda q, k, v: function(q, k, v, block_mask=blocks, enable_gqa=True)

    # ---- losses

    def _linear(self, shape: Linear) -> tuple[Tensor, Tensor, Tensor]:
        x = self._normal(shape.tokens, shape.hidden)
        weight = self._normal(shape.words, shape.hidden, scale=2 * shape.hidden**-0.5)
        generator = torch.Generator(self.device).manual_seed(1)
        return x, weight, torch.randint(0, shape.words, (shape.tokens,), generator=generator, device=self.device)

    def loss(self, shape: Linear) -> Case:
        x, weight, target = self._linear(shape)

        def plain(x, w):
            return F.cross_entropy(F.linear(x, w).float(), target)

        share = torch.full((shape.tokens,), 1 / shape.tokens, device=self.device)
        contenders: dict[str, Contender] = {
            OURS: lambda x, w: linear_cross_entropy(x, w, target),
            "Liger": _peer("liger_kernel.transformers.functional", lambda m: (
                lambda x, w: m.liger_fused_linear_cross_entropy(x, w, target)), self.on_gpu),
            "cut-cross-entropy": _peer("cut_cross_entropy", lambda m: (
                lambda x, w: m.linear_cross_entropy(x, w, target)), self.on_gpu),
            "cut-cross-entropy, all gradients": _peer("cut_cross_entropy", lambda m: (
                lambda x, w: m.linear_cross_entropy(x, w, target, filter_eps=None)), self.on_gpu),
            "torch.compile": self.compiled(plain),
            "torch fused": (
                (lambda x, w: F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions()))
                if hasattr(torch.nn, "LinearCrossEntropyOptions") else "absent: this torch has no linear_cross_entropy"
            ),
        }  # fmt: skip
        work = 2 * shape.tokens * shape.hidden * shape.words
        return Case("loss", str(shape), [x, weight], contenders, partial(_loss_error, x, weight, target, share),
                    work=work, work_both=3 * work)  # fmt: skip

    def logprobs(self, shape: Linear) -> Case:
        """Make a case of log-probabilities, forward only, as for evaluation and a reference policy."""
        x, weight, target = (t.detach() for t in self._linear(shape))
        base = "liger_kernel.chunked_loss.fused_linear_ppo"

        def plain(x, w):
            return F.linear(x, w).float().log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)

        def error(found: list[Tensor]) -> float:
            return max(_off(found[0][part], -_nll(x[part], weight, target[part])) for part in _chunks(shape.tokens))

        return Case(
            "logprobs", str(shape), [x, weight],
            {
                OURS: lambda x, w: linear_logprobs(x, w, target),
                "Liger": _peer(base, lambda m: (lambda x, w: m.LigerFusedLinearPPOBase.chunk_forward(
                    x.unsqueeze(0), w, target.unsqueeze(0)).squeeze(0)), self.on_gpu),
                "torch.compile": self.compiled(plain),
            },
            error, work=2 * shape.tokens * shape.hidden * shape.words, bound=0.01,
        )  # fmt: skip

    def grpo(self, sequences: int, shape: Linear) -> Case:
        """Make a case of an on-policy GRPO step: the probability ratio is 1, but its gradient is not zero."""
        x, weight, target = self._linear(shape)
        rows = target.view(sequences, -1)
        advantage = torch.linspace(-1, 1.5, sequences, device=self.device)
        share = (advantage / shape.tokens).repeat_interleave(rows.shape[1])

        def objective(logprobs: Tensor) -> Tensor:
            return -(torch.exp(logprobs - logprobs.detach()) * share).sum()

        def plain(x, w):
            return objective(F.linear(x, w).float().log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1))

        def liger(module):
            loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
            mask = torch.ones_like(rows)
            return lambda x, w: loss(x.view(*rows.shape, -1), w, rows, mask, advantage)[0]

        work = 2 * shape.tokens * shape.hidden * shape.words
        return Case(
            "grpo", str(shape), [x, weight],
            {
                OURS: lambda x, w: objective(linear_logprobs(x, w, target)),
                "Liger": _peer("liger_kernel.chunked_loss.grpo_loss", liger, self.on_gpu),
                "torch.compile": self.compiled(plain),
            },
            partial(_loss_error, x, weight, target, share, value=-share.sum()), work=work, work_both=3 * work,
        )  # fmt: skip

    # ---- decoding

    def decode(self, shape: Decode) -> Case:
        B, H, K, S, D = shape.batch, shape.heads, shape.kv_heads, shape.capacity, shape.size
        query, key, value = (self._normal(B, n, t, D, grad=False) for n, t in ((H, 1), (K, S), (K, S)))
        lengths = shape.lengths().to(self.device)
        mask = (torch.arange(S, device=self.device) < lengths.unsqueeze(1)).view(B, 1, 1, S)

        def masked(q, k, v):
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

        def error(found: list[Tensor]) -> float:
            first = slice(0, 1)
            parts = [x[first].float() for x in (query, key, value)]
            return _off(found[0][first], attention_decode_reference(*parts, lengths[first], D**-0.5, None))

        return Case(
            "decode", str(shape), [query, key, value],
            {
                OURS: lambda q, k, v: attention_decode(q, k, v, lengths),
                "SDPA masked": masked,
                "flex_attention": self._flex_decode(shape, lengths),
            },
            error, work=float(2 * key.element_size() * K * D * int(lengths.sum())), unit="TB/s", graph=True,
        )  # fmt: skip

    def _flex_decode(self, shape: Decode, lengths: Tensor) -> Contender:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError:
            return "absent: this torch has no flex_attention"
        seen = lambda b, h, q, k: k < lengths[b]  # noqa: E731
        try:
            blocks = create_block_mask(seen, shape.batch, None, 1, shape.capacity, device=self.device)
        except Exception as error:  # any error of a peer
            return _absent(error)
        function = self.compiled(flex_attention)
        return lambda q, k, v: function(q, k, v, block_mask=blocks, enable_gqa=True)


def as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _peer(module: str, make: Callable, on_gpu: bool) -> Contender:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return "absent: not installed"
    if not on_gpu:
        return "absent: needs a GPU"
    try:
        return make(importlib.import_module(module))
    except Exception as error:  # any error of a peer's import or set-up goes into its row of the table
        return _absent(error)


def _absent(error: Exception) -> str:
    return f"absent: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _off(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float()
    return ((found.detach().float() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def _seen_pairs(shape: Attention, documents: Tensor | None, window: int | None) -> int:
    """Return the number of pairs of a query and a visible key, over all rows."""
    position = torch.arange(shape.length)
    starts = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    if documents is not None:
        starts = Packing(documents.cpu()).starts
    if window is not None:
        starts = torch.maximum(starts, position - window + 1)
    return int((position - starts + 1).sum())


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + 2048, tokens)) for start in range(0, tokens, 2048)]


def _nll(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float() @ weight.float().t(), target, reduction="none")


@torch.no_grad()
def _loss_error(x, weight, target, share, found: list[Tensor], value: Tensor | None = None) -> float:
    """Return the largest error of the loss weighted by `share` and of parts of its gradients, from float32 logits."""
    wide = weight.float()
    total, grad_words = 0.0, torch.zeros_like(wide[:CHECKED_WORDS])
    grad_tokens = None
    for part in _chunks(x.shape[0]):
        tokens = x[part].float()
        log_p = torch.log_softmax(tokens @ wide.t(), -1)
        total -= (log_p.gather(1, target[part].unsqueeze(1)).squeeze(1) * share[part]).sum()
        grad = log_p.exp_().scatter_add_(1, target[part].unsqueeze(1), -torch.ones_like(tokens[:, :1]))
        grad *= share[part].unsqueeze(1)
        grad_words += grad[:, :CHECKED_WORDS].t() @ tokens
        grad_tokens = grad[:CHECKED_TOKENS] @ wide if grad_tokens is None else grad_tokens
    assert grad_tokens is not None
    wanted = [total if value is None else value, grad_tokens, grad_words]
    return max(_off(a[: b.shape[0]] if b.dim() else a, b) for a, b in zip(found, wanted, strict=True))
