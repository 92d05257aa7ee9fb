"""Model configuration, with the field names of a Hugging Face `config.json`.

It is independent of files and tensors: `from_hf` takes the parsed dictionary, `to_hf` returns one.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from llmkit.errors import UserError, naming
from llmkit.io.foreign import integer, number, shown, switch
from llmkit.io.progress import counted
from llmkit.model.families import FAMILIES, Family
from llmkit.model.rope import Rope, RopeScaling, rope_to_hf, ropes_from_hf, scaling_from_dict

SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new")}  # names in config.json


def _choice(usual: Any) -> Any:
    """Declare a field in which families differ, with its most common value."""
    return field(default=usual, metadata={"usual": usual})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder, and choices in which families differ. Defaults are for training from scratch, a Qwen3.

    layer_windows  sliding window of each layer; None: no layer has one
    rotary_dim     number of rotated channels of a head, from the first; None: all
    sliding_rope   rotation of the layers with a window, if it differs from that of the others
    no_rope_layers layers without a rotation
    pre_norms      norms of the inputs of attention and feed-forward
    post_norms     norms of their outputs
    layer_norm     norms subtract the mean and have biases
    qk_norm_whole  queries and keys are normalized over all heads at once
    query_pre_attn_scalar  attention scores are divided by its square root, not by that of the head size

    The last four fields exist only in training and are folded away on export (`Transformer.export_state_dict`):
    `normalize_embedding` feeds the first layer RMSNorm(E[token]); `residual_scales` learns one factor for each branch
    that joins the residual stream; `norm_gains=False` trains without the gains of the hidden norms (saved as ones);
    `qk_gain` multiplies the normalized queries (saved in q_norm).
    """

    backend: ClassVar[str] = "llmkit"  # the code that computes it
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    sliding_rope: Rope | None = None
    no_rope_layers: tuple[int, ...] = ()
    learned_positions: bool = _choice(False)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = _choice(False)  # on the query, key and value projections
    attention_out_bias: bool = _choice(False)
    mlp_bias: bool = _choice(False)
    gated_mlp: bool = _choice(True)
    activation: str = _choice("silu")  # or gelu_tanh
    pre_norms: bool = _choice(True)
    post_norms: bool = _choice(False)
    layer_norm: bool = _choice(False)
    qk_norm: bool = _choice(True)
    qk_norm_whole: bool = _choice(False)
    layer_windows: tuple[int | None, ...] | None = None
    scale_embedding: bool = _choice(False)  # by the square root of the hidden size
    embedding_multiplier: float = _choice(1.0)
    residual_multiplier: float = _choice(1.0)
    attention_multiplier: float | None = _choice(None)
    query_pre_attn_scalar: float | None = _choice(None)
    logits_scaling: float = _choice(1.0)  # divides the logits
    attention_softcap: float | None = _choice(None)  # c of c * tanh(score / c)
    logits_softcap: float | None = _choice(None)
    model_type: str = "qwen3"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    normalize_embedding: bool = False
    residual_scales: bool = False
    norm_gains: bool = True
    qk_gain: float = 1.0

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise UserError(f"model_type: expected one of {', '.join(FAMILIES)}, found {self.model_type!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"found {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: expected an even number, found {self.head_dim}")
        family = FAMILIES[self.model_type]
        for name in PLAIN.keys() - family.options.keys():
            if getattr(self, name) != (expected := family.choices.get(name, PLAIN[name])):
                raise UserError(f"{name}: expected {expected} for {self.model_type}, found {getattr(self, name)}")
        if self.qk_gain != 1.0 and not self.qk_norm:
            raise UserError("qk_gain: needs qk_norm")
        if self.layer_windows is not None and len(self.layer_windows) != self.num_hidden_layers:
            raise UserError(
                f"layer_windows: expected {counted(self.num_hidden_layers, 'entry')}, found {len(self.layer_windows)}"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generation: none, one or several."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else () if ends is None else (ends,)

    @property
    def layer_ropes(self) -> tuple[Rope, ...]:
        """The rotation of each layer."""
        channels = 0 if self.learned_positions else self.rotary_dim
        main = Rope(self.rope_theta, self.rope_scaling, channels)
        local = main if self.sliding_rope is None else replace(self.sliding_rope, channels=channels)
        ropes = [main if window is None else local for window in self.layer_windows or (None,) * self.num_hidden_layers]
        for layer in self.no_rope_layers:
            ropes[layer] = replace(main, channels=0)
        return tuple(ropes)

    @property
    def attention_scale(self) -> float:
        """Factor of rotated queries times keys, including that of yarn and longrope, which multiplies both."""
        turned = 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor
        scale = self.attention_multiplier or (self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return self.qk_gain * turned**2 * scale

    @property
    def embedding_scale(self) -> float:
        """Factor of the embedding's output."""
        return self.embedding_multiplier * (self.hidden_size**0.5 if self.scale_embedding else 1.0)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of each matrix in a layer's stacked matrices: queries, keys, values; gate, up."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "qkv": (query, key, key),
            "out": (self.hidden_size,),
            "gate_up": (self.intermediate_size,) * (2 if self.gated_mlp else 1),
            "down": (self.hidden_size,),
        }

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every parameter of a layer, in the saved model."""
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        rows = {name: sum(sizes) for name, sizes in self.stacked_rows.items()}
        whole = self.qk_norm_whole
        shapes = {
            "input_norm": self.pre_norms and (hidden,),
            "input_norm_bias": self.layer_norm and (hidden,),
            "qkv": (rows["qkv"], hidden),
            "qkv_bias": self.attention_bias and (rows["qkv"],),
            "q_norm": self.qk_norm and (query if whole else self.head_dim,),
            "k_norm": self.qk_norm and (key if whole else self.head_dim,),
            "out": (hidden, query),
            "out_bias": self.attention_out_bias and (hidden,),
            "attention_post_norm": self.post_norms and (hidden,),
            "mlp_norm": self.pre_norms and (hidden,),
            "mlp_norm_bias": self.layer_norm and (hidden,),
            "gate_up": (rows["gate_up"], hidden),
            "gate_up_bias": self.mlp_bias and (rows["gate_up"],),
            "down": (hidden, self.intermediate_size),
            "down_bias": self.mlp_bias and (hidden,),
            "mlp_post_norm": self.post_norms and (hidden,),
        }
        return {name: shape for name, shape in shapes.items() if shape}

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the saved model."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        tables = self.vocab_size * (1 if self.tied_on_disk else 2)
        tables += self.max_position_embeddings * self.learned_positions + 1 + self.layer_norm
        return self.num_hidden_layers * layer + tables * self.hidden_size

    @property
    def tied_on_disk(self) -> bool:
        """True if the saved model ties its embedding: a normalized one has to be saved separately from the head."""
        return self.tie_word_embeddings and not self.normalize_embedding

    def flops_per_token(self, context: int) -> float:
        """Return the training FLOPs (forward, backward) per token: 6 per matrix weight, 6 H D T per causal layer."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values() if len(shape) == 2)
        weights = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        query = self.num_attention_heads * self.head_dim
        return 6 * weights + 12 * self.num_hidden_layers * query * context / 2

    def folded(self) -> "ModelConfig":
        """Return the configuration of the exported model, without fields unknown to stock code."""
        return replace(
            self,
            tie_word_embeddings=self.tied_on_disk,
            normalize_embedding=False,
            residual_scales=False,
            norm_gains=True,
            qk_gain=1.0,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Restore a configuration from `dataclasses.asdict`, directly or through JSON."""
        values = dict(values)
        if values.get("rope_scaling"):
            values["rope_scaling"] = scaling_from_dict(values["rope_scaling"])
        if rope := values.get("sliding_rope"):
            values["sliding_rope"] = Rope(**{**rope, "scaling": rope["scaling"] and scaling_from_dict(rope["scaling"])})
        for name in ("layer_windows", "no_rope_layers", "eos_token_id"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"model configuration: unknown fields {unknown}")
        return cls(**values)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Return the `config.json` of the exported model in transformers' format, readable by releases 4 and 5."""
        config, family, ends = self.folded(), FAMILIES[self.model_type], self.eos_token_id
        main = Rope(self.rope_theta, self.rope_scaling, self.rotary_dim)
        activation = family.key("activation")
        sizes = (*SIZES, "num_key_value_heads", "head_dim", "activation", "max_position_embeddings", "rms_norm_eps")
        written = {name: getattr(config, name) for name in sizes}
        written["activation"] = family.defaults.get(activation, ACTIVATIONS[self.activation][0])
        out: dict[str, Any] = {
            "architectures": [family.architecture + family.head],
            "model_type": config.model_type,
            **{key: value for name, value in written.items() if (key := family.key(name))},
            **rope_to_hf(main, config.sliding_rope or main, config.head_dim, family),
            "tie_word_embeddings": config.tie_word_embeddings,
            **dict.fromkeys(family.dropouts, 0.0),
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
            "torch_dtype": dtype,
        }
        for name, key in family.options.items():
            value = getattr(config, name)
            if value != PLAIN[name] or key == "attention_bias":  # other plain values are the defaults
                # transformers expects an integer here, and floats for softcaps
                out[key] = int(value) if name == "query_pre_attn_scalar" and value.is_integer() else value
        if "pad_token_id" in family.defaults:  # else transformers would not train the default's row
            out["pad_token_id"] = None
        return out | _windows_to_hf(config, family)

    @classmethod
    def from_hf(
        cls,
        values: dict[str, Any],
        where: str = "config.json",
        otherwise: str = "choose a model of one of these families",
    ) -> "ModelConfig":
        """Convert a parsed `config.json`; `where` names it in errors, and `otherwise` is the advice for an unknown
        family. Raises UserError for settings that the model would not reproduce."""
        model_type = values.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None or not isinstance(model_type, str):
            code = ", whose code (auto_map) is never run" if values.get("auto_map") else ""
            raise UserError(
                f"{where}: expected model_type to be one of {', '.join(FAMILIES)}, found {shown(model_type)}{code}; "
                + otherwise
            )
        values = {**family.defaults, **values}
        names = {name: family.key(name) for name in SIZES}
        if family.mlp_ratio and values.get(names["intermediate_size"]) is None:
            hidden = integer(values, names["hidden_size"], where, 0, at_most=_WIDEST)
            values[names["intermediate_size"]] = family.mlp_ratio * hidden or None
        if missing := [names[name] for name in SIZES if values.get(names[name]) is None]:
            raise UserError(f"{where}: expected integers for {', '.join(missing)}")
        sizes = {name: integer(values, names[name], where, at_most=most) for name, most in SIZES.items()}
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        activation = family.choices.get("activation", PLAIN["activation"])
        key = family.key("activation")
        if values.get(key, ACTIVATIONS[activation][0]) not in ACTIVATIONS[activation]:
            raise UserError(
                f"{where}: expected {key} {ACTIVATIONS[activation][0]!r} for {model_type}, found {shown(values[key])}"
            )
        for key, value in family.refused.items():
            if values.get(key, value) not in (value, None):
                raise UserError(f"{where}: only {key} {value} is supported, found {shown(values[key])}")
        values = {name: value for name, value in values.items() if family.key(name)}
        own_width = family.defaults.get("head_dim") or max(1, sizes["hidden_size"] // heads)
        head_dim = integer(values, "head_dim", where, own_width, at_most=_WIDEST)
        chosen = {**PLAIN, **family.choices}
        for name, key in family.options.items():
            read = switch if isinstance(PLAIN[name], bool) else number
            chosen[name] = PLAIN[name] if values.get(key) is None else read(values, key, where)
        with naming(where):
            return cls(
                **sizes,
                **chosen,
                num_key_value_heads=integer(values, "num_key_value_heads", where, heads, at_most=_WIDEST),
                head_dim=head_dim,
                max_position_embeddings=integer(values, family.key("max_position_embeddings"), where, 2048),
                **ropes_from_hf(values, family, head_dim, where),
                rms_norm_eps=number(values, family.key("rms_norm_eps"), where, 1e-6),
                tie_word_embeddings=switch(values, "tie_word_embeddings", where),
                layer_windows=_windows_from_hf(values, family, layers, where),
                no_rope_layers=_no_rope_from_hf(values, family, layers, where),
                model_type=model_type,
                bos_token_id=_token_id(values, "bos_token_id", where),
                eos_token_id=token_ids(values, "eos_token_id", where),
            )


PLAIN = {item.name: item.metadata["usual"] for item in fields(ModelConfig) if item.metadata} | {"qk_norm": False}
_WIDEST = 2**24
# the sizes in every config.json, and their upper bounds: a larger one is a mistake, and would be allocated first
SIZES = {
    "vocab_size": _WIDEST,
    "hidden_size": _WIDEST,
    "intermediate_size": _WIDEST,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**16,
}


def _token_id(values: dict[str, Any], name: str, where: str) -> int | None:
    return integer(values, name, where, at_least=-1)  # some write -1 for none


def token_ids(values: dict[str, Any], name: str, where: str) -> int | tuple[int, ...] | None:
    """Read a field of one token id or several. Raises UserError."""
    value = values.get(name)
    if not isinstance(value, list):
        return _token_id(values, name, where)
    if len(value) > 1000:
        raise UserError(f"{where}: expected at most 1000 ids for {name}, found {len(value)}")
    ids = [_token_id({name: item}, name, where) for item in value]
    return tuple(token_id for token_id in ids if token_id is not None)


def _windows_from_hf(values: dict[str, Any], family: Family, layers: int, where: str) -> tuple[int | None, ...] | None:
    window = integer(values, "sliding_window", where) if family.windows else None
    if window is None or (family.windows == "switch" and not switch(values, "use_sliding_window", where)):
        return None
    if family.windows == "all":
        return (window,) * layers
    kinds = values.get("layer_types")
    if kinds is None and family.rope_every:  # smollm3: those without a rotation
        unrotated = _no_rope_from_hf(values, family, layers, where)
        kinds = [SLIDING if i in unrotated else FULL for i in range(layers)]
    elif kinds is None and family.window_every:
        every = integer(values, "sliding_window_pattern", where, family.window_every)
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    elif kinds is None:
        first = integer(values, "max_window_layers", where, 28, at_least=0)
        kinds = [SLIDING if i >= first else FULL for i in range(layers)]
    if not isinstance(kinds, list) or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise UserError(f"{where}: expected {FULL} or {SLIDING} for each layer in layer_types, found {shown(kinds)}")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    windows = config.layer_windows or (None,) * config.num_hidden_layers
    width = next((window for window in windows if window is not None), None)
    if family.windows is None:
        return {}
    out: dict[str, Any] = {"use_sliding_window": width is not None} if family.windows == "switch" else {}
    out["sliding_window"] = width
    if family.windows == "switch" and not family.rope_every:
        out["max_window_layers"] = config.num_hidden_layers
    if family.windows != "all":
        out["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    if family.rope_every:
        out["no_rope_layers"] = [int(i not in config.no_rope_layers) for i in range(config.num_hidden_layers)]
    return out


def _no_rope_from_hf(values: dict[str, Any], family: Family, layers: int, where: str) -> tuple[int, ...]:
    if not family.rope_every:
        return ()
    rotated = values.get("no_rope_layers")  # 1 for a rotated layer, despite its name
    if rotated is None:
        every = integer(values, "no_rope_layer_interval", where, family.rope_every)
        rotated = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(flag not in (0, 1) for flag in rotated):
        raise UserError(f"{where}: expected 0 or 1 for each layer in no_rope_layers, found {shown(rotated)}")
    return tuple(i for i in range(layers) if not rotated[i])
