"""The families of decoders that llmkit loads, trains and saves, with transformers' names and choices.

One decoder computes them all (model/transformer.py). An entry has the choices that all members of a family share, those
that a member's config.json makes and under which names, the defaults of config.json, and the names of the tensors.
Checked against transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# parameter of a layer -> the modules of a checkpoint that it stacks
LLAMA_LAYER = {
    "input_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
POST_NORMS = {
    "attention_post_norm": ("post_attention_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA_LAYER = {**LLAMA_LAYER, **POST_NORMS, "mlp_norm": ("pre_feedforward_layernorm",)}
OLMO_LAYER = {**LLAMA_LAYER, **POST_NORMS}  # without pre-norms
LLAMA_TABLES = {"embed_tokens": "embed_tokens", "norm": "norm"}
BIASES = {"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family as transformers defines it.

    architecture  prefix of its classes, such as "Llama" of LlamaForCausalLM
    head          suffix of its language model's class
    scorer        prefix of its classifier's class, if it is not `architecture`
    choices       fields of ModelConfig that are not plain in every member
    options       fields of ModelConfig in which members differ, and their names in config.json
    refused       names in config.json of settings with one supported value, and that value
    names         names in config.json that differ from ours; "" for fields that it lacks
    defaults      defaults of config.json, by its names
    windows       which layers have `sliding_window`: none, "all", by `layer_types`, or by these if `use_sliding_window`
    window_every  without `layer_types`, each layer of this multiple has full attention
    layer_ropes   True if layers with a window may have their own rotation
    rope_every    without `no_rope_layers`, each layer of this multiple is not rotated
    partial_rotary  True if `partial_rotary_factor` applies
    mlp_ratio     default ratio of intermediate size to hidden size
    dropouts      names of its dropouts in config.json, which are written as 0: none is applied
    prefix        of the tensors of the model without its head
    tables        names of the tensors outside of the layers
    layers        name of the list of layers
    layer         modules of a layer
    transposed    True if matrices are stored as (in, out), as by gpt2's Conv1D
    gain_offset   added to the stored gain of a norm
    """

    architecture: str
    head: str = "ForCausalLM"
    scorer: str | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: Literal["all", "layers", "switch"] | None = None
    window_every: int | None = None
    layer_ropes: bool = False
    rope_every: int | None = None
    partial_rotary: bool = False
    mlp_ratio: int | None = None
    dropouts: tuple[str, ...] = ("attention_dropout",)
    prefix: str = "model."
    tables: Mapping[str, str] = field(default_factory=lambda: LLAMA_TABLES)
    layers: str = "layers"
    layer: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LLAMA_LAYER)
    transposed: bool = False
    gain_offset: float = 0.0

    def key(self, name: str) -> str:
        """Return the name in config.json of a field of ModelConfig; "" if it has none."""
        return self.names.get(name, "hidden_act" if name == "activation" else name)


FAMILIES = {
    "llama": Family(architecture="Llama", options={**BIASES, "mlp_bias": "mlp_bias"}),
    "mistral": Family(
        architecture="Mistral", windows="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": Family(
        architecture="Qwen2",
        choices={"attention_bias": True},
        windows="switch",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        architecture="Qwen3",
        choices={"qk_norm": True},
        options=BIASES,
        windows="switch",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "gemma2": Family(
        architecture="Gemma2",
        choices={"activation": "gelu_tanh", "post_norms": True, "scale_embedding": True},
        options={
            **BIASES,
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attention_softcap": "attn_logit_softcapping",
            "logits_softcap": "final_logit_softcapping",
        },
        refused={"use_bidirectional_attention": False},
        names={"activation": "hidden_activation"},
        defaults={
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="layers",
        window_every=2,
        layer=GEMMA_LAYER,
        gain_offset=1.0,
    ),
    "gemma3_text": Family(
        architecture="Gemma3",
        scorer="Gemma3Text",
        choices={"activation": "gelu_tanh", "post_norms": True, "qk_norm": True, "scale_embedding": True},
        options={
            **BIASES,
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "logits_softcap": "final_logit_softcapping",
        },
        refused={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        names={"activation": "hidden_activation"},
        defaults={
            **GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        windows="layers",
        window_every=6,
        layer_ropes=True,
        layer=GEMMA_LAYER,
        gain_offset=1.0,
    ),
    "gpt2": Family(
        architecture="GPT2",
        head="LMHeadModel",
        choices={
            "learned_positions": True,
            "layer_norm": True,
            "gated_mlp": False,
            "activation": "gelu_tanh",
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
        refused={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "",
            "head_dim": "",
            "activation": "activation_function",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "rope_theta": "",
        },
        defaults={
            "activation_function": "gelu_new",
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        mlp_ratio=4,
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        prefix="transformer.",
        tables={"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"},
        layers="h",
        layer={
            "input_norm": ("ln_1",),
            "qkv": ("attn.c_attn",),
            "out": ("attn.c_proj",),
            "mlp_norm": ("ln_2",),
            "gate_up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
        transposed=True,
    ),
    "granite": Family(
        architecture="Granite",
        options={
            **BIASES,
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_multiplier": "attention_multiplier",
            "logits_scaling": "logits_scaling",
        },
        defaults={"attention_multiplier": 1.0},
    ),
    "olmo2": Family(
        architecture="Olmo2",
        choices={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
        options=BIASES,
        defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
        layer=OLMO_LAYER,
    ),
    "olmo3": Family(
        architecture="Olmo3",
        choices={"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
        options=BIASES,
        defaults={
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "pad_token_id": 1,
            "rope_theta": 5e5,
            "sliding_window": 4096,
        },
        windows="layers",
        window_every=4,
        layer_ropes=True,
        layer=OLMO_LAYER,
    ),
    "phi3": Family(
        architecture="Phi3",
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        windows="all",
        partial_rotary=True,
        dropouts=("attention_dropout", "embd_pdrop", "resid_pdrop"),
        layer={**LLAMA_LAYER, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)},
    ),
    "smollm3": Family(
        architecture="SmolLM3",
        options={**BIASES, "mlp_bias": "mlp_bias"},
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        windows="switch",
        rope_every=4,
    ),
}
