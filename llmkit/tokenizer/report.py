"""Evaluate a tokenizer: bytes per token by source, beside other tokenizers, and figures of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit.errors import UserError
from llmkit.tokenizer.backends import TokenizersBackend
from llmkit.tokenizer.merges import Merges

# Half a CPU second a tokenizer, where training takes 4 for 100 MB. Of less than 32 MB a 32nd part, 64 KB at least.
MEASURED_BYTES, MEASURED_SHARE, LEAST_MEASURED = 1 << 20, 1 / 32, 64 << 10
LISTED_SOURCES = 50
OTHERS = "(other sources)"

Sample = dict[str, list[str]]  # source -> texts


class Measured(NamedTuple):
    """A tokenizer that is only asked how many tokens each of some texts has."""

    vocab_size: int
    count: Callable[[Sequence[str]], Sequence[int]]


def make_report(
    tokenizer: str, merges: Merges, reserved: int, sample: Sample, others: Mapping[str, Measured]
) -> dict[str, Any]:
    """The content of report.json beyond what the run itself knows; `tokenizer` is the text of tokenizer.json."""
    backend = TokenizersBackend(tokenizer.encode())
    texts = [text for texts in sample.values() for text in texts]
    ids, lengths = backend.encode_batch(texts)
    back = backend.tokenizer.decode_batch(
        [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])], skip_special_tokens=False
    )
    lost = [text[:80] for text, again in zip(texts, back, strict=True) if text != again]
    return {
        "reserved_tokens": reserved,
        "sample": {"bytes": sum(map(_size, texts)), **bytes_per_token(sample, lengths.tolist())},
        "round_trip": {"texts": len(texts), "lost": len(lost), "first_lost": lost[:3]},
        "compared": {
            path: {"vocab_size": other.vocab_size, **bytes_per_token(sample, other.count(texts))}
            for path, other in others.items()
        },
        **tokens_report(merges),
    }


def choose_sample(texts_of_source: Mapping[str, list[str]], bytes_of_source: Mapping[str, int]) -> Sample:
    """At most MEASURED_BYTES of text, as even over the sources as they allow; the smallest ones are put together."""
    by_size = sorted(texts_of_source, key=lambda source: -bytes_of_source[source])
    sample: Sample = {source: texts_of_source[source] for source in by_size[:LISTED_SOURCES]}
    if len(by_size) > LISTED_SOURCES:
        sample[OTHERS] = [text for source in by_size[LISTED_SOURCES:] for text in texts_of_source[source][:1]]
    left = min(MEASURED_BYTES, max(LEAST_MEASURED, int(MEASURED_SHARE * sum(bytes_of_source.values()))))
    chosen: Sample = {}
    available = {source: sum(map(_size, texts)) for source, texts in sample.items()}
    for i, source in enumerate(sorted(sample, key=available.__getitem__)):
        chosen[source] = _first(sample[source], left // (len(sample) - i))
        left -= sum(map(_size, chosen[source]))
    return {source: chosen[source] for source in sample}


def _size(text: str) -> int:
    return len(text.encode())


def _first(texts: list[str], size: int) -> list[str]:
    chosen = []
    for text in texts:
        head = text.encode()[:size].decode(errors="ignore")
        if not head:
            break
        chosen.append(head)
        size -= _size(head)
    return chosen


def load_other(path: str) -> Measured:
    """A tokenizer to compare with, of any common form.

    path: a tokenizer.json or its folder, GPT-2's encoder.json (vocab.bpe beside it), a SentencePiece .model.
    Raises UserError when it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such tokenizer; --compare takes a tokenizer.json, encoder.json or .model")
    if file.suffix == ".model":
        return _sentencepiece(file)
    try:
        gpt2 = file.name.endswith("encoder.json")
        return _measured(TokenizersBackend(_gpt2_json(file) if gpt2 else file.read_bytes()))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        message = str(error).replace("\n", " ")[:200]
        raise UserError(f"{file}: not a tokenizer that tokenizers can read: {message}") from None


def _measured(backend: TokenizersBackend) -> Measured:
    return Measured(backend.tokenizer.get_vocab_size(), lambda texts: backend.encode_batch(texts)[1].tolist())


def _gpt2_json(encoder: Path) -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    merges = encoder.with_name(encoder.name.removesuffix("encoder.json") + "vocab.bpe")
    if not merges.is_file():
        raise UserError(f"{merges}: expected GPT-2's merges beside {encoder.name}, found nothing")
    tokenizer = Tokenizer(models.BPE.from_file(str(encoder), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    return tokenizer.to_str().encode()


def _sentencepiece(file: Path) -> Measured:
    try:
        import sentencepiece  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{file}: needs the package sentencepiece: pip install sentencepiece") from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise UserError(f"{file}: not a SentencePiece model: {error}") from None
    return Measured(processor.vocab_size(), lambda texts: [len(ids) for ids in processor.encode(list(texts))])


def bytes_per_token(sample: Sample, lengths: Sequence[int]) -> dict[str, Any]:
    """Bytes per token of a sample and of each source in it, from the number of tokens of each text."""
    length = iter(lengths)
    sizes = {source: (sum(map(_size, texts)), sum(next(length) for _ in texts)) for source, texts in sample.items()}
    return {
        "bytes_per_token": _ratio(*map(sum, zip(*sizes.values(), strict=True))),
        "bytes_per_token_by_source": {source: _ratio(*size) for source, size in sizes.items()},
    }


def _ratio(size: int, tokens: int) -> float:
    return round(size / max(tokens, 1), 4)


def tokens_report(merges: Merges) -> dict[str, Any]:
    """Describe the learned tokens: the number that never occur in the encoded corpus, and the longest."""
    learned = np.arange(256, len(merges.tokens))
    unused = learned[merges.counts[256:] == 0]
    longest = sorted(learned.tolist(), key=lambda i: (-len(merges.tokens[i]), i))[:20]
    return {
        "unused_tokens": {
            "count": len(unused),
            "meaning": "learned tokens that only ever stand within longer ones in the training text",
            "first": [_shown(merges.tokens[i]) for i in unused[:20].tolist()],
        },
        "longest_tokens": [
            {"token": _shown(merges.tokens[i]), "bytes": len(merges.tokens[i]), "count": int(merges.counts[i])}
            for i in longest
        ],
    }


def _shown(token: bytes) -> str:
    return token.decode(errors="backslashreplace")
