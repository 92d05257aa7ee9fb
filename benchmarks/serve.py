"""`llmkit serve` compared with llama-cpp-python's server: requests and tokens per second, time to the first token.

    python benchmarks/serve.py chat/ --peer-python peers/bin/python     # has llama-cpp-python[server]

Both serve one folder with the same number of threads: float32 against a GGUF file in float32, int8 against q8_0. In
each round the two answer the same requests in turn, with 1 client and with 16; printed are medians over the rounds, and
the median of the rounds' ratios. A client sends its next request as soon as it has the answer.

    python benchmarks/serve.py chat/ --long 1500                        # a model with a context of 2,048 or more

measures llmkit's server with prompts of that length: the time to the first token of a conversation's first and second
turn, and the longest gap between two tokens of a running client when such a prompt arrives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PORTS = 8471, 8472
PROMPT = "Tell me about the village where the river meets the old road, and who lives there. "


async def ask(url: str, body: dict[str, Any]) -> tuple[float, float, bytes]:
    """Send a request; return the seconds to the first data of the body and to its end, and the body."""
    address, data = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    await reader.readuntil(b"\r\n\r\n")
    content = await reader.read(1)
    while body.get("stream") and b'"text": "' not in content.replace(b'"text":"', b'"text": "'):
        if not (piece := await reader.read(65536)):
            break
        content += piece
    first = time.perf_counter() - started
    content += await reader.read()
    writer.close()
    return first, time.perf_counter() - started, content


async def load(
    url: str, clients: int, requests: int, tokens: int, stream: bool, prompt: list[int] | None = None
) -> dict[str, float]:
    """Return the figures of concurrent clients."""
    waiting, firsts, made = list(range(requests)), [], 0

    async def client() -> None:
        nonlocal made
        while waiting:
            number = waiting.pop()
            body = {"prompt": prompt or f"{number}. {PROMPT}", "max_tokens": tokens, "seed": number, "stream": stream}
            first, _, content = await ask(url, body | {"temperature": 1.0, "top_k": 40})
            firsts.append(first)
            if not stream:
                made += json.loads(content[content.index(b"{") : content.rindex(b"}") + 1])["usage"][
                    "completion_tokens"
                ]

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - started
    if stream:
        return {"first token, ms": 1000 * statistics.median(firsts)}
    return {"requests/s": requests / seconds, "tokens/s": made / seconds}


async def stream(url: str, body: dict[str, Any]) -> AsyncIterator[tuple[float, list[int]]]:
    """Send a request; yield the time and the tokens of each chunk."""
    address, data = urlsplit(url), json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(data)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
    async for line in reader:
        if line.startswith(b"data: {") and (ids := json.loads(line[6:])["choices"][0].get("token_ids")):
            yield time.perf_counter(), ids
    writer.close()


async def long_prompts(url: str, vocabulary: int, length: int, tokens: int, number: int) -> dict[str, float]:
    """Return the seconds to the first token of two turns, and the longest gap of another client."""
    first = vocabulary // 10  # skips the special tokens, which usually come first
    draw = random.Random(number)
    body = {"max_tokens": tokens, "temperature": 1.0, "seed": number}
    prompt, figures = [draw.randrange(first, vocabulary) for _ in range(length)], {}
    for turn in ("first", "second"):
        started, times = time.perf_counter(), []
        async for at, ids in stream(url, body | {"prompt": prompt}):
            times.append(at)
            prompt = prompt + ids
        figures[f"time to the first token of the {turn} turn"] = times[0] - started
        prompt = prompt + [draw.randrange(first, vocabulary) for _ in range(50)]
    other = [draw.randrange(first, vocabulary) for _ in range(length)]
    gaps, last, task = {False: [0.0], True: [0.0]}, 0.0, None
    async for at, _ in stream(url, body | {"prompt": [7], "max_tokens": 4 * tokens}):
        gaps[task is not None and not task.done()].append(at - last if last else 0.0)
        last = at
        if task is None and len(gaps[False]) > tokens:
            task = asyncio.ensure_future(load(url, 1, 1, 1, False, other))
    assert task is not None
    await task
    return figures | {
        "longest gap between tokens": max(gaps[False]),
        "longest gap while a prompt comes in": max(gaps[True]),
    }


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"{' '.join(map(str, process.args))}: exit code {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=1).read()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{url}: no answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer-python", help="Python with llama-cpp-python and its server")
    parser.add_argument("--long", type=int, help="length of long prompts, instead of the comparison")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.long is None and options.peer_python is None:
        parser.error("expected --peer-python or --long")
    urls = [f"http://127.0.0.1:{port}" for port in PORTS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if options.long is not None:
        command = [sys.executable, "-m", "llmkit", "serve", options.model, "--port", str(PORTS[0])]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                wait_for(urls[0], process)
                rounds = range(options.rounds)
                size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
                load_of = partial(long_prompts, urls[0], min(size, 1000), options.long, options.tokens)
                runs = [asyncio.run(load_of(number)) for number in rounds]
            finally:
                process.terminate()
        for name in runs[0]:
            print(f"| {name}, ms | {1000 * statistics.median(run[name] for run in runs):.0f} |")
        return
    print("| precision | clients | figure | llmkit | llama.cpp | ratio |\n|---|---|---|---|---|---|")
    for ours, theirs in (("float32", "float32"), ("int8", "q8_0")):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            file = Path(folder) / "m.gguf"
            export = [sys.executable, "-m", "llmkit", "export", options.model, "--format", "gguf", "--dtype", theirs]
            subprocess.run([*export, "-o", str(file), "--quiet"], check=True, stdout=subprocess.DEVNULL)
            commands = [
                [sys.executable, "-m", "llmkit", "serve", options.model, "--dtype", ours, "--port", str(PORTS[0])],
                [options.peer_python, "-m", "llama_cpp.server", "--model", str(file), "--port",
                 str(PORTS[1]), "--n_threads", str(options.threads), "--n_threads_batch", str(options.threads),
                 "--n_ctx", "0", "--verbose", "false"],
            ]  # fmt: skip
            for url, command in zip(urls, commands, strict=True):
                process = stack.enter_context(
                    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                )
                stack.callback(process.terminate)
                wait_for(url, process)
            compare(f"{ours}, {theirs}", urls, options.rounds, options.tokens)


def compare(precision: str, urls: list[str], rounds: int, tokens: int) -> None:
    """Print the rows of one precision."""
    for clients in (1, 16):
        figures: dict[str, list[tuple[float, float]]] = {}
        for number in range(rounds + 1):
            for stream in (False, True):
                pair = [asyncio.run(load(url, clients, max(4, 2 * clients), tokens, stream)) for url in urls]
                for name in pair[0] if number else ():  # the first round warms up
                    figures.setdefault(name, []).append((pair[0][name], pair[1][name]))
        for name, values in figures.items():
            mine, other = (statistics.median(value[side] for value in values) for side in (0, 1))
            ratio = statistics.median(value[0] / value[1] for value in values)
            print(f"| {precision} | {clients} | {name} | {mine:.1f} | {other:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
