"""Training a BPE tokenizer: llmkit compared with Hugging Face tokenizers and rustbpe, on the same text and pattern.

    python benchmarks/train_bpe.py docs.jsonl.gz --peer-python peers/bin/python

Contenders run in turn, in rounds, each in a separate process; a row is the median. llmkit is the command as a user runs
it: start-up, report and manifest included. The peers read the same JSONL in a few lines of Python. Wall time is from
start to end of the process, CPU time includes its children, peak memory is the largest sum of the resident sets of all
its processes, sampled every 20 ms. `merges as HF` is the share of positions with the same merge as Hugging Face.

A corpus that is too small is repeated with its documents in order; in every repetition 1 word in 100 has two letters
swapped, so that new words keep appearing. --memory-megabytes is the size of llmkit's last run, for its memory per byte.
The peers' Python needs tokenizers, rustbpe and orjson. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import count
from pathlib import Path

SPECIALS = 12  # included in llmkit's vocabulary size, not in the peers'
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---- in a peer's process


def texts(path: str) -> Iterator[str]:
    import orjson

    with open(path, "rb") as lines:
        for line in lines:
            yield orjson.loads(line)["text"]


def run_hf(path: str, vocab_size: int, out: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        for text in texts(path):
            batch.append(text)
            if len(batch) == 1000:
                yield batch
                batch = []
        yield batch

    tokenizer.train_from_iterator(batches(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    Path(out).write_text(json.dumps(["".join(pair) for pair in merges]))


def run_rustbpe(path: str, vocab_size: int, out: str) -> None:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts(path), vocab_size, pattern=QWEN2)
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])[256:]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    Path(out).write_text(json.dumps(["".join(letter[byte] for byte in token) for token, _ in ranks]))


# ---- in this process


def write_corpus(source: str, path: Path, size: int) -> int:
    """Write `size` bytes of text as JSONL; return how many bytes of text there are."""
    with (gzip.open if source.endswith(".gz") else open)(source, "rb") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    written = 0
    with open(path, "w", encoding="utf-8") as handle:
        for repetition in count():
            for text in documents:
                edited = with_typos(text, repetition) if repetition else text
                handle.write(json.dumps({"text": edited}, ensure_ascii=False) + "\n")
                written += len(edited.encode())
                if written >= size:
                    return written
    raise AssertionError


def with_typos(text: str, repetition: int) -> str:
    words = text.split(" ")
    for i in range(repetition * 7 % 100, len(words), 100):
        word = words[i]
        if len(word) > 3:
            at = (repetition + i) % (len(word) - 1)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return its wall and CPU seconds and its peak memory in MB."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    peak = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, sum(map(resident, family(process.pid))))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}")
    return {"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime, "MB": peak / 1e6}


def family(pid: int) -> list[int]:
    """Return the process and its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(child))]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def llmkit_command(path: Path, vocab_size: int, out: Path) -> list[str]:
    command = [sys.executable, "-m", "llmkit", "train-bpe", str(path), "--vocab-size", str(vocab_size)]
    return [*command, "-o", str(out), "--force", "--quiet"]


def merges_of(out: Path) -> list[str]:
    """Return the strings that the merges produce, in order."""
    if out.is_dir():
        return ["".join(pair) for pair in json.loads((out / "tokenizer.json").read_text())["model"]["merges"]]
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", help="JSONL with `text`, plain or .gz")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--memory-megabytes", type=float, default=500, help="0: skip this run")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=["llmkit", "hf", "rustbpe"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "docs.jsonl")
        size = write_corpus(options.documents, corpus, int(options.megabytes * 1e6))
        print(f"{size / 1e6:.0f} MB of text, vocabulary {options.vocab_size}, {date.today()}, {machine()}\n")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
        for _ in range(options.rounds):
            for name in options.only:
                out = Path(folder, name)
                command = [
                    options.peer_python,
                    __file__,
                    "--run",
                    name,
                    str(corpus),
                    str(options.vocab_size - SPECIALS),
                ]
                ours = llmkit_command(corpus, options.vocab_size, out)
                runs[name].append(measure(ours if name == "llmkit" else [*command, str(out)]))
        print_table(runs, {name: merges_of(Path(folder, name)) for name in options.only}, size)
        if options.memory_megabytes:
            size = write_corpus(options.documents, corpus, int(options.memory_megabytes * 1e6))
            found = measure(llmkit_command(corpus, options.vocab_size, Path(folder, "large")))
            print(
                f"\nllmkit at {size / 1e6:.0f} MB: {found['MB']:.0f} MB, {found['MB'] * 1e6 / size:.2f} bytes/byte; "
                f"{found['wall']:.1f} s, {found['cpu']:.1f} CPU s"
            )


def print_table(runs: dict[str, list[dict[str, float]]], merges: dict[str, list[str]], size: int) -> None:
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    ours = medians.get("llmkit")
    print("| | wall s | CPU s | peak MB | bytes/byte | llmkit: wall | llmkit: CPU | merges as HF |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, found in medians.items():
        ratios = [f"{ours[key] / found[key]:.2f}x" if ours else "" for key in ("wall", "cpu")]
        theirs = merges.get("hf", [])
        same = sum(a == b for a, b in zip(merges[name], theirs, strict=False)) / max(len(theirs), 1)
        cells = [f"{found['wall']:.2f}", f"{found['cpu']:.2f}", f"{found['MB']:.0f}", f"{found['MB'] * 1e6 / size:.2f}"]
        print(f"| {name} | {' | '.join([*cells, *ratios])} | {same:.2%} |" if theirs else f"| {name} | {cells} |")


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{cores} cores, {model[0].split(':')[1].strip() if model else platform.machine()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        {"hf": run_hf, "rustbpe": run_rustbpe}[sys.argv[2]](sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
