"""`llmkit train-bpe`: train a byte-level BPE tokenizer that Hugging Face libraries load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmkit.config import CommonConfig, RecordsConfig, argument, as_options, option, parse_columns
from llmkit.errors import UserError
from llmkit.io.files import atomic_folder, check_output, output_folder
from llmkit.io.jsonl import PACKED, input_files, names_of, write_json
from llmkit.io.manifest import write_manifest
from llmkit.io.progress import Progress, counted, duration, quantity, say
from llmkit.io.ranks import available_cores
from llmkit.io.records import BadRecords

BYTES_PER_SECOND = 30e6  # English, vocabulary of 32k, two cores


@dataclass(frozen=True, kw_only=True)
class TrainBpeConfig(RecordsConfig, CommonConfig):
    """Options of `llmkit train-bpe`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit train-bpe docs.jsonl --vocab-size 8192 -o tok/
          zcat docs.jsonl.gz | llmkit train-bpe - -o tok/
          llmkit train-bpe docs.jsonl.zst --pattern llama3 --compare gpt2/tokenizer.json -o tok/
    """
    following: ClassVar[str] = "llmkit pretrain docs.jsonl --tokenizer tok/ --time-budget 10m -o base/"

    inputs: tuple[str, ...] = argument(
        "Documents: JSONL, Parquet or CSV with `text`, plain text, or - for stdin.", metavar="INPUT..."
    )
    vocab_size: int = option(
        32768, "Vocabulary size, special tokens included; rounded up to a multiple of 64.", unit="count", at_most=2**24
    )
    pattern: str = option("qwen2", "Pre-tokenization pattern.", metavar="qwen2|llama3|gpt2|o200k|REGEX")
    min_frequency: int = option(0, "Minimum frequency of a merged pair.", at_least=0)
    limit_bytes: int | None = option(None, "Maximum number of bytes of text to read [all].", unit="bytes", at_least=1)
    compare: tuple[str, ...] = option((), "Tokenizer to compare with; repeatable.", metavar="PATH", reads=True)
    seed: None = None  # no --seed: nothing is random

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.inputs or "-" in self.inputs


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints."""

    path: str
    vocab_size: int
    merges: int
    documents: int
    bytes: int
    bytes_per_token: float
    bad_records: int
    seconds: float
    not_used: dict[str, int] | None = None


def run(config: TrainBpeConfig) -> Summary | None:
    """Load, count, merge, save, summarise. Raises UserError for the user's mistakes, before anything is written."""
    from llmkit.tokenizer import folder
    from llmkit.tokenizer.corpus import Corpus, count_pieces
    from llmkit.tokenizer.merges import train_merges
    from llmkit.tokenizer.patterns import find_pattern

    # load
    started = time.monotonic()
    out, inputs, size = _checked(config, folder.SMALLEST_VOCABULARY, folder.MULTIPLE)
    pattern = find_pattern(config.pattern)
    others = {path: folder.load_other(path) for path in config.compare}
    bad = BadRecords(config.max_bad, config.quiet)
    corpus = Corpus(inputs, pattern, config.limit, config.limit_bytes, bad, parse_columns(config.columns))
    specials, total = len(folder.SPECIALS), _megabytes_of(inputs, config.limit_bytes)
    wanted = size - specials - 256  # merges
    if config.dry_run:
        say(f"vocabulary {size}: 256 bytes, {counted(wanted, 'merge')}, special tokens: {specials}", config.quiet)
        say(f"pattern {pattern.name}: {pattern.regex}", config.quiet)
        time_needed = f", about {duration(1 + total * 1e6 / BYTES_PER_SECOND)}" if total else ""
        say(f"from {names_of(inputs)} on {counted(available_cores(), 'core')} to {out}{time_needed}", config.quiet)
        return None

    # count
    with Progress("count", total=total, unit="MB", quiet=config.quiet) as progress:
        pieces, counts = count_pieces(corpus.blocks(), pattern, on_progress=lambda size: progress.advance(size / 1e6))
    if not pieces:
        raise UserError(f"{names_of(inputs)}: no text to train on; expected records with 'text', or plain text")

    # merge
    with Progress("merge", total=wanted, unit="merges", quiet=config.quiet) as progress:
        merges = train_merges(pieces, counts, wanted + 256, config.min_frequency, progress.advance)
    count = len(merges.pairs)
    results = {
        "vocab_size": len(merges.tokens) + specials + len(folder.reserved_tokens(count)),
        "merges": count,
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "bytes_per_token": round(corpus.bytes / int(merges.counts.sum()), 4),
        **bad.results,
    }
    if count < wanted:
        times = f" {config.min_frequency} times" if config.min_frequency > 1 else ""
        vocabulary = f"the vocabulary is {results['vocab_size']}"
        say(f"only {counted(count, 'merge')} of {wanted}: no other pair occurs{times}; {vocabulary}", config.quiet)

    # save
    with atomic_folder(out, config.force) as partial:
        text = folder.tokenizer_json(merges, pattern)
        folder.write_tokenizer(partial, text)
        report = folder.make_report(text, merges, folder.choose_sample(corpus.sample, corpus.bytes_of_source), others)
        write_json(partial / "report.json", {"pattern": pattern.regex, **results, **report})
        write_manifest(partial, "train-bpe", as_options(config), inputs=inputs, results=results)

    # summarise
    for path, other in report["compared"].items():
        ratio = report["sample"]["bytes_per_token"] / other["bytes_per_token"]
        say(f"{ratio:.3f} x the bytes per token of {path} ({other['vocab_size']} tokens)", config.quiet)
    say(f"{results['bytes_per_token']} bytes per token over {quantity(corpus.bytes)}B of text", config.quiet)
    return Summary(path=str(out), **results, seconds=round(time.monotonic() - started, 2))


def _checked(config: TrainBpeConfig, smallest: int, multiple: int) -> tuple[Path, list[str], int]:
    """Return the output, the inputs and the vocabulary size, as they will be used."""
    out = output_folder(config.out, example="tok/")
    check_output(str(out), config.force)
    inputs = input_files(config.inputs or ["-"], text=True)
    if config.vocab_size < smallest:
        needed = f"(256 bytes and {counted(smallest - 256, 'special token')})"
        raise UserError(f"--vocab-size: expected at least {smallest} {needed}, found {config.vocab_size}")
    size = -(-config.vocab_size // multiple) * multiple
    if size != config.vocab_size:
        say(f"--vocab-size {config.vocab_size} becomes {size}, a multiple of {multiple}", config.quiet)
    return out, inputs, size


def _megabytes_of(inputs: list[str], limit_bytes: int | None) -> float | None:
    """Return an upper bound of the text in megabytes; None for pipes and compressed files without a limit."""
    files = [Path(path) for path in inputs if Path(path).is_file() and not path.endswith(PACKED)]
    if len(files) < len(inputs):
        return limit_bytes / 1e6 if limit_bytes else None
    size = sum(file.stat().st_size for file in files)
    return min(size, limit_bytes or size) / 1e6
