"""The decoder that every stage trains and samples: the Llama and Qwen family in one file.

Token ids come in, hidden states go out; `logits` and `loss` finish them. RMSNorm, rotary positions, grouped queries,
SwiGLU, optional per-head norm of queries and keys, optional projection biases, tied or untied embeddings, and
`rope_scaling` linear, dynamic, yarn and llama3 for longer contexts. `grow_vocabulary` adds tokens to a trained model.
The model computes in the dtype of its parameters; float32 masters are kept by the trainer.

Query, key and value projections are one matrix, so are gate and up: one product each. `export_state_dict` takes them
apart into a stock Hugging Face model's tensors.

B batch, T tokens, H query heads, K key-value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.kernels.attention import Branching, Packing, scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.linear import linear
from llmkit.kernels.projections import qkv_rotary, swiglu_mlp
from llmkit.kernels.rowwise import add_rms_norm, rms_norm
from llmkit.model.config import ModelConfig, RopeScaling

MULTIPLE = 64  # of rows, where the base kept it: 16-byte loads of the output matrix


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs, float64. Scaling as transformers defines it."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        unscaled = _yarn_kept(head_dim, theta, scaling)
        return frequencies * unscaled + frequencies / scaling.factor * (1 - unscaled)
    # llama3: long wavelengths are stretched, short ones kept, and those between interpolated.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    unscaled = unscaled.clamp(0.0, 1.0)
    return frequencies * unscaled + frequencies / scaling.factor * (1 - unscaled)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The share of each frequency that yarn keeps: all of those that turn `beta_fast` times in the first context."""

    def pair_that_turns(times: float) -> float:
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


class RotaryTable:
    """Cosines and sines of positions 0 ... length - 1, grown on demand and kept on each device asked for.

    Float32 whatever the model computes in: bfloat16 would round every cosine by up to 0.4%.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None):
        self._frequencies = rotary_frequencies(head_dim, theta, scaling)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(length, head_dim / 2, 2): cosine and sine side by side."""
        key = (device, torch.float64 if dtype == torch.float64 else torch.float32)
        if key not in self._tables or self._tables[key].shape[0] < length:
            rows = 256 * math.ceil(length / 256)
            angles = torch.arange(rows, dtype=torch.float64, device="cpu").unsqueeze(1) * self._frequencies
            self._tables[key] = torch.stack((angles.cos(), angles.sin()), -1).to(*key)
        return self._tables[key][:length]


class Layer(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream after."""

    def __init__(self, config: ModelConfig, index: int, new: Callable[..., nn.Parameter]):
        super().__init__()
        self.config = config
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        hidden, intermediate = config.hidden_size, config.intermediate_size
        gain = new if config.norm_gains else (lambda size: None)
        self.window = config.layer_windows[index] if config.layer_windows else None
        self.input_norm = gain(hidden)
        self.qkv = new(query + 2 * key, hidden)
        self.qkv_bias = new(query + 2 * key) if config.attention_bias else None
        self.q_norm = gain(config.head_dim) if config.qk_norm else None
        self.k_norm = gain(config.head_dim) if config.qk_norm else None
        self.out = new(hidden, query)
        self.out_bias = new(hidden) if config.attention_out_bias else None
        self.mlp_norm = gain(hidden)
        self.gate_up = new(2 * intermediate, hidden)
        self.down = new(hidden, intermediate)
        self.residual_scale = new(2) if config.residual_scales else None

    def forward(self, x_BTC: Tensor, cos_sin: Tensor, doc_ids) -> Tensor:
        eps, out, down = self.config.rms_norm_eps, self.out, self.down
        if self.residual_scale is not None:  # a product of the weight's size costs less than one of the batch's
            out, down = out * self.residual_scale[0], down * self.residual_scale[1]
        attended = self._attend(rms_norm(x_BTC, self.input_norm, eps), cos_sin, doc_ids)
        normed, x_BTC = add_rms_norm(linear(attended, out, self.out_bias), x_BTC, self.mlp_norm, eps)
        return x_BTC + swiglu_mlp(normed, self.gate_up, down)

    def _attend(self, x_BTC: Tensor, cos_sin: Tensor, doc_ids) -> Tensor:
        config = self.config
        batch, length, _ = x_BTC.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        query_BHTD, key_BKTD, value_BKTD = qkv_rotary(
            x_BTC, self.qkv, cos_sin, heads=heads, kv_heads=kv_heads, bias=self.qkv_bias,
            q_gain=self.q_norm, k_gain=self.k_norm,
            eps=config.rms_norm_eps if config.qk_norm else None,
        )  # fmt: skip
        scale = config.attention_scale
        gqa = heads != kv_heads
        if isinstance(doc_ids, Branching):
            attended_BHTD = scaled_dot_product_attention(
                query_BHTD, key_BKTD, value_BKTD, doc_ids.mask(self.window), scale=scale, enable_gqa=gqa
            )
        else:
            attended_BHTD = scaled_dot_product_attention(
                query_BHTD, key_BKTD, value_BKTD, is_causal=True, scale=scale, enable_gqa=gqa,
                doc_ids=doc_ids, window=self.window,
            )  # fmt: skip
        return attended_BHTD.transpose(1, 2).reshape(batch, length, heads * config.head_dim)


class Transformer(nn.Module):
    """A decoder-only language model.

    >>> config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    >>> model = Transformer(config, seed=0)
    >>> model.logits(model(torch.tensor([[1, 2, 3]]))).shape
    torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """With a seed the parameters are initialised for training; without one they are left unset, at no cost."""
        super().__init__()
        self.config = config

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.embed_tokens = new(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Layer(config, i, new) for i in range(config.num_hidden_layers))
        self.layers = cast("Sequence[Layer]", layers)  # what iterating a ModuleList gives, for the type checker
        self.norm = new(config.hidden_size) if config.norm_gains else None
        self.lm_head = None if config.tie_word_embeddings else new(config.vocab_size, config.hidden_size)
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, config.rope_scaling)
        self.checkpoint_layers = False  # recompute each layer in backward: less memory, a third more time
        self._compiled_layers = False
        if seed is not None:
            self.initialize(seed)

    def initialize(self, seed: int) -> None:
        """Set every parameter from one generator, for Muon on matrices and AdamW on the rest.

        What writes to the residual stream starts at zero, so that every layer starts as the identity (Muon's
        first steps have the same size whatever it starts from). Other matrices are uniform with variance
        1 / fan-in. The head starts small: the first loss is log(V), whatever the embedding's scale.
        """
        generator = torch.Generator().manual_seed(seed)

        def uniform(parameter: Tensor, deviation: float) -> None:
            bound = math.sqrt(3.0) * deviation
            fresh = torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
            parameter.data.copy_(fresh)

        def normal(parameter: Tensor, deviation: float) -> None:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul_(deviation))

        hidden = self.config.hidden_size
        if self.lm_head is None:
            # One matrix is both: small enough for the head; the first norm restores the embedding's scale.
            normal(self.embed_tokens, 0.02)
        else:
            normal(self.embed_tokens, 1.0)
            normal(self.lm_head, 0.001)
        for layer in self.layers:
            uniform(layer.qkv, hidden**-0.5)
            uniform(layer.gate_up, hidden**-0.5)
            for zero in (layer.out, layer.down, layer.qkv_bias, layer.out_bias):
                if zero is not None:
                    zero.data.zero_()
            for scale in (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, layer.residual_scale):
                if scale is not None:
                    scale.data.fill_(1.0)
        if self.norm is not None:
            self.norm.data.fill_(1.0)

    def compile_layers(self) -> None:
        """Run every layer through torch.compile, each by itself: where the whole cannot be one graph."""
        self._compiled_layers = True
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]

    @property
    def head_weight(self) -> Tensor:
        """(V, hidden), the embedding where they are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def matrices(self) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
        """The matrices for Muon: (name, parameter, rows of each of the matrices that it stacks)."""
        config = self.config
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        for i, layer in enumerate(self.layers):
            yield f"layers.{i}.qkv", layer.qkv, (query, key, key)
            yield f"layers.{i}.out", layer.out, (config.hidden_size,)
            yield f"layers.{i}.gate_up", layer.gate_up, (config.intermediate_size,) * 2
            yield f"layers.{i}.down", layer.down, (config.hidden_size,)

    def forward(self, token_ids_BT: Tensor, *, doc_ids: Tensor | Packing | Branching | None = None) -> Tensor:
        """Hidden states (B, T, hidden), normed, ready for the head.

        `doc_ids` (B, T): equal neighbours are one document, and attention stays within it; a `Branching` of them lets
        several answers share a prompt. Positions do not restart at documents: rotary attention depends on differences
        alone.
        """
        eager = not (self._compiled_layers or torch.compiler.is_compiling())
        x_BTC = F.embedding(token_ids_BT, self.embed_tokens)
        if self.config.normalize_embedding:
            x_BTC = rms_norm(x_BTC, None, self.config.rms_norm_eps)
        if isinstance(doc_ids, Branching):
            positions = doc_ids.position_ids
            cos_sin = self._rotary(int(positions.max()) + 1, x_BTC.device, x_BTC.dtype)[positions]
        else:
            cos_sin = self._rotary(x_BTC.shape[1], x_BTC.device, x_BTC.dtype)
            if eager and isinstance(doc_ids, Tensor):
                doc_ids = Packing(doc_ids)
        for layer in self.layers:
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, cos_sin, doc_ids, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = layer(x_BTC, cos_sin, doc_ids)
        return rms_norm(x_BTC, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., V)."""
        return linear(hidden, self.head_weight)

    def loss(
        self,
        token_ids_BT: Tensor,
        targets_BT: Tensor,
        doc_ids: Tensor | Packing | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        chunk_tokens: int | str = "auto",
    ) -> Tensor:
        """Cross-entropy of the targets, which the caller has shifted: targets[b, t] follows token_ids[b, t]."""
        return linear_cross_entropy(
            self(token_ids_BT, doc_ids=doc_ids), self.head_weight, targets_BT,
            reduction=reduction, ignore_index=ignore_index, chunk_tokens=chunk_tokens,
        )  # fmt: skip


@torch.no_grad()
def grow_vocabulary(model: Transformer, known: int, wanted: int) -> Transformer:
    """A model in which ids `known` to `wanted` - 1 start from the mean of the ids below.

    A base may have rows for them already, that no token has used: they start from the mean as well. The mean makes a
    new token about as likely as an average one, whatever the context (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models"). The embedding and an untied head grow in step; the same model is returned where
    no token is new.
    """
    if wanted <= known:
        return model
    rows = model.embed_tokens.shape[0]
    if wanted > rows:
        multiple = MULTIPLE if rows % MULTIPLE == 0 else 1
        grown = Transformer(
            replace(model.config, vocab_size=-(-wanted // multiple) * multiple),
            dtype=model.embed_tokens.dtype,
            device=model.embed_tokens.device,
        )
        theirs = dict(grown.named_parameters())
        for name, parameter in model.named_parameters():
            theirs[name][: len(parameter)].copy_(parameter)
        model = grown.train(model.training)
    for table in {model.embed_tokens, model.head_weight}:
        table[known:] = table[:known].float().mean(0)
    return model
