"""The smallest model folder, for tests of generation: random weights and one token per byte."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 257  # 256 bytes and <|endoftext|>
END = 256


def save_tokenizer(folder: Path, *more_specials: str) -> None:
    """Write a byte-level tokenizer without merges: id 256 is <|endoftext|>, which begins and ends every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", *more_specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def make_model(*, context: int = 512, seed: int = 0, spread: float = 1.0, **sizes):
    """Make a Transformer with every parameter random, gains included; a large `spread` sharpens the distribution."""
    import torch

    from llmkit.model.config import ModelConfig
    from llmkit.model.transformer import Transformer

    shape = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "bos_token_id": END,
        "eos_token_id": END,
        **sizes,
    }
    model = Transformer(ModelConfig(max_position_embeddings=context, **shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1]
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread * fan_in**-0.5)
            else:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def certain(model, *chain):
    """Make a model always generate the tokens of `chain` in order, regardless of the prompt."""
    import itertools

    import torch

    hidden = model.config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.fill_(1.0)
        for i, (token, following) in enumerate(itertools.pairwise(chain)):
            model.embed_tokens[token, i % hidden] = 1.0
            model.lm_head[following, i % hidden] = 10.0
    return model


def save_folder(folder: Path, model=None) -> Path:
    """Write a complete run folder and return it."""
    from llmkit.model.folder import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    save_model(model or make_model(), folder)
    return folder


def save_assistant(folder: Path, said: str | None = None, context: int = 256) -> Path:
    """Write an assistant that answers everything with `said`, or at random."""
    from llmkit.model.folder import save_model
    from llmkit.tokenizer.chat import CHAT_SPECIALS
    from llmkit.tokenizer.encoding import load_tokenizer

    folder.mkdir()
    save_tokenizer(folder, *CHAT_SPECIALS)
    tokenizer = load_tokenizer(folder)
    header, end = tokenizer.specials["<|im_sep|>"], tokenizer.specials["<|im_end|>"]
    model = make_model(vocab_size=257 + len(CHAT_SPECIALS), eos_token_id=(END, end), context=context)
    if said is not None:
        certain(model, header, *tokenizer.encode(said), end)
    save_model(model, folder)
    return folder
