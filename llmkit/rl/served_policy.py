"""A server that samples from the policy as it is: weights are handed over before each batch, attempts made by ids.

    served = ServedPolicy(server, tokenizer, end_ids=..., folder=work / "served", write=write, concurrency=64)
    served.hand_over()
    for samples in served.sampler(settings).complete(requests): ...

The weights go through the server's own mechanism, from a folder that it must see under the same path: SGLang's
`/update_weights_from_disk`, vLLM's `reload_weights` by `/collective_rpc` (with VLLM_SERVER_DEV_MODE=1) and
`/reset_prefix_cache`. Where a server does not say that it has loaded them, the run ends. Where it says so and has not,
its log-probabilities differ from the trainer's, which `--max-difference` bounds; SGLang also names the version of the
weights in every answer, which is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from llmkit.errors import ServerError, UserError
from llmkit.generation.next_token import Sampling
from llmkit.generation.served_models import OpenAIClient, shortened
from llmkit.generation.served_sampler import ServedSampler
from llmkit.io.files import remove
from llmkit.rl.rollouts import RolloutSettings
from llmkit.tokenizer.encoding import Tokenizer

KINDS = ("vllm", "sglang")  # by the owner of the model in the list of a server's models


class ServedPolicy:
    """Where attempts come from, in place of a generator of our own.

    end_ids      tokens of which one ends an attempt that ends by itself
    folder       where the weights are written, each time into another folder, which replaces the former
    write        saves the policy as it is now in a folder
    concurrency  attempts under way at most

    Raises UserError for a server that is none of those that load weights, ServerError where it does not answer.
    """

    def __init__(
        self,
        server: OpenAIClient,
        tokenizer: Tokenizer,
        *,
        end_ids: Collection[int],
        folder: Path,
        write: Callable[[Path], None],
        concurrency: int,
    ) -> None:
        self._server, self._tokenizer, self._end_ids, self._concurrency = server, tokenizer, end_ids, concurrency
        self._folder, self._write = folder, write
        self._held: Path | None = None  # what the server has loaded
        self.kind = server.check()
        if self.kind not in KINDS:
            raise UserError(
                f"{server.place}: expected vLLM or SGLang, which load new weights, found a server of "
                f"{self.kind or 'unknown kind'}; sample from the folder instead, without --engine"
            )

    def sampler(self, settings: RolloutSettings) -> ServedSampler:
        """Return a sampler with the weights that were handed over last."""
        sampler = ServedSampler(
            self._server,
            Sampling(settings.temperature),
            tokenizer=self._tokenizer,
            concurrency=self._concurrency,
            stop=settings.stop,
            logprobs=True,
            token_ids=True,
            end_ids=self._end_ids,
        )
        if self.kind == "sglang" and self._held is not None:
            sampler.weights = self._held.name
        return sampler

    def hand_over(self) -> None:
        """Have the server load the policy as it is now. Raises ServerError unless it says that it has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="policy-", dir=self._folder.resolve()))
        folder.chmod(0o755)  # the server may be another user's
        self._write(folder)
        try:
            self._load(folder)
        except ServerError as error:
            dev_mode = "was it started with VLLM_SERVER_DEV_MODE=1, and " if self.kind == "vllm" else ""
            raise ServerError(
                f"{error}: it did not load the policy, and would sample from an older one; {dev_mode}does it see "
                f"{folder}?"
            ) from None
        if self._held is not None:
            remove(self._held)
        self._held = folder

    def _load(self, folder: Path) -> None:
        command = self._server.command
        if self.kind == "vllm":
            command("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            # without the flag vLLM keeps a prefix that a request still holds
            command("/reset_prefix_cache?reset_running_requests=true")
            return
        answer = command("/update_weights_from_disk", {"model_path": str(folder), "weight_version": folder.name})
        if not isinstance(answer, dict) or not answer.get("success"):
            raise ServerError(f"{self._server.place}: refuses the weights: {shortened(str(answer))}")

    def close(self) -> None:
        """Remove what was written for the server."""
        remove(self._folder)
