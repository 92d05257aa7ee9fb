"""`llmkit sft`: fine-tune a model on conversations or preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llmkit.config import (
    DECAY_FRACTION,
    MICRO_BATCH_TOKENS,
    GoldConfig,
    PreferenceConfig,
    TaskConfig,
    TuningConfig,
    argument,
    option,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, read_conversation, with_system
from llmkit.io.jsonl import input_files, read_jsonl
from llmkit.io.metrics import METRICS, last_figures, read_metrics
from llmkit.io.progress import counted, duration, quantity, say
from llmkit.io.records import BadRecords
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from llmkit.crawl.filters.contamination import Findings
    from llmkit.data.batches import Mixture, Source
    from llmkit.data.examples import DataFile
    from llmkit.rewards import Weighted
    from llmkit.rl.monitor import Watch
    from llmkit.training.finetuning import KeepBest, Tuning
    from llmkit.training.loss import Loss
    from llmkit.training.run import Run
    from llmkit.training.trainer import Trainer

PROMPTS = ("Hello, who are you?", "What is the capital of France?")
LONGEST_CONTEXT = 2048  # tokens per row, if the model's context is longer
EPOCHS, PREFERENCE_EPOCHS = 2.0, 1.0
CONVERSATION_LOSSES = ("assistant", "answer", "last", "all")
PREFERENCE_LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
PREFERENCE_RATE, PREFERENCE_LORA_RATE = 1e-4, 1e-3  # AdamW, width of 256; docs/preferences.md
ANSWER_TOKENS = 64  # of a sample during training
SHOWN = 5  # examples that a dry run shows, and conversations that --not-in leaves out
STEPS_OF_A_RUN = 200  # determines the default batch, within its bounds
SMALLEST_BATCH, LARGEST_BATCH = 1024, 32768  # tokens
MUCH_MORE = 1.25  # times the requested epochs, which a full last step may exceed


@dataclass(frozen=True, kw_only=True)
class SftConfig(TuningConfig, TaskConfig, PreferenceConfig, GoldConfig):
    """Options of `llmkit sft`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit sft base/ --data chats.jsonl -o chat/
          llmkit sft base/ --data chats.jsonl:0.8 --data tools.jsonl:0.2 --epochs 3 --val held-out.jsonl -o chat/
          zcat chats.jsonl.gz | llmkit sft base/ --identity "name=Ada;maker=Example Labs" -o chat/
          llmkit sft base/ --data chats.jsonl --dry-run
          llmkit sft base/ --data chats.jsonl --lora-rank 16 --keep-adapter -o chat/
          llmkit sft chat/ --data prefs.jsonl --loss dpo --beta 0.1 --val held-out.jsonl -o policy/

        A record is {"messages": [{"role", "content"}]}, {"prompt", "completion"}, Alpaca's, ShareGPT's, or {"text"},
        which is trained on in full; a file is JSONL or one JSON array, plain, gzip or zstd. The loss covers the
        assistant's text, tool calls and end-of-turn tokens; --loss answer leaves out its thinking, and "weight": 0
        leaves out a message. A FILE's weight is its share of the training tokens; without weights, files count by
        size.

        --loss dpo, ipo, kto, orpo and simpo train on preferences, in the formats of train-reward; kto also reads
        answers with a "label" (docs/preferences.md).
    """
    following: ClassVar[str] = 'llmkit sample chat/ -p "Hello, who are you?" --chat'

    model: str = argument("Model folder: a base model, or an assistant to tune further.", metavar="MODEL", default=None)
    data: tuple[str, ...] = option((), "Conversations; repeatable [stdin].", metavar="FILE[:WEIGHT]", reads=True)
    val: tuple[str, ...] = option((), "Held-out conversations, for the validation loss.", metavar="FILE", reads=True)

    loss: str = option(
        "assistant",
        "Tokens in the loss, or a preference loss.",
        group="Data",
        choices=CONVERSATION_LOSSES + PREFERENCE_LOSSES,
    )
    on_long: str = option(
        "truncate",
        "Action for records longer than the context; truncate keeps the turns of a conversation that fit, and the end "
        "of a comparison's prompt. Documents are always split.",
        group="Data",
        choices=("truncate", "drop", "split", "error"),
    )
    not_in: tuple[str, ...] = option(
        (),
        "Evaluation items that no conversation may contain; repeatable.",
        group="Data",
        metavar="FILE",
        reads=True,
    )
    sequence_length: int | None = option(None, "Tokens per row [the model's context].", group="Data", at_least=8)
    identity: str | None = option(
        None,
        "Name and maker that the assistant learns to state; WEIGHT is relative to all other data [0.1].",
        group="Data",
        metavar='"name=...;maker=...[:WEIGHT]"',
    )
    system: str | None = option(
        None, "System message for conversations without one; `identity`: generated from --identity.", group="Data"
    )
    keep_adapter: bool = option(False, "Save the adapter, in PEFT format, with the merged model.", group="LoRA")

    epochs: float | None = option(None, "Passes over the data [2].", group="Horizon", above=0)
    tokens: int | None = option(None, "Total training tokens.", group="Horizon", unit="count", at_least=1)
    time_budget: float | None = option(None, "Wall-clock limit.", group="Horizon", unit="duration", above=0)
    patience: int | None = option(
        None,
        "Validations without improvement before an early stop; the best parameters are kept.",
        group="Horizon",
        at_least=1,
    )

    batch_tokens: int | None = option(
        None, "Tokens per step [by the size of the data].", group="Training", unit="count", at_least=8
    )

    prompt: tuple[str, ...] = option(PROMPTS, "Prompt of the samples; repeatable.", group="Log", free=True)

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.data or any(text == "-" or text.startswith("-:") for text in self.data)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints; the `val_` ones are those of the saved parameters, of `kept_step`."""

    path: str
    steps: int
    tokens: int
    epochs: dict[str, float]
    trained_parameters: int
    loss: float
    seconds: float
    val_loss: float | None = None
    val_accuracy: float | None = None  # preference losses: share of held-out pairs in order
    val_gold: float | None = None
    tasks: dict[str, float] | None = None  # the last scores of --evaluate
    kept_step: int | None = None
    stopped: str | None = None  # by --stop-on-hack, in words
    bad_records: int = 0
    not_used: dict[str, int] | None = None
    contaminated: int | None = None  # conversations left out by --not-in


def run(config: SftConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    from llmkit.training.run import Run

    config, files = _checked(config)
    run = Run("sft", config, "chat/")
    if results := run.finished():
        return Summary(**results)
    from llmkit.rewards import parse_rewards

    run.join()
    gold = parse_rewards([config.gold], flag="--gold", device=config.device, dtype=config.dtype) if config.gold else []
    with ExitStack() as stack:
        for weighted in gold:
            stack.callback(weighted.reward.close)
        return _tune(config, files, run, gold)


def _tune(config: SftConfig, files: list[DataFile], run: Run, gold: list[Weighted]) -> Summary | None:
    from llmkit.crawl.filters.contamination import Findings
    from llmkit.evaluation.evaluator import TaskScores
    from llmkit.rewards.reward import ModelReward
    from llmkit.rl.monitor import Watch
    from llmkit.training.distributed import whole_model
    from llmkit.training.finetuning import KeepBest, answer, load_for_tuning

    # load
    tuning = load_for_tuning(str(config.model), run.device, run.dtype, config.quantize, config.backend)
    tasks = TaskScores(config.evaluate, tuning.tokenizer, chat=True)
    row_tokens, findings = _row_tokens(config, tuning.context), Findings()
    if config.loss in PREFERENCE_LOSSES:
        lessons = _preferences(config, files, tuning, row_tokens, run, gold)
    else:
        lessons = _conversations(config, files, tuning, row_tokens, run.bad, findings)
    tuning = tuning.with_adapter(config.lora_rank, config.seed)

    # build
    mixture = _mixture(config, lessons, tuning)
    steps, warmup_steps = _horizon(config, mixture)
    micro_rows = config.micro_batch_size or max(1, MICRO_BATCH_TOKENS // lessons.row_tokens)
    _say_plan(config, mixture, steps, warmup_steps, tuning)
    if config.dry_run:
        return _rehearse(config, lessons, mixture, steps, micro_rows, tuning)
    run.world.check_rows(mixture.batch_size, f"--batch-tokens: rows of {lessons.row_tokens} tokens")
    run.begin({"the data": lessons.digests})
    trainer = _trainer(run, tuning, lessons, mixture, steps, warmup_steps, micro_rows)
    best = KeepBest(run.work, trainer.optimizer)
    rows = read_metrics(run.work / METRICS)
    watch = Watch(trainer, rows=rows, proxy="val_margin", stop_on_hack=config.stop_on_hack)
    validate = _validation(config, lessons, mixture, trainer, best, watch, rows)

    # train
    with run.training(trainer):
        trainer.fit(
            mixture.prefetch(trainer.step),
            total_steps=steps,
            seconds=run.seconds_left(config.time_budget),
            evaluate=tasks.beside(validate, tuning.model),
            evaluate_first=lessons.answers is not None,
            sample=lambda: answer(tuning, whole_model(tuning.model), config.prompt, ANSWER_TOKENS),
            figures=lambda step: lessons.figures(trainer.figures[-1]),
        )

    # save, and summarise
    values = best.values()
    if not run.world.leads:
        return None
    results = {
        **{name: value for name, value in trainer.results().items() if name in Summary.__annotations__},
        **_kept(config, run.work, best.step, watch.stopped),
        "trained_parameters": tuning.trained_parameters,
        "epochs": {source.examples.name: round(epochs, 3) for source, epochs in mixture.epochs(trainer.step)},
        **({"contaminated": findings.documents} if config.not_in else {}),
    }
    judges = [weighted.reward.folder for weighted in gold if isinstance(weighted.reward, ModelReward)]
    inputs, parents = [path for file in files for path in file.files], [str(config.model), *judges]
    write = partial(_write, config, tuning, values, findings)
    return Summary(**run.finish(results, inputs=inputs, parents=parents, write=write, not_in=config.not_in))


def _write(config: SftConfig, tuning: Tuning, values: Mapping[str, Tensor], findings: Findings, folder: Path) -> None:
    from llmkit.crawl.filters.contamination import REPORT
    from llmkit.training.finetuning import save_tuned

    if config.not_in:
        findings.write(folder / REPORT)
    save_tuned(tuning, values, folder, keep_adapter=config.keep_adapter)


@dataclass(frozen=True)
class Lessons:
    """Training data and its loss: examples or comparisons of answers, which `pack` puts into rows of `row_tokens`.

    digests  hash of each source
    figures  figures of a step, from those of its micro-batches
    answers  figures of the model's own answers to held-out prompts
    """

    sources: list[Source]
    held_out: list[Any]
    digests: list[str]
    row_tokens: int
    loss: Loss
    pack: Callable[..., Any] | None = None
    figures: Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]] = lambda parts: {}
    answers: Callable[[], dict[str, float]] | None = None


def _trainer(
    run: Run, tuning: Tuning, lessons: Lessons, mixture: Mixture, steps: int | None, warmup_steps: int, micro_rows: int
) -> Trainer:
    from llmkit.training.finetuning import LORA_LEARNING_RATE
    from llmkit.training.optimizer import Schedule
    from llmkit.training.plan import ADAMW_RATE
    from llmkit.training.trainer import TrainerSettings

    config = cast(SftConfig, run.config)
    flops_per_token = tuning.model.config.flops_per_token(mixture.sequence_length)
    flops = flops_per_token * mixture.batch_size * mixture.sequence_length * (steps or STEPS_OF_A_RUN)
    rate, lora_rate = ADAMW_RATE, LORA_LEARNING_RATE
    if config.loss in PREFERENCE_LOSSES:  # no flops: never tried with torch.compile
        rate, lora_rate, flops = PREFERENCE_RATE, PREFERENCE_LORA_RATE, None
    optimizer = tuning.build_optimizer(config.learning_rate, config.weight_decay, anchor=rate, lora_anchor=lora_rate)
    settings = TrainerSettings(micro_rows, flops_per_token=flops_per_token)
    if config.loss == "ipo":  # a squared difference is not in nats
        settings = replace(settings, spike_nats=math.inf)
    schedule = Schedule(warmup_steps, DECAY_FRACTION)
    return run.trainer(tuning.model, optimizer, schedule, lessons.loss, settings, flops=flops)


def _validation(
    config: SftConfig,
    lessons: Lessons,
    mixture: Mixture,
    trainer: Trainer,
    best: KeepBest,
    watch: Watch,
    rows: Sequence[Mapping[str, Any]],
) -> Callable[[], dict[str, float]] | None:
    """Return a function that evaluates the model on the held-out examples, and may stop the run.

    rows  metrics so far
    """
    if not lessons.held_out:
        return None
    from llmkit.data.batches import PackedEvaluation
    from llmkit.reward_model.preferences import held_out_figures
    from llmkit.training.finetuning import EarlyStop
    from llmkit.training.loss import masked_loss

    micro_rows, length, pad = trainer.settings.micro_batch_rows, mixture.sequence_length, mixture.pad
    compares = config.loss in PREFERENCE_LOSSES
    batches = [PackedEvaluation(examples, length, micro_rows, pad) for examples in lessons.held_out if not compares]
    early = None if config.patience is None else EarlyStop(trainer, config.patience, rows)

    def validate() -> dict[str, float]:
        if compares:
            scores = held_out_figures(trainer.model, lessons.held_out, lessons.loss, pad)
            scores |= lessons.answers() if lessons.answers is not None else {}
        else:
            scores = masked_loss(trainer.model, chain.from_iterable(batches), config.quiet)
        if early is not None:
            best.offer(trainer.step, -scores["val_loss"])
            early.note(scores)
        if "val_gold" in scores:
            watch.note_evaluation(scores)
            best.offer(trainer.step, scores["val_gold"])
        return scores

    return validate


def _rehearse(
    config: SftConfig, lessons: Lessons, mixture: Mixture, steps: int | None, micro_rows: int, tuning: Tuning
) -> None:
    """Show some examples on stdout, and estimate the memory and time of the training."""
    from llmkit.reward_model.preferences import answers_of
    from llmkit.training.distributed import world
    from llmkit.training.finetuning import show_examples
    from llmkit.training.loss import rows_of
    from llmkit.training.speed import batch_seconds

    if world().leads:
        every = [source.examples for source in mixture.sources]
        shown = [answers_of(examples, SHOWN) for examples in every] if config.loss in PREFERENCE_LOSSES else every
        show_examples(shown, tuning.tokenizer, SHOWN)
    rows = min(micro_rows, mixture.batch_size)
    seconds = batch_seconds(tuning.model, lessons.loss, rows_of(mixture.batch(0), 0, rows), rows, tuning.device)
    memory = tuning.training_memory(rows * mixture.sequence_length)
    whole = "" if steps is None else f", {duration(steps * seconds * mixture.batch_size / rows)} to train"
    say(f"about {sum(memory) / 1e9:.2f} GB of memory{whole}", config.quiet)


def _kept(config: SftConfig, work: Path, step: int | None, stopped: str | None) -> dict[str, Any]:
    """Return `kept_step` and the figures of the best parameters; nothing if the last ones are saved."""
    if step is None:
        return {}
    figures = last_figures(read_metrics(work / METRICS), step)
    names = [name for name in Summary.__annotations__ if name.startswith("val_") and name in figures]
    values = {name: round(figures[name], 4) for name in names}
    by = "val_gold" if config.gold else "val_loss"
    say(f"kept the parameters of step {step}, the best: {by} {values[by]:.4f}", config.quiet)
    return {**values, "kept_step": step, **({"stopped": stopped} if stopped else {})}


# ---- options


def _checked(config: SftConfig) -> tuple[SftConfig, list[DataFile]]:
    """Check the options; return them, with --not-in as files, and the files of --data."""
    check_model_folder(config.model, "llmkit sft base/ --data chats.jsonl")
    if config.patience is not None and not (config.val and config.eval_every):
        raise UserError("--patience: needs --val and --eval-every, to measure improvement")
    if config.eval_every is not None and not (config.val or config.evaluate):
        raise UserError("--eval-every: needs --val, held-out conversations, or --evaluate, tasks")
    if config.keep_adapter and config.lora_rank is None:
        raise UserError("--keep-adapter: needs --lora-rank; there is no adapter otherwise")
    _check_loss(config)
    if config.system == "identity" and config.identity is None:
        raise UserError("--system identity: needs --identity, which it is generated from")

    from llmkit.data.examples import parse_data  # brings numpy, which --help does without
    from llmkit.data.identity import parse_identity

    if config.identity is not None:
        parse_identity(config.identity)
    input_files(config.val)
    config = replace(config, not_in=tuple(input_files(config.not_in)))
    return config, parse_data(config.data)


def _check_loss(config: SftConfig) -> None:
    """Raise UserError for an option that --loss does not use."""
    used_by = {
        "beta": PREFERENCE_LOSSES,
        "label_smoothing": ("dpo", "simpo"),
        "sft_weight": ("dpo", "ipo", "orpo", "simpo"),
        "margin": ("simpo",),
        "gold": PREFERENCE_LOSSES,
        **dict.fromkeys(("identity", "system", "not_in"), CONVERSATION_LOSSES),
    }
    for name, losses in used_by.items():
        if getattr(config, name) not in (None, ()) and config.loss not in losses:
            expected = f"{', '.join(losses[:-1])} or {losses[-1]}" if losses[1:] else losses[0]
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: expected --loss {expected}, found {config.loss}, which does not use it")
    if config.gold and (not config.val or config.patience):
        raise UserError("--gold: needs --val, for its prompts, and no --patience, which selects by the loss")
    if config.stop_on_hack and not (config.gold and config.eval_every):
        raise UserError("--stop-on-hack: needs --gold, the reward to monitor, and --eval-every")
    if config.on_long == "split" and config.loss in PREFERENCE_LOSSES:
        raise UserError(f"--on-long split: expected truncate, drop or error with --loss {config.loss}")


def _row_tokens(config: SftConfig, context: int) -> int:
    """Return the tokens per row. Raises UserError if they exceed the model's context."""
    if config.sequence_length is not None and config.sequence_length > context:
        raise UserError(f"--sequence-length: expected at most {context}, the context, found {config.sequence_length}")
    return config.sequence_length or min(context, LONGEST_CONTEXT)


def _epochs(config: SftConfig) -> float:
    return config.epochs or (PREFERENCE_EPOCHS if config.loss in PREFERENCE_LOSSES else EPOCHS)


def _mixture(config: SftConfig, lessons: Lessons, tuning: Tuning) -> Mixture:
    """Return batches, by default of a size that makes about 200 steps of the data."""
    from llmkit.data.batches import Mixture
    from llmkit.model.devices import check_batch_memory

    row_tokens = lessons.row_tokens
    tokens = sum(source.examples.inputs for source in lessons.sources) * _epochs(config)
    wanted = config.batch_tokens or min(max(tokens / STEPS_OF_A_RUN, SMALLEST_BATCH), LARGEST_BATCH)
    rows = max(1, round(wanted / row_tokens))
    tuning.check_memory(min(config.micro_batch_size or 1, rows) * row_tokens)
    check_batch_memory(rows * row_tokens, "lower --batch-tokens")
    return Mixture(lessons.sources, row_tokens, rows, tuning.pad_id, config.seed, lessons.pack)


def _horizon(config: SftConfig, mixture: Mixture) -> tuple[int | None, int]:
    """Return the steps of the run (None with a time budget) and of its warm-up."""
    steps = None
    if config.time_budget is None:
        steps = config.max_steps or mixture.steps_for(config.tokens or _epochs(config) * mixture.inputs)
    return steps, (steps or STEPS_OF_A_RUN) // 20 if config.warmup_steps is None else config.warmup_steps


def _preferences(
    config: SftConfig, files: list[DataFile], tuning: Tuning, context: int, run: Run, gold: list[Weighted]
) -> Lessons:
    """Read comparisons of answers, with reference log-probabilities if the loss needs them."""
    import numpy as np

    from llmkit.data.overlap import read_sources
    from llmkit.formats.preferences import read_comparison, read_verdict
    from llmkit.reward_model.comparisons import Comparisons, packed_comparisons, read_comparisons
    from llmkit.reward_model.head import row_length
    from llmkit.reward_model.preferences import PreferenceLoss, Reference, balanced, policy_comparisons
    from llmkit.rl.evaluation import HeldOutAnswers
    from llmkit.rl.policy import reference_of
    from llmkit.training.preferences import Objective, figures_of

    objective = Objective.of(config.loss, config.beta, config.label_smoothing, config.sft_weight, config.margin)
    read_record = read_verdict if config.loss == "kto" else read_comparison
    answers, reference = HeldOutAnswers(read_record), None
    if objective.needs_reference and not config.dry_run:
        reference = Reference(tuning, f"{run.dtype} {config.quantize}", run.folder.parent, config.quiet)
    columns = parse_columns(config.columns)

    def read(name: str, paths: list[str], held_out: bool = False, **options: Any) -> tuple[Comparisons, str]:
        options |= {"on_long": config.on_long, "limit": config.limit, "columns": columns, "quiet": config.quiet}
        options["read"] = answers.read if held_out else read_record
        source, digest = read_comparisons(name, paths, tuning.chat, context, run.bad, **options)
        return policy_comparisons(source, config.loss, context, config.quiet), digest

    sources, held_out, digests = read_sources(read, files, config.val, config.quiet, partial(read, held_out=True))
    if config.loss == "kto":
        objective = balanced(objective, [source.examples for source in sources])
    before = reference_of(tuning.model, config.lora_rank is not None) if reference and config.val else None
    own_figures = answers.open(tuning, before, gold, config.seed)
    if reference is not None:  # when nothing is left to be refused
        held_out = [reference.compare(source, held_out=True) for source in held_out]
        sources = [
            replace(source, examples=reference.compare(cast(Comparisons, source.examples))) for source in sources
        ]
    return Lessons(
        sources,
        held_out,
        digests,
        row_length(np.concatenate([source.examples.sizes for source in sources])),
        PreferenceLoss(objective),
        packed_comparisons,
        figures_of,
        own_figures,
    )


def _conversations(
    config: SftConfig, files: list[DataFile], tuning: Tuning, row_tokens: int, bad: BadRecords, findings: Findings
) -> Lessons:
    """Read examples of conversations; those that --not-in leaves out go to `findings`."""
    from llmkit.data.batches import Source
    from llmkit.data.examples import Examples, read_examples
    from llmkit.data.identity import identity_conversations, parse_identity, system_message
    from llmkit.data.overlap import item_finder, read_sources
    from llmkit.training.loss import next_token_loss

    facts, weight = parse_identity(config.identity) if config.identity is not None else ({}, 0.0)
    system = system_message(facts) if config.system == "identity" else config.system
    examples_of = partial(
        read_examples,
        encode=partial(tuning.chat.encode_many, loss=config.loss),
        longest=row_tokens + 1,
        on_long=config.on_long,
        unknown=tuning.chat.unk_id,
        advice=f"{'a longer' if config.sequence_length else 'pretrain with a longer'} --sequence-length gives more",
        quiet=config.quiet,
    )

    def shown(conversation: Conversation, name: str) -> Conversation:
        if conversation.tools and not tuning.chat.shows_tools:
            bad.count_unused(name, ("'tools' not shown by the chat template",))
        return with_system(conversation, system)

    def read(name: str, paths: list[str], **options: Any) -> tuple[Examples, str]:
        conversations = read_jsonl(paths, config.limit, read_conversation, bad, parse_columns(config.columns))
        return examples_of(name, map(partial(shown, name=name), conversations), bad=bad, **options)

    contaminated = item_finder(config.not_in, findings, SHOWN, config.quiet) if config.not_in else None
    sources, held_out, digests = read_sources(
        partial(read, contaminated=contaminated), files, config.val, config.quiet, read
    )
    if facts:
        stated = (with_system(chat, system) for chat in identity_conversations(facts))
        examples, digest = examples_of("--identity", stated, bad=BadRecords())
        sources.append(Source(examples, weight * sum(source.weight for source in sources)))
        digests.append(digest)
    if config.not_in:
        say(f"--not-in: {findings} left out", config.quiet)
    return Lessons(sources, held_out, digests, row_tokens, next_token_loss)


def _say_plan(config: SftConfig, mixture: Mixture, steps: int | None, warmup_steps: int, tuning: Tuning) -> None:
    from llmkit.training.optimizer import warn_of_long_warmup

    horizon = f"{config.time_budget:.0f} s" if steps is None else counted(steps, "step")
    rows, new = mixture.batch_size, tuning.new_tokens
    new_tokens = f"; {counted(new, 'token')} {'is' if new == 1 else 'are'} new to the model" if new else ""
    say(
        f"{horizon} of {counted(rows, 'row')} of {mixture.sequence_length} tokens; "
        f"{quantity(tuning.trained_parameters)} trained parameters{new_tokens}",
        config.quiet,
    )
    warn_of_long_warmup(warmup_steps, steps, config.quiet)
    if (config.batch_tokens or 0) > mixture.inputs:
        few = f"more than the {counted(mixture.inputs, 'token')} of the data, so a step repeats some"
        say(f"--batch-tokens {config.batch_tokens:,}: {few}", config.quiet)
    if steps is None:
        return
    epochs = mixture.epochs(steps)
    say(f"epochs of each source: {', '.join(f'{source.examples.name} {n:.2f}' for source, n in epochs)}", config.quiet)
    taken = sum(source.examples.inputs * n for source, n in epochs) / mixture.inputs
    wanted = _epochs(config)
    if config.max_steps is None and config.tokens is None and taken > MUCH_MORE * wanted:
        say(
            f"that is {taken:.2g} epochs in total instead of {wanted:g}: a step takes up to "
            f"{rows * mixture.sequence_length:,} tokens and there are {mixture.inputs:,}; give more data, or a "
            "smaller --batch-tokens or --sequence-length",
            config.quiet,
        )
