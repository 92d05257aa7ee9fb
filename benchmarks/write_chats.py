"""`llmkit write-chats` compared with distilabel and synthetic-data-kit: requests per second to a scripted server.

    python benchmarks/write_chats.py --peer-python peers/bin/python     # has distilabel==1.5.3, synthetic-data-kit

The server answers each request after 30 to 70 ms, independent of its load. In each round all programs answer the same
prompts in turn, with the same concurrency: ours with --answer, distilabel with a pipeline of TextGeneration,
synthetic-data-kit with LLMClient.batch_completion. Rates are measured by the server, from the first request to the
last, without start-up; printed are medians over the rounds. `topics` is ours with --topics: two requests per
conversation, three with a system message. `broken` is the same with 5% of replies truncated, empty, not JSON, 429, 500
or slow: the output must have exactly -n lines, all different.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SLOW = 3.0  # seconds that a slow reply takes


class Server:
    """OpenAI's chat completions, answered by `chat_writer`; `broken` is the share of faulty replies."""

    def __init__(self, port: int) -> None:
        from chat_writer import chat_writer

        self.answer, self.port, self.broken, self.faults = chat_writer, port, 0.0, random.Random(0)
        self.times: list[float] = []

    async def serve(self) -> None:
        async with await asyncio.start_server(self.talk, "127.0.0.1", self.port) as server:
            await server.serve_forever()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path = head.split(b" ")[:2]
                length = next((int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
                body = json.loads(await reader.readexactly(length) or b"null")
                if method == b"GET" and path.startswith(b"/start"):
                    self.broken, self.times = float(path.rpartition(b"/")[2]), []
                    status, value = 200, {}
                elif method == b"GET" and path == b"/figures":
                    status, value = 200, {"requests": len(self.times), "seconds": self.times[-1] - self.times[0]}
                elif method == b"GET":
                    status, value = 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
                else:
                    status, value = await self.reply(body)
                if status == 0:
                    break
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                again = "Retry-After: 0.1\r\n" if status in (429, 500) else ""
                start = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n{again}"
                writer.write(f"{start}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.times.append(time.monotonic())
        await asyncio.sleep(random.uniform(0.03, 0.07))
        fault = None
        if self.faults.random() < self.broken:
            fault = self.faults.choice(["cut", "cut text", "empty", "no JSON", "429", "500", "slow"])
        await asyncio.sleep(SLOW if fault == "slow" else 0)
        if fault in ("429", "500"):
            return int(fault), {"error": {"message": f"something of {fault}"}}
        if fault in ("cut", "no JSON"):
            return (0, b"") if fault == "cut" else (200, b"<html>Bad gateway</html>")
        text = "" if fault == "empty" else self.answer(body["messages"][-1]["content"], body.get("seed") or 0)
        text, ended = (text[: len(text) // 2], "length") if fault == "cut text" else (text, "stop")
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": ended, "logprobs": None}]
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        return 200, {
            "id": "1", "created": 0, "model": "tiny", "object": "chat.completion", "choices": choices, "usage": usage
        }  # fmt: skip


DISTILABEL = """
import json, sys
from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

if __name__ == "__main__":
    url, path, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rows = [{"instruction": json.loads(line)["prompt"]} for line in open(path)]
    with Pipeline() as pipeline:
        model = OpenAILLM(model="tiny", base_url=url, api_key="none", generation_kwargs={"max_new_tokens": 256})
        load = LoadDataFromDicts(data=rows, batch_size=concurrency)
        load >> TextGeneration(llm=model, input_batch_size=concurrency)
    print(len(pipeline.run(use_cache=False)["default"]["train"]))
"""
KIT = """
import json, sys
from synthetic_data_kit.models.llm_client import LLMClient

url, path, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in open(path)]
client = LLMClient(provider="api-endpoint", api_base=url, api_key="none", model_name="tiny")
client.sleep_time = 0
print(len(client.batch_completion(rows, batch_size=concurrency)))
"""


def figures(url: str, command: list[str], broken: float = 0.0) -> dict[str, float]:
    """Run a program; return the number of its requests, and their rate by the server's clock."""
    with urllib.request.urlopen(f"{url}/start/{broken}"):
        pass
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: {(ran.stdout + ran.stderr)[-2000:]}")
    with urllib.request.urlopen(f"{url}/figures") as reply:
        counts = json.load(reply)
    return {"requests": counts["requests"], "requests a second": counts["requests"] / counts["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python with distilabel and synthetic-data-kit")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8473)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "helpers"))
    if options.serve:
        asyncio.run(Server(options.port).serve())
    from chat_writer import sentence

    url = f"http://127.0.0.1:{options.port}"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        chance = random.Random(0)
        prompts = [{"prompt": f"How can I {sentence(chance)[11:]}?"} for _ in range(options.requests)]
        (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        (place / "topics.txt").write_text("The sea\nCooking\nMusic\nTravel\n")
        (place / "guide.md").write_text("Be helpful, truthful and harmless.")
        (place / "distilabel_pipeline.py").write_text(DISTILABEL)
        (place / "kit.py").write_text(KIT)
        serve = [sys.executable, __file__, "--serve", "--port", str(options.port)]
        ours = [sys.executable, "-m", "llmkit", "write-chats", "--guide", f"{place}/guide.md", "--force", "--quiet"]
        ours += [
            "--writer",
            f"openai:{url}/v1#tiny",
            "--concurrency",
            str(options.concurrency),
            "-o",
            f"{place}/o.jsonl",
        ]
        peer = [f"{url}/v1", f"{place}/prompts.jsonl", str(options.concurrency)]
        topics = [*ours, "--topics", f"{place}/topics.txt", "-n", str(options.requests // 3)]
        commands: dict[str, tuple[list[str], float]] = {
            "llmkit": ([*ours, "--answer", f"{place}/prompts.jsonl"], 0.0),
            "llmkit, topics": (topics, 0.0),
            "llmkit, topics, broken": (topics, 0.05),
        }
        if options.peer_python:
            commands["distilabel"] = ([options.peer_python, f"{place}/distilabel_pipeline.py", *peer], 0.0)
            commands["synthetic-data-kit"] = ([options.peer_python, f"{place}/kit.py", *peer], 0.0)
        with subprocess.Popen(serve) as server:
            try:
                time.sleep(2)
                rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
                for _ in range(options.rounds):
                    for name, (command, broken) in commands.items():
                        rounds[name].append(figures(url, command, broken))
                        if "topics" in name:
                            lines = (place / "o.jsonl").read_bytes().splitlines()
                            assert len(lines) == len(set(lines)) == options.requests // 3
            finally:
                server.kill()
        for name, each in rounds.items():
            rates = [figure["requests a second"] for figure in each]
            print(
                f"{name:24} {statistics.median(rates):7.1f} requests/s ({min(rates):.1f} to {max(rates):.1f}), "
                f"{each[-1]['requests']:.0f} requests"
            )


if __name__ == "__main__":
    main()
