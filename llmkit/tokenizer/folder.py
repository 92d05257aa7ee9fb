"""A tokenizer folder from trained merges: tokenizer.json and tokenizer_config.json, as Hugging Face reads them.

The vocabulary is the 256 bytes, the tokens learned, the special tokens and, up to a multiple of 64 (16-byte loads of
the output matrix), reserved tokens. Specials and reserved tokens come last, so that the ids of text never depend on
them, and are not in the BPE model: raw text that spells one is encoded as text when special tokens are switched off
(`encode_special_tokens`), as llmkit does everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.tokenizer.encoding import END_OF_TEXT, bos_post_processor
from llmkit.tokenizer.merges import Merges
from llmkit.tokenizer.patterns import Pattern, byte_alphabet

SPECIALS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_end|>",
    *(f"<|{tool}_{edge}|>" for tool in ("search", "python", "calc", "result") for edge in ("start", "end")),
)
MULTIPLE = 64
SMALLEST_VOCABULARY = 256 + len(SPECIALS)

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").strip()


def reserved_tokens(learned: int) -> list[str]:
    """Name the tokens that fill a vocabulary of bytes, `learned` tokens and specials up to the next multiple of 64."""
    return [f"<|reserved_{i}|>" for i in range(-(SMALLEST_VOCABULARY + learned) % MULTIPLE)]


def tokenizer_json(merges: Merges, pattern: Pattern) -> str:
    """The text of tokenizer.json. Raises UserError when a learned token spells a special one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    character = {byte: letter for letter, byte in byte_alphabet()}
    tokens = ["".join(map(character.__getitem__, token)) for token in merges.tokens]
    added = [*SPECIALS, *reserved_tokens(len(tokens) - 256)]
    if taken := set(added) & set(tokens):
        raise UserError(
            f"--pattern: pieces that contain {taken.pop()} became a token; choose one that cuts at '<' and '|'"
        )
    pairs = [(tokens[left], tokens[right]) for left, right in merges.pairs]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(pattern.regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = bos_post_processor(END_OF_TEXT, len(tokens))
    return json.dumps(spec, indent=2, ensure_ascii=False)


def tokenizer_config() -> dict[str, object]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(folder: Path, tokenizer: str) -> None:
    """Write tokenizer_config.json, then tokenizer.json."""
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    for name, text in (("tokenizer_config.json", config), ("tokenizer.json", tokenizer)):
        with atomic_file(folder / name, "w") as handle:
            handle.write(text + "\n")
