"""Many concurrent clients: texts as for single requests, slots freed by disconnects, and constant memory."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from served import Server, served


@pytest.fixture(scope="module", params=["float32", "int8"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    base = tiny.save_folder(root / "base", tiny.make_model(context=1024))
    folders = base, tiny.save_assistant(root / "chat", context=1024)
    with served(*folders, "--batch-size", "8", "--dtype", request.param) as server:
        yield server


def requests(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    made = []
    for seed in range(count):
        common = {"seed": seed, "max_tokens": draw.randint(1, 20), "temperature": draw.choice([0, 0.7, 1.3])}
        common |= draw.choice([{}, {"top_p": 0.8}, {"extra_body": {"top_k": 5}}, {"stop": ["e"]}, {"n": 2}])
        text = "word " * draw.choice([draw.randint(1, 20), draw.randint(100, 180)])  # up to four pieces
        chat = {"model": "chat", "messages": [{"role": "user", "content": text}]}
        made.append(common | draw.choice([chat, {"model": "base", "prompt": text}]))
    return made


async def answer(client: Any, request: dict[str, Any], leave: bool = False) -> list[str]:
    api = client.chat.completions if "messages" in request else client.completions
    texts = [""] * request.get("n", 1)
    stream = await api.create(**request, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content if "messages" in request else choice.text) or ""
        if leave and any(texts):
            await stream.close()
            break
    return texts


def open_requests(server: Server) -> int:
    return sum(map(int, re.findall(r"^llmkit_requests_open\S* (\d+)$", server.post("/metrics", None)[1], re.MULTILINE)))


def test_each_of_64_clients_has_the_text_of_a_lone_request(server: Server) -> None:
    from openai import AsyncOpenAI

    async def all_of_them() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            wanted = requests(64)
            alone = [await answer(client, request) for request in wanted]
            order = list(range(64))
            random.Random(1).shuffle(order)
            together = await asyncio.gather(*(answer(client, wanted[at], leave=at % 8 == 0) for at in order))
        for at, texts in zip(order, together, strict=True):
            if at % 8 == 0:
                assert all(whole.startswith(text) for whole, text in zip(alone[at], texts, strict=True))
            else:
                assert texts == alone[at], wanted[at]

    asyncio.run(all_of_them())
    deadline = time.monotonic() + 10
    while open_requests(server) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_requests(server) == 0


def test_the_queue_has_a_bound(tmp_path: Path) -> None:
    from openai import AsyncOpenAI, RateLimitError

    async def ask(client: Any) -> Any:
        return await client.completions.create(model="base", prompt="a", max_tokens=300, seed=3)

    async def twelve(url: str) -> list[Any]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(12)), return_exceptions=True)

    with served(tiny.save_folder(tmp_path / "base"), "--batch-size", "2", "--queue", "3") as server:
        answers = asyncio.run(twelve(server.url))
    refused = [error for error in answers if isinstance(error, RateLimitError)]
    assert len(refused) == 7 and all(error.response.headers["retry-after"] for error in refused)
    assert len({one.choices[0].text for one in answers if not isinstance(one, RateLimitError)}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_when_what_runs_is_finished(tmp_path: Path, number: signal.Signals) -> None:
    with served(tiny.save_folder(tmp_path / "base", tiny.make_model(context=4096))) as server:
        request = {"model": "base", "prompt": "a", "max_tokens": 600, "temperature": 1.5, "stream": True, "seed": 1}
        stream = iter(server.client.completions.create(**request))
        chunks = [next(stream)]
        server.process.send_signal(number)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        server.process.wait(20)


def test_a_request_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    folder = tiny.save_folder(tmp_path / "base", tiny.make_model(context=100_000))
    request = {"model": "base", "prompt": "a", "max_tokens": 90_000, "temperature": 0}
    with served(folder, "--timeout", "0.3") as server:
        status, content = server.post("/v1/completions", request)
        assert status == 504 and "--timeout" in content["error"]["message"]
        assert "--timeout" in server.post("/v1/completions", {**request, "stream": True})[1]
        assert server.post("/v1/completions", {**request, "max_tokens": 2})[0] == 200


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(tmp_path: Path) -> None:
    from openai import AsyncOpenAI

    def resident() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]

    async def ask_all(wanted: list[dict[str, Any]]) -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for start in range(0, len(wanted), 50):
                batch = enumerate(wanted[start : start + 50])
                await asyncio.gather(*(answer(client, request, leave=at % 8 == 0) for at, request in batch))

    base = tiny.save_folder(tmp_path / "base", tiny.make_model(context=1024))
    with served(base, tiny.save_assistant(tmp_path / "chat", context=1024)) as server:
        asyncio.run(ask_all(requests(2000)))  # to the peak of its buffers
        before = resident()
        asyncio.run(ask_all(requests(2000)))
        assert resident() < before + 2_000  # kB
