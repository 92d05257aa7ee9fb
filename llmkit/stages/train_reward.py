"""`llmkit train-reward`: train a reward model on preferences; with `--score`, score completions with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llmkit.config import DECAY_FRACTION, MICRO_BATCH_TOKENS, TuningConfig, argument, option, parse_columns
from llmkit.errors import GateError, UserError
from llmkit.io.jsonl import input_files, name_of, open_output, read_jsonl, write_json
from llmkit.io.progress import Progress, counted, duration, quantity, say
from llmkit.io.records import BadRecords
from llmkit.io.remote import is_remote
from llmkit.io.run_folder import check_model_folder, uploaded

if TYPE_CHECKING:
    from llmkit.data.batches import Mixture
    from llmkit.data.examples import DataFile
    from llmkit.reward_model.comparisons import Comparisons
    from llmkit.tokenizer.chat import ChatFormat
    from llmkit.training.finetuning import Tuning
    from llmkit.training.run import Run
    from llmkit.training.trainer import Trainer

LEARNING_RATE = 1.5e-3  # AdamW, width of 256; docs/experiments.md, "Reward models"
EVALUATION = "evaluation.json"
FEW = 50  # comparisons: too few to fit a temperature


@dataclass(frozen=True, kw_only=True)
class TrainRewardConfig(TuningConfig):
    """Options of `llmkit train-reward`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit train-reward chat/ --data prefs.jsonl --val held-out.jsonl -o judge/
          llmkit train-reward chat/ --data hh.jsonl.gz:0.7 --data ours.jsonl:0.3 --ensemble 4 -o judge/
          llmkit sample chat/ --jsonl -n 8 < prompts.jsonl | llmkit train-reward --score judge/ - | jq .reward
          llmkit train-reward --score judge/ --rank completions.jsonl | jq -c 'select(.rank == 1)'
          llmkit train-reward --score judge/ --val held-out.jsonl --fail-under 0.6

        A record is {"prompt", "chosen", "rejected"}, optionally with a "margin"; two conversations with the same
        beginning; an hh-rlhf transcript; or {"prompt", "completions", "ranking"}, where 1 is best and ties have equal
        ranks. Without --val, --val-fraction of the data is held out.

        --score FOLDER is a filter: it reads {"prompt" or "messages", "completion"} and adds `reward`, in input order.
    """
    following: ClassVar[str] = "llmkit sample chat/ --jsonl -n 8 < prompts.jsonl | llmkit train-reward --score judge/ -"

    inputs: tuple[str, ...] = argument(
        "Model folder; with --score, files of completions, or - for stdin.", metavar="MODEL|INPUT..."
    )
    data: tuple[str, ...] = option((), "Preferences; repeatable [stdin].", metavar="FILE[:WEIGHT]", reads=True)
    val: tuple[str, ...] = option((), "Held-out preferences.", metavar="FILE", reads=True)
    score: str | None = option(
        None, "Reward model to score completions with instead of training one.", metavar="FOLDER", reads=True
    )
    rank: bool = option(False, "With --score: sort the completions of each prompt best first, and add their ranks.")

    val_fraction: float = option(0.1, "Share to hold out without --val.", group="Data", above=0, at_most=0.5)
    on_long: str = option(
        "truncate",
        "Action for comparisons longer than the context; truncate drops the beginning of the prompt.",
        group="Data",
        choices=("truncate", "drop", "error"),
    )

    ensemble: int = option(
        1, "Number of heads; their spread is the uncertainty.", group="Judge", at_least=1, at_most=64
    )
    fail_under: float | None = option(
        None,
        "Minimum accuracy on held-out preferences; exit code 3 below it.",
        group="Judge",
        at_least=0,
        at_most=1,
        free=True,
    )

    epochs: float | None = option(None, "Passes over the data [1].", group="Horizon", above=0)
    batch_size: int = option(32, "Comparisons per step, approximately.", group="Training", at_least=1)
    sample_every: None = None  # a reward model writes no text to show

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        if self.score is not None:
            return not self.val and (not self.inputs or "-" in self.inputs)
        return not self.data or any(text == "-" or text.startswith("-:") for text in self.data)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints."""

    path: str
    steps: int
    comparisons: int
    trained_parameters: int
    loss: float
    seconds: float
    val_comparisons: int = 0
    val_accuracy: float | None = None
    val_accuracy_95: list[float] | None = None
    val_loss: float | None = None
    tokens: int | None = None
    bad_records: int = 0
    not_used: dict[str, int] | None = None


@dataclass(frozen=True)
class Scored:
    """Figures that --score prints: `counts` if the records went to a file, or the `evaluation` on --val."""

    path: str | None = None
    counts: dict[str, int] | None = None
    evaluation: dict[str, Any] | None = None
    bad_records: int | None = None
    not_used: dict[str, int] | None = None


def run(config: TrainRewardConfig) -> Summary | Scored | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    if config.score is not None:
        return _score(config)
    from llmkit.training.run import Run

    files = _checked(config)
    run = Run("train-reward", config, "judge/")
    if results := run.finished():
        _check_gate(config, results["val_accuracy"])
        return Summary(**results)

    from llmkit.reward_model.evaluation import check_unequal, judge
    from llmkit.reward_model.head import RewardModel, save_reward_model
    from llmkit.training.finetuning import load_for_tuning, never_last_id, save_tuned

    # load
    run.join()
    folder, of_base = str(config.inputs[0]), partial(RewardModel.of, heads=config.ensemble, seed=config.seed)
    tuning = load_for_tuning(folder, run.device, run.dtype, config.quantize, config.backend, reshape=of_base)
    model, pad = cast(RewardModel, tuning.model), never_last_id(tuning)
    training, held_out, digests = _read_all(config, files, tuning, run.bad)
    check_unequal(held_out)

    # build
    tuning = tuning.with_adapter(config.lora_rank, config.seed)
    mixture, steps = _plan(config, files, training, tuning, pad)
    trainer = _trainer(run, tuning, mixture, steps, digests)
    if trainer is None:
        return None

    # train
    def validate() -> dict[str, float]:
        overall = judge(model, held_out, pad)["overall"]
        return {"val_loss": overall["loss"], "val_accuracy": overall["accuracy"]}

    evaluate = validate if config.eval_every else None
    with run.training(trainer):
        trainer.fit(mixture.prefetch(trainer.step), total_steps=steps, evaluate=evaluate)

    # save
    evaluation = judge(model, held_out, pad, tokenizer=tuning.tokenizer, seed=config.seed)
    values = trainer.optimizer.whole_masters()
    if not run.world.leads:
        return None

    def write(folder: Path) -> None:
        write_json(folder / EVALUATION, evaluation)
        save_tuned(tuning, values, folder, pad_id=pad, write=partial(save_reward_model, pad_id=pad))

    _say_evaluation(evaluation, config.quiet)
    results = _results(trainer, training, tuning, evaluation)
    inputs = [path for file in files for path in file.files if path != "-"]
    results = run.finish(results, inputs=inputs, parents=[folder], write=write)
    _check_gate(config, evaluation["overall"]["accuracy"])

    # summarise
    return Summary(**results)


def _checked(config: TrainRewardConfig) -> list[DataFile]:
    """Check the options before any work; return the files of --data."""
    if len(config.inputs) != 1:
        actual = f"{len(config.inputs)} ({' '.join(config.inputs)})" if config.inputs else "none"
        raise UserError(
            f"MODEL: expected one model folder, such as llmkit train-reward chat/ --data prefs.jsonl, found {actual}"
        )
    check_model_folder(config.inputs[0], "llmkit train-reward chat/ --data prefs.jsonl")
    if config.rank:
        raise UserError("--rank: needs --score, whose completions it ranks")
    from llmkit.data.examples import parse_data  # brings numpy, which --help does without

    input_files(config.val)
    return parse_data(config.data)


def _read_all(
    config: TrainRewardConfig, files: Sequence[DataFile], tuning: Tuning, bad: BadRecords
) -> tuple[list[Comparisons], list[Comparisons], list[str]]:
    """Read the training comparisons and the held-out ones, with a digest of each source."""
    from llmkit.data.overlap import read_sources

    read = _reader(config, tuning.chat, tuning.context, bad)
    every, held_out, digests = read_sources(read, files, config.val, config.quiet)
    sources = [cast("Comparisons", source.examples) for source in every]
    if config.val:
        return sources, held_out, digests
    halves = [source.split(config.val_fraction, config.seed) for source in sources]
    say(f"held out: {counted(sum(len(part) for _, part in halves), 'comparison')} (--val-fraction)", config.quiet)
    return [training for training, _ in halves], [part for _, part in halves], digests


def _reader(
    config: TrainRewardConfig, chat: ChatFormat, context: int, bad: BadRecords
) -> Callable[..., tuple[Comparisons, str]]:
    """Return `read_comparisons` with the options of the command, to call with a name and files."""
    from llmkit.reward_model.comparisons import read_comparisons

    options = {"on_long": config.on_long, "limit": config.limit, "quiet": config.quiet}
    columns = parse_columns(config.columns)
    return partial(read_comparisons, chat=chat, context=context, bad=bad, columns=columns, **options)


def _plan(
    config: TrainRewardConfig, files: Sequence[DataFile], training: list[Comparisons], tuning: Tuning, pad: int
) -> tuple[Mixture, int]:
    """Return the batches and the number of steps."""
    import numpy as np

    from llmkit.data.batches import Mixture, Source
    from llmkit.reward_model.comparisons import packed_comparisons
    from llmkit.reward_model.head import row_length

    row_tokens = row_length(np.concatenate([source.sizes for source in training]))
    comparisons = sum(map(len, training))
    if (batch := min(config.batch_size, comparisons)) < config.batch_size:
        say(f"--batch-size {config.batch_size:,} becomes {batch:,}, the number of comparisons", config.quiet)
    rows = max(1, round(batch * sum(source.inputs for source in training) / comparisons / row_tokens))
    tuning.check_memory(min(config.micro_batch_size or 1, rows) * row_tokens)
    sources = [Source(part, file.weight or float(part.inputs)) for part, file in zip(training, files, strict=True)]
    mixture = Mixture(sources, row_tokens, rows, pad, config.seed, packed_comparisons)
    steps = config.max_steps or mixture.steps_for((config.epochs or 1) * mixture.inputs)
    say(
        f"{counted(steps, 'step')} of {counted(rows, 'row')} of {row_tokens} tokens, "
        f"{counted(comparisons * rows * row_tokens // mixture.inputs, 'comparison')} each, approximately; "
        f"{quantity(tuning.trained_parameters)} trained parameters",
        config.quiet,
    )
    return mixture, steps


def _trainer(run: Run, tuning: Tuning, mixture: Mixture, steps: int, digests: list[str]) -> Trainer | None:
    """Return the trainer; in a dry run print its costs and return None."""
    from llmkit.reward_model.head import ComparisonLoss
    from llmkit.training.optimizer import Schedule, warn_of_long_warmup
    from llmkit.training.speed import batch_seconds
    from llmkit.training.trainer import TrainerSettings

    config, row_tokens = cast(TrainRewardConfig, run.config), mixture.sequence_length
    warmup_steps = steps // 20 if config.warmup_steps is None else config.warmup_steps
    warn_of_long_warmup(warmup_steps, steps, config.quiet)
    loss = ComparisonLoss(config.seed)
    micro_rows = config.micro_batch_size or max(1, MICRO_BATCH_TOKENS // row_tokens)
    flops_per_token = tuning.model.config.flops_per_token(row_tokens)
    if config.dry_run:
        flops = flops_per_token * mixture.batch_size * row_tokens * steps
        memory = sum(tuning.training_memory(micro_rows * row_tokens))
        seconds = steps * batch_seconds(tuning.model, loss, mixture.batch(0), micro_rows, run.device)
        say(f"about {memory / 1e9:.2f} GB of memory, {flops:.3g} FLOPs, {duration(seconds)} to train", config.quiet)
        return None
    run.world.check_rows(mixture.batch_size, f"--batch-size: rows of {row_tokens} tokens")
    run.begin({"the data": digests})
    optimizer = tuning.build_optimizer(config.learning_rate, config.weight_decay, anchor=LEARNING_RATE)
    settings = TrainerSettings(micro_rows, flops_per_token=flops_per_token)
    return run.trainer(tuning.model, optimizer, Schedule(warmup_steps, DECAY_FRACTION), loss, settings)


def _results(
    trainer: Trainer, training: Sequence[Comparisons], tuning: Tuning, evaluation: dict[str, Any]
) -> dict[str, Any]:
    overall = evaluation["overall"]
    return {
        **trainer.results(),
        "comparisons": sum(map(len, training)),
        "trained_parameters": tuning.trained_parameters,
        **{f"val_{name}": overall[name] for name in ("comparisons", "accuracy", "accuracy_95", "loss")},
    }


# ---- scores


@uploaded("out")
def _score(config: TrainRewardConfig) -> Scored | None:
    """Add rewards to completions, or with --val evaluate the reward model."""
    for flag, given in (("--data", config.data), ("--resume", config.resume), ("--lora-rank", config.lora_rank)):
        if given:
            raise UserError(f"{flag}: cannot be combined with --score; training and scoring are two runs")
    if config.val and (config.out or config.inputs or config.rank):
        raise UserError("--val: evaluates the model of --score and scores nothing; leave out INPUT, --out and --rank")
    if config.fail_under is not None and not config.val:
        raise UserError("--fail-under: needs --val with --score, for an accuracy")
    from llmkit.model.devices import choose_device, choose_dtype
    from llmkit.reward_model.evaluation import judge
    from llmkit.reward_model.head import load_reward_model
    from llmkit.reward_model.scoring import Scorer
    from llmkit.tokenizer.encoding import load_tokenizer
    from llmkit.tokenizer.templates import chat_format

    folder = str(config.score)
    if not is_remote(folder) and not Path(folder).is_dir():
        raise UserError(
            f"{folder}: expected a reward model's folder, found {'a file' if Path(folder).exists() else 'nothing'}"
        )
    device = choose_device(config.device)
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, dtype=choose_dtype(config.dtype, device), device=device)
    chat = chat_format(tokenizer)
    tokenizer.check_fits(model.config.vocab_size)
    if config.dry_run:
        say(
            f"{folder}: {quantity(model.config.parameter_count)} parameters, {counted(len(model.score), 'head')}",
            config.quiet,
        )
        return None
    pad, bad = chat.end_id, BadRecords(config.max_bad, config.quiet)
    if config.val:
        read = _reader(config, chat, model.config.max_position_embeddings, bad)
        held_out = [read(name_of(path), input_files([path]))[0] for path in config.val]
        evaluation = judge(model, held_out, pad, tokenizer=tokenizer, seed=config.seed)
        _say_evaluation(evaluation, config.quiet)
        _check_gate(config, evaluation["overall"]["accuracy"])
        return Scored(evaluation=evaluation)
    scorer = Scorer(model, chat, pad)
    out = config.out or "-"
    rows = read_jsonl(
        input_files(config.inputs or ["-"]), config.limit, scorer.checked, bad, parse_columns(config.columns)
    )
    with open_output(out, config.force) as write, Progress("score", unit="records", quiet=config.quiet) as progress:
        for record in scorer.score(rows, rank=config.rank):
            write(record)
            progress.advance()
    say(", ".join(f"{what} {count}" for what, count in scorer.counts.items()) or "nothing to score", config.quiet)
    return None if out == "-" else Scored(path=out, counts=dict(scorer.counts), **bad.results)


def _say_evaluation(evaluation: dict[str, Any], quiet: bool) -> None:
    baselines = {"baseline, length": evaluation["baseline_length"]} if "baseline_length" in evaluation else {}
    sources = evaluation["by_source"] if len(evaluation["by_source"]) > 1 else {}
    for name, scores in {"held out": evaluation["overall"], **sources, **baselines}.items():
        low, high = scores["accuracy_95"]
        doubt = " (too few to rely on)" if scores["comparisons"] < FEW else ""
        say(
            f"{name}: accuracy {scores['accuracy']:.3f} (95%: {low:.3f} to {high:.3f}), "
            f"{counted(scores['comparisons'], 'comparison')}; calibration error {scores['ece']:.3f}, "
            f"{scores['ece_at_temperature']:.3f} at temperature {scores['temperature']:g}{doubt}",
            quiet,
        )
    for name, with_feature in evaluation.get("biases", {}).items():
        score, label = with_feature["score"], with_feature["label"]
        say(f"correlation with {name}: scores {score:+.3f}, labels {label:+.3f}", quiet)


def _check_gate(config: TrainRewardConfig, accuracy: float) -> None:
    if config.fail_under is not None and accuracy < config.fail_under:
        raise GateError(f"accuracy {accuracy} is under --fail-under {config.fail_under}")
