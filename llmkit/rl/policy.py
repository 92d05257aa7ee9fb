"""Samplers of the current policy: in this process, or on a server that loads its weights before each batch.

    policy = ServedPolicy("openai:http://localhost:8000/v1#chat", tuning, 120.0, 64, (), work / "served", write)
    for samples in policy.sampler(temperature=1.0).complete(requests): ...

The server loads the weights from a folder that it must see under the same path, by its own API: SGLang's
`/update_weights_from_disk`, or vLLM's `reload_weights` through `/collective_rpc` (with VLLM_SERVER_DEV_MODE=1) and
`/reset_prefix_cache`. The run ends if the server does not confirm. If it confirms and has not loaded them, its
log-probabilities differ from the trainer's, which ends the run, too; SGLang also names the version of its weights in
every answer, which is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path

import torch

from llmkit.errors import ServerError, UserError
from llmkit.generation.generator import Generator, end_tokens
from llmkit.generation.next_token import Sampling
from llmkit.generation.served_models import OpenAIClient, parse_address, shortened
from llmkit.generation.served_sampler import ServedSampler
from llmkit.generation.tool_calls import ToolUse
from llmkit.io.files import remove
from llmkit.io.progress import say
from llmkit.model.devices import is_small
from llmkit.model.transformer import Transformer
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.training.distributed import whole_model
from llmkit.training.finetuning import Tuning, load_unchanged

KINDS = ("vllm", "sglang")  # `owned_by` of the server's model
SLOTS, SMALL_MODEL_SLOTS = 64, 256  # sequences decoded at a time


def load_policy(
    folder: str,
    system: str | None,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    backend: str,
    quiet: bool,
) -> Tuning:
    """Load an assistant, or with a warning a base model, which takes no `system`."""
    tuning = load_unchanged(folder, device, dtype, quantize, backend)
    if not tuning.is_assistant:
        if system is not None:
            raise UserError(f"--system: {folder} is a base model, which has no chat format; tune it with llmkit sft")
        say(
            f"{folder}: a base model: prompts are continued as text, and attempts may never stop; tune it with llmkit "
            "sft, or end attempts with --stop",
            quiet,
        )
    return tuning


def reference_of(model: Transformer, frozen: bool) -> Transformer:
    """Return a frozen copy of the model; if its weights are `frozen` under adapters, it shares them."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers()) if frozen}
    return deepcopy(model, memo).eval().requires_grad_(False)


class OwnPolicy:
    """A policy that samples in this process; `name` of the model for errors, `stop` sequences of a rollout."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, stop: Sequence[str], name: str, tools: ToolUse | None
    ) -> None:
        self._model, self._tokenizer, self._stop, self._name, self._tools = model, tokenizer, stop, name, tools
        self._slots = SMALL_MODEL_SLOTS if is_small(model.config.parameter_count, model.embed_tokens.device) else SLOTS

    def sampler(self, temperature: float) -> Generator:
        """Return a sampler of the current policy."""
        model = whole_model(self._model)
        with torch.inference_mode():
            return Generator(
                model, self._tokenizer, Sampling(temperature),
                slots=self._slots, stop=self._stop, name=self._name, tools=self._tools,
            )  # fmt: skip

    def close(self) -> None:
        """Do nothing: no files were written."""


class ServedPolicy:
    """A policy that a server samples.

    engine       openai:URL#NAME; `timeout` of a request in seconds, `concurrency` of requests
    stop         stop sequences, in addition to the end tokens
    folder       receives the weights, each time in a new subfolder that replaces the old one
    write        saves the current policy to a folder

    Raises UserError for a server that cannot load weights, ServerError if it does not answer.
    """

    def __init__(
        self,
        engine: str,
        tuning: Tuning,
        timeout: float,
        concurrency: int,
        stop: Sequence[str],
        folder: Path,
        write: Callable[[Path], None],
    ) -> None:
        server = self._server = OpenAIClient(parse_address(engine, "--engine"), timeout)
        self._tokenizer, self._stop = tuning.tokenizer, stop
        self._end_ids = end_tokens(tuning.model.config, tuning.tokenizer)  # each ends a rollout alone
        self._concurrency, self._folder, self._write = concurrency, folder, write
        self._held: Path | None = None  # the folder that the server has loaded
        self.kind = server.check()
        if self.kind not in KINDS:
            raise UserError(
                f"{server.place}: expected vLLM or SGLang, which can load new weights, found "
                f"{self.kind or 'a server of unknown kind'}; sample from the folder instead, without --engine"
            )

    def sampler(self, temperature: float) -> ServedSampler:
        """Return a sampler of the current policy. Raises ServerError unless the server confirms that it loaded it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="policy-", dir=self._folder.resolve()))
        folder.chmod(0o755)  # the server may run as another user
        self._write(folder)
        command = self._server.command
        try:
            if self.kind == "vllm":
                command("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
                # without the flag vLLM keeps the prefixes of running requests
                command("/reset_prefix_cache?reset_running_requests=true")
            else:
                version = {"model_path": str(folder), "weight_version": folder.name}
                answer = command("/update_weights_from_disk", version)
                if not isinstance(answer, dict) or not answer.get("success"):
                    raise ServerError(f"{self._server.place}: refuses the weights: {shortened(str(answer))}")
        except ServerError as error:
            dev_mode = "was it started with VLLM_SERVER_DEV_MODE=1, and " if self.kind == "vllm" else ""
            raise ServerError(
                f"{error}: it did not load the policy and would sample from an older one; {dev_mode}can it read "
                f"{folder}?"
            ) from None
        if self._held is not None:
            remove(self._held)
        self._held = folder
        sampler = ServedSampler(
            self._server,
            Sampling(temperature),
            tokenizer=self._tokenizer,
            concurrency=self._concurrency,
            stop=self._stop,
            logprobs=True,
            token_ids=True,
            end_ids=self._end_ids,
        )
        if self.kind == "sglang":
            sampler.weights = folder.name
        return sampler

    def close(self) -> None:
        """Remove the weights written for the server."""
        remove(self._folder)
