"""Who answers the questions of a probe: an assistant's folder, or a model behind a server.

answering = folder_answering("chat/", "auto", "auto", Sampling(0.8), slots=16)
with answering.start() as generator: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from llmkit.generation.generator import Generator
from llmkit.generation.loaded_model import open_model
from llmkit.generation.next_token import Sampling
from llmkit.generation.served_models import Usage
from llmkit.generation.served_sampler import ServedSampler, open_served
from llmkit.io.resume import fingerprint
from llmkit.tokenizer.chat import ChatFormat


@dataclass(frozen=True)
class Answering:
    """How questions become completions.

    chat      the tokens of a conversation; None where a server has messages become tokens
    context   tokens that the model takes; None where only its server knows
    identity  what a resumed run must have in common
    start     makes the generator, for as long as it is used
    usage     what a server was asked so far
    """

    chat: ChatFormat | None
    context: int | None
    identity: dict[str, Any]
    start: Callable[[], AbstractContextManager[Generator | ServedSampler]]
    usage: Usage | None = None


def folder_answering(folder: str, device: str, dtype: str, sampling: Sampling, slots: int) -> Answering:
    """An assistant's folder. Raises UserError for a base model."""
    opened = open_model(folder, device, dtype)
    chat = opened.chat

    @contextmanager
    def start() -> Iterator[Generator]:
        with opened.computing():
            yield opened.generator(sampling, slots)

    return Answering(chat, opened.config.max_position_embeddings, {"the model": fingerprint(folder)}, start)


def served_answering(
    engine: str,
    folder: str | None,
    sampling: Sampling,
    *,
    concurrency: int,
    timeout: float,
    retries: int,
) -> Answering:
    """A model behind a server, with the tokenizer of a folder or its own. Raises UserError where it is not there."""
    served = open_served(engine, folder, timeout=timeout, retries=retries)
    chat = served.chat
    served.server.check()

    @contextmanager
    def start() -> Iterator[ServedSampler]:
        yield served.sampler(sampling, concurrency=concurrency, logprobs=False, skip_long=True)

    return Answering(chat, None, served.identity, start, served.server.usage)
