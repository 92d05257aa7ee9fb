"""Fine-tuning on conversations: loading a model, growing its vocabulary, adapters, optimizer, and saving the result.

tuning = load_for_tuning("base/", device=..., dtype=...)
tuning = tuning.with_adapter(rank=16, seed=0)        # without it, all parameters are trained
optimizer = tuning.build_optimizer(learning_rate=None, weight_decay=0.0)
best = KeepBest(run.work, optimizer)
...                                                  # train; best.offer(step, -loss) after an evaluation
save_tuned(tuning, best.values(), folder)
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkit.display import check_stdout, printable
from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.io.hub import hub_name
from llmkit.io.jsonl import write_json
from llmkit.io.progress import counted, say
from llmkit.model.devices import check_memory
from llmkit.model.folder import load_model, save_model
from llmkit.model.lora import LinearAdapter, LoraAdapter
from llmkit.model.quantized import is_quantized
from llmkit.model.transformer import Transformer, grow_vocabulary
from llmkit.model.transformers_backend import TransformersModel
from llmkit.tokenizer.chat import CHAT_SPECIALS, ChatFormat, has_own_template, write_chat_tokenizer
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import chat_format
from llmkit.training.checkpoint import Checkpoints
from llmkit.training.distributed import shard, world
from llmkit.training.optimizer import GroupSettings, Optimizer
from llmkit.training.plan import ADAMW_RATE, ADAMW_WIDTH, training_memory
from llmkit.training.trainer import Trainer

if TYPE_CHECKING:
    from llmkit.data.batches import Packable
    from llmkit.tokenizer.encoding import Tokenizer


# AdamW learning rate of adapters at width 256, scaled like ADAMW_RATE; docs/experiments.md, "Fine-tuning"
LORA_LEARNING_RATE = 3e-3


def show_examples(sources: Sequence[Packable], tokenizer: Tokenizer, count: int) -> None:
    """Print `count` examples to stdout, taken from the sources in turn.

    On a terminal, trained text is green and underlined, and a thin space follows each token, to show where words are
    split; elsewhere it is enclosed in « and ».
    """
    from rich.console import Console
    from rich.text import Text

    check_stdout()
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
    shown = printable if console.is_terminal else str
    for number in range(count):
        source, index = sources[number % len(sources)], number // len(sources)
        if index >= len(source):
            continue
        ids, trained = source[index]
        heading = (
            f"==> {source.name}, example {index + 1}: {counted(len(ids), 'token')}, {int(trained.sum())} trained on <=="
        )
        text, stream = Text(), tokenizer.stream()  # a character of several tokens is shown with the last of them
        for learnt, group in groupby(zip(ids.tolist(), trained.tolist(), strict=True), key=lambda pair: pair[1]):
            words = [shown(word) for token, _ in group if (word := stream.push([token]))]
            if console.is_terminal:
                text.append("\u2009".join(words), "green underline" if learnt else None)
            else:
                text.append(f"«{''.join(words)}»" if learnt else "".join(words))
        text.append(shown(stream.finish()))
        console.print(shown(heading), style="bold" if console.is_terminal else None)
        console.print(text, "")


@dataclass(frozen=True)
class Tuning:
    """A model, its tokenizer, and its trained parameters.

    folder        it was loaded from
    prepare       turns a model loaded from the folder into the tuned one: with rows for new tokens, or of another kind
    is_assistant  True if the model of the folder has learnt to end its turns
    new_tokens    number of conversation tokens that the base did not have
    unlearnt      ids that it never saw, whose rows an adapter also trains
    own           names of parameters that the base does not have
    template      True if conversations are written in llmkit's format, with tokens that `save_tuned` adds
    """

    folder: str
    model: Transformer
    tokenizer: Tokenizer
    prepare: Callable[[Transformer], Transformer]
    is_assistant: bool
    template: bool = False
    new_tokens: int = 0
    unlearnt: tuple[int, ...] = ()
    own: frozenset[str] = frozenset()
    adapter: LoraAdapter | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.embed_tokens.device

    @property
    def context(self) -> int:
        """Context length in tokens."""
        return self.model.config.max_position_embeddings

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format of the tokenizer."""
        return chat_format(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Padding token, for positions without a target."""
        return self.tokenizer.specials.get("<|im_end|>", 0)

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained parameters, by name."""
        every = list(self.model.named_parameters())
        if self.adapter is None:
            return every
        return [*self.adapter.parameters(), *(pair for pair in every if pair[0] in self.own)]

    @property
    def trained_parameters(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for _, parameter in self.parameters)

    def with_adapter(self, rank: int | None, seed: int) -> Tuning:
        """Train low-rank adapters instead of the model's own parameters; return self if `rank` is None.

        The rows of conversation tokens that a base never saw are trained too, or it would not learn to stop.
        """
        if rank is None:
            return self
        kind: Any = LinearAdapter if isinstance(self.model, TransformersModel) else LoraAdapter
        tuning = replace(self, adapter=kind(self.model, rank, 2.0 * rank, seed=seed, token_ids=self.unlearnt))
        for _, parameter in tuning.parameters:
            parameter.requires_grad_(True)
        return tuning

    def check_memory(self, micro_batch_tokens: int, advice: str = "lower --micro-batch-size") -> None:
        """Raise UserError, with `advice`, if parameters and a micro-batch do not fit into the device's memory."""
        divided = 1 if self.adapter else world().size
        state, activations = self.training_memory(micro_batch_tokens, divided)
        smaller = "use --lora-rank 16 or a smaller model"
        if self.adapter:
            smaller = "use a smaller model" if is_quantized(self.model) else "use --quantize nf4 or a smaller model"
        check_memory({smaller: state, advice: activations}, self.device)

    def training_memory(self, micro_batch_tokens: float, devices: int = 1) -> tuple[float, float]:
        """Estimate the bytes of training, as `plan.training_memory` does."""
        working_bytes = None
        if is_quantized(self.model):
            working_bytes = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        return training_memory(self.model.config, micro_batch_tokens, self.trained_parameters, devices, working_bytes)

    def build_optimizer(
        self,
        learning_rate: float | None,
        weight_decay: float,
        *,
        anchor: float = ADAMW_RATE,
        lora_anchor: float = LORA_LEARNING_RATE,
    ) -> Optimizer:
        """Build AdamW over the trained parameters; `learning_rate` None follows from the width, `anchor` being that of
        256.

        The model is sharded over the ranks, except with adapters: then each rank has all of it.
        """
        if learning_rate is None:
            anchor = lora_anchor if self.adapter else anchor
            learning_rate = anchor * math.sqrt(ADAMW_WIDTH / self.model.config.hidden_size)
        if self.adapter is None:
            shard(self.model)
        plain = GroupSettings("adamw", learning_rate, betas=(0.9, 0.95), eps=1e-8)
        decayed = replace(plain, weight_decay=weight_decay)
        return Optimizer((name, value, decayed if value.ndim > 1 else plain) for name, value in self.parameters)


def save_tuned(
    tuning: Tuning,
    values: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    keep_adapter: bool = False,
    pad_id: int | None = None,
    write: Callable[[Any, Path], None] = save_model,
) -> None:
    """Write the tokenizer, and then the model with the trained `values`, with an adapter merged into it.

    values        unsharded and float32
    keep_adapter  also write the adapter to adapter/
    pad_id        padding token to name in the tokenizer's configuration
    write         writes another kind of model, or in another precision
    """
    tokenizer = tuning.tokenizer
    if tuning.template:
        tokenizer = write_chat_tokenizer(load_tokenizer(tuning.folder), folder)
    else:
        tokenizer.copy_to(folder)
    if pad_id is not None:
        names = {number: name for name, number in tokenizer.specials.items()}
        write_json(folder / "tokenizer_config.json", {**tokenizer.config, "pad_token": names[pad_id]})
    adapter = tuning.adapter
    backend = tuning.model.config.backend
    base = load_model(tuning.folder, dtype=torch.float32 if adapter is None else None, backend=backend)
    rows = max(base.config.vocab_size, tokenizer.vocab_size)
    model = tuning.prepare(base)
    for name, parameter in model.named_parameters():
        if adapter is None or name in tuning.own:
            parameter.data = values[name].to(parameter.device)
    if adapter is not None:  # with a bfloat16 base, each sum is computed in float32 when it is written
        kind: Any = type(adapter)
        full = kind(
            model, adapter.rank, adapter.alpha, adapter.targets, token_ids=adapter.token_ids, dtype=torch.float32
        )
        full.load(dict(values))
        if keep_adapter:
            full.save(folder / "adapter", hub_name(tuning.folder), rows)
    write(model.eval(), folder)


def load_for_tuning(
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    backend: str = "auto",
    *,
    reshape: Callable[[Transformer], Transformer] | None = None,
) -> Tuning:
    """Load a model folder to tune on conversations, and add rows for conversation tokens that it lacks.

    A folder with a foreign chat template keeps it and its tokens. `quantize` and `backend` are those of `load_model`,
    the former for adapters only. `reshape` turns the base into another kind of model, deterministically.

    Raises UserError if the folder cannot be loaded, if weights are not finite, or if the tokenizer does not fit the
    model.
    """
    base = load_unchanged(folder, device, dtype, quantize, backend)
    known, specials = base.tokenizer.vocab_size, base.tokenizer.specials
    template = not has_own_template(base.tokenizer)
    if template:
        with tempfile.TemporaryDirectory(prefix="llmkit-") as temporary:
            tokenizer = write_chat_tokenizer(base.tokenizer, Path(temporary))
        turn, text = tokenizer.specials["<|im_end|>"], tokenizer.end_of_text_id
        used = {tokenizer.specials[name] for name in CHAT_SPECIALS}
    else:
        tokenizer, turn, text = base.tokenizer, base.chat.end_id, None
        talk = [message(role, "Hello") for role in ("user", "assistant")]
        used = {turn, *base.chat.encode(talk).token_ids.tolist()} & set(specials.values())

    def prepared(model: Transformer) -> Transformer:
        if template:
            model = grow_vocabulary(model, known, tokenizer.vocab_size)
        # the end of a turn first
        ends = dict.fromkeys(end for end in (turn, *model.config.eos_token_ids, text) if end is not None)
        model.config = replace(model.config, eos_token_id=tuple(ends))
        return model

    model = prepared(base.model)
    names = {name for name, _ in model.named_parameters()}
    # if a token is new, rows without a token are set to the mean too
    new = range(known, model.config.vocab_size) if tokenizer.vocab_size > known else ()
    if reshape is not None:
        model = reshape(model)
    return Tuning(
        folder,
        model.train(),
        tokenizer,
        prepared if reshape is None else lambda loaded: reshape(prepared(loaded)),
        is_assistant=base.is_assistant,
        template=template,
        new_tokens=tokenizer.vocab_size - known,
        unlearnt=tuple(sorted({*(() if base.is_assistant else used), *new})),
        own=frozenset(name for name, _ in model.named_parameters()) - names,
    )


def load_unchanged(
    folder: str, device: torch.device, dtype: torch.dtype, quantize: str | None = None, backend: str = "auto"
) -> Tuning:
    """Load a model folder without extending it: a base model stays one. Raises UserError as `load_for_tuning` does."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype, device=device, quantize=quantize, backend=backend)
    tokenizer.check_fits(model.config.vocab_size)
    check_finite(model, folder)
    ends = model.config.eos_token_ids
    if has_own_template(tokenizer):
        is_assistant = (end := chat_format(tokenizer).end_id) in ends or end == tokenizer.eos_id
    else:
        is_assistant = tokenizer.specials.get("<|im_end|>") in ends
    return Tuning(folder, model.train(), tokenizer, lambda loaded: loaded, is_assistant)


def check_finite(model: Transformer, folder: str) -> None:
    """Raise UserError if a weight is not finite, before any work starts."""
    for name, value in chain(model.named_parameters(), model.named_buffers()):  # a quantized matrix has scales
        if not value.is_floating_point():
            continue
        if not all(bound.isfinite() for bound in torch.aminmax(value.detach())):  # NaN is both min and max
            name = name.replace("parametrizations.", "").removesuffix(".0.scales")
            raise UserError(
                f"{folder}: expected finite weights, found NaN or infinity in {name}; make or download the model again"
            )


class KeepBest:
    """Keeps the best parameters of a training on disk, next to its checkpoints, so that they survive a kill.

    `step` is the step of the kept parameters; None if there are none, and the last ones count as the best.
    """

    def __init__(self, folder: Path, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._checkpoints = Checkpoints(folder / "state" / "best", keep=1)
        state = self._checkpoints.state() or {}
        self.step: int | None = state.get("step")
        self._score: float = state.get("score", -math.inf)

    def offer(self, step: int, score: float) -> None:
        """Keep the parameters of this step if their score is the highest."""
        if score > self._score:
            self._score = score
            self._checkpoints.save(step, self._optimizer.masters(), {"score": score}, wait=True)
            self.step = step

    def keep(self, step: int) -> None:
        """Keep the parameters of this step instead of those kept before."""
        self._checkpoints.save(step, self._optimizer.masters(), {})
        self.step = step

    def forget(self) -> None:
        """Delete the kept parameters: the last ones count as the best."""
        self._checkpoints.wait()
        self.step = None
        if world().leads:
            shutil.rmtree(self._checkpoints.folder, ignore_errors=True)

    def values(self) -> dict[str, torch.Tensor]:
        """Return the parameters to save, unsharded and float32: the kept ones, or else the last.

        Collective; only rank 0 gets them.
        """
        self._checkpoints.wait()
        if self.step is None:
            return self._optimizer.whole_masters()
        loaded = self._checkpoints.load() if world().leads else None
        return loaded[0] if loaded else {}


class EarlyStop:
    """Stops a training after `patience` evaluations without a gain in `val_loss`.

    rows  of the metrics so far, so that a resumed run continues the count
    """

    def __init__(self, trainer: Trainer, patience: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self._trainer, self._patience = trainer, patience
        self._lowest, self._without_gain = math.inf, 0
        for row in rows:
            if "val_loss" in row:
                self.note(row)

    def note(self, scores: Mapping[str, float]) -> None:
        """Count an evaluation."""
        self._without_gain = 0 if scores["val_loss"] < self._lowest else self._without_gain + 1
        self._lowest = min(self._lowest, scores["val_loss"])
        if self._without_gain >= self._patience and not self._trainer.stopping:
            quiet, step = self._trainer.settings.quiet, self._trainer.step
            say(f"no gain in {counted(self._patience, 'validation')}: stopping after step {step}", quiet)
            self._trainer.stopping = True


def never_last_id(tuning: Tuning) -> int:
    """Return a special token that ends no conversation, for padding: the token before it is then the end of a turn.

    Raises UserError if there is none.
    """
    tokenizer, known = tuning.tokenizer, tuning.tokenizer.specials
    last = tuning.chat.encode([message("user", "Hello"), message("assistant", "Hello")]).token_ids[-1]
    for token in (tokenizer.pad_id, tokenizer.end_of_text_id, known.get("<|im_start|>"), *known.values()):
        if token is not None and token in known.values() and token != last:
            return token
    raise UserError(
        f"{tuning.folder}: expected a special token for padding, found only the one that ends an answer; "
        "add one to its tokenizer"
    )


def answer(tuning: Tuning, model: Transformer, prompts: Sequence[str], max_tokens: int) -> str:
    """Answer some questions greedily, as a sample of a model in training: "question -> answer" per line."""
    room = model.config.max_position_embeddings
    encoded = [tuning.chat.encode([message("user", prompt)], prompt=True).token_ids.tolist() for prompt in prompts]
    fitting = [(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) < room]
    requests = [Request(ids, max_tokens=max_tokens) for _, ids in fitting]
    generator = Generator(model, tuning.tokenizer, Sampling(temperature=0.0), slots=max(1, len(requests)))
    with torch.no_grad():
        answers = [samples[0] for samples in generator.complete(requests)]
    return "\n".join(f"{prompt} -> {completion.text}" for (prompt, _), completion in zip(fitting, answers, strict=True))
