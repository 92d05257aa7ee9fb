"""Regular expressions that split text into pieces before BPE, and places where text may safely be cut first.

Hugging Face's `Split` ("isolated") applies a pattern: its matches and the text between them are pieces. It runs at
4 MB/s. But with the four named patterns a piece always ends

1. between an ASCII letter and another ASCII character: no alternative continues from a letter to anything else, except
   that o200k includes a contraction ("don't") in the word;
2. before a space that follows a non-space character: an alternative matches a space only at its start or within white
   space;

and no alternative looks behind, or ahead except after white space. So text may be cut at these places, and each
*chunk* splits into the same pieces as within the text. English has one chunk per 5 bytes, and few unique ones: the
pattern splits each of these only once (corpus.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llmkit.errors import UserError
from llmkit.io.foreign import no_panic


def byte_alphabet() -> list[tuple[str, int]]:
    """List the (character, byte) pairs of byte-level BPE by character, which is the order of Hugging Face's ids.

    Printable bytes represent themselves, others are U+0100 and up (GPT-2's bytes_to_unicode).

    >>> byte_alphabet()[0], byte_alphabet()[-1]
    (('!', 33), ('Ń', 173))
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(chr(byte), byte) for byte in printable] + [(chr(0x100 + i), byte) for i, byte in enumerate(others)]


@dataclass(frozen=True)
class Pattern:
    """A pattern that splits text into pieces.

    regex       in Oniguruma's syntax, as in tokenizer.json
    ascii_regex the same for ASCII chunks, for `re` on bytes, which is ten times faster; None if unknown
    unbroken    ASCII characters that must not be cut off from a preceding letter; None: no safe cuts are known
    """

    name: str
    regex: str
    ascii_regex: bytes | None = None
    unbroken: bytes | None = None


_REGEX = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_ASCII = {"L": "A-Za-z", "N": "0-9", "Lu": "A-Z", "Ll": "a-z"}
_CATEGORY = re.compile(r"\\p\{(\w+)\}")


def _ascii_regex(regex: str) -> bytes:
    """Rewrite a regular expression for ASCII: Unicode categories become character ranges.

    >>> _ascii_regex(r" ?[^\\s\\p{L}]+|\\p{N}{1,3}")
    b' ?[^\\\\sA-Za-z]+|[0-9]{1,3}'
    """
    classes = re.sub(r"\[[^]]*\]", lambda match: _CATEGORY.sub(lambda name: _ASCII.get(name[1], ""), match[0]), regex)
    return _CATEGORY.sub(lambda name: f"[{_ASCII[name[1]]}]", classes).encode()


NAMES = tuple(_REGEX)
PATTERNS = {
    name: Pattern(name, regex, _ascii_regex(regex), b"'" if name == "o200k" else b"") for name, regex in _REGEX.items()
}


def find_pattern(text: str) -> Pattern:
    """Find a pattern by name, or make one from a regular expression. Raise UserError if tokenizers cannot read it."""
    if text in PATTERNS:
        return PATTERNS[text]
    if not text or re.fullmatch(r"[\w.-]+", text):  # an unknown name, which as a regex would match only itself
        raise UserError(f"--pattern: expected {', '.join(NAMES)} or a regular expression, found {text!r}")
    from tokenizers import Regex

    try:
        Regex(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"--pattern: expected {', '.join(NAMES)} or a regular expression, found {text!r}: {error}"
        ) from None
    return Pattern("custom", text)


def piece_finder(pattern: Pattern) -> Callable[[bytes], list[bytes]]:
    """Return a function that splits a UTF-8 text into its non-empty pieces."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern.regex), "isolated").pre_tokenize_str

    def find(text: bytes) -> list[bytes]:
        with no_panic("--pattern", "the regular expression takes too much time or memory for a text"):
            return [piece.encode() for piece, _ in split(text.decode()) if piece]

    if pattern.ascii_regex is None:
        return find
    find_ascii = re.compile(pattern.ascii_regex).findall
    return lambda text: find_ascii(text) if text.isascii() else find(text)
