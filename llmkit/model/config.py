"""Configuration of a model, in the names of a Hugging Face `config.json`.

Knows nothing of files or tensors: `from_hf` takes the parsed dictionary, `to_hf` returns one.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from llmkit.errors import UserError
from llmkit.io.foreign import integer, number, shown, switch
from llmkit.io.progress import counted

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# What each family takes for granted when its config.json is silent (transformers' own defaults).
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_WINDOW = 4096
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies: "linear" divides all by `factor`, "llama3" and "yarn" those of long wavelengths.

    "dynamic" divides only beyond `max_position_embeddings`, where no sequence of ours goes: it is kept for who reads
    what we save. `attention_factor` multiplies cosines and sines.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


# What each kind of scaling has in a config.json beside its name.
_SCALING_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama and Qwen family. The defaults are those of a model trained from scratch.

    The last four fields exist while we train and fold away on export (`Transformer.export_state_dict`):
    `normalize_embedding` feeds the first layer RMSNorm(E[token]); `residual_scales` learns one factor for each
    branch that joins the residual stream; `norm_gains=False` trains without the gains of the hidden norms (saved
    as ones); `qk_gain` multiplies the normed queries (saved in q_norm).
    """

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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    attention_out_bias: bool = False
    qk_norm: bool = True
    layer_windows: tuple[int | None, ...] | None = None  # sliding window of each layer; None is none at all
    model_type: str = "qwen3"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    normalize_embedding: bool = False
    residual_scales: bool = False
    norm_gains: bool = True
    qk_gain: float = 1.0

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, found {self.model_type!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"found {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: expected an even number, found {self.head_dim}")
        if self.qk_norm != (self.model_type == "qwen3"):
            raise UserError(f"qk_norm: {self.model_type} has {'none' if self.qk_norm else 'it always'}")
        if self.qk_gain != 1.0 and not self.qk_norm:
            raise UserError("qk_gain: needs qk_norm")
        if self.layer_windows is not None and len(self.layer_windows) != self.num_hidden_layers:
            raise UserError(
                f"layer_windows: expected {counted(self.num_hidden_layers, 'entry')}, found {len(self.layer_windows)}"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation, of which a config names none, one or several."""
        ends = self.eos_token_id
        return ends if isinstance(ends, tuple) else () if ends is None else (ends,)

    @property
    def attention_scale(self) -> float:
        """The factor of queries times keys, once they are rotated; yarn's stands in both of them."""
        turned = 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor
        return self.qk_gain * turned**2 * self.head_dim**-0.5

    @property
    def parameter_count(self) -> int:
        """Parameters of the saved model."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * query + 2 * key + 3 * self.intermediate_size + 2)
        layer += self.attention_bias * (query + 2 * key) + self.attention_out_bias * self.hidden_size
        layer += 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_on_disk else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @property
    def tied_on_disk(self) -> bool:
        """True if the saved model shares its embedding: a normalised one can only be saved beside the head's."""
        return self.tie_word_embeddings and not self.normalize_embedding

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs (forward and backward) a token: 6 a matrix weight, 12 H D T for causal-free attention."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * query + 2 * key + 3 * self.intermediate_size)
        weights = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        return 6 * weights + 12 * self.num_hidden_layers * query * context / 2

    def folded(self) -> "ModelConfig":
        """The configuration of the exported model, with nothing left that stock code does not know."""
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
        """Read back what `dataclasses.asdict` made of a configuration, and JSON of that."""
        values = dict(values)
        if values.get("rope_scaling"):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        for name in ("layer_windows", "eos_token_id"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"model configuration: unknown fields {unknown}")
        return cls(**values)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of the exported model, as transformers writes it, readable by releases 4 and 5."""
        config, ends = self.folded(), self.eos_token_id
        out: dict[str, Any] = {
            "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
            "model_type": config.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": config.tie_word_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
            "torch_dtype": dtype,
        }
        if scaling := config.rope_scaling:
            names = ("rope_type", *_SCALING_FIELDS[scaling.rope_type])
            out["rope_scaling"] = {name: getattr(scaling, name) for name in names}
        if config.model_type in ("llama", "qwen3"):
            out["attention_bias"] = config.attention_bias
        windows = self.layer_windows or (None,) * self.num_hidden_layers
        width = next((window for window in windows if window is not None), None)
        if self.model_type == "mistral":
            out["sliding_window"] = width
        elif self.model_type != "llama":
            out |= {
                "use_sliding_window": width is not None,
                "sliding_window": width,
                "max_window_layers": self.num_hidden_layers,
                "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
            }
        return out

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """From a parsed `config.json`; `where` names it in errors. Refuses what the model would not reproduce."""
        model_type = values.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise UserError(
                f"{where}: expected model_type to be one of {', '.join(MODEL_TYPES)}, found {shown(model_type)}"
            )
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise UserError(f"{where}: expected integers for {', '.join(missing)}")
        sizes = {name: integer(values, name, where, at_most=most) for name, most in _REQUIRED.items()}
        if values.get("hidden_act", "silu") not in ("silu", "swish"):
            hidden_act = shown(values["hidden_act"])
            raise UserError(f"{where}: expected hidden_act 'silu', which the four families have, found {hidden_act}")
        if values.get("mlp_bias"):
            raise UserError(f"{where}: expected mlp_bias false: no biases in feed-forward layers are supported")
        theta, scaling = _rope_from_hf(values, where)
        heads = sizes["num_attention_heads"]
        without = "num_key_value_heads" not in values  # null is as many as there are heads
        kv_heads = _DEFAULT_KEY_VALUE_HEADS.get(model_type, heads) if without else heads
        width = _DEFAULT_HEAD_DIM.get(model_type) or sizes["hidden_size"] // heads
        bias = switch(values, "attention_bias", where) and model_type in ("llama", "qwen3")
        try:
            return cls(
                **sizes,
                num_key_value_heads=integer(values, "num_key_value_heads", where, kv_heads, at_most=_WIDEST),
                head_dim=integer(values, "head_dim", where, width, at_most=_WIDEST),
                max_position_embeddings=integer(values, "max_position_embeddings", where, 2048),
                rope_theta=theta,
                rope_scaling=scaling,
                rms_norm_eps=number(values, "rms_norm_eps", where, 1e-6),
                tie_word_embeddings=switch(values, "tie_word_embeddings", where),
                attention_bias=bias or model_type == "qwen2",
                attention_out_bias=bias,
                qk_norm=model_type == "qwen3",
                layer_windows=_windows_from_hf(values, model_type, where),
                model_type=model_type,
                bos_token_id=_token_id(values, "bos_token_id", where),
                eos_token_id=token_ids(values, "eos_token_id", where),
            )
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


_WIDEST = 2**24
LEAST_TURNS = 1e-6  # of yarn's; a context divided by much less is beyond all numbers
# the sizes that every config.json has, and the most of each: what is larger is a mistake, and would be built first
_REQUIRED = {
    "vocab_size": _WIDEST,
    "hidden_size": _WIDEST,
    "intermediate_size": _WIDEST,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**16,
}


def _token_id(values: dict[str, Any], name: str, where: str) -> int | None:
    return integer(values, name, where, at_least=-1)  # -1 is what some write for none


def token_ids(values: dict[str, Any], name: str, where: str) -> int | tuple[int, ...] | None:
    """A field of one token id or several. Raises UserError."""
    value = values.get(name)
    if not isinstance(value, list):
        return _token_id(values, name, where)
    if len(value) > 1000:
        raise UserError(f"{where}: expected at most 1000 ids for {name}, found {len(value)}")
    ids = [_token_id({name: item}, name, where) for item in value]
    return tuple(token_id for token_id in ids if token_id is not None)


def _rope_from_hf(values: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_scaling` and `rope_theta` (transformers 4) or `rope_parameters` (5).

    Where a file has both, version 5 lets `rope_scaling` win.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    parameters = values.get(name) or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: expected an object for {name}, found {shown(parameters)}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(f"{where}: {name} that differ from layer to layer are not supported")
    theta = number(parameters, "rope_theta", where) or number(values, "rope_theta", where, _DEFAULT_ROPE_THETA)
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type == "default":
        return theta, None
    if rope_type not in _SCALING_FIELDS:
        known = ", ".join(("default", *_SCALING_FIELDS))
        raise UserError(f"{where}: expected rope scaling {known}, found {shown(rope_type)}")
    needed = _SCALING_FIELDS[rope_type][: 3 if rope_type == "llama3" else 1]
    numbers = {name: number(parameters, name, where) for name in needed}
    if rope_type in ("llama3", "yarn"):
        field, context = "original_max_position_embeddings", integer(values, "max_position_embeddings", where, 2048)
        numbers[field] = integer(values, field, where, integer(parameters, field, where, context))  # as transformers
        if rope_type == "yarn":
            if theta <= 1:
                raise UserError(f"{where}: expected a number above 1 for rope_theta with yarn, found {shown(theta)}")
            if numbers["factor"] is None and numbers[field] == context:
                raise UserError(f"{where}: rope scaling yarn needs factor, or {field} other than {context}")
            numbers["factor"] = numbers["factor"] or context / numbers[field]
            numbers |= _yarn_from_hf(parameters, numbers["factor"], where)
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise UserError(f"{where}: rope scaling {rope_type} needs {', '.join(missing)}")
    if rope_type == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(f"{where}: expected low_freq_factor below high_freq_factor in {name}")
    return theta, RopeScaling(rope_type, **numbers)


def _yarn_from_hf(parameters: dict[str, Any], factor: float, where: str) -> dict[str, Any]:
    """Read yarn's parameters, with transformers' defaults. Raises UserError."""

    def grown(name: str) -> float:
        return max(1.0, 0.1 * number(parameters, name, where, 1.0) * math.log(factor) + 1.0)

    both = parameters.get("mscale") and parameters.get("mscale_all_dim")  # DeepSeek's; they may be 0
    default = grown("mscale") / grown("mscale_all_dim") if both else max(1.0, 0.1 * math.log(factor) + 1.0)
    return {
        "attention_factor": number(parameters, "attention_factor", where, default),
        "beta_fast": number(parameters, "beta_fast", where, 32.0, above=LEAST_TURNS),
        "beta_slow": number(parameters, "beta_slow", where, 1.0, above=LEAST_TURNS),
        "truncate": parameters.get("truncate") is None or switch(parameters, "truncate", where),
    }


def _windows_from_hf(values: dict[str, Any], model_type: str, where: str) -> tuple[int | None, ...] | None:
    layers = values["num_hidden_layers"]
    if model_type == "llama":
        return None
    window = integer(values, "sliding_window", where, None if "sliding_window" in values else _DEFAULT_WINDOW)
    if model_type == "mistral":
        return None if window is None else (window,) * layers
    if not switch(values, "use_sliding_window", where) or window is None:
        return None
    kinds = values.get("layer_types")
    if kinds is None:
        first = integer(values, "max_window_layers", where, 28, at_least=0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        raise UserError(
            f"{where}: expected full_attention or sliding_attention for each layer in layer_types, found {shown(kinds)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
