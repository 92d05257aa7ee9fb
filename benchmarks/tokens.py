"""Tokenization of documents (JSONL or Parquet) to disk on one thread: llmkit with each backend, tiktoken, Hugging Face,
datatrove.

    python benchmarks/tokens.py docs.jsonl --tokenizer tok/ --peer-python peers/bin/python

Every contender reads the same file, encodes with the same vocabulary, prepends the same token to each document and
writes 16 or 32-bit ids and document ends; it runs in its own process on one CPU, with one thread per library pool. The
rate is bytes of text per CPU second, from opening the file to closing the output; llmkit's includes hashing the input,
verifying the ids and starting the backend. `same` compares the ids with Hugging Face's. Slow contenders read only the
first --slow-megabytes. The peers' Python needs tiktoken, tokenizers, numpy, pyarrow, orjson and
datatrove[io,processing]; the default is this Python. datatrove appends its token to each document; for the comparison
its last one is moved to the front.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("llmkit", "llmkit-fastokens", "llmkit-tokenizers", "tiktoken", "hf", "datatrove")
PEERS = ("tiktoken", "hf", "datatrove")
SLOW = ("llmkit-tokenizers", "hf", "datatrove")
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


# ---- in a contender's process


def texts(path: str, limit: int | None):
    import orjson

    if path.endswith(".parquet"):
        from pyarrow import parquet

        batches = parquet.ParquetFile(path).iter_batches(columns=["text"])
        yield from itertools.islice((text for batch in batches for text in batch["text"].to_pylist()), limit)
        return
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as lines:
        for number, line in enumerate(lines):
            if number == limit:
                return
            yield orjson.loads(line)["text"]


def write_arrays(folder: Path, parts, start: int, dtype):
    """Write what a peer's user would: the concatenated ids, and the end of each document."""
    import numpy as np

    with_start = [part for ids in parts for part in (np.array([start], dtype), ids.astype(dtype))]
    tokens = np.concatenate(with_start)
    ends = np.cumsum([1 + len(ids) for ids in with_start[1::2]])
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "doc_ends.npy", ends)
    return tokens


def run_tiktoken(path: str, limit: int | None, tokenizer_json: str, folder: Path):
    import numpy as np
    import tiktoken

    spec = json.loads(Path(tokenizer_json).read_bytes())
    step = spec["pre_tokenizer"]["pretokenizers"][0]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in printable)}
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ranks = {
        bytes(alphabet[character] for character in piece): number
        for piece, number in spec["model"]["vocab"].items()
        if piece not in added
    }
    encoding = tiktoken.Encoding("bench", pat_str=step["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens=added)
    dtype = np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32
    started = time.process_time(), time.perf_counter()
    parts = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts(path, limit)]
    return started, write_arrays(folder, parts, added["<|endoftext|>"], dtype)


def run_hf(path: str, limit: int | None, tokenizer_json: str, folder: Path):
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_json)
    tokenizer.encode_special_tokens = True
    start = tokenizer.token_to_id("<|endoftext|>")
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    started = time.process_time(), time.perf_counter()
    parts, group = [], []
    for text in texts(path, limit):
        group.append(text)
        if len(group) == 256:
            parts += [np.array(encoding.ids) for encoding in tokenizer.encode_batch_fast(group)]
            group = []
    parts += [np.array(encoding.ids) for encoding in tokenizer.encode_batch_fast(group)]
    return started, write_arrays(folder, parts, start, dtype)


def run_datatrove(path: str, limit: int | None, tokenizer_json: str, folder: Path):
    import numpy as np
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = ParquetReader if path.endswith(".parquet") else JsonlReader
    started = time.process_time(), time.perf_counter()
    LocalPipelineExecutor(
        [
            reader(os.path.dirname(path) or ".", glob_pattern=os.path.basename(path), limit=limit or -1),
            DocumentTokenizer(str(folder / "ids"), tokenizer_json, eos_token="<|endoftext|>", shuffle_documents=False),
        ],
        logging_dir=str(folder / "logs"),
    ).run()
    ids = next((folder / "ids").glob("*.ds"))
    ends = np.fromfile(f"{ids}.index", np.uint64).astype(np.int64)
    tokens = np.fromfile(ids, np.uint16 if ids.stat().st_size == 2 * ends[-1] else np.uint32)
    return started, np.concatenate([tokens[-1:], tokens[:-1]])  # a token before the first document, as for the others


def run_llmkit(path: str, limit: int | None, tokenizer_json: str, folder: Path, backend: str | None):
    import numpy as np

    from llmkit.data.shards import tokenize_documents
    from llmkit.tokenizer.encoding import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_json)
    started = time.process_time(), time.perf_counter()
    if backend is not None:
        tokenizer.choose_backend([], only=backend)
    shards = tokenize_documents([path], tokenizer, folder, limit=limit, quiet=True)
    stopped = time.process_time(), time.perf_counter()
    peak = peak_megabytes()  # before the comparison loads all tokens, which no real run does
    if backend not in (None, tokenizer.backend):
        raise SystemExit(f"{backend}: not installed, or it does not give the ids of tokenizers")
    tokens = np.concatenate([shard.tokens for shard in shards._shards])
    return (started, stopped), peak, tokens, tokenizer.backend


def peak_megabytes() -> float:
    """Return this process's peak memory; on Linux, getrusage would include its parent's at the fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def worker(name: str, path: str, limit: int | None, head: int, tokenizer_json: str) -> dict:
    """Run one contender, and hash the ids of the first `head` documents for comparison."""
    import numpy as np

    library = name
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("llmkit"):
            _, _, backend = name.partition("-")
            times, peak, tokens, library = run_llmkit(path, limit, tokenizer_json, Path(folder), backend or None)
            (cpu, wall), (cpu_end, wall_end) = times
        else:
            run = {"tiktoken": run_tiktoken, "hf": run_hf, "datatrove": run_datatrove}[name]
            (cpu, wall), tokens = run(path, limit, tokenizer_json, Path(folder))
            cpu_end, wall_end = time.process_time(), time.perf_counter()
            peak = peak_megabytes()
    start_at = np.flatnonzero(tokens == tokens[0])
    first = tokens[: start_at[head] if head < len(start_at) else len(tokens)].astype(np.uint32)
    digest = hashlib.sha256(first.tobytes()).hexdigest()[:12]
    return {
        "cpu": cpu_end - cpu,
        "wall": wall_end - wall,
        "peak_mb": peak,
        "tokens": len(tokens),
        "ids": digest,
        "library": library,
    }


# ---- all contenders


def text_sizes(path: str) -> list[int]:
    return [len(text.encode()) for text in texts(path, None)]


def measure(name: str, arguments: argparse.Namespace, limit: int | None, head: int) -> dict:
    python = arguments.peer_python if name in PEERS and arguments.peer_python else sys.executable
    command = [python, __file__, arguments.documents, "--tokenizer", arguments.tokenizer, "--worker", name]
    command += ["--head", str(head), *(["--limit", str(limit)] if limit else [])]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    one_cpu = (lambda: os.sched_setaffinity(0, {arguments.cpu})) if hasattr(os, "sched_setaffinity") else None
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, preexec_fn=one_cpu, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("documents", help="JSONL, plain or gzip, or Parquet")
    parser.add_argument("--tokenizer", required=True, help="folder of a byte-level BPE with <|endoftext|>")
    parser.add_argument("--peer-python", help="Python with the peers")
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts; slow ones run once")
    parser.add_argument("--slow-megabytes", type=float, default=20)
    parser.add_argument("--cpu", type=int, default=0, help="CPU that every contender is pinned to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--head", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = Path(arguments.tokenizer)
    tokenizer_json = str(path / "tokenizer.json" if path.is_dir() else path)
    if arguments.worker:
        outcome = worker(arguments.worker, arguments.documents, arguments.limit, arguments.head, tokenizer_json)
        print(json.dumps(outcome))
        return

    sizes = text_sizes(arguments.documents)
    head, total = 0, 0
    while head < len(sizes) and total < arguments.slow_megabytes * 1e6:
        total += sizes[head]
        head += 1
    runs: dict[str, list[dict]] = {name: [] for name in arguments.only}
    for k in range(arguments.rounds):
        for name in arguments.only:
            if k == 0 or name not in SLOW:
                runs[name].append(measure(name, arguments, head if name in SLOW else None, head))
    megabytes = {name: (total if name in SLOW else sum(sizes)) / 1e6 for name in runs}
    cpu = {name: statistics.median(run["cpu"] for run in some) for name, some in runs.items()}
    rate = {name: megabytes[name] / cpu[name] for name in runs}
    reference = runs.get("hf", [{"ids": None}])[0]["ids"]
    corpus = f"{len(sizes):,} documents, {sum(sizes) / 1e6:.1f} MB of text"
    print(f"{arguments.documents}: {corpus}; {platform.machine()}, Python {platform.python_version()}")
    heads = f"{'MB':>6} {'CPU s':>7} {'MB/s':>7} {'/tiktoken':>9} {'/hf':>6} {'/datatrove':>10} {'peak MB':>8}  same"
    print(f"{'':18} {'library':10} {heads}")
    for name, some in runs.items():
        ratios = [f"{rate[name] / rate[peer]:.1f}" if peer in rate else "-" for peer in PEERS]
        same = "-" if reference is None else "yes" if all(run["ids"] == reference for run in some) else "NO"
        print(
            f"{name:18} {some[0]['library']:10} {megabytes[name]:6.1f} {cpu[name]:7.2f} {rate[name]:7.1f} "
            f"{ratios[0]:>9} {ratios[1]:>6} {ratios[2]:>10} {max(run['peak_mb'] for run in some):8.0f}  {same}"
        )


if __name__ == "__main__":
    main()
