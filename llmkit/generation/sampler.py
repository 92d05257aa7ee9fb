"""Samplers complete prompts: with a local model (`Generator`), or a server's (`ServedSampler`).

with open_sampler("chat/", Sampling(temperature=0.8)) as sampler:  # or "openai:http://localhost:8000/v1#qwen"
    for samples in sampler.complete([Request(sampler.encode("Once upon"), samples=3, max_tokens=64)]):
        print([sample.text for sample in samples])
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llmkit.config import ToolConfig
from llmkit.errors import UserError
from llmkit.formats.conversations import Message
from llmkit.generation.generator import Generator, ModelFolder, end_tokens
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Completion, OnCall, OnDone, OnText, Prompt, Request, Usage
from llmkit.generation.served_models import EXAMPLE, SCHEME, OpenAIClient, parse_address
from llmkit.generation.served_sampler import ServedSampler
from llmkit.generation.tool_calls import Functions, open_tools
from llmkit.io.hub import local_folder
from llmkit.io.remote import is_remote
from llmkit.io.resume import fingerprint
from llmkit.model.devices import choose_device, choose_precision
from llmkit.model.folder import SavedTensors, load_config
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import choose_thinking
from llmkit.tools.toolbox import Toolbox


class Sampler(Protocol):
    """Completes prompts.

    name          of the model, for users and reports
    identity      what must be the same in a resumed run, under names that users know
    context       context length in tokens; None if only the server knows it
    tokenizer     None if a server tokenizes
    chat          chat format; None if a server applies its own. Raises UserError for a base model
    is_assistant  whether it can answer conversations
    tools         that the model may call; None if it cannot call any
    usage         requests and tokens so far
    """

    name: str
    identity: Mapping[str, Any]
    context: int | None
    usage: Usage

    @property
    def tools(self) -> Functions | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @cached_property
    def chat(self) -> ChatFormat | None: ...
    @property
    def is_assistant(self) -> bool: ...

    def check(self) -> None:
        """Raise ServerError if a server does not answer."""
        ...

    def encode(self, prompt: str | Sequence[Message], tools: Functions | None = None) -> Prompt:
        """Encode a text to continue or a conversation to answer; `tools` replace the sampler's. Raises UserError."""
        ...

    def complete(
        self,
        requests: Iterable[Request | None],
        *,
        on_text: OnText | None = None,
        on_call: OnCall | None = None,
        on_done: OnDone | None = None,
    ) -> Iterator[list[Completion]]:
        """Yield the samples of each request, in order; none if the prompt leaves no room in the context.

        Requests are read lazily, a bounded number of them ahead of the oldest unfinished one. A request of None means
        that the next one is available only after a running one is done. `on_done` gets the samples of a request as soon
        as they are complete, even before those of earlier requests, and is never called while a request is being read.
        """
        ...

    def plan(self) -> Iterator[str]:
        """Describe, for --dry-run, the model that would generate, in lines."""
        ...

    def describe(self) -> Iterator[str]:
        """Describe the completed work, in lines."""
        ...


@contextmanager
def open_sampler(
    source: str,
    sampling: Sampling,
    *,
    flag: str = "MODEL",
    folder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    slots: int = 16,
    stop: Sequence[str] = (),
    end_ids: Collection[int] | None = None,
    tools: ToolConfig | None = None,
    end_at_others: bool = False,
    concurrency: int = 8,
    timeout: float = 120.0,
    logprobs: bool = False,
    skip_refused: bool = False,
) -> Iterator[Sampler]:
    """Open the sampler of a model folder, whose weights are loaded at the first completion, or of `openai:URL#NAME`.

    flag                      names the source in errors; --engine takes no folder
    stop                      stop strings, which are left out of completions
    tools                     tools that may be called, and whether the model is to think
    device, dtype, backend, slots, end_ids, end_at_others  for a folder: see `load_config`, `Generator` and `open_tools`
    folder, concurrency, timeout, logprobs, skip_refused  for a server: see `ServedSampler`; `folder` has the tokenizer

    Raises UserError if the source is neither, or if a folder's tokenizer does not fit its model. Sends no request.
    """
    if source.startswith(SCHEME) or flag == "--engine":
        server = OpenAIClient(parse_address(source, flag), timeout)
        tokenizer = None if folder is None else load_tokenizer(folder)
        with ExitStack() as stack:
            functions, thinking = None, None
            if tools is not None and tokenizer is not None:
                choose_thinking(tokenizer, tools.thinking)
                if tools.tools:
                    raise UserError("--tools: expected no MODEL with --engine, whose server parses function calls")
            elif tools is not None:
                toolbox = Toolbox.parse(tools.tools, sandbox=tools.sandbox, timeout=tools.tool_timeout)
                functions = Functions(stack.enter_context(toolbox), tools.max_tool_calls)
                thinking = {"on": True, "off": False}.get(tools.thinking)
            yield ServedSampler(
                server,
                sampling,
                tokenizer=tokenizer,
                concurrency=concurrency,
                stop=stop,
                logprobs=logprobs,
                skip_refused=skip_refused,
                tools=functions,
                thinking=thinking,
            )
        return
    if not is_remote(source) and not Path(source).is_dir():
        raise UserError(f"{flag}: expected the folder of a model, or {EXAMPLE}, found {source}")
    chosen = choose_device(device)
    config, tokenizer = load_config(source, backend), load_tokenizer(source)
    tokenizer.check_fits(config.vocab_size)
    if not is_remote(source):  # a dry run would download a remote one
        SavedTensors(source).check_kind()
    model = ModelFolder(source, config, chosen, choose_precision(dtype, chosen, config.backend))
    with ExitStack() as stack:
        use = None
        if tools is not None:
            choose_thinking(tokenizer, tools.thinking)
            use = open_tools(tools, tokenizer, stack, end_tokens(config, tokenizer), end_at_others)
        generator = Generator(
            model, tokenizer, sampling, slots=slots, stop=stop, end_ids=end_ids, name=source, tools=use
        )
        identity = fingerprint(local_folder(source, weights=True))
        generator.identity = {"the model": identity, "the precision": model.precision.name}
        yield generator
    generator.__dict__.pop("decoder", None)  # free the weights; the counts stay
