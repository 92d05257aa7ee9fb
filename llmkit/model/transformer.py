"""The decoder that every stage trains and samples, of any family in model/families.py, as its configuration says.

Token ids go in, hidden states come out; `logits` and `loss` complete them. It has RMSNorm or LayerNorm, before or after
attention and feed-forward or both; rotary positions of every kind, per layer, or learned ones; grouped queries, norms
of queries and keys, sliding windows per layer; a gated or a plain feed-forward; biases; scales of embedding, residual
stream, attention and logits; tied or untied embeddings. `grow_vocabulary` adds tokens to a trained model. The model
computes in the dtype of its parameters; the trainer keeps float32 masters.

Query, key and value projections are one matrix, and so are gate and up: one product each. `export_state_dict` splits
them into the tensors of a stock Hugging Face model.

B batch, T tokens, H query heads, K key-value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from llmkit.kernels.attention import Branching, Packing, scaled_dot_product_attention
from llmkit.kernels.cross_entropy import linear_cross_entropy
from llmkit.kernels.dispatch import backend
from llmkit.kernels.fused_attention import document_starts
from llmkit.kernels.linear import linear
from llmkit.kernels.logprobs import linear_logprobs
from llmkit.kernels.projections import feed_forward, qkv_rotary
from llmkit.kernels.rowwise import add_rms_norm, rms_norm
from llmkit.model.config import ModelConfig, Rope, RopeScaling

MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer
MULTIPLE = 64  # of rows, if the base's are such: for 16-byte loads of the output matrix


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, *, long: bool = False
) -> Tensor:
    """Return the radians per position of each of the head_dim / 2 pairs, float64, scaled as in transformers. `long`:
    for a sequence longer than longrope's original context."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "longrope":
        factors = scaling.long_factor if long else scaling.short_factor
        return frequencies / torch.tensor(factors, dtype=torch.float64)
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # long wavelengths are stretched, short ones kept, and those between interpolated
    context = scaling.original_max_position_embeddings
    if scaling.rope_type == "yarn":  # between the pairs with beta_fast and beta_slow turns in that context
        low, high = (
            head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))
            for times in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 * (low == high)
        unscaled = 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    else:  # llama3: between numbers of turns
        turns = context / (2 * math.pi / frequencies)
        unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = unscaled.clamp(0.0, 1.0)
    return frequencies * unscaled + frequencies / scaling.factor * (1 - unscaled)


class RotaryTable:
    """Cosines and sines of positions 0 ... length - 1, grown on demand and cached per device.

    Channels that are not rotated have angle zero. `ModelConfig.attention_scale` includes the squared factor of the main
    rotation's scaling, so channels that are rotated differently, or not at all, are divided by it here.

    Float32 whatever the model computes in: bfloat16 would round every cosine by up to 0.4%.
    """

    def __init__(self, config: ModelConfig, rope: Rope):
        self._rope, self._head_dim = rope, config.head_dim
        scaling = rope.scaling
        self._long_from = scaling.original_max_position_embeddings if scaling and scaling.long_factor else None
        channels = config.head_dim if rope.channels is None else rope.channels
        factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
        magnitudes = torch.full((config.head_dim // 2, 1), 1 / factor, dtype=torch.float64)
        magnitudes[: channels // 2] = (scaling.attention_factor if scaling else 1.0) / factor
        self._magnitudes = magnitudes if bool((magnitudes != 1).any()) else None
        self._channels = channels
        self._tables: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}

    def __call__(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.float32, *, decoding: bool = False
    ) -> Tensor:
        """Return (length, head_dim / 2, 2): cosine and sine.

        Longrope rotates a sequence longer than its original context differently, from the first position on. With
        `decoding`, each row is for a sequence that ends at its position.
        """
        first = self._long_from
        if first is None or length <= first:
            return self._rows(length, device, dtype, False)
        rows = self._rows(length, device, dtype, True)
        return torch.cat([self._rows(first, device, dtype, False), rows[first:]]) if decoding else rows

    def _rows(self, length: int, device: torch.device, dtype: torch.dtype, long: bool) -> Tensor:
        key = (device, torch.float64 if dtype == torch.float64 else torch.float32, long)
        if key not in self._tables or self._tables[key].shape[0] < length:
            rows = 256 * math.ceil(length / 256)
            frequencies = torch.zeros(self._head_dim // 2, dtype=torch.float64, device="cpu")
            if self._channels:
                turning = rotary_frequencies(self._channels, self._rope.theta, self._rope.scaling, long=long)
                frequencies[: len(turning)] = turning
            angles = torch.arange(rows, dtype=torch.float64, device="cpu").unsqueeze(1) * frequencies
            table = torch.stack((angles.cos(), angles.sin()), -1)
            self._tables[key] = (table if self._magnitudes is None else table * self._magnitudes).to(*key[:2])
        return self._tables[key][:length]


def rotary_tables(config: ModelConfig) -> tuple[list[RotaryTable], list[int]]:
    """Return the tables of a model's rotations, and the index of each layer's table."""
    ropes = list(dict.fromkeys(config.layer_ropes))
    return [RotaryTable(config, rope) for rope in ropes], [ropes.index(rope) for rope in config.layer_ropes]


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream, and normalized before, after or both."""

    input_norm: Tensor | None
    input_norm_bias: Tensor | None
    qkv: nn.Parameter
    qkv_bias: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    out: nn.Parameter
    out_bias: nn.Parameter | None
    attention_post_norm: nn.Parameter | None
    mlp_norm: nn.Parameter | None
    mlp_norm_bias: nn.Parameter | None
    gate_up: nn.Parameter
    gate_up_bias: nn.Parameter | None
    down: nn.Parameter
    down_bias: nn.Parameter | None
    mlp_post_norm: nn.Parameter | None

    def __init__(self, config: ModelConfig, index: int, new: Callable[..., nn.Parameter]):
        super().__init__()
        self.config = config
        self.window = config.layer_windows[index] if config.layer_windows else None
        shapes = config.layer_shapes()
        for name in Layer.__annotations__:
            shape = shapes.get(name) if config.norm_gains or not name.endswith("_norm") else None
            self.register_parameter(name, None if shape is None else new(*shape))
        self.residual_scale = new(2) if config.residual_scales else None

    def forward(self, x_BTC: Tensor, cos_sin: Tensor, doc_ids, rows: Tensor | None = None) -> Tensor:
        """Return the hidden states after the layer (B, T, C), or only those of `rows` (N,) of the flat batch (N, C)."""
        config, eps, out, down = self.config, self.config.rms_norm_eps, self.out, self.down
        if self.residual_scale is not None:  # scaling the weight costs less than scaling the batch
            out, down = out * self.residual_scale[0], down * self.residual_scale[1]
        normed = normalize(x_BTC, self.input_norm, self.input_norm_bias, config) if config.pre_norms else x_BTC
        branch = self._attend(normed, cos_sin, doc_ids)
        if rows is not None:
            branch, x_BTC = branch.flatten(0, 1)[rows], x_BTC.flatten(0, 1)[rows]
        branch = linear(branch, out, self.out_bias)
        branch = self._finish(branch, self.attention_post_norm)
        if config.pre_norms and not config.layer_norm:
            normed, x_BTC = add_rms_norm(branch, x_BTC, self.mlp_norm, eps)
        else:
            normed = x_BTC = x_BTC + branch
            if config.pre_norms:
                normed = normalize(x_BTC, self.mlp_norm, self.mlp_norm_bias, config)
        branch = feed_forward(
            normed, self.gate_up, down, self.gate_up_bias, self.down_bias,
            activation=config.activation, gated=config.gated_mlp,
        )  # fmt: skip
        return x_BTC + self._finish(branch, self.mlp_post_norm)

    def _finish(self, branch_BTC: Tensor, post_norm: Tensor | None) -> Tensor:
        """Normalize and scale the output of a branch for the residual stream."""
        config = self.config
        if config.post_norms:
            branch_BTC = rms_norm(branch_BTC, post_norm, config.rms_norm_eps)
        return branch_BTC if config.residual_multiplier == 1.0 else branch_BTC * config.residual_multiplier

    def _attend(self, x_BTC: Tensor, cos_sin: Tensor, doc_ids) -> Tensor:
        config = self.config
        batch, length, _ = x_BTC.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        query_BHTD, key_BKTD, value_BKTD = qkv_rotary(
            x_BTC, self.qkv, cos_sin, heads=heads, kv_heads=kv_heads, bias=self.qkv_bias,
            q_gain=self.q_norm, k_gain=self.k_norm,
            eps=config.rms_norm_eps if config.qk_norm else None, whole=config.qk_norm_whole,
        )  # fmt: skip
        attended_BHTD = scaled_dot_product_attention(
            query_BHTD, key_BKTD, value_BKTD, is_causal=True, scale=config.attention_scale,
            enable_gqa=heads != kv_heads, doc_ids=doc_ids, window=self.window, softcap=config.attention_softcap,
        )  # fmt: skip
        return attended_BHTD.transpose(1, 2).reshape(batch, length, heads * config.head_dim)


def normalize(x: Tensor, gain: Tensor | None, bias: Tensor | None, config: ModelConfig) -> Tensor:
    """Apply the configuration's norm over the last dimension: x (..., hidden), gain and bias (hidden,)."""
    if config.layer_norm:
        return F.layer_norm(x, x.shape[-1:], gain, bias, config.rms_norm_eps)
    return rms_norm(x, gain, config.rms_norm_eps)


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
        """Initialize the parameters for training with `seed`; without one, leave them unset, at no cost."""
        super().__init__()
        self.config = config

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.embed_tokens = new(config.vocab_size, config.hidden_size)
        positions = config.max_position_embeddings
        self.embed_positions = new(positions, config.hidden_size) if config.learned_positions else None
        layers = nn.ModuleList(Layer(config, i, new) for i in range(config.num_hidden_layers))
        self.layers = cast("Sequence[Layer]", layers)  # what iterating a ModuleList gives, for the type checker
        self.norm = new(config.hidden_size) if config.norm_gains else None
        self.norm_bias = new(config.hidden_size) if config.layer_norm else None
        self.lm_head = None if config.tie_word_embeddings else new(config.vocab_size, config.hidden_size)
        self._tables, self._table_of = rotary_tables(config)
        # as in transformers, in the precision of the model: the square root of 1152 is 34 in bfloat16
        kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        self.embedding_scales = {dtype: torch.tensor(config.embedding_scale, dtype=dtype).item() for dtype in kinds}
        self.checkpoint_layers = False  # recompute each layer in backward: less memory, a third more time
        self._compiled_layers = False
        if seed is not None:
            self.initialize(seed)

    def initialize(self, seed: int) -> None:
        """Set every parameter from one generator, for Muon on matrices and AdamW on the rest.

        Matrices that write to the residual stream start at zero, so that every layer starts as the identity (Muon's
        first steps have the same size from any start). Other matrices are uniform with variance 1 / fan-in. The head
        starts small: the first loss is log(V), whatever the embedding's scale.
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
            # Tied: small enough for the head; the first norm restores the embedding's scale.
            normal(self.embed_tokens, 0.02)
        else:
            normal(self.embed_tokens, 1.0)
            normal(self.lm_head, 0.001)
        for layer in self.layers:
            uniform(layer.qkv, hidden**-0.5)
            uniform(layer.gate_up, hidden**-0.5)
            for name, parameter in layer.named_parameters():
                if name in ("out", "down") or name.endswith("_bias"):
                    parameter.data.zero_()
                elif name.endswith("_norm") or name == "residual_scale":
                    parameter.data.fill_(1.0)
        if self.norm is not None:
            self.norm.data.fill_(1.0)
        if self.norm_bias is not None:
            self.norm_bias.data.zero_()
        if self.embed_positions is not None:
            normal(self.embed_positions, 0.02)

    def compile_layers(self) -> None:
        """Compile every layer separately, for models that cannot be one graph."""
        self._compiled_layers = True
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (V, hidden); the embedding if they are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def matrices(self) -> Iterator[tuple[str, nn.Parameter, tuple[int, ...]]]:
        """Yield the matrices for Muon: (name, parameter, rows of each matrix that it stacks)."""
        rows = self.config.stacked_rows
        for i, layer in enumerate(self.layers):
            for name in MATRICES:
                yield f"layers.{i}.{name}", getattr(layer, name), rows[name]

    def forward(
        self,
        token_ids_BT: Tensor,
        *,
        doc_ids: Tensor | Packing | Branching | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, hidden), normalized, ready for the head.

        With `rows` (N,), return only these rows of the flat batch (N, hidden): the last layer skips the others.

        `doc_ids` (B, T): equal neighbours are one document, and attention stays within it; a `Branching` of them lets
        several answers share a prompt. Rotary positions do not restart at documents, because rotary attention depends
        on differences alone; learned ones do.
        """
        config = self.config
        eager = not (self._compiled_layers or torch.compiler.is_compiling())
        x_BTC = F.embedding(token_ids_BT, self.embed_tokens)
        if config.normalize_embedding:
            x_BTC = rms_norm(x_BTC, None, config.rms_norm_eps)
        if config.embedding_scale != 1.0:
            x_BTC = x_BTC * self.embedding_scales[x_BTC.dtype]
        if isinstance(doc_ids, Branching):
            positions = doc_ids.position_ids
            length = int(positions.max()) + 1
            turns = [table(length, x_BTC.device, x_BTC.dtype)[positions] for table in self._tables]
        else:
            turns = [table(x_BTC.shape[1], x_BTC.device, x_BTC.dtype) for table in self._tables]
            if isinstance(doc_ids, Tensor) and not torch.compiler.is_compiling():
                doc_ids = Packing(doc_ids)
                # otherwise each layer's graph would compute them; torch's attention needs none
                if self._compiled_layers and backend(x_BTC.device.type) != "torch":
                    for window in set(config.layer_windows or [None]):
                        doc_ids.bounds(window)
        if self.embed_positions is not None:
            x_BTC = x_BTC + F.embedding(_positions(token_ids_BT, doc_ids), self.embed_positions)
        last = self.layers[-1]
        for layer, table in zip(self.layers, self._table_of, strict=True):
            turn, some = turns[table], rows if layer is last else None
            if self.checkpoint_layers and self.training and torch.is_grad_enabled():
                x_BTC = checkpoint(layer, x_BTC, turn, doc_ids, some, use_reentrant=False, preserve_rng_state=False)
            elif eager and torch.is_grad_enabled() and parametrize.is_parametrized(layer):
                x_BTC = _recomputing_weights(layer, x_BTC, turn, doc_ids, some)
            else:
                x_BTC = layer(x_BTC, turn, doc_ids, some)
        x_BTC = normalize(x_BTC, self.norm, self.norm_bias, config)
        return x_BTC if config.logits_scaling == 1.0 else x_BTC / config.logits_scaling

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden) to logits (..., V)."""
        logits, cap = linear(hidden, self.head_weight), self.config.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

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
        """Return the cross-entropy of the targets, which are already shifted: targets[b, t] follows token_ids[b, t]."""
        return linear_cross_entropy(
            self(token_ids_BT, doc_ids=doc_ids), self.head_weight, targets_BT,
            reduction=reduction, ignore_index=ignore_index, chunk_tokens=chunk_tokens,
            softcap=self.config.logits_softcap,
        )  # fmt: skip

    def target_logprobs(self, hidden_NC: Tensor, target_N: Tensor) -> Tensor:
        """Return the log-probability of each target under softmax(logits): (N,) float32."""
        return linear_logprobs(hidden_NC, self.head_weight, target_N, softcap=self.config.logits_softcap)  # type: ignore[return-value]

    def logprobs(self, hidden_NC: Tensor, target_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return each target's log-probability, and the entropy, under softmax(logits / temperature): (N,) float32."""
        logprob_N, entropy_N = linear_logprobs(
            hidden_NC, self.head_weight, target_N, temperature=temperature, return_entropy=True,
            softcap=self.config.logits_softcap,
        )  # fmt: skip
        return logprob_N, entropy_N

    @torch.no_grad()
    def grow(self, rows: int) -> None:
        """Resize embedding and head to `rows` rows; new ones are unset."""
        self.config = replace(self.config, vocab_size=rows)
        for name in ("embed_tokens",) if self.lm_head is None else ("embed_tokens", "lm_head"):
            table = getattr(self, name)
            grown = table.new_empty(rows, self.config.hidden_size)
            grown[: len(table)] = table
            setattr(self, name, nn.Parameter(grown))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode in the block, and restore the previous mode after it, even after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _recomputing_weights(layer: Layer, x_BTC: Tensor, cos_sin: Tensor, doc_ids, rows: Tensor | None) -> Tensor:
    """Run a layer whose matrices are computed, from adapters or codes, and recompute them in backward.

    Keeping them would take the memory of another model. Forward has those of one layer, backward those of one product.
    """
    with parametrize.cached():
        names = {getattr(layer, name).untyped_storage().data_ptr(): name for name in MATRICES}

        def pack(saved: Tensor):
            name = names.get(saved.untyped_storage().data_ptr())
            return saved if name is None else (name, saved.shape, saved.stride(), saved.storage_offset())

        def unpack(packed) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, shape, stride, offset = packed
            with torch.no_grad():
                return getattr(layer, name).as_strided(shape, stride, offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return layer(x_BTC, cos_sin, doc_ids, rows)


def _positions(token_ids_BT: Tensor, doc_ids: Tensor | Packing | Branching | None) -> Tensor:
    """Return the position of each token in its document, (T,) or (B, T)."""
    if isinstance(doc_ids, Branching):
        return doc_ids.position_ids
    position = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    if doc_ids is None:
        return position
    return position - (doc_ids.starts if isinstance(doc_ids, Packing) else document_starts(doc_ids))


@torch.no_grad()
def grow_vocabulary(model: Transformer, known: int, wanted: int) -> Transformer:
    """Set the rows of ids `known` to `wanted` - 1 to the mean of the rows before them, in place; return the model.

    The embedding and an untied head grow together if rows are missing; rows that a base has already, but no token used,
    are set too. The mean makes a new token about as likely as an average one, whatever the context (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models").
    """
    if wanted <= known:
        return model
    rows = model.embed_tokens.shape[0]
    if wanted > rows:
        multiple = MULTIPLE if rows % MULTIPLE == 0 else 1
        model.grow(-(-wanted // multiple) * multiple)
    for table in {model.embed_tokens, model.head_weight}:
        table[known:] = table[:known].float().mean(0)
    return model
