"""Our engine behind the protocol that vLLM and SGLang speak, for what no small real server does: token ids in and
out, log-probabilities, weights loaded from a folder; with the faults of `ChatServer` and with lies.

with ModelServer(folder, kind="vllm") as server:
    server.lies = {"few logprobs"}
    ... server.spec ...
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from chat_server import ChatServer

from llmkit.formats.conversations import message
from llmkit.generation.generator import Generator, prompt_ids
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.model.folder import load_model
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import load_tokenizer

OPENAI = {
    "model",
    "prompt",
    "messages",
    "seed",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "stream",
    "logprobs",
    "echo",
}


class ModelServer(ChatServer):
    """Serves a model folder.

    kind    "vllm" and "sglang" take token ids and load weights; "strict" takes the fields of OpenAI's alone and text
    lies    "few logprobs", "no logprobs", "no ids", "ids as names" (as older vLLM has it), "no end" (leaves it out),
            "no echo" (of the prompt), "no zero" (refuses max_tokens=0), "no begin" (token before an echoed text),
            "stale" (says that it loaded weights, and did not), "refuses" (to load), "abort" (ends completions so)
    loaded  the folders that it was asked to load; `resets` counts those of its cache
    """

    def __init__(self, folder: Path, kind: str = "vllm") -> None:
        super().__init__(lambda prompt, seed: "")
        self.kind, self.lies, self.loaded, self.resets = kind, set[str](), list[Path](), 0
        self.about = {"owned_by": kind, "max_model_len": 512}
        self.version, self._lock = "default", threading.Lock()
        self._load(folder)
        self._tokenizer = load_tokenizer(folder)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        while self.open:  # a thread within torch at the interpreter's end aborts it
            time.sleep(0.01)

    def _load(self, folder: Path) -> None:
        self._model = load_model(folder)

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            command = urlsplit(path).path
            if command in ("/v1/completions", "/v1/chat/completions"):
                return self._complete(body)
            if command == "/update_weights_from_disk" and self.kind == "sglang":
                return self._take_weights(body["model_path"], body.get("weight_version"))
            if command == "/collective_rpc" and self.kind == "vllm":
                assert body["method"] == "reload_weights"
                return self._take_weights(body["kwargs"]["weights_path"], None)
            if command == "/reset_prefix_cache" and self.kind == "vllm":
                self.resets += 1
                return 200, b""
            return 404, {"detail": "Not Found"}

    def _take_weights(self, path: str, version: str | None) -> tuple[int, Any]:
        if "refuses" in self.lies:
            return 400, {"success": False, "message": "the parameters have other shapes"}
        self.loaded.append(Path(path))
        if "stale" not in self.lies:
            self._load(Path(path))
            self.version = version or self.version
        return 200, {"success": True, "message": "Succeeded to update model weights."}

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = set(body) - OPENAI
        if self.kind == "strict" and (unknown or isinstance(body.get("prompt"), list)):
            return 422, {"detail": f"Unexpected fields in the request: {sorted(unknown) or ['prompt']}"}
        ids = self._ids(body)
        if len(ids) + body["max_tokens"] > self._model.config.max_position_embeddings:
            return 400, {"error": {"message": "This model's maximum context length is exceeded."}}
        if body.get("echo") and "no echo" not in self.lies:
            return self._echo(ids["no begin" in self.lies :], body["max_tokens"])
        top_k, top_p, min_p = (body.get(name) for name in ("top_k", "top_p", "min_p"))
        sampling = Sampling(body["temperature"], top_k if top_k and top_k > 0 else None, top_p, min_p)
        generator = Generator(self._model, self._tokenizer, sampling, slots=1, stop=body.get("stop") or ())
        with torch.inference_mode():
            ((made,),) = generator.complete([Request(ids, 1, body["max_tokens"], body["seed"])])
        count = len(made.token_ids)
        shown = count - 1 if "no end" in self.lies and made.finish_reason == "stop" else count
        reason = "abort" if "abort" in self.lies else made.finish_reason
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if body.get("return_token_ids") and not self.lies & {"no ids", "ids as names"}:
            choice |= {"token_ids": made.token_ids[:shown], "prompt_token_ids": ids}
        given = made.logprobs[: shown - 2 if "few logprobs" in self.lies else shown]
        if body.get("logprobs") and "no logprobs" not in self.lies:
            choice["logprobs"] = self._logprobs("messages" in body, made.token_ids, given)
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": made.text}
        else:
            choice["text"] = made.text
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        whole: dict[str, Any] = {"id": "1", "choices": [choice], "usage": usage}
        return 200, whole | ({"metadata": {"weight_version": self.version}} if self.kind == "sglang" else {})

    def _echo(self, ids: list[int], max_tokens: int) -> tuple[int, Any]:
        """The prompt with its log-probabilities, and what follows it."""
        if max_tokens == 0 and "no zero" in self.lies:
            return 400, {"error": {"message": "max_tokens must be at least 1, got 0."}}
        for _ in range(max_tokens):
            with torch.no_grad():
                ids = [*ids, int(self._model.logits(self._model(torch.tensor([ids])))[0, -1].argmax())]
        with torch.no_grad():
            all_TV = self._model.logits(self._model(torch.tensor([ids])))[0].log_softmax(-1)
        given = [None, *(float(all_TV[place, token]) for place, token in enumerate(ids[1:]))]
        names = [self._tokenizer.decode([one]) for one in ids]
        tops = [None, *({self._tokenizer.decode([int(row.argmax())]): float(row.max())} for row in all_TV[:-1])]
        logprobs = {"tokens": names, "token_logprobs": given, "top_logprobs": tops, "text_offset": None}
        choice = {"index": 0, "finish_reason": "length", "text": "".join(names), "logprobs": logprobs}
        return 200, {"id": "1", "choices": [choice]}

    def _logprobs(self, of_messages: bool, token_ids: list[int], given: list[float]) -> dict[str, Any]:
        names = [self._tokenizer.decode([one]) for one in token_ids[: len(given)]]
        if "ids as names" in self.lies:
            names = [f"token_id:{one}" for one in token_ids[: len(given)]]
        if of_messages:
            rows = zip(names, given, strict=True)
            return {"content": [{"token": name, "logprob": value, "top_logprobs": []} for name, value in rows]}
        return {"tokens": names, "token_logprobs": given, "top_logprobs": None, "text_offset": None}

    def _ids(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            messages = [message(one["role"], one["content"]) for one in body["messages"]]
            return ChatFormat(self._tokenizer).encode(messages, prompt=True).token_ids.tolist()
        prompt = body["prompt"]
        return prompt_ids(self._tokenizer, prompt) if isinstance(prompt, str) else prompt
