"""Convert a tokenizer to GGUF so that llama.cpp tokenizes text in the same way.

llama.cpp identifies pre-tokenizers by name, not by regular expression. Its converter finds the name by a hash of the
token ids of a text, which a newly trained tokenizer cannot have; here the split in tokenizer.json is recognized.
Sources: llama.cpp's src/llama-vocab.cpp, `llm_tokenizer_bpe`, and gguf's constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.tokenizer.chat import has_own_template
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.tokenizer.patterns import PATTERNS
from llmkit.tokenizer.templates import chat_format, portable_template

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.h, `llama_token_type`

# llama.cpp's names of splits. llama3 is "llama-bpe" if pieces that are tokens skip the merges, as in Llama 3's own
# tokenizer; "smaug-bpe" is the same expression with merges. o200k is missing: llama.cpp approximates its classes of
# letters, and splits words with accents differently.
_NAMES = {"qwen2": "qwen2", "gpt2": "gpt-2", "llama3": "smaug-bpe"}
# llama.cpp always treats these as end tokens
ENDS_BY_NAME = (
    "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>", "<eos>",
    "<end_of_turn>", "<EOT>",
)  # fmt: skip


@dataclass(frozen=True)
class GgufTokenizer:
    """The values of the keys `tokenizer.*` in a GGUF file, and notes on differences from the folder.

    model   "gpt2": byte-level BPE with `merges`; "llama": SentencePiece BPE with `scores`, highest merged first
    pre     llama.cpp's name of the pre-tokenizer
    ends    at most three end tokens: eos first, then the end of a turn
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    bos_id: int | None
    ends: tuple[int, ...]
    pad_id: int | None
    unknown_id: int | None
    add_bos: bool
    chat_template: str | None
    notes: tuple[str, ...]


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> GgufTokenizer:
    """Convert the tokenizer of a model with `vocab_size` rows and the end tokens `ends`.

    Raises UserError if llama.cpp cannot tokenize like it.
    """
    spec, name = tokenizer.content, str(tokenizer.path)
    kind, notes = spec["model"].get("type"), []
    if kind != "BPE":
        raise UserError(f"{name}: expected a BPE tokenizer for GGUF, found {kind}")
    pieces = bool(spec["model"].get("byte_fallback"))
    pre = _check_sentencepiece(spec, name) if pieces else _split_name(spec, name)
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer in ("NFC", "NFKC") and not pieces:
        notes.append(f"text that is not in {normalizer} is tokenized differently: llama.cpp does not normalize")
    elif normalizer is not None and not pieces:
        raise UserError(f"{name}: llama.cpp does not support the normalizer {normalizer}")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
    if not merges:
        raise UserError(f"{name}: expected a tokenizer with merges, required by llama.cpp, found none")
    tokens, types = _tokens(spec, vocab_size, pieces)
    if pieces and (lacking := 256 - types.count(BYTE)):
        notes.append(f"llama.cpp fails at characters that are not tokens: the vocabulary lacks {lacking} of 256 bytes")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{name}: expected distinct token texts, required by llama.cpp, found one twice")
    own = has_own_template(tokenizer)
    assistant = tokenizer.chat_template is not None and not own and tokenizer.specials.get("<|im_end|>") in ends
    template = tokenizer.chat_template if own or assistant else None  # a base model is not trained on its template
    ordered = sorted(dict.fromkeys(ends), key=lambda end: end != tokenizer.eos_id)
    unnamed = [tokens[end] for end in ordered[3:] if tokens[end] not in ENDS_BY_NAME]
    if unnamed:
        notes.append(f"llama.cpp will not stop at {', '.join(unnamed)}: a file can name three end tokens")
    # llama.cpp would also prepend it to conversations, in which an assistant may never have seen it
    add_bos = tokenizer.add_bos and not assistant
    if add_bos and template is not None:  # only if the template writes it, which llama.cpp then does not repeat; if the
        # template fails, keep the configured value like llama.cpp's converter
        with suppress(UserError):
            encoded = chat_format(tokenizer).encode([message("user", "Hello")], prompt=True)
            add_bos = bool(encoded.token_ids[0] == tokenizer.bos_id)
    unknown = spec["model"].get("unk_token")
    return GgufTokenizer(
        model="llama" if pieces else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if pieces else merges,
        scores=_scores(tokens, types, merges) if pieces else [],
        bos_id=tokenizer.bos_id,
        ends=tuple(ordered[:3]),
        pad_id=tokenizer.pad_id,
        unknown_id=None if unknown is None else tokens.index(unknown),
        add_bos=add_bos,
        chat_template=None if template is None else portable_template(template),
        notes=tuple(notes),
    )


# ---- splits


def _split_name(spec: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") for step in steps):
        raise UserError(f"{name}: llama.cpp does not support add_prefix_space")
    kinds, split = [step.get("type") for step in steps], None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        split = "gpt2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        split = "starcoder"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        regex = steps[0]["pattern"].get("Regex")
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        split = next((key for key in _NAMES if plain and PATTERNS[key].regex == regex), None)
    if split is None:
        raise UserError(
            f"{name}: expected a pre-tokenizer that llama.cpp supports ({', '.join(_NAMES)} of llmkit train-bpe "
            "--pattern, or starcoder's), found another expression; use --format hf"
        )
    if spec["model"].get("ignore_merges"):
        if split != "llama3":
            raise UserError(f"{name}: llama.cpp does not support ignore_merges with the pattern {split}")
        return "llama-bpe"
    return _NAMES.get(split, split)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part[key] if part.get("type") == "Sequence" else [part]


def _check_sentencepiece(spec: dict[str, Any], name: str) -> str:
    """Raise UserError unless text is prepared as in llama.cpp's SentencePiece: prepend a space, then mark spaces."""
    normal = _steps(spec.get("normalizer"), "normalizers")
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    prepended = [step["type"] for step in normal] == ["Prepend", "Replace"] and not steps
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not normal:
        prepended = steps[0].get("prepend_scheme") != "never" and not steps[0].get("split", True)
    if not prepended:
        raise UserError(
            f"{name}: expected text to be prepared as by Llama's SentencePiece tokenizer, found another form; "
            "use --format hf"
        )
    return "default"


# ---- tokens


def _tokens(spec: dict[str, Any], vocab_size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Return text and type of every id. llama.cpp parses CONTROL tokens in text only on request."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, index in spec["model"]["vocab"].items():
        is_byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[index], types[index] = text, BYTE if is_byte else NORMAL
    for token in spec.get("added_tokens") or []:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = spec["model"].get("unk_token")
    if unknown is not None and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Return scores for SentencePiece, which merges the pair whose token has the highest score: the earliest merge."""
    rank = {merge.replace(" ", "", 1): order for order, merge in reversed([*enumerate(merges)])}
    lowest = -float(len(merges) + 1)
    return [
        -float(rank.get(token, len(merges))) if kind == NORMAL else 0.0 if kind == BYTE else lowest
        for token, kind in zip(tokens, types, strict=True)
    ]
