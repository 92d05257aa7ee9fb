"""`llmkit serve` behind a proxy that imitates vLLM or SGLang, including loading weights from a folder, with the faults
of `ChatServer` and wrong answers.

with ModelServer(folder, kind="vllm") as server:
    server.lies = {"few logprobs"}
    ... server.spec ...
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chat_server import ChatServer
from served import serving

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

    kind    "vllm" and "sglang" accept token ids and load weights; "strict" accepts only OpenAI's fields and text
    lies    "few logprobs", "no logprobs", "no ids", "ids as names" (like older vLLM), "no end" (end token omitted), "no
            echo" (prompt not echoed), "no zero" (max_tokens=0 refused), "no begin" (no beginning token in an echo),
            "stale" (reports weights as loaded that were not), "refuses" (to load), "abort" (as finish reason)
    loaded  the folders of all load requests; `resets` counts cache resets
    """

    def __init__(self, folder: Path, kind: str = "vllm") -> None:
        super().__init__(lambda prompt, seed: "")
        self.kind, self.lies, self.loaded, self.resets = kind, set[str](), list[Path](), 0
        self.about = {"owned_by": kind, "max_model_len": 512}
        self.version, self._lock, self._stack = "default", threading.Lock(), ExitStack()
        self._load(folder)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        while self.open:
            time.sleep(0.01)
        self._stack.close()

    def _load(self, folder: Path) -> None:
        before, self._stack = self._stack, ExitStack()
        self._server_of_model = self._stack.enter_context(serving(folder))
        before.close()  # only after the new one is up

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        command = urlsplit(path).path
        if command in ("/v1/completions", "/v1/chat/completions"):
            return self._complete(command, body)
        with self._lock:
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

    def _complete(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = set(body) - OPENAI
        if self.kind == "strict" and (unknown or isinstance(body.get("prompt"), list)):
            return 422, {"detail": f"Unexpected fields in the request: {sorted(unknown) or ['prompt']}"}
        if body["max_tokens"] == 0 and "no zero" in self.lies:
            return 400, {"error": {"message": "max_tokens must be at least 1, got 0."}}
        left_out = {"model", "stream"}
        left_out |= {"return_token_ids"} if self.lies & {"no ids", "ids as names"} else set()
        left_out |= {"return_tokens_as_token_ids"} if "no ids" in self.lies else set()
        left_out |= {"logprobs"} if "no logprobs" in self.lies else set()
        left_out |= {"echo"} if "no echo" in self.lies else set()
        asked = {name: value for name, value in body.items() if name not in left_out}
        asked["max_tokens"] = body["max_tokens"] or ("echo" not in asked)
        status, whole = self._server_of_model.post(path, asked)
        if status == 200:
            self._lie(*whole["choices"])
            whole |= {"metadata": {"weight_version": self.version}} if self.kind == "sglang" else {}
        return status, whole

    def _lie(self, choice: dict[str, Any]) -> None:
        """Corrupt the choice of an answer."""
        logprobs = choice.get("logprobs") or {}
        lists = [values for values in logprobs.values() if isinstance(values, list)]
        if "no begin" in self.lies:
            for values in lists:
                del values[0]
            logprobs["token_logprobs"][0] = None
        if "few logprobs" in self.lies:
            for values in lists:
                del values[-2:]
        if "no end" in self.lies and choice["finish_reason"] == "stop":
            for values in (choice["token_ids"], *lists):
                del values[-1:]
        if "abort" in self.lies:
            choice["finish_reason"] = "abort"
