"""Tiny random models of every family, saved by transformers, for the model tests."""

from pathlib import Path

import torch
import transformers

SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN_ROPE = dict(rope_type="yarn", rope_theta=5e5, factor=4.0, original_max_position_embeddings=16)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=8)
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0)
OLMO_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
OLMO_ROPE = {"full_attention": YARN_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
PHI_ROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
LONG_ROPE = dict(
    rope_type="longrope", rope_theta=1e4, partial_rotary_factor=2 / 3, short_factor=[1.0, 1.1, 1.2, 1.5],
    long_factor=[1.0, 2.0, 3.0, 4.0],
)  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases-and-scaled-rope": ("Llama", {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral-window": ("Mistral", {"sliding_window": 8, "head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "llama-mlp-biases": ("Llama", {"mlp_bias": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3-scaled-rope": ("Gemma3Text", {**GEMMA, "rope_parameters": GEMMA_ROPE, "attention_bias": True}),
    "gpt2": ("GPT2", {"n_inner": 80}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False}),
    "granite": ("Granite", {**GRANITE, "tie_word_embeddings": True}),
    "granite-biases": ("Granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo2-biases-and-yarn": ("Olmo2", {"attention_bias": True, "rope_parameters": YARN_ROPE}),
    "olmo3": ("Olmo3", {"sliding_window": 8, "layer_types": OLMO_LAYERS}),
    "olmo3-yarn": ("Olmo3", {"sliding_window": 8, "layer_types": OLMO_LAYERS, "rope_parameters": OLMO_ROPE}),
    "phi3": ("Phi3", {}),
    "phi3-window-and-part-of-the-head": ("Phi3", {"sliding_window": 8, "rope_parameters": PHI_ROPE}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG_ROPE}),
    "phi3-longrope-beyond-its-first-context": (
        "Phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "rope_parameters": YARN_ROPE}),
    "smollm3-window": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
    ),
}


def make(name: str):
    """Make a model with every parameter random, norm gains and biases included, so that tests notice a missing one."""
    cls, options = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, cls + "Config")(**SMALL, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(name: str, folder: Path):
    model = make(name)
    model.save_pretrained(folder)
    return model


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
