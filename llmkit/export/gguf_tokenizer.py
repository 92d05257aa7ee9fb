"""A tokenizer in the terms of GGUF: what llama.cpp must be told to cut text into the same tokens.

llama.cpp knows splits by name, not by their regular expression, and its converter finds the name by a hash of the ids
of a text: a tokenizer that was trained yesterday has none. Here the split itself is recognised, in tokenizer.json.
Source: llama.cpp's src/llama-vocab.cpp, `llm_tokenizer_bpe`, and gguf's constants.
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

# llama.cpp's name of each split. That of llama3 is "llama-bpe" where a piece that is a token as a whole needs no
# merges, as in Llama 3's own tokenizer; "smaug-bpe" is the same expression with merges. o200k is not here: llama.cpp
# approximates its classes of letters, and cuts words with accents elsewhere.
_NAMES = {"qwen2": "qwen2", "gpt2": "gpt-2", "llama3": "smaug-bpe"}
# what llama.cpp takes for an end whatever the file says
ENDS_BY_NAME = (
    "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>", "<eos>",
    "<end_of_turn>", "<EOT>",
)  # fmt: skip


@dataclass(frozen=True)
class GgufTokenizer:
    """Values of the keys `tokenizer.*` of a GGUF file, and notes where llama.cpp will not do as the folder does.

    model   "gpt2", byte-level BPE with `merges`, or "llama", SentencePiece's with `scores`: higher is merged earlier
    pre     llama.cpp's name of the split
    ends    tokens that end a generation: eos first, then the turn's end, at most three
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
    """Return the tokenizer of a model of `vocab_size` tokens that ends a generation at one of `ends`.

    Raises UserError for one that llama.cpp has no way to follow.
    """
    spec, name = tokenizer.content, str(tokenizer.path)
    kind, notes = spec["model"].get("type"), []
    if kind != "BPE":
        raise UserError(f"{name}: expected a BPE tokenizer for GGUF, found {kind}")
    pieces = bool(spec["model"].get("byte_fallback"))
    pre = _check_sentencepiece(spec, name) if pieces else _split_name(spec, name)
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer in ("NFC", "NFKC") and not pieces:
        notes.append(f"text that is not in form {normalizer} becomes other tokens: llama.cpp does not normalise")
    elif normalizer is not None and not pieces:
        raise UserError(f"{name}: the normalizer {normalizer} has no equal in llama.cpp")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
    if not merges:
        raise UserError(f"{name}: expected a tokenizer with merges, which llama.cpp needs, found none")
    tokens, types = _tokens(spec, vocab_size, pieces)
    if pieces and (lacking := 256 - types.count(BYTE)):
        notes.append(
            f"llama.cpp ends with an error at a character that is no token: the vocabulary lacks {lacking} of 256 bytes"
        )
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{name}: expected every token to be another text, as llama.cpp needs it, found one twice")
    own = has_own_template(tokenizer)
    assistant = tokenizer.chat_template is not None and not own and tokenizer.specials.get("<|im_end|>") in ends
    template = tokenizer.chat_template if own or assistant else None  # a base model has not learnt its template
    ordered = sorted(dict.fromkeys(ends), key=lambda end: end != tokenizer.eos_id)
    unnamed = [tokens[end] for end in ordered[3:] if tokens[end] not in ENDS_BY_NAME]
    if unnamed:
        notes.append(f"llama.cpp will not end at {', '.join(unnamed)}: a file names three tokens")
    # llama.cpp puts it before conversations as well, where an assistant may never have seen it
    add_bos = tokenizer.add_bos and not assistant
    if add_bos and template is not None:  # only where the template writes it, which llama.cpp then does not do again;
        # of a template that nobody can ask llama.cpp's converter leaves what the configuration says
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
    """Return llama.cpp's name for the split of a byte-level tokenizer."""
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("add_prefix_space") for step in steps):
        raise UserError(f"{name}: add_prefix_space has no equal in llama.cpp")
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
            f"{name}: expected text to be split as llama.cpp knows it ({', '.join(_NAMES)} of llmkit train-bpe "
            "--pattern, or starcoder's), found another expression; --format hf needs no such name"
        )
    if spec["model"].get("ignore_merges"):
        if split != "llama3":
            raise UserError(f"{name}: ignore_merges with the split {split} has no equal in llama.cpp")
        return "llama-bpe"
    return _NAMES.get(split, split)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part[key] if part.get("type") == "Sequence" else [part]


def _check_sentencepiece(spec: dict[str, Any], name: str) -> str:
    """Raise UserError unless text is prepared as llama.cpp does it for SentencePiece: a space before it, then marks."""
    normal = _steps(spec.get("normalizer"), "normalizers")
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    prepended = [step["type"] for step in normal] == ["Prepend", "Replace"] and not steps
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not normal:
        prepended = steps[0].get("prepend_scheme") != "never" and not steps[0].get("split", True)
    if not prepended:
        raise UserError(
            f"{name}: expected text to be prepared as Llama's SentencePiece tokenizer does it, found another form; "
            "--format hf needs no such form"
        )
    return "default"


# ---- tokens


def _tokens(spec: dict[str, Any], vocab_size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id. Tokens of type CONTROL are found in text only where a program asks for them."""
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
    """SentencePiece merges the neighbours that make the token of the highest score: here, of the earliest merge."""
    rank = {merge.replace(" ", "", 1): order for order, merge in reversed([*enumerate(merges)])}
    lowest = -float(len(merges) + 1)
    return [
        -float(rank.get(token, len(merges))) if kind == NORMAL else 0.0 if kind == BYTE else lowest
        for token, kind in zip(tokens, types, strict=True)
    ]
