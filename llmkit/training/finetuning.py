"""A loaded model made ready for tuning on conversations: vocabulary, adapters, optimizer, and the folder at the end.

tuning = Finetuning.load("base/", device=..., dtype=...)
tuning.add_adapter(rank=16, alpha=32, seed=0)        # or all parameters are trained
optimizer = tuning.build_optimizer(learning_rate=None, weight_decay=0.0)
trainer = build_trainer(tuning.model, optimizer, schedule, ...)          # llmkit/training/setup.py
trainer.fit(...)
tuning.save(work, tuning.trained_values())
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.io.jsonl import write_json
from llmkit.io.progress import counted, say
from llmkit.model.devices import check_memory
from llmkit.model.folder import load_model, save_model
from llmkit.model.lora import LoraAdapter
from llmkit.model.transformer import Transformer, grow_vocabulary
from llmkit.tokenizer.chat import CHAT_SPECIALS, ChatFormat, has_own_template, write_chat_tokenizer
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.templates import chat_format
from llmkit.training.checkpoint import Checkpoints
from llmkit.training.distributed import world
from llmkit.training.optimizer import GroupSettings, Optimizer
from llmkit.training.scaling import ADAMW_RATE, ADAMW_WIDTH, training_memory
from llmkit.training.sharding import shard
from llmkit.training.trainer import Trainer

# AdamW's rate of adapters at a width of 256, as ADAMW_RATE; docs/experiments.md, "Fine-tuning"
LORA_LEARNING_RATE = 3e-3

M = TypeVar("M", bound=Transformer)


class Finetuning:
    """A model, its tokenizer and what is trained of it."""

    def __init__(self, folder: str, model: Transformer, tokenizer: Tokenizer, known_tokens: int | None) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self._known_tokens = known_tokens  # None: the model stays what it is
        self._turn_end: int | None = None  # of a template from elsewhere
        self.adapter: LoraAdapter | None = None
        self.optimizer: Optimizer | None = None
        self._best: Checkpoints | None = None
        self.best_step: int | None = None  # at which the best parameters were kept
        self._reshape: Callable[[Transformer], Transformer] = lambda model: model
        self._write: Callable[[Any, Path], None] = save_model
        self._own: set[str] = set()  # parameters that the base does not have
        self._unlearnt: tuple[int, ...] = ()  # tokens of conversations that the base never saw

    @classmethod
    def load(cls, folder: str, *, device: torch.device, dtype: torch.dtype) -> Finetuning:
        """Load a model folder, with rows for the tokens of conversations, where it lacks them.

        A folder that brings a chat template from elsewhere keeps it, and its tokens.

        Raises UserError for a folder that cannot be loaded, for weights that are not finite, and for a tokenizer that
        does not fit the model.
        """
        base = load_tokenizer(folder)
        model = load_model(folder, dtype=dtype, device=device)
        base.check_fits(model.config.vocab_size)
        if has_own_template(base):
            check_finite(model, folder)
            tuning = cls(folder, model, base, None)
            turn = tuning._turn_end = tuning.chat.end_id
            if not tuning.is_assistant:
                talk = [message(role, "Hello") for role in ("user", "assistant")]
                used = {turn, *tuning.chat.encode(talk).token_ids.tolist()}
                tuning._unlearnt = tuple(sorted(used & set(base.specials.values())))
            tuning.model = _ending_at(model, turn)
            return tuning.train()
        with tempfile.TemporaryDirectory(prefix="llmkit-") as temporary:
            tokenizer = write_chat_tokenizer(base, Path(temporary))
        check_finite(model, folder)
        known = base.vocab_size
        tuning = cls(folder, model, tokenizer, known)
        unlearnt = set() if tuning.is_assistant else {tokenizer.specials[name] for name in CHAT_SPECIALS}
        tuning.model = _grown(model, known, tokenizer)
        # rows that no token has are at the mean, too, as soon as a token is new
        rows = tuning.model.config.vocab_size if tokenizer.vocab_size > known else known
        tuning._unlearnt = tuple(sorted({*unlearnt, *range(known, rows)}))
        return tuning.train()

    @classmethod
    def load_unchanged(cls, folder: str, *, device: torch.device, dtype: torch.dtype) -> Finetuning:
        """Load a model folder as it is: a base model stays one. Raises UserError as `load` does."""
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, dtype=dtype, device=device)
        tokenizer.check_fits(model.config.vocab_size)
        check_finite(model, folder)
        return cls(folder, model, tokenizer, None).train()

    def train(self) -> Finetuning:
        """Put the model in training mode."""
        self.model.train()
        return self

    def become(self, reshape: Callable[[Transformer], M], write: Callable[[Any, Path], None]) -> M:
        """Tune another kind of model, which `reshape` makes of the base, the same each time, and `write` saves."""
        before = {name for name, _ in self.model.named_parameters()}
        model = reshape(self.model)
        self._reshape, self._write, self.model = reshape, write, model
        self._own = {name for name, _ in model.named_parameters()} - before
        return model

    def frozen_copy(self) -> Transformer:
        """The model as it is now, for comparison."""
        return deepcopy(self.model).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.dtype

    @property
    def context(self) -> int:
        """Tokens that the model can take."""
        return self.model.config.max_position_embeddings

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format of the tokenizer."""
        return chat_format(self.tokenizer)

    @property
    def is_assistant(self) -> bool:
        """True if the model has learnt to end its turns."""
        own = has_own_template(self.tokenizer)
        end = self.chat.end_id if own else self.tokenizer.specials.get("<|im_end|>")
        return end in self.model.config.eos_token_ids or (own and end == self.tokenizer.eos_id)

    @property
    def pad_id(self) -> int:
        """A token for places where nothing is predicted."""
        return self.tokenizer.specials.get("<|im_end|>", 0)

    @property
    def never_last_id(self) -> int:
        """A special token that no conversation ends with: padding, before which the last token is a turn's end.

        Raises UserError where there is none.
        """
        last = self.chat.encode([message("user", "Hello"), message("assistant", "Hello")]).token_ids[-1]
        known = self.tokenizer.specials
        for token in (self.tokenizer.pad_id, self.tokenizer.end_of_text_id, known.get("<|im_start|>"), *known.values()):
            if token is not None and token in known.values() and token != last:
                return token
        raise UserError(
            f"{self.folder}: expected a special token for padding, found only the one that ends an answer; "
            "add one to its tokenizer"
        )

    @property
    def new_tokens(self) -> int:
        """Tokens that the base did not have."""
        return 0 if self._known_tokens is None else self.tokenizer.vocab_size - self._known_tokens

    @property
    def trained_parameters(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for _, parameter in self._trained())

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        parameters = list(self.model.named_parameters())
        if self.adapter is None:
            return parameters
        return [*self.adapter.parameters(), *(pair for pair in parameters if pair[0] in self._own)]

    def add_adapter(self, rank: int, alpha: float | None, seed: int) -> None:
        """Train low-rank adapters in place of the model's own parameters; `alpha` is twice the rank unless given.

        So are the rows of the tokens of conversations that a base never saw, or it would not learn to stop.
        """
        alpha = 2.0 * rank if alpha is None else alpha
        self.adapter = LoraAdapter(self.model, rank, alpha, seed=seed, token_ids=self._unlearnt)
        for _, parameter in self._trained():
            parameter.requires_grad_(True)

    def check_memory(self, micro_batch_tokens: int) -> None:
        """Raise UserError where the parameters and a micro-batch do not fit into the memory of the device."""
        divided = 1 if self.adapter else world().size
        config, trained = self.model.config, self.trained_parameters
        state, activations = training_memory(config, micro_batch_tokens, trained, divided)
        smaller = "take a smaller model" if self.adapter else "take --lora-rank 16, or a smaller model"
        check_memory({smaller: state, "lower --micro-batch-size": activations}, self.device)

    def build_optimizer(
        self,
        learning_rate: float | None,
        weight_decay: float,
        *,
        anchor: float = ADAMW_RATE,
        lora_anchor: float = LORA_LEARNING_RATE,
    ) -> Optimizer:
        """AdamW over what is trained; a `learning_rate` of None follows from the width, as `anchor` is for 256.

        Several processes divide the model among them, but for adapters, which each has whole.
        """
        if learning_rate is None:
            anchor = lora_anchor if self.adapter else anchor
            learning_rate = anchor * math.sqrt(ADAMW_WIDTH / self.model.config.hidden_size)
        if self.adapter is None:
            shard(self.model)
        plain = GroupSettings("adamw", learning_rate, betas=(0.9, 0.95), eps=1e-8)
        decayed = replace(plain, weight_decay=weight_decay)
        self.optimizer = Optimizer(
            (name, parameter, decayed if parameter.ndim > 1 else plain) for name, parameter in self._trained()
        )
        return self.optimizer

    def keep_best(
        self,
        trainer: Trainer,
        evaluate: Callable[[], Mapping[str, float]],
        score: Callable[[Mapping[str, float]], float],
    ) -> Callable[[], Mapping[str, float]]:
        """`evaluate`, which also keeps the parameters whose `score` is highest, for `save`.

        They outlive a kill: they lie beside the checkpoints.
        """
        best = self._open_best(trainer.folder)
        best_state = best.state()
        highest = -math.inf if best_state is None else best_state["score"]

        def watched() -> Mapping[str, float]:
            nonlocal highest
            scores = evaluate()
            if score(scores) > highest:
                highest = score(scores)
                best.save(trainer.step, self._masters(), {"score": highest}, wait=True)
                self.best_step = trainer.step
            return scores

        return watched

    def keep_now(self, trainer: Trainer) -> None:
        """Keep the parameters as they are now for `save`, in place of those kept before."""
        self._open_best(trainer.folder).save(trainer.step, self._masters(), {})
        self.best_step = trainer.step

    def forget_kept(self) -> None:
        """Let `save` write the last parameters."""
        if self._best is not None:
            self._best.wait()
            self.best_step = None
            if world().leads:
                shutil.rmtree(self._best.folder, ignore_errors=True)

    def _open_best(self, folder: Path) -> Checkpoints:
        if self._best is None:
            self._best = Checkpoints(folder / "state" / "best", keep=1)
            state = self._best.state()
            self.best_step = None if state is None else state["step"]
        return self._best

    def stop_early(
        self, trainer: Trainer, evaluate: Callable[[], Mapping[str, float]], patience: int
    ) -> Callable[[], Mapping[str, float]]:
        """`evaluate`, which also keeps the best parameters, and stops the trainer after `patience` without a gain."""
        keeping, without_gain = self.keep_best(trainer, evaluate, lambda scores: -scores["val_loss"]), 0

        def watched() -> Mapping[str, float]:
            nonlocal without_gain
            scores = keeping()
            without_gain = 0 if self.best_step == trainer.step else without_gain + 1
            if without_gain >= patience:
                say(
                    f"no gain in {counted(patience, 'validation')}: stopping after step {trainer.step}",
                    trainer.settings.quiet,
                )
                trainer.stopping = True
            return scores

        return watched

    def _masters(self) -> dict[str, torch.Tensor]:
        assert self.optimizer is not None, "nothing was trained"
        return self.optimizer.masters()

    def write_tokenizer(self, folder: Path, pad_id: int | None = None) -> None:
        """Write the tokenizer with its tokens and template of conversations; `pad_id` names its token for padding."""
        written = self.tokenizer
        if self._known_tokens is None:
            written.copy_to(folder)
        else:
            written = write_chat_tokenizer(load_tokenizer(self.folder), folder)
        if pad_id is not None:
            names = {number: name for name, number in written.specials.items()}
            write_json(folder / "tokenizer_config.json", {**written.config, "pad_token": names[pad_id]})

    def trained_values(self) -> dict[str, torch.Tensor]:
        """Return the values to save, whole and float32: the best ones if they were watched for, else the last ones.

        All processes call it; the first gets them, the others none.
        """
        assert self.optimizer is not None, "nothing was trained"
        if self._best is not None:
            self._best.wait()
        if self._best is not None and self.best_step is not None:
            loaded = self._best.load() if world().leads else None
            return loaded[0] if loaded else {}
        return self.optimizer.whole_masters()

    def save(self, folder: Path, values: Mapping[str, torch.Tensor], *, keep_adapter: bool = False) -> None:
        """Write the model in float32 with the `trained_values`."""
        self._write(self._assembled(values, folder / "adapter" if keep_adapter else None), folder)

    def save_now(self, folder: Path) -> None:
        """Write the model as it is now, in the precision that it is trained in, and its tokenizer."""
        self.write_tokenizer(folder)
        save_model(self._assembled(self._masters()), folder, dtype=self.dtype)

    def _assembled(self, values: Mapping[str, torch.Tensor], adapter_folder: Path | None = None) -> Transformer:
        """A whole model of what was trained, on the CPU, with an adapter merged and, if asked, saved."""
        base = load_model(self.folder)
        rows = max(base.config.vocab_size, self.tokenizer.vocab_size)
        if self._known_tokens is not None:
            base = _grown(base, self._known_tokens, self.tokenizer)
        elif self._turn_end is not None:
            base = _ending_at(base, self._turn_end)
        model = self._reshape(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self.adapter is None or name in self._own:
                    parameter.copy_(values[name])
        if self.adapter is not None:
            mine = self.adapter
            whole = LoraAdapter(model, mine.rank, mine.alpha, mine.targets, token_ids=mine.token_ids)
            whole.load(dict(values))
            if adapter_folder is not None:
                whole.save(adapter_folder, self.folder, rows)
            model = whole.merge()
        return model.eval()


def check_finite(model: Transformer, folder: str) -> None:
    """Raise UserError for weights that no loss comes from, before work is put into them."""
    for name, parameter in model.named_parameters():
        if not all(bound.isfinite() for bound in torch.aminmax(parameter.detach())):  # a NaN is both
            raise UserError(
                f"{folder}: expected weights that are finite numbers, found NaN or infinity in {name}; "
                "make or fetch the model again"
            )


def _grown(model: Transformer, known: int, tokenizer: Tokenizer) -> Transformer:
    """The model with rows for every token, which ends a text where a turn ends, too."""
    model = grow_vocabulary(model, known, tokenizer.vocab_size)
    return _ending_at(model, tokenizer.specials["<|im_end|>"], tokenizer.end_of_text_id)


def _ending_at(model: Transformer, turn: int, text: int | None = None) -> Transformer:
    """The model with these tokens among those that end a generation, the end of a turn first."""
    ends = dict.fromkeys(end for end in (turn, *model.config.eos_token_ids, text) if end is not None)
    model.config = replace(model.config, eos_token_id=tuple(ends))
    return model


def answer(model: Transformer, chat: ChatFormat, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int) -> str:
    """The likeliest answers to some questions, for a look at a model in training: "question -> answer" by line."""
    room = model.config.max_position_embeddings
    encoded = [chat.encode([message("user", prompt)], prompt=True).token_ids.tolist() for prompt in prompts]
    fitting = [(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) < room]
    requests = [Request(ids, max_tokens=max_tokens) for _, ids in fitting]
    generator = Generator(model, tokenizer, Sampling(temperature=0.0), slots=max(1, len(requests)))
    with torch.no_grad():
        answers = [samples[0] for samples in generator.complete(requests)]
    return "\n".join(f"{prompt} -> {completion.text}" for (prompt, _), completion in zip(fitting, answers, strict=True))
