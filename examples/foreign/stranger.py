"""Make a model folder without llmkit: random weights saved by transformers, and a Hugging Face tokenizer.

python examples/foreign/stranger.py OUT docs.jsonl                  # a Llama with the ChatML template
python examples/foreign/stranger.py OUT docs.jsonl --family mistral --no-template
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

try:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
except ImportError:
    raise SystemExit("stranger.py: needs transformers: pip install transformers") from None

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str], template: str | None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 384 tokens with GPT-2's split."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    eos = SPECIALS[0] if template is None else SPECIALS[2]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, chat_template=template)


def make_model(family: str, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """Make a random model of this family with two layers and hidden size 64."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        family, **shape, **ends, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("texts", type=Path, help="JSONL with `text`, for the tokenizer")
    parser.add_argument("--family", choices=("llama", "mistral", "qwen2", "qwen3"), default="llama")
    parser.add_argument("--no-template", action="store_true", help="a base model without a chat template")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    texts = [json.loads(line)["text"] for line in arguments.texts.read_text().splitlines()]
    tokenizer = make_tokenizer(texts, None if arguments.no_template else CHATML)
    make_model(arguments.family, tokenizer).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
