"""The characters that stand for bytes in a byte-level vocabulary."""

from __future__ import annotations


def byte_alphabet() -> list[tuple[str, int]]:
    """The (character, byte) pairs of byte-level BPE, by character: the order of Hugging Face's ids.

    Printable bytes stand for themselves, the others for U+0100 and up (GPT-2's bytes_to_unicode).

    >>> byte_alphabet()[0], byte_alphabet()[-1]
    (('!', 33), ('Ń', 173))
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(chr(byte), byte) for byte in printable] + [(chr(0x100 + i), byte) for i, byte in enumerate(others)]
