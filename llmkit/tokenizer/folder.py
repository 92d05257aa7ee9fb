"""The output of tokenizer training: tokenizer.json and tokenizer_config.json for Hugging Face, and a report.

The vocabulary consists of the 256 bytes, the learned tokens, the special tokens, and reserved tokens up to a multiple
of 64 (16-byte loads of the output matrix). Special and reserved tokens come last, so that the ids of text do not
depend on them. They are not in the BPE model: with `encode_special_tokens`, which llmkit always sets, raw text that
spells one is encoded as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit.errors import UserError
from llmkit.io.files import atomic_file
from llmkit.io.hub import local_folder
from llmkit.tokenizer.backends import TokenizersBackend
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
_OWN = "calc|python|search"
# How transformers' `parse_response` parses an answer: text, thoughts, calls. A call of a built-in tool has one argument
# with the tool's name, because keys must come from the text. JSON is parsed by member; strings and nested values are
# matched as units.
_MEMBER = (
    r"""(?(DEFINE)(?P<string>"(?:[^"\\]|\\.)*+")(?P<nested>[\[{](?:[^\[\]{}"]++|(?&string)|(?&nested))*+[\]}]))"""
    rf"""^(?P<key>{_OWN})(?P<value>_start\|>.*<\|(?P=key)_end\|>)$"""
    r"""|"(?P<key>(?:[^"\\]|\\.)*+)"\s*:\s*(?P<value>(?&string)|(?&nested)|[^\s,\[\]{}"]+)"""
)
_VERBATIM = {"content": "text", "content_args": {"strip": False}, "repeats": True}
RESPONSE_TEMPLATE = {
    "version": 1,
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": ["<|im_start|>assistant<|im_sep|>", "<|result_end|>"],
    "fields": {
        "reasoning_content": {
            "open_pattern": r"<think>\n?", "close_pattern": r"\n?</think>\n{0,2}", **_VERBATIM, "join": "\n\n",
        },
        "tool_calls": {
            "open_pattern": rf"""<\|(?=(?P<name>{_OWN})_start\|>)"""
            r"""|<tool_call>\s*\{\s*"name":\s*"(?P<name>[^"\\]+)",\s*"arguments":\s*(?=\{)""",
            "close_pattern": rf"(?<=<\|(?:{_OWN})_end\|>)|\}}\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": _MEMBER,
                "value_parser": {
                    "name": "json",
                    "args": {"string_delims": [["_start|>", f"<|{tool}_end|>"] for tool in _OWN.split("|")]},
                },
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "tool_responses": {"open": "<|result_start|>", "close": "<|result_end|>", **_VERBATIM},
        "content": {"close": ["<|im_end|>", END_OF_TEXT], **_VERBATIM, "join": ""},
    },
}  # fmt: skip
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
}

# Half a CPU second per tokenizer; training takes 4 s for 100 MB. Below 32 MB a 32nd of the text, at least 64 KB.
MEASURED_BYTES, MEASURED_SHARE, LEAST_MEASURED = 1 << 20, 1 / 32, 64 << 10
LISTED_SOURCES = 50
OTHERS = "(other sources)"

Sample = dict[str, list[str]]  # source -> texts


def reserved_tokens(learned: int) -> list[str]:
    """List the tokens that pad a vocabulary of bytes, `learned` tokens and specials to a multiple of 64."""
    return [f"<|reserved_{i}|>" for i in range(-(SMALLEST_VOCABULARY + learned) % MULTIPLE)]


def tokenizer_json(merges: Merges, pattern: Pattern) -> str:
    """Return the content of tokenizer.json. Raise UserError if a learned token spells a special one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    character = {byte: letter for letter, byte in byte_alphabet()}
    tokens = ["".join(map(character.__getitem__, token)) for token in merges.tokens]
    added = [*SPECIALS, *reserved_tokens(len(tokens) - 256)]
    if taken := set(added) & set(tokens):
        raise UserError(
            f"--pattern: the special token {taken.pop()} was learned from text; use a pattern that cuts at '<' and '|'"
        )
    pairs = [(tokens[left], tokens[right]) for left, right in merges.pairs]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
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


def write_tokenizer(folder: Path, tokenizer: str) -> None:
    """Write tokenizer_config.json and the chat template, then tokenizer.json."""
    write_template(folder, CONFIG)
    with atomic_file(folder / "tokenizer.json", "w") as handle:
        handle.write(tokenizer + "\n")


def write_template(folder: Path, config: Mapping[str, Any]) -> None:
    """Write our chat template, and tokenizer_config.json with the special tokens and the response template."""
    names = {f"{name.strip('<|>')}_token": name for name in SPECIALS if name != END_OF_TEXT}
    known = config.get("extra_special_tokens") or {}
    # a dict, which transformers 4 and 5 read; version 4 fails at a list
    extra = dict.fromkeys((*known, *names.values())) if isinstance(known, list) else {**known, **names}
    beside = {**config, "extra_special_tokens": extra if isinstance(known, dict) else list(extra)}
    beside["response_template"] = RESPONSE_TEMPLATE
    beside.pop("chat_template", None)  # transformers 5 and other programs read it from chat_template.jinja
    texts = {
        "chat_template.jinja": CHAT_TEMPLATE,
        "tokenizer_config.json": json.dumps(beside, indent=2, ensure_ascii=False),
    }
    for name, text in texts.items():
        with atomic_file(folder / name, "w") as handle:
            handle.write(text + "\n")


# ---- report


class Measured(NamedTuple):
    """A tokenizer that only counts the tokens of texts."""

    vocab_size: int
    count: Callable[[Sequence[str]], Sequence[int]]


def make_report(tokenizer: str, merges: Merges, sample: Sample, others: Mapping[str, Measured]) -> dict[str, Any]:
    """Report bytes per token of a tokenizer.json by source, compared with others, and statistics of its tokens."""
    backend = TokenizersBackend(tokenizer.encode())
    texts = [text for texts in sample.values() for text in texts]
    ids, lengths = backend.encode_batch(texts)
    back = backend.tokenizer.decode_batch(
        [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])], skip_special_tokens=False
    )
    lost = [text[:80] for text, again in zip(texts, back, strict=True) if text != again]
    learned = np.arange(256, len(merges.tokens))
    unused = learned[merges.counts[256:] == 0].tolist()
    longest = sorted(learned.tolist(), key=lambda i: (-len(merges.tokens[i]), i))[:20]
    shown = [token.decode(errors="backslashreplace") for token in merges.tokens]
    return {
        "reserved_tokens": len(reserved_tokens(len(merges.pairs))),
        "sample": {"bytes": sum(map(_size, texts)), **_bytes_per_token(sample, lengths.tolist())},
        "round_trip": {"texts": len(texts), "lost": len(lost), "first_lost": lost[:3]},
        "compared": {
            path: {"vocab_size": other.vocab_size, **_bytes_per_token(sample, other.count(texts))}
            for path, other in others.items()
        },
        "unused_tokens": {
            "count": len(unused),
            "meaning": "learned tokens that occur only within longer ones in the training text",
            "first": [shown[i] for i in unused[:20]],
        },
        "longest_tokens": [
            {"token": shown[i], "bytes": len(merges.tokens[i]), "count": int(merges.counts[i])} for i in longest
        ],
    }


def _size(text: str) -> int:
    return len(text.encode())


def _bytes_per_token(sample: Sample, lengths: Sequence[int]) -> dict[str, Any]:
    length = iter(lengths)
    sizes = {source: (sum(map(_size, texts)), sum(next(length) for _ in texts)) for source, texts in sample.items()}
    ratios = {source: round(size / max(tokens, 1), 4) for source, (size, tokens) in sizes.items()}
    size, tokens = map(sum, zip(*sizes.values(), strict=True))
    return {"bytes_per_token": round(size / max(tokens, 1), 4), "bytes_per_token_by_source": ratios}


def choose_sample(texts_of_source: Mapping[str, list[str]], bytes_of_source: Mapping[str, int]) -> Sample:
    """Choose at most MEASURED_BYTES of text, spread evenly over the sources; the smallest sources are merged."""
    by_size = sorted(texts_of_source, key=lambda source: -bytes_of_source[source])
    sample: Sample = {source: texts_of_source[source] for source in by_size[:LISTED_SOURCES]}
    if len(by_size) > LISTED_SOURCES:
        sample[OTHERS] = [text for source in by_size[LISTED_SOURCES:] for text in texts_of_source[source][:1]]
    left = min(MEASURED_BYTES, max(LEAST_MEASURED, int(MEASURED_SHARE * sum(bytes_of_source.values()))))
    chosen: Sample = {source: [] for source in sample}
    available = {source: sum(map(_size, texts)) for source, texts in sample.items()}
    for i, source in enumerate(sorted(sample, key=available.__getitem__)):
        room = left // (len(sample) - i)
        for text in sample[source]:
            head = text.encode()[:room].decode(errors="ignore")
            if not head:
                break
            chosen[source].append(head)
            room -= _size(head)
            left -= _size(head)
    return chosen


def load_other(path: str) -> Measured:
    """Load a tokenizer to compare with, in any common format. Raise UserError if it cannot be read.

    path: a tokenizer.json, its folder or address, GPT-2's encoder.json (with vocab.bpe), or a SentencePiece .model
    """
    from tokenizers import ByteLevelBPETokenizer

    file = local_folder(path)
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; --compare takes a tokenizer.json, encoder.json or .model")
    if file.suffix == ".model":
        try:
            import sentencepiece  # pyright: ignore[reportMissingImports]

            processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except ImportError:
            raise UserError(f"{file}: needs the package sentencepiece: pip install sentencepiece") from None
        except Exception as error:
            raise UserError(f"{file}: not a SentencePiece model: {error}") from None
        return Measured(processor.vocab_size(), lambda texts: [len(ids) for ids in processor.encode(list(texts))])
    try:
        if file.name.endswith("encoder.json"):
            merges = file.with_name(file.name.removesuffix("encoder.json") + "vocab.bpe")
            if not merges.is_file():
                raise UserError(f"{merges}: expected GPT-2's merges next to {file.name}, found nothing")
            data = ByteLevelBPETokenizer.from_file(str(file), str(merges)).to_str().encode()
        else:
            data = file.read_bytes()
        backend = TokenizersBackend(data)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        message = str(error).replace("\n", " ")[:200]
        raise UserError(f"{file}: not a tokenizer that tokenizers can read: {message}") from None
    return Measured(backend.tokenizer.get_vocab_size(), lambda texts: backend.encode_batch(texts)[1].tolist())
