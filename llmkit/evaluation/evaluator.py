"""Evaluate models: each item of a task gives a record of likelihoods or completions, and metrics.

loaded = load_items(load_tasks(["arc_easy=arc_easy.jsonl"])[0])  # evaluation.tasks
with open_model("base/", Settings()) as model:
    records = [record for chunk in chunks(loaded.items) for record in model.evaluate(loaded.task, chunk)]
summarise(loaded, records)["score"]  # evaluation.scores
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import comb
from typing import Any

import numpy as np
import torch

from llmkit.config import ToolConfig
from llmkit.errors import UserError, naming
from llmkit.evaluation.likelihood import Likelihood, Scorer, Tokens, encode_core, encode_pairs
from llmkit.evaluation.scores import summarise
from llmkit.evaluation.served import WITH_FOLDER, ServedScorer
from llmkit.evaluation.tasks import EXACT_MATCH, Item, Task, is_exact_match, load_items, load_tasks
from llmkit.formats.conversations import Message, message
from llmkit.generation.generator import Generator, end_tokens
from llmkit.generation.next_token import Sampling, request_number
from llmkit.generation.requests import Request
from llmkit.generation.sampler import Sampler, open_sampler
from llmkit.generation.served_models import OpenAIClient, parse_address
from llmkit.generation.tool_calls import open_tools
from llmkit.io.hub import local_folder
from llmkit.io.resume import fingerprint
from llmkit.model.devices import Precision, choose_device, choose_precision
from llmkit.model.folder import load_config, load_model
from llmkit.model.transformer import Transformer
from llmkit.rewards.reward import Attempt
from llmkit.rewards.verifiers import VerifierReward
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import choose_thinking
from llmkit.training.distributed import whole_model

CHUNK = 512  # items evaluated together, and saved together for --resume
ITEMS = 500  # most items per task during training: a standard error of 0.022 at a score of 0.5
Validation = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Settings:
    """How a model is prompted.

    chat         each item is a user turn in the model's chat format
    system       the system message; without `chat`, text at the beginning of the prompt
    samples, temperature, max_tokens, seed  for generation; without `max_tokens`, the task's own
    tools        tools, thinking, and the sandbox for programs under test
    """

    chat: bool = False
    system: str | None = None
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    seed: int = 0
    tools: ToolConfig = field(default_factory=ToolConfig)


def chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Split the items into chunks."""
    return (items[first : first + CHUNK] for first in range(0, len(items), CHUNK))


def check_problems(task: Task, items: Sequence[Item], verifier: VerifierReward) -> None:
    """Raise UserError if a problem lacks what its verifier needs, or if there is no sandbox to run tests."""
    for item in items:
        if item.problem is not None and task.verifier != EXACT_MATCH:
            verifier.check(item.problem)


@dataclass(frozen=True)
class Model:
    """A model under evaluation, local or behind a server.

    sampler  opens a sampler with the given stop strings, which stays open until `close`
    """

    name: str
    sha256: str
    tokenizer: Tokenizer | None
    settings: Settings
    scorer: Scorer | ServedScorer
    sampler: Callable[[Sequence[str]], AbstractContextManager[Sampler]]
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _samplers: dict[tuple[str, ...], Sampler] = field(default_factory=dict, init=False)

    def _opened(self, stop: tuple[str, ...]) -> Sampler:
        """Return the sampler with these stop strings, opened once for all chunks of a task."""
        if stop not in self._samplers:
            self._stack.close()  # one at a time, because each has a cache
            self._samplers.clear()
            self._samplers[stop] = self._stack.enter_context(self.sampler(stop))
        return self._samplers[stop]

    @cached_property
    def _verifier(self) -> VerifierReward:
        return VerifierReward(sandbox=self.settings.tools.sandbox != "none")

    def evaluate(self, task: Task, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return a record for each item: likelihoods or completions, and `metrics`.

        Raises UserError for a task that this model does not support.
        """
        if task.kind == "generation":
            return self._generate(task, items)
        if self.tokenizer is not None:
            requests = self._encode(self.tokenizer, task, items)
            with naming(self.name):
                scores = iter(self.scorer.score(requests))
        elif task.tokens == "core" or (self.settings.chat and task.kind != "text"):
            why = "--chat" if self.settings.chat else "CORE"
            raise UserError(f"{task.name}: {why} needs the tokens of prompts; {WITH_FOLDER}")
        else:
            assert isinstance(self.scorer, ServedScorer)
            scores = iter(self.scorer.score_texts(self._pairs(task, items)))
        return [_judge(task, item, [next(scores) for _ in item.pairs("")]) for item in items]

    def _encode(self, tokenizer: Tokenizer, task: Task, items: Sequence[Item]) -> list[Tokens]:
        if task.tokens == "core":
            groups = [[context + rest for context, rest in item.pairs(task.delimiter)] for item in items]
            contexts = [item.contexts[0].strip() for item in items] if task.kind == "language_modeling" else None
            return encode_core(tokenizer, groups, contexts, task.kind == "schema")
        if not self.settings.chat or task.kind == "text":
            with naming(f"--tasks {task.name}"):
                return encode_pairs(tokenizer, self._pairs(task, items))
        chat = self._opened(()).chat
        if chat is None:
            raise UserError("--chat: expected a model with a local chat format")
        turns = [(self._turns(item, context), rest) for item in items for context, rest in item.pairs("")]
        prompts = [chat.encode(messages, prompt=True).token_ids.tolist() for messages, _ in turns]
        return [(ids + tokenizer.encode(rest), len(ids)) for ids, (_, rest) in zip(prompts, turns, strict=True)]

    def _pairs(self, task: Task, items: Sequence[Item]) -> list[tuple[str, str]]:
        if task.kind == "text":
            return [pair for item in items for pair in item.pairs("")]
        return [(self._prefix(task, item) + a, b) for item in items for a, b in item.pairs(task.delimiter)]

    def _prefix(self, task: Task, item: Item) -> str:
        system = self.settings.system or ""
        joint = task.separator if system and item.description and not system[-1].isspace() else ""
        return system + joint + item.description

    def _turns(self, item: Item, text: str) -> list[Message]:
        system = "\n\n".join(filter(None, (self.settings.system, item.description.strip())))
        return [*([message("system", system)] if system else []), message("user", text)]

    def _generate(self, task: Task, items: Sequence[Item]) -> list[dict[str, Any]]:
        settings, records = self.settings, []
        check_problems(task, items, self._verifier)
        sampler, limit = self._opened(task.stop), settings.max_tokens or task.max_tokens
        prompts = [self._prompt(task, item, sampler, limit) for item in items]
        requests = [
            Request(prompt, settings.samples, limit, settings.seed, request_number(prompt), item.where)
            for item, (prompt, _) in zip(items, prompts, strict=True)
        ]
        completed = list(sampler.complete(requests))
        attempts = [
            Attempt(item.problem, sample.text, len(sample.token_ids), sample.finish_reason, limit, sample.tool_calls)
            for item, samples in zip(items, completed, strict=True)
            for sample in samples
            if item.problem is not None
        ]
        if task.verifier == EXACT_MATCH:
            verdicts = iter([float(is_exact_match(task, attempt.completion, attempt.problem)) for attempt in attempts])
        else:
            verdicts = iter(self._verifier.score(attempts))
        for item, samples, (_, truncated) in zip(items, completed, prompts, strict=True):
            if not samples:
                raise UserError(f"{item.where}: the prompt is longer than the context of {sampler.name}")
            right = [next(verdicts) for _ in samples]
            count, wrong = len(right), sum(verdict != 1.0 for verdict in right)
            record = {
                "completions": [sample.text for sample in samples],
                "right": right,
                "ends": [sample.finish_reason for sample in samples],
                "truncated": truncated,
                # the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374)
                "metrics": {f"pass@{k}": 1.0 - comb(wrong, k) / comb(count, k) for k in sorted({1, count})},
            }
            records.append(record)
        return records

    def _prompt(self, task: Task, item: Item, sampler: Sampler, limit: int) -> tuple[Any, bool]:
        """Return an item's prompt in the sampler's form, and whether it was truncated on the left."""
        assert item.problem is not None
        messages, text = item.problem.messages, item.contexts[0]
        with naming(item.where):
            if self.settings.chat or messages:
                turns = self._turns(item, text)
                prompt = sampler.encode([*turns[:-1], *(messages or turns[-1:])])
            else:
                prompt = sampler.encode(self._prefix(task, item) + text)
        if sampler.context is None:
            return prompt, False
        room = max(sampler.context - limit, sampler.context // 2)
        return prompt[-room:], len(prompt) > room

    def close(self) -> None:
        """Close the samplers, and stop the verifiers' processes."""
        self._stack.close()
        self._verifier.close()


def _judge(task: Task, item: Item, scores: Sequence[Likelihood]) -> dict[str, Any]:
    logprobs, tokens = [score.logprob for score in scores], [score.tokens for score in scores]
    record: dict[str, Any] = {"logprobs": logprobs, "tokens": tokens, "truncated": any(x.truncated for x in scores)}
    if item.gold is None:
        text = item.continuations[0]
        metrics = {} if task.kind == "text" else {"acc": float(scores[0].is_greedy)}
        return {**record, "bytes": len(text.encode()), "words": len(re.split(r"\s+", text)), "metrics": metrics}
    lengths = {"acc": tokens if task.tokens == "core" else [1] * len(scores)}
    if task.tokens != "core" and task.kind == "multiple_choice":
        lengths["acc_norm"] = [len(option) for option in item.options]  # characters, as in lm-evaluation-harness
        lengths["acc_bytes"] = [len(option.encode()) for option in item.options]
        lengths["acc_tokens"] = tokens
    chosen = {name: int(np.argmax(np.array(logprobs) / np.array(length))) for name, length in lengths.items()}
    metrics = {name: float(option == item.gold) for name, option in chosen.items()}
    return {**record, "chosen": chosen["acc"], "metrics": metrics}


# ---- models


def model_here(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    name: str = "the model",
    sha256: str = "",
    precision: Precision | None = None,
    slots: int = 16,
) -> Model:
    """Wrap a loaded model, possibly one in training."""

    @contextmanager
    def sampler(stop: Sequence[str]) -> Iterator[Sampler]:
        with ExitStack() as stack:
            ends = end_tokens(model.config, tokenizer)
            tools = open_tools(settings.tools, tokenizer, stack, ends) if settings.tools.tools else None
            weights = "dense" if precision is None else precision.weights
            yield Generator(
                model, tokenizer, Sampling(settings.temperature), slots=slots, stop=stop, name=name, tools=tools,
                weights=weights,
            )  # fmt: skip

    return Model(name, sha256, tokenizer, settings, Scorer(model), sampler)


@contextmanager
def open_model(
    folder: str | None,
    settings: Settings,
    *,
    engine: str = "local",
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    slots: int = 16,
    concurrency: int = 8,
    timeout: float = 120.0,
) -> Iterator[Model]:
    """Open the model in a folder or behind a server; for a server, the folder has the tokenizer. Raises UserError."""
    if engine == "local":
        assert folder is not None
        path, tokenizer, chosen = local_folder(folder, weights=True), load_tokenizer(folder), choose_device(device)
        choose_thinking(tokenizer, settings.tools.thinking)
        precision = choose_precision(dtype, chosen, load_config(path, backend).backend)
        loaded = load_model(path, dtype=precision.dtype, device=chosen, backend=backend)
        tokenizer.check_fits(loaded.config.vocab_size)
        model = model_here(
            loaded, tokenizer, settings, name=folder, sha256=fingerprint(path), precision=precision, slots=slots
        )
    else:

        def sampler(stop: Sequence[str]) -> AbstractContextManager[Sampler]:
            return open_sampler(
                engine, Sampling(settings.temperature), flag="--engine", folder=folder, stop=stop,
                concurrency=concurrency, timeout=timeout, tools=settings.tools,
            )  # fmt: skip

        context = None
        if folder is not None and (local_folder(folder) / "config.json").is_file():
            context = load_config(folder, "auto").max_position_embeddings
        with sampler(()) as opened:
            opened.check()
            name, tokenizer = opened.name, opened.tokenizer
        server = OpenAIClient(parse_address(engine, "--engine"), timeout)
        model = Model(name, "", tokenizer, settings, ServedScorer(server, concurrency, context, tokenizer), sampler)
    with closing(model):
        yield model


# ---- a model in training


class TaskScores:
    """Adds the scores of tasks to a validation, as `task/NAME`.

    chat  prompt in the model's chat format
    Raises UserError for tasks that cannot be loaded.
    """

    def __init__(self, specs: Sequence[str], tokenizer: Tokenizer, *, chat: bool = False) -> None:
        self._loaded = [load_items(task, ITEMS) for task in load_tasks(specs, flag="--evaluate")]
        self._tokenizer, self._chat = tokenizer, chat

    def beside(self, validate: Validation | None, model: Transformer) -> Validation | None:
        """Return a validation with both scores. Each rank scores all items, because it would only wait otherwise."""
        if not self._loaded:
            return validate

        def evaluate() -> dict[str, float]:
            scores = {} if validate is None else dict(validate())
            with torch.no_grad():
                full_model = whole_model(model)
            evaluated = model_here(full_model, self._tokenizer, Settings(chat=self._chat))
            with closing(evaluated), _eager(full_model):
                for loaded in self._loaded:
                    records = [row for chunk in chunks(loaded.items) for row in evaluated.evaluate(loaded.task, chunk)]
                    scores[f"task/{loaded.task.name}"] = round(summarise(loaded, records)["score"], 5)
            return scores

        return evaluate


@contextmanager
def _eager(model: Transformer) -> Iterator[None]:
    """Disable torch.compile, which would compile every shape in an evaluation."""
    compiled = [(layer, layer.__dict__.pop("forward", None)) for layer in model.layers]
    try:
        yield
    finally:
        for layer, forward in compiled:
            if forward is not None:
                layer.forward = forward
