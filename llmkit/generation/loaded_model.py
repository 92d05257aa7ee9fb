"""Open a model folder for generation: its configuration first, its weights when they are needed.

opened = open_model("chat/", device="auto", dtype="auto")
with opened.computing():
    generator = opened.generator(Sampling(temperature=0.8), slots=16)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llmkit.errors import UserError
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.model.config import ModelConfig
from llmkit.model.devices import Precision, choose_device, choose_precision, is_small, one_thread
from llmkit.model.folder import load_config, load_model
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import chat_format


@dataclass(frozen=True)
class OpenedModel:
    """A model folder, its configuration and tokenizer, and how it will compute."""

    folder: str
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision

    @property
    def end_ids(self) -> tuple[int | None, ...]:
        """The tokens that end a turn or a text."""
        return (*self.config.eos_token_ids, self.tokenizer.eos_id)

    @cached_property
    def chat(self) -> ChatFormat:
        """Chat format of the model. Raises UserError for a base model: it would continue a question, not answer it."""
        chat = chat_format(self.tokenizer)
        if chat.end_id not in self.end_ids:
            raise UserError(
                f"{self.folder}: a base model, which has not learnt to end a turn; tune it by llmkit sft, or ask it "
                "by sample --as-assistant -p"
            )
        return chat

    @cached_property
    def is_assistant(self) -> bool:
        """True if the model has a chat format."""
        with suppress(UserError):
            return self.chat is not None
        return False

    def generator(self, sampling: Sampling, slots: int, **details: Any) -> Generator:
        """Load the weights, to generate with them; `details` are those of `Generator`."""
        model = load_model(self.folder, dtype=self.precision.dtype, device=self.device)
        weights = self.precision.weights
        return Generator(model, self.tokenizer, sampling, slots=slots, name=self.folder, weights=weights, **details)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Without gradients, and on one thread where the model is too small for two."""
        with torch.inference_mode(), one_thread(is_small(self.config.parameter_count, self.device)):
            yield


def open_model(folder: str, device: str, dtype: str) -> OpenedModel:
    """Read all of a model folder but its weights. Raises UserError where tokenizer and model do not fit."""
    chosen = choose_device(device)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    tokenizer.check_fits(config.vocab_size)
    return OpenedModel(folder, config, tokenizer, chosen, choose_precision(dtype, chosen))
