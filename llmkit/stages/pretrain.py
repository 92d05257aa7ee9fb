"""`llmkit pretrain`: pretrain a base model on documents."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from llmkit.config import (
    MOST_DECAY,
    MOST_RATE,
    TaskConfig,
    TrainingConfig,
    argument,
    flag_of,
    option,
    option_fields,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.io.hub import hub_hint, is_model
from llmkit.io.jsonl import names_of
from llmkit.io.progress import counted, duration, say
from llmkit.io.remote import is_remote
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.data.batches import Batches
    from llmkit.data.shards import TokenShards
    from llmkit.data.shares import Sources
    from llmkit.model.config import ModelConfig
    from llmkit.model.transformer import Transformer
    from llmkit.tokenizer.encoding import Tokenizer
    from llmkit.training.plan import Plan, Planner, PlanOptions, Recipe
    from llmkit.training.run import Run
    from llmkit.training.trainer import Trainer

LONGEST_ROW = 2048  # tokens per row with --from, if the model's context is longer
FIXED_BY_MODEL = [
    "tokenizer",
    "depth",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
]
MANY = 20_000_000  # tokens; with more, one run of tokens in four is compared with --val: half the time


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig, TaskConfig):
    """Options of `llmkit pretrain`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit pretrain docs.jsonl --tokenizer tok/ --time-budget 10m -o base/
          llmkit pretrain docs.jsonl.gz --tokenizer tok/ --val val.jsonl.gz --depth 4 -o base/
          zcat docs.jsonl.gz | llmkit pretrain - --tokenizer tok/ --depth 2 --tokens 5M -o base/
          llmkit pretrain docs.jsonl --tokenizer tok/ --depth 4 -o base/ --resume
          llmkit pretrain docs.jsonl --from base/ -o longer/
          llmkit pretrain docs.jsonl:0.7 books.jsonl:0.3 --phase 0.9:docs=0.2,books=0.8 --tokenizer tok/ -o base/
    """
    following: ClassVar[str] = 'llmkit sample base/ -p "Once upon a time"'

    inputs: tuple[str, ...] = argument(
        "Documents: JSONL, Parquet or CSV with `text`, plain text, or - for stdin; a weight is a share of the tokens.",
        metavar="INPUT[:WEIGHT]...",
    )
    tokenizer: str | None = option(
        None, "Tokenizer folder, from train-bpe [required without --from].", metavar="FOLDER", reads=True
    )
    model: str | None = option(
        None, "Model folder to train further, with its tokenizer.", flag="--from", metavar="MODEL", reads=True
    )
    val: tuple[str, ...] = option((), "Held-out documents, scored in bits per byte.", metavar="FILE", reads=True)
    phase: tuple[str, ...] = option(
        (), "Input shares after the fraction START (0 to 1) of the run; repeatable.", metavar="START:NAME=SHARE,..."
    )

    depth: int | None = option(None, "Transformer layers; determines width and the rest.", group="Model", at_least=1)
    hidden_size: int | None = option(None, "Width [64 x depth].", group="Model", at_least=32)
    num_attention_heads: int | None = option(None, "Query heads [width / 64].", group="Model", at_least=1)
    num_key_value_heads: int | None = option(None, "Key and value heads [query heads].", group="Model", at_least=1)
    sequence_length: int | None = option(None, "Context length in tokens [planned].", group="Model", at_least=8)
    tie_word_embeddings: bool = option(False, "Embedding shared with the output head.", group="Model")

    tokens: int | None = option(None, "Total training tokens.", group="Horizon", unit="count", at_least=1)
    flops: float | None = option(None, "Total training FLOPs.", group="Horizon", unit="count", above=0)
    time_budget: float | None = option(None, "Wall-clock limit.", group="Horizon", unit="duration", above=0)
    max_steps: int | None = option(None, "Optimizer steps.", group="Horizon", unit="count", at_least=1)
    epochs: float | None = option(None, "Passes over the tokens [1 with --from].", group="Horizon", above=0)

    batch_tokens: int | None = option(None, "Tokens per step [planned].", group="Training", unit="count", at_least=8)
    micro_batch_size: int | None = option(None, "Sequences per forward pass [planned].", group="Training", at_least=1)
    learning_rate: float | None = option(
        None,
        "Muon learning rate of the matrices; AdamW trains the output head at a quarter of it. With --from, AdamW "
        "learning rate of all parameters [planned].",
        group="Training",
        above=0,
        at_most=10,
    )
    weight_decay: float | None = option(
        None, "Weight decay of the matrices [planned].", group="Training", at_least=0, at_most=MOST_DECAY
    )
    warmup_steps: int | None = option(None, "Learning-rate warm-up steps [planned].", group="Training", at_least=0)
    prompt: str = option("The", "Prompt of the samples.", group="Log", free=True)

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.inputs or any(text == "-" or text.startswith("-:") for text in self.inputs)


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints; `shares` of the tokens and `epochs` by source of a mixture."""

    path: str
    steps: int
    tokens: int
    parameters: int
    loss: float
    seconds: float
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    tasks: dict[str, float] | None = None  # the last scores of --evaluate
    shares: dict[str, float] | None = None
    epochs: dict[str, float] | None = None
    bad_records: int = 0
    not_used: dict[str, int] | None = None


def run(config: PretrainConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    from llmkit.training.run import Run

    # first the checks without torch, which takes seconds to import
    run = Run("pretrain", config, "base/")
    if results := run.finished():
        return Summary(**results)
    sources = _checked_sources(config)
    from llmkit.data.batches import EvaluationBatches
    from llmkit.evaluation.evaluator import TaskScores
    from llmkit.generation.generator import continue_text
    from llmkit.tokenizer.encoding import load_tokenizer
    from llmkit.training.distributed import whole_model
    from llmkit.training.loss import held_out_loss
    from llmkit.training.optimizer import float32_copy

    # load
    run.join()
    tokenizer = load_tokenizer(parent := str(config.model or config.tokenizer))
    tasks = TaskScores(config.evaluate, tokenizer)
    planner = _planner(config, tokenizer, run)
    corpus, val_shards = _token_shards(config, sources, tokenizer, run)

    # build
    identity = {"the tokenizer": tokenizer.sha256, "the data": [f"{one.tokens} tokens, {one.digest}" for one in corpus]}
    plan = _plan(planner, run, identity, corpus, sources, val_shards)
    batches = _batches(config, plan, corpus, sources)
    _say_plan(config, plan, sources, batches, run)
    if config.dry_run:
        return None
    derived = {"plan": plan.to_json()}
    run.begin(identity, derived)  # only now: the plan may be refused
    model = (trainer := _trainer(config, plan, run)).model

    # train
    held_out = EvaluationBatches(val_shards, plan.sequence_length, plan.micro_batch_rows) if val_shards else None
    validate = partial(held_out_loss, model, held_out, config.quiet) if held_out else None
    with run.training(trainer):
        trainer.fit(
            batches.prefetch(trainer.step),
            total_steps=plan.total_steps,
            seconds=plan.seconds,
            evaluate=tasks.beside(validate, model),
            sample=lambda: continue_text(whole_model(model), tokenizer, config.prompt, max_tokens=40, seed=config.seed),
            figures=lambda step: sources.named(batches.realised(step - 1, step), "share_"),
        )

    # save
    trained = float32_copy(model, trainer.optimizer)
    if trained is None:
        return None
    write = partial(_write, tokenizer, trained)

    # summarise
    results = trainer.results() | {"parameters": plan.model.parameter_count}
    if sources.names:
        results["shares"] = sources.named(batches.realised(0, trainer.step))
        results["epochs"] = sources.named(batches.epochs(trainer.step))
    return Summary(**run.finish(results, inputs=sources.paths, parents=[parent], derived=derived, write=write))


def _checked_sources(config: PretrainConfig) -> Sources:
    """Return the sources of documents. Raises UserError for wrong options and missing files."""
    from llmkit.data.shards import document_files  # brings numpy, which --help does without
    from llmkit.data.shares import parse_sources

    sources = parse_sources(config.inputs, config.phase)
    for path in (*(source.path for source in sources.inputs), *config.val):
        if (Path(path) / "config.json").exists() or (is_remote(path) and is_model(path)):
            raise UserError(f"{path}: expected documents, found a model folder; to train it further: --from {path}")
    if config.model is not None:
        for item in option_fields(PretrainConfig):
            if item.name in FIXED_BY_MODEL and getattr(config, item.name) not in (None, False):
                raise UserError(f"{flag_of(item)}: is set by the model of --from {config.model}; leave it out")
        if config.learning_rate is not None and config.learning_rate > MOST_RATE:
            raise UserError(
                f"--learning-rate: expected at most {MOST_RATE} with --from, which trains with AdamW, "
                f"found {config.learning_rate:g}"
            )
        check_model_folder(config.model, "llmkit pretrain docs.jsonl --from base/")
    elif config.tokenizer is None:
        raise UserError("--tokenizer is required: a folder from llmkit train-bpe, such as --tokenizer tok/")
    elif not is_remote(config.tokenizer) and not Path(config.tokenizer).exists():
        raise UserError(
            f"--tokenizer: expected a folder with tokenizer.json, found no {config.tokenizer}; llmkit train-bpe makes "
            f"one{hub_hint(config.tokenizer) or ', and hf://ORG/MODEL names one of the Hugging Face Hub'}"
        )
    if config.phase and config.time_budget is not None:
        raise UserError("--phase: expected a run of known length, found --time-budget; choose --tokens or --max-steps")
    if config.eval_every is not None and not (config.val or config.evaluate):
        raise UserError("--eval-every: needs --val, held-out documents, or --evaluate, tasks")
    document_files(config.val)
    _ = sources.files
    return sources


def _planner(config: PretrainConfig, tokenizer: Tokenizer, run: Run) -> Planner:
    """Return the planner, which needs the documents for a plan. Raises UserError for a wrong shape of the model."""
    from llmkit.kernels.dispatch import backend
    from llmkit.model.folder import SavedTensors, load_config
    from llmkit.training.plan import Planner

    model = None
    if config.model is not None:
        model = load_config(config.model)
        tokenizer.check_fits(model.vocab_size)
        if not is_remote(config.model):  # a dry run downloads no weights
            SavedTensors(config.model).check_kind()
        context = model.max_position_embeddings
        if config.sequence_length is not None and config.sequence_length > context:
            raise UserError(
                f"--sequence-length: the context of --from {config.model} is {context}, found {config.sequence_length}"
            )
        model = replace(model, max_position_embeddings=config.sequence_length or min(context, LONGEST_ROW))
    backend(run.device.type)  # raises UserError for an unknown LLMKIT_KERNELS
    planner = Planner(
        options=cast("PlanOptions", config),  # a protocol cannot declare read-only fields
        vocab_size=tokenizer.vocab_size,
        device=run.device.type,
        seconds_used=lambda: run.seconds,
        special_ids=tokenizer.document_bounds(),
        model=model,
    )
    planner.shape(config.depth or 4)
    return planner


def _token_shards(
    config: PretrainConfig, sources: Sources, tokenizer: Tokenizer, run: Run
) -> tuple[list[TokenShards], TokenShards | None]:
    """Tokenize each source of documents, and --val; a dry run leaves no files behind."""
    from llmkit.data.overlap import Overlap
    from llmkit.data.shards import document_files, tokenize_documents

    cache = run.folder.with_name(run.folder.name + ".tokens")
    if config.dry_run:
        cache = Path(tempfile.mkdtemp(prefix="llmkit-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    tokenize = partial(
        tokenize_documents,
        encoder=tokenizer,
        cache=cache,
        limit=config.limit,
        columns=parse_columns(config.columns),
        resume=run.resume,
        bad=run.bad,
        quiet=config.quiet,
    )
    with run.world.in_turn():
        corpus = []
        for number, paths in enumerate(sources.files):  # streams are cached by name, files by their content
            name = "tokens" if number == 0 or all(Path(path).is_file() for path in paths) else f"tokens-{number}"
            corpus.append(tokenize(paths, name=name))
        val = document_files(config.val)
        val_shards = tokenize(val, name="val") if val else None
    if val_shards is not None and run.world.leads:
        many = sum(shards.tokens for shards in corpus) > MANY
        overlap = Overlap((val_shards[k] for k in range(len(val_shards))), run=8, every=4 if many else 1)
        for shards in corpus:
            overlap.compare_shards(shards)
        overlap.report(config.quiet)
    run.world.check_same({"the documents": " ".join(shards.digest for shards in corpus)})
    return corpus, val_shards


def _plan(
    planner: Planner,
    run: Run,
    identity: dict[str, Any],
    corpus: list[TokenShards],
    sources: Sources,
    val_shards: TokenShards | None,
) -> Plan:
    """Return the plan of the resumed run, or a new one from rank 0, which may time this machine."""
    from llmkit.model.devices import check_memory
    from llmkit.training import speed
    from llmkit.training.plan import Plan

    if notes := run.notes(identity):
        return Plan.from_json(notes["plan"])

    def rate(model: ModelConfig, recipe: Recipe, rows: int, length: int) -> float:
        """Measure tokens/s; a dry run times one layer only."""
        if run.config.dry_run:
            own, _ = speed.expected_tokens_per_second(model, recipe, rows, length, run.device, run.dtype)
        else:
            own = speed.tokens_per_second(model, recipe, rows, length, run.device, run.dtype)
        return run.world.size * own

    sizes = [shards.tokens for shards in corpus]
    shares = list(zip(sources.mean_shares(sizes), corpus, strict=True))
    if run.world.leads:
        plan = replace(
            planner,
            corpus_tokens=sum(sizes),
            speed=rate,
            closing_tokens=val_shards.tokens if val_shards else 0,
            check_fits=lambda plan: check_memory(plan.training_memory(run.world.size), run.device),
            documents_within=lambda n: sum(share * float((shards.lengths <= n).mean()) for share, shards in shares),
        ).plan()
    return Plan.from_json(run.world.broadcast(plan.to_json() if run.world.leads else None))


def _batches(config: PretrainConfig, plan: Plan, corpus: list[TokenShards], sources: Sources) -> Batches:
    from llmkit.data.batches import Batches

    by_part = sources.shares([shards.tokens for shards in corpus])
    # rounded: .29 * 100 is 28.999..., which would begin a phase at step 28
    shares = {int(round(start * plan.total_steps, 6)): shares for start, shares in by_part.items()}
    return Batches(corpus, plan.sequence_length, plan.batch_rows, config.seed, shares)


def _say_plan(config: PretrainConfig, plan: Plan, sources: Sources, batches: Batches, run: Run) -> None:
    """Print the plan. Raises UserError if the data or the memory do not suffice."""
    from llmkit.data.shares import shares_table
    from llmkit.model.devices import check_batch_memory, check_memory
    from llmkit.training.optimizer import warn_of_long_warmup
    from llmkit.training.plan import plan_table
    from llmkit.training.speed import expected_tokens_per_second

    run.world.check_rows(plan.batch_rows, f"--batch-tokens: rows of {plan.sequence_length} tokens")
    sizes = [shards.tokens for shards in batches.sources]
    if sum(sizes) < plan.sequence_length:
        documents = sum(shards.documents for shards in batches.sources)
        raise UserError(
            f"{names_of(sources.paths)}: {counted(sum(sizes), 'token')} in {counted(documents, 'document')} "
            f"are fewer than one context of {plan.sequence_length:,}; give more text or a shorter --sequence-length"
        )
    if config.batch_tokens not in (None, plan.batch_tokens):
        whole = f"whole rows of {plan.sequence_length:,}"
        say(f"--batch-tokens {config.batch_tokens:,} becomes {plan.batch_tokens:,}, {whole}", config.quiet)
    if (config.batch_tokens or 0) > sum(sizes):
        few = f"more than the {counted(sum(sizes), 'token')} of the documents, so a step repeats some"
        say(f"--batch-tokens {config.batch_tokens:,}: {few}", config.quiet)
    say(plan_table(plan), config.quiet)
    if sources.names:
        say(shares_table(sources.names, sizes, batches.shares, batches.taken(plan.total_steps)), config.quiet)
    for name, epochs in sources.named(batches.epochs(plan.total_steps)).items():
        if epochs > 1:
            say(f"{name} runs out and repeats: {epochs:.2f} epochs", config.quiet)
    warn_of_long_warmup(plan.warmup_steps, plan.total_steps, config.quiet)
    check_memory(plan.training_memory(run.world.size), run.device)
    follows = "" if config.batch_tokens else ", which is derived from the total training tokens"
    check_batch_memory(plan.batch_tokens, f"lower --batch-tokens{follows}")
    if config.dry_run:
        rate, basis = expected_tokens_per_second(
            plan.model, plan.recipe, plan.micro_batch_rows, plan.sequence_length, run.device, run.dtype
        )
        say(f"at {rate:,.0f} tokens/s, {duration(plan.tokens / rate)} of training; from {basis}", config.quiet)


def _trainer(config: PretrainConfig, plan: Plan, run: Run) -> Trainer:
    """Return the trainer of a new model or of --from, sharded over the ranks."""
    from llmkit.model.folder import load_model
    from llmkit.model.transformer import Transformer
    from llmkit.training.distributed import shard
    from llmkit.training.finetuning import check_finite
    from llmkit.training.loss import next_token_loss
    from llmkit.training.optimizer import Schedule, build_optimizer
    from llmkit.training.trainer import TrainerSettings

    if config.model is None:
        model = Transformer(plan.model, seed=config.seed).to(device=run.device, dtype=run.dtype)
    else:
        model = load_model(config.model, dtype=run.dtype, device=run.device).train()
        check_finite(model, config.model)
    shard(model)
    optimizer, schedule = build_optimizer(model, plan.recipe), Schedule(plan.warmup_steps, plan.decay_fraction)
    settings = TrainerSettings(plan.micro_batch_rows, flops_per_token=plan.model.flops_per_token(plan.sequence_length))
    return run.trainer(model, optimizer, schedule, next_token_loss, settings, flops=plan.flops)


def _write(tokenizer: Tokenizer, model: Transformer, folder: Path) -> None:
    from llmkit.model.folder import save_model

    tokenizer.copy_to(folder)
    save_model(model, folder)
