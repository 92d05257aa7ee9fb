"""Tiny random models of families that llmkit does not implement, with a byte-level tokenizer, saved by transformers."""

import json
from pathlib import Path

import torch
import transformers
from tiny import END, VOCABULARY, save_tokenizer

IDS = dict(bos_token_id=END, eos_token_id=END, pad_token_id=None)
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS)
DENSE = dict(COMMON, intermediate_size=64, max_position_embeddings=128)
GROUPED = dict(DENSE, num_key_value_heads=2)
MAMBA = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, **IDS)
HYBRID = dict(
    head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8
)
MODELS = {
    "gpt_neox": DENSE,
    "opt": dict(COMMON, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=128, dropout=0.3),
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, seq_length=128, **IDS),  # ALiBi
    "falcon": dict(COMMON, max_position_embeddings=128),
    "mamba": MAMBA,  # recurrent
    "mamba2": dict(MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "falcon_h1": dict(GROUPED, **HYBRID, lm_head_multiplier=0.5),  # attention and recurrence, scaled logits
    "lfm2": dict(GROUPED, layer_types=["conv", "full_attention"]),  # convolutions and attention
    "glm4": dict(GROUPED, head_dim=8),
    "starcoder2": dict(GROUPED, sliding_window=8),
    "cohere2": dict(GROUPED, sliding_window=8, logit_scale=0.25, layer_types=["sliding_attention", "full_attention"]),
    "stablelm": GROUPED,
    "phi": DENSE,  # a head with a bias
    "qwen3_moe": dict(GROUPED, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}


def make(family: str, **options):
    """Make a model with random parameters and a sharp distribution."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **MODELS[family] | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(family: str, folder: Path, **options):
    """Write the folder and return the model."""
    model = make(family, **options)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def edit_config(folder: Path, **changes) -> None:
    """Change fields of config.json."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
