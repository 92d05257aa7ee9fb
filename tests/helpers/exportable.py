"""Model folders of every family with random weights and a tokenizer of `llmkit train-bpe`."""

from __future__ import annotations

from pathlib import Path

from tiny import make_model

from llmkit.model.config import Rope, RopeScaling
from llmkit.model.folder import save_model
from llmkit.stages import train_bpe
from llmkit.tokenizer.encoding import load_tokenizer

TEXT = "The old ship's crew sailed past 12 green islands; don't ask \N{GRINNING FACE} why they'd sing. " * 40
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=64, attention_factor=1.2)
FAMILIES = {
    "qwen3": {},
    "qwen3-tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "qk_norm": False, "attention_bias": True},
    "llama": {"model_type": "llama", "qk_norm": False},
    "llama-biases": {"model_type": "llama", "qk_norm": False, "attention_bias": True, "attention_out_bias": True},
    "llama-mlp-biases": {"model_type": "llama", "qk_norm": False, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "qk_norm": False, "head_dim": 24},
    "gemma2": {
        "model_type": "gemma2", "qk_norm": False, "activation": "gelu_tanh", "post_norms": True,
        "scale_embedding": True, "query_pre_attn_scalar": 16.0, "layer_windows": (64, None),
        "attention_softcap": 2.0, "logits_softcap": 3.0, "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", "activation": "gelu_tanh", "post_norms": True, "scale_embedding": True,
        "query_pre_attn_scalar": 16.0, "num_hidden_layers": 7, "layer_windows": (*(64,) * 5, None, 64),
        "rope_theta": 1e6, "sliding_rope": Rope(1e4), "rope_scaling": RopeScaling("linear", 4.0),
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "qk_norm": False, "num_key_value_heads": 4, "learned_positions": True,
        "layer_norm": True, "gated_mlp": False, "activation": "gelu_tanh", "attention_bias": True,
        "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "granite": {
        "model_type": "granite", "qk_norm": False, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_bias": True, "attention_out_bias": True,
        "mlp_bias": True,
    },
    "olmo2-tied": {
        "model_type": "olmo2", "qk_norm_whole": True, "pre_norms": False, "post_norms": True,
        "tie_word_embeddings": True,
    },
    "olmo3": {
        "model_type": "olmo3", "qk_norm_whole": True, "pre_norms": False, "post_norms": True,
        "num_hidden_layers": 5, "layer_windows": (64, 64, 64, None, 64), "rope_scaling": YARN,
        "sliding_rope": Rope(1e4),
    },
    "phi3": {"model_type": "phi3", "qk_norm": False, "rotary_dim": 12},
    "phi3-longrope": {
        "model_type": "phi3", "qk_norm": False, "rotary_dim": 12,
        "rope_scaling": RopeScaling(
            "longrope", 4.0, original_max_position_embeddings=64, attention_factor=1.2,
            short_factor=(1.0,) * 6, long_factor=(1.0, 1.5, 2.0, 4.0, 4.0, 5.0),
        ),
    },
    "smollm3": {"model_type": "smollm3", "qk_norm": False, "num_hidden_layers": 5, "no_rope_layers": (3,)},
}  # fmt: skip


def save_tokenizer(folder: Path, pattern: str = "qwen2") -> Path:
    """Write a tokenizer that `llmkit train-bpe` trained on a few words; return the folder."""
    text = folder.parent / "words.txt"
    text.write_text(TEXT)
    train_bpe.run(
        train_bpe.TrainBpeConfig(inputs=(str(text),), pattern=pattern, vocab_size=384, out=str(folder), quiet=True)
    )
    return folder


def save_assistant(folder: Path, pattern: str = "qwen2", assistant: bool = True, **details) -> Path:
    """Write an assistant, or a base model, with random weights."""
    tokenizer = load_tokenizer(save_tokenizer(folder, pattern))
    ids = tokenizer.specials
    end = ids["<|endoftext|>"]
    ends = (ids["<|im_end|>"], end) if assistant else end
    save_model(make_model(vocab_size=tokenizer.vocab_size, bos_token_id=end, eos_token_id=ends, **details), folder)
    return folder
