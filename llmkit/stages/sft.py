"""`llmkit sft`: conversations turn a base model into an assistant that stops when it has answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from llmkit.config import (
    DECAY_FRACTION,
    MICRO_BATCH_TOKENS,
    TuningConfig,
    argument,
    option,
)
from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, read_conversation
from llmkit.io.jsonl import check_inputs, name_of, read_jsonl
from llmkit.io.metrics import METRICS, last_figures, read_metrics
from llmkit.io.progress import Progress, counted, duration, quantity, say
from llmkit.io.records import BadRecords
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.data.examples import Examples
    from llmkit.data.mixture import Mixture, Source
    from llmkit.data.sources import DataFile
    from llmkit.tokenizer.chat import ChatFormat

Observer = Callable[[list[str]], object] | None  # receives the texts of the data

PROMPTS = ("Hello, who are you?", "What is the capital of France?")
LONGEST_CONTEXT = 2048  # tokens of a row, where the model's context is longer
EPOCHS = 2.0
ANSWER_TOKENS = 64  # of an answer while training
STEPS_OF_A_RUN = 200  # from which the batch follows, within its bounds
SMALLEST_BATCH, LARGEST_BATCH = 1024, 32768  # tokens
MUCH_MORE = 1.25  # times the epochs that were asked for, which the last step may go beyond


@dataclass(frozen=True, kw_only=True)
class SftConfig(TuningConfig):
    """Options of `llmkit sft`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit sft base/ --data chats.jsonl -o chat/
          llmkit sft base/ --data chats.jsonl:0.8 --data tools.jsonl:0.2 --epochs 3 --val held-out.jsonl -o chat/
          zcat chats.jsonl.gz | llmkit sft base/ --identity "name=Ada;maker=Example Labs" -o chat/
          llmkit sft base/ --data chats.jsonl --inspect 5
          llmkit sft base/ --data chats.jsonl --lora-rank 16 --keep-adapter -o chat/

        A record is {"messages": [{"role", "content"}]}, {"prompt", "completion"}, Alpaca's, ShareGPT's, or
        {"text"}, which is trained on whole; a file is JSONL or one JSON array, plain, gzip or zstd. The loss
        covers the assistant's words, its tool calls and the end-of-turn token; a message's "weight": 0
        leaves it out. A FILE's weight is its share of the training tokens; without weights a file counts by its size.
    """
    following: ClassVar[str] = 'llmkit sample chat/ -p "Hello, who are you?" --chat'

    model: str = argument("Model folder: a base model, or one to tune on.", metavar="MODEL", default=None)
    data: tuple[str, ...] = option((), "Conversations; repeatable [stdin].", metavar="FILE[:WEIGHT]", reads=True)
    val: tuple[str, ...] = option((), "Held-out conversations, for the validation loss.", metavar="FILE", reads=True)

    loss: str = option("assistant", "Tokens in the loss.", group="Data", choices=("assistant", "last", "all"))
    on_long: str = option(
        "truncate",
        "Treatment of conversations longer than the context; truncate ends them after the last turn that fits. "
        "Documents are always split.",
        group="Data",
        choices=("truncate", "drop", "split", "error"),
    )
    sequence_length: int | None = option(None, "Tokens of a row [the model's context].", group="Data", at_least=8)
    identity: str | None = option(
        None, "Name and maker that the assistant learns to give.", group="Data", metavar='"name=...;maker=..."'
    )
    identity_weight: float = option(0.1, "Weight of --identity; all data together weigh 1.", group="Data", above=0)
    system: str | None = option(
        None, "System message of conversations without one; `identity`: made of --identity.", group="Data"
    )
    inspect: int | None = option(
        None, "Examples to show token by token, instead of training.", group="Data", at_least=1, free=True
    )

    keep_adapter: bool = option(False, "Copy of the adapter, in PEFT's format, beside the merged model.", group="LoRA")

    epochs: float | None = option(None, "Passes over the data [2].", group="Horizon", above=0)
    tokens: int | None = option(None, "Tokens of training in all.", group="Horizon", unit="count", at_least=1)
    time_budget: float | None = option(None, "Wall-clock limit.", group="Horizon", unit="duration", above=0)
    patience: int | None = option(
        None,
        "Validations without improvement before an early stop; the best parameters are kept.",
        group="Horizon",
        at_least=1,
    )

    batch_tokens: int | None = option(
        None, "Tokens per step [by the data].", group="Training", unit="count", at_least=8
    )

    prompt: tuple[str, ...] = option(PROMPTS, "Prompt of the samples; repeatable.", group="Log", free=True)

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.data or any(text == "-" or text.startswith("-:") for text in self.data)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints; with --patience, `val_loss` is that of `kept_step`, the saved parameters."""

    path: str
    steps: int
    tokens: int
    epochs: dict[str, float]
    trained_parameters: int
    loss: float
    seconds: float
    val_loss: float | None = None
    kept_step: int | None = None
    bad_records: int = 0
    not_used: dict[str, int] | None = None


def run(config: SftConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    from llmkit.training.run import Run

    files = _checked(config)
    run = Run("sft", config, "chat/", dry=config.inspect is not None)
    if results := run.finished():
        return Summary(**results)

    from llmkit.data.mixture import Mixture, PackedEvaluation
    from llmkit.data.overlap import Overlap
    from llmkit.model.devices import check_batch_memory
    from llmkit.training import speed
    from llmkit.training.distributed import whole_model
    from llmkit.training.finetuning import EarlyStop, KeepBest, answer, load_for_tuning, show_examples
    from llmkit.training.loss import masked_loss, next_token_loss
    from llmkit.training.optimizer import Schedule, warn_of_long_warmup
    from llmkit.training.plan import training_memory
    from llmkit.training.trainer import TrainerSettings

    # load
    run.join()
    tuning = load_for_tuning(str(config.model), device=run.device, dtype=run.dtype)
    row_tokens = _row_tokens(config, tuning.context)
    texts: list[str] = []
    held_out = [_read_file(config, path, tuning.chat, row_tokens, run.bad, texts.extend)[0] for path in config.val]
    overlap = Overlap.of_texts(texts)
    observe = overlap.compare_texts if held_out else None
    sources, digests = _read_sources(config, files, tuning.chat, row_tokens, run.bad, observe)
    overlap.report(config.quiet)
    if config.inspect is not None:
        show_examples([source.examples for source in sources], tuning.tokenizer, config.inspect)
        return None

    # build
    rows = _batch_rows(config, sources, row_tokens)
    tuning = tuning.with_adapter(config.lora_rank, config.lora_alpha, config.seed)
    tuning.check_memory(min(config.micro_batch_size or 1, rows) * row_tokens)
    check_batch_memory(rows * row_tokens, "lower --batch-tokens")
    mixture = Mixture(sources, row_tokens, rows, tuning.pad_id, config.seed)
    steps = _total_steps(config, mixture)
    _say_plan(config, mixture, steps, tuning.trained_parameters, tuning.new_tokens)
    warmup_steps = (steps or STEPS_OF_A_RUN) // 20 if config.warmup_steps is None else config.warmup_steps
    warn_of_long_warmup(warmup_steps, steps, config.quiet)
    micro_rows = config.micro_batch_size or max(1, MICRO_BATCH_TOKENS // row_tokens)
    if config.dry_run:
        some = mixture.rows(0, 0, min(micro_rows, mixture.batch_size))
        seconds = speed.batch_seconds(tuning.model, next_token_loss, some, len(some[0]), run.device)
        memory = sum(training_memory(tuning.model.config, len(some[0]) * row_tokens, tuning.trained_parameters))
        whole = "" if steps is None else f", {duration(steps * seconds * mixture.batch_size / len(some[0]))} to train"
        say(f"about {memory / 1e9:.2f} GB of memory{whole}", config.quiet)
        return None
    run.world.check_rows(mixture.batch_size, f"--batch-tokens: rows of {row_tokens} tokens")
    run.begin({"the data": digests})
    optimizer = tuning.build_optimizer(config.learning_rate, config.weight_decay)
    best = KeepBest(run.work, optimizer)
    flops_per_token = tuning.model.config.flops_per_token(row_tokens)
    trainer = run.trainer(
        tuning.model,
        optimizer,
        Schedule(warmup_steps, DECAY_FRACTION),
        next_token_loss,
        TrainerSettings(micro_rows, flops_per_token=flops_per_token),
        flops=flops_per_token * mixture.batch_size * row_tokens * (steps or STEPS_OF_A_RUN),
    )

    # train
    batches = [PackedEvaluation(examples, row_tokens, micro_rows, tuning.pad_id) for examples in held_out]
    early = EarlyStop(trainer, best, config.patience) if config.patience is not None else None

    def validate() -> dict[str, float]:
        scores = masked_loss(tuning.model, chain.from_iterable(batches), config.quiet)
        if early is not None:
            early.note(scores)
        return scores

    with run.training(trainer):
        trainer.fit(
            mixture.prefetch(trainer.step),
            total_steps=steps,
            seconds=run.seconds_left(config.time_budget),
            evaluate=validate if held_out else None,
            sample=lambda: answer(tuning, whole_model(tuning.model), config.prompt, ANSWER_TOKENS),
        )

    # save
    values = best.values()
    if not run.world.leads:
        return None

    def write(folder: Path) -> None:
        tuning.write_tokenizer(folder)
        tuning.save(folder, values, keep_adapter=config.keep_adapter)

    epochs = zip(sources, mixture.epochs(trainer.step), strict=True)
    results = {
        **trainer.results(),
        **_kept(config, run.work, best.step),
        "trained_parameters": tuning.trained_parameters,
        "epochs": {source.examples.name: round(count, 3) for source, count in epochs},
    }
    inputs = [file.path for file in files if file.path != "-"]

    # summarise
    return Summary(**run.finish(results, inputs=inputs, parents=[str(config.model)], write=write))


def _kept(config: SftConfig, work: Path, step: int | None) -> dict[str, float]:
    """Return `val_loss` and `kept_step` of the best parameters, for the summary; nothing without --patience."""
    if step is None:
        return {}
    loss = round(last_figures(read_metrics(work / METRICS), step).get("val_loss", math.nan), 4)
    say(f"kept the parameters of step {step}, the best: val_loss {loss:.4f}", config.quiet)
    return {"val_loss": loss, "kept_step": step}


# ---- what is asked for


def _checked(config: SftConfig) -> list[DataFile]:
    """The files of --data, once all that can be known before the work is in order."""
    check_model_folder(config.model, "llmkit sft base/ --data chats.jsonl")
    if config.patience is not None and not (config.val and config.eval_every):
        raise UserError("--patience: needs --val and --eval-every, to see whether there is a gain")
    if config.eval_every is not None and not config.val:
        raise UserError("--eval-every: needs --val, conversations to look at")
    if config.identity_weight != SftConfig.identity_weight and config.identity is None:
        raise UserError("--identity-weight: needs --identity, whose share it is")
    if config.keep_adapter and config.lora_rank is None:
        raise UserError("--keep-adapter: needs --lora-rank; there is no adapter otherwise")
    if config.system == "identity" and config.identity is None:
        raise UserError("--system identity: needs --identity, whose facts it states")

    from llmkit.data.identity import parse_identity
    from llmkit.data.sources import parse_data  # brings numpy, which --help does without

    if config.identity is not None:
        parse_identity(config.identity)
    check_inputs(config.val)
    return parse_data(config.data)


def _row_tokens(config: SftConfig, context: int) -> int:
    if config.sequence_length is not None and config.sequence_length > context:
        raise UserError(f"--sequence-length: the model's context is {context}, found {config.sequence_length}")
    return config.sequence_length or min(context, LONGEST_CONTEXT)


def _batch_rows(config: SftConfig, sources: list[Source], row_tokens: int) -> int:
    """Rows of a step: as many as make some 200 steps of the data, within bounds."""
    tokens = sum(source.examples.inputs for source in sources) * (config.epochs or EPOCHS)
    wanted = config.batch_tokens or min(max(tokens / STEPS_OF_A_RUN, SMALLEST_BATCH), LARGEST_BATCH)
    return max(1, round(wanted / row_tokens))


def _total_steps(config: SftConfig, mixture: Mixture) -> int | None:
    """The steps of the run; None under a time budget."""
    if config.time_budget is not None:
        return None
    if config.max_steps is not None:
        return config.max_steps
    return mixture.steps_for(config.tokens or (config.epochs or EPOCHS) * mixture.inputs)


# ---- data


def _read_sources(
    config: SftConfig,
    files: list[DataFile],
    chat: ChatFormat,
    row_tokens: int,
    bad: BadRecords,
    observe: Observer,
) -> tuple[list[Source], list[str]]:
    """The sources of the mixture, and a digest of each."""
    from llmkit.data.identity import identity_conversations, parse_identity
    from llmkit.data.mixture import Source

    sources, digests = [], []
    for place, file in enumerate(files):
        examples, digest = _read_file(config, file.path, chat, row_tokens, bad, observe)
        if before := [other.path for other in files[:place]].count(file.path):
            examples.name += f" ({before + 1})"  # of a file that is given again, figures of its own
        sources.append(Source(examples, file.weight or float(examples.inputs)))
        digests.append(digest)
    if config.identity is not None:
        conversations = identity_conversations(parse_identity(config.identity))
        examples, digest = _read(config, "--identity", iter(conversations), chat, row_tokens, BadRecords())
        sources.append(Source(examples, config.identity_weight * sum(source.weight for source in sources)))
        digests.append(digest)
    return sources, digests


def _read_file(
    config: SftConfig, path: str, chat: ChatFormat, row_tokens: int, bad: BadRecords, observe: Observer
) -> tuple[Examples, str]:
    conversations = read_jsonl([path], config.limit, read_conversation, bad)
    return _read(config, name_of(path), conversations, chat, row_tokens, bad, observe)


def _read(
    config: SftConfig,
    name: str,
    conversations: Iterator[Conversation],
    chat: ChatFormat,
    row_tokens: int,
    bad: BadRecords,
    observe: Observer = None,
) -> tuple[Examples, str]:
    from llmkit.data.examples import CUT
    from llmkit.data.identity import parse_identity, system_message
    from llmkit.data.sources import read_examples

    system = config.system
    if system == "identity":
        system = system_message(parse_identity(config.identity or ""))
    with Progress(f"read {name}", unit="conversations", quiet=config.quiet) as progress:
        examples, digest = read_examples(
            name,
            conversations,
            lambda chunk: chat.encode_many(chunk, loss=config.loss),
            row_tokens + 1,
            config.on_long,
            bad=bad,
            unknown=chat.unk_id,
            system=system,
            observe=observe,
            progress=progress.advance,
        )
    others = "".join(f", {key} {count}" for key, count in examples.counts.items() if key not in ("read", CUT))
    say(
        f"{name}: {counted(examples.counts['read'], 'conversation')}{others}; {counted(len(examples), 'example')}, "
        f"{quantity(examples.inputs)} tokens, {quantity(examples.targets)} of them trained on",
        config.quiet,
    )
    if cut := examples.counts[CUT]:
        longer = "a longer" if config.sequence_length else "pretrain with a longer"
        place = f"cut at the context of {row_tokens} tokens"
        say(f"{name}: {counted(cut, 'answer')} {place}; {longer} --sequence-length gives more", config.quiet)
    return examples, digest


def _say_plan(config: SftConfig, mixture: Mixture, steps: int | None, parameters: int, new_tokens: int) -> None:
    horizon = f"{config.time_budget:.0f} s" if steps is None else counted(steps, "step")
    rows = mixture.batch_size
    new = (
        f"; {counted(new_tokens, 'token')} {'is' if new_tokens == 1 else 'are'} new to the model" if new_tokens else ""
    )
    say(
        f"{horizon} of {counted(rows, 'row')} of {mixture.sequence_length} tokens; "
        f"{quantity(parameters)} parameters are trained{new}",
        config.quiet,
    )
    if (config.batch_tokens or 0) > mixture.inputs:
        few = f"more than the {counted(mixture.inputs, 'token')} of the data, so a step repeats some"
        say(f"--batch-tokens {config.batch_tokens:,}: {few}", config.quiet)
    if steps is not None:
        parts = list(zip(mixture.sources, mixture.epochs(steps), strict=True))
        shares = ", ".join(f"{source.examples.name} {epochs:.2f}" for source, epochs in parts)
        say(f"epochs of each source: {shares}", config.quiet)
        taken = sum(source.examples.inputs * epochs for source, epochs in parts) / mixture.inputs
        asked = config.epochs or EPOCHS
        if config.tokens is None and config.max_steps is None and taken > MUCH_MORE * asked:
            say(
                f"that is {taken:.2g} epochs of all, where {asked:g} were asked for: a step takes up to "
                f"{rows * mixture.sequence_length:,} tokens and there are {mixture.inputs:,}; give more data, or a "
                "smaller --batch-tokens or --sequence-length",
                config.quiet,
            )
