"""Model folders of every family with a tokenizer that `llmkit train-bpe` makes, and random weights."""

from __future__ import annotations

from pathlib import Path

from tiny import make_model

from llmkit.model.folder import save_model
from llmkit.stages import train_bpe
from llmkit.tokenizer.encoding import load_tokenizer

TEXT = "The old ship's crew sailed past 12 green islands; don't ask \N{GRINNING FACE} why they'd sing. " * 40
FAMILIES = {
    "qwen3": {},
    "qwen3-tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "qk_norm": False, "attention_bias": True},
    "llama": {"model_type": "llama", "qk_norm": False},
    "llama-biases": {"model_type": "llama", "qk_norm": False, "attention_bias": True, "attention_out_bias": True},
    "mistral": {"model_type": "mistral", "qk_norm": False, "head_dim": 24},
}


def save_tokenizer(folder: Path, pattern: str = "qwen2") -> Path:
    """The folder with a tokenizer that `llmkit train-bpe` makes of a few words."""
    text = folder.parent / "words.txt"
    text.write_text(TEXT)
    train_bpe.run(
        train_bpe.TrainBpeConfig(inputs=(str(text),), pattern=pattern, vocab_size=384, out=str(folder), quiet=True)
    )
    return folder


def save_assistant(folder: Path, pattern: str = "qwen2", assistant: bool = True, **details) -> Path:
    """An assistant, or a base model, with random weights."""
    tokenizer = load_tokenizer(save_tokenizer(folder, pattern))
    ids = tokenizer.specials
    end = ids["<|endoftext|>"]
    ends = (ids["<|im_end|>"], end) if assistant else end
    save_model(make_model(vocab_size=tokenizer.vocab_size, bos_token_id=end, eos_token_id=ends, **details), folder)
    return folder
