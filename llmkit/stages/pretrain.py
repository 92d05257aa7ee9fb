"""`llmkit pretrain`: documents and a tokenizer become a base model."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from llmkit.config import CommonConfig, argument, as_options, option
from llmkit.errors import UserError
from llmkit.files import PARTIAL, atomic_file, check_output
from llmkit.progress import say
from llmkit.rundir import (
    begin_run,
    describe_inputs,
    finish_run,
    read_manifest,
    write_loss_curve,
    write_manifest,
    write_model_card,
)

NO_LAST_STEP = 1 << 62  # under a time budget nobody knows it
STARTED = time.monotonic()  # a time budget covers the start-up, too


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(CommonConfig):
    """Options of `llmkit pretrain`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit pretrain docs.jsonl --tokenizer tok/ --time-budget 10m -o base/
          llmkit pretrain docs.jsonl.gz --tokenizer tok/ --val val.jsonl.gz --depth 4 -o base/
          zcat docs.jsonl.gz | llmkit pretrain - --tokenizer tok/ --depth 2 --tokens 5M -o base/
          llmkit pretrain docs.jsonl --tokenizer tok/ --depth 4 -o base/ --resume
    """
    following: ClassVar[str] = 'llmkit sample base/ -p "Once upon a time"'

    inputs: tuple[str, ...] = argument("Documents: JSONL with `text`, plain text, or - for stdin.", metavar="INPUT...")
    tokenizer: str | None = option(None, "Tokenizer folder, from train-bpe.", metavar="FOLDER")
    val: tuple[str, ...] = option((), "Held-out documents, scored in bits per byte.", metavar="FILE")
    token_cache: str | None = option(None, "Where token shards are kept [beside --out].", metavar="FOLDER")
    device: str = option("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "Working precision; masters are float32.", choices=("auto", "float32", "bfloat16"))
    resume: bool = option(False, "Go on from the last checkpoint of this --out.")

    depth: int | None = option(None, "Layers; width and the rest follow.", group="Model", at_least=1)
    hidden_size: int | None = option(None, "Width [64 x depth].", group="Model", at_least=32)
    intermediate_size: int | None = option(None, "SwiGLU width [8/3 x width].", group="Model", at_least=32)
    num_attention_heads: int | None = option(None, "Query heads [width / 64].", group="Model", at_least=1)
    num_key_value_heads: int | None = option(None, "Key and value heads.", group="Model", at_least=1)
    sequence_length: int | None = option(None, "Tokens of context.", group="Model", at_least=8)
    tie_word_embeddings: bool = option(False, "Share embedding and output head.", group="Model")

    tokens: int | None = option(None, "Train on this many tokens.", group="Horizon", unit="count", at_least=1)
    flops: float | None = option(None, "Train for this many FLOPs.", group="Horizon", unit="count", above=0)
    time_budget: float | None = option(None, "Be done in this time.", group="Horizon", unit="duration", above=0)
    max_steps: int | None = option(None, "Train for this many steps.", group="Horizon", unit="count", at_least=1)
    epochs: float | None = option(None, "Train this often on every token.", group="Horizon", above=0)

    batch_tokens: int | None = option(None, "Tokens of a step.", group="Training", unit="count", at_least=8)
    micro_batch_size: int | None = option(None, "Sequences at a time.", group="Training", at_least=1)
    learning_rate: float | None = option(None, "Of the matrices (Muon).", group="Training", above=0)
    embedding_learning_rate: float | None = option(None, "Of the embedding (AdamW).", group="Training", above=0)
    head_learning_rate: float | None = option(None, "Of the output head (AdamW).", group="Training", above=0)
    weight_decay: float | None = option(None, "Of the matrices.", group="Training", at_least=0)
    warmup_steps: int | None = option(None, "Steps to the full rate.", group="Training", at_least=0)
    decay_fraction: float = option(0.6, "Last part, with falling rate.", group="Training", at_least=0, at_most=1)
    max_grad_norm: float | None = option(1.0, "Clip gradients to this norm.", group="Training", above=0)
    activation_checkpointing: bool = option(False, "Less memory, a third more time.", group="Training")
    compile: str = option("auto", "torch.compile; auto: on GPUs.", group="Training", choices=("auto", "on", "off"))
    workers: int = option(1, "Threads that prepare batches.", group="Training", at_least=0)

    eval_every: int | None = option(None, "Steps between validations.", group="Log", at_least=1)
    save_every: int | None = option(None, "Steps between checkpoints [10 minutes].", group="Log", at_least=1)
    sample_every: int | None = option(None, "Steps between samples.", group="Log", at_least=1)
    prompt: str = option("The", "Prompt of the samples.", group="Log")

    def reads_stdin(self) -> bool:
        """Whether stdin is the input."""
        return not self.inputs or "-" in self.inputs


@dataclass(frozen=True)
class Summary:
    """What the command line prints."""

    path: str
    steps: int
    tokens: int
    parameters: int
    loss: float
    seconds: float
    val_loss: float | None = None
    val_bits_per_byte: float | None = None


def run(config: PretrainConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    out, inputs = _checked_paths(config)  # before the seconds that torch takes to import

    from llmkit.data.batches import Batches, EvaluationBatches
    from llmkit.data.tokenize import tokenize_documents
    from llmkit.engine import setup, speed
    from llmkit.engine.evaluation import held_out_loss, next_token_loss
    from llmkit.engine.generation import continue_text
    from llmkit.engine.planning import Plan, Wishes, make_plan, plan_table
    from llmkit.engine.schedule import Schedule
    from llmkit.engine.trainer import Trainer, TrainerSettings
    from llmkit.model.folder import save_model
    from llmkit.model.transformer import Transformer
    from llmkit.tokenizer.encoding import load_tokenizer

    # load
    if config.resume and out.is_dir() and not Path(str(out) + PARTIAL).exists():
        return _finished(out)
    tokenizer = load_tokenizer(config.tokenizer or "")
    cache = Path(config.token_cache) if config.token_cache else out.with_name(out.name + ".tokens")
    if config.dry_run:
        cache = Path(tempfile.mkdtemp(prefix="llmkit-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    shards = tokenize_documents(inputs, tokenizer, cache, limit=config.limit, resume=config.resume, quiet=config.quiet)
    val_shards = None
    if config.val:
        val_shards = tokenize_documents(
            list(config.val), tokenizer, cache, name="val", resume=config.resume, quiet=config.quiet
        )

    # build
    device = setup.choose_device(config.device)
    dtype = setup.choose_dtype(config.dtype, device)
    work = Path(str(out) + PARTIAL)
    plan_file = work / "state" / "plan.json"
    if config.resume and plan_file.exists():
        plan = Plan.from_json(json.loads(plan_file.read_text()))
        _check_same_options(config, json.loads(plan_file.with_name("options.json").read_text()))
    else:
        wishes = Wishes(**{item.name: getattr(config, item.name) for item in fields(Wishes)})
        plan = make_plan(
            wishes,
            vocab_size=tokenizer.vocab_size,
            corpus_tokens=shards.tokens,
            device=device.type,
            speed=partial(speed.tokens_per_second, device=device, dtype=dtype),
            seconds_used=lambda: time.monotonic() - STARTED,
            closing_tokens=val_shards.tokens if val_shards else 0,
            special_ids=tokenizer.document_bounds(),
        )
    batches = Batches(shards, plan.sequence_length, plan.batch_rows, config.seed)
    say(plan_table(plan), config.quiet)
    if config.dry_run:
        rate = speed.tokens_per_second(
            plan.model, plan.recipe, plan.micro_batch_rows, plan.sequence_length, device, dtype
        )
        say(f"at {rate:,.0f} tokens/s here, about {plan.tokens / rate:,.0f} s of training", config.quiet)
        return None
    begin_run(out, resume=config.resume, force=config.force)  # not before: a plan may be refused
    plan_file.parent.mkdir(exist_ok=True)
    _write_json(plan_file, plan.to_json())
    _write_json(plan_file.with_name("options.json"), _identity(config))
    model = Transformer(plan.model, seed=config.seed).to(device=device, dtype=dtype)
    model.checkpoint_layers = config.activation_checkpointing
    optimizer = setup.build_optimizer(model, plan.recipe)
    trainer = Trainer(
        model,
        optimizer,
        Schedule(plan.warmup_steps, plan.decay_fraction),
        batches=lambda step: batches.prefetch(step, NO_LAST_STEP, workers=config.workers),
        loss=setup.compiled(next_token_loss, config.compile, device, plan.flops),
        folder=work,
        settings=TrainerSettings(
            micro_batch_rows=plan.micro_batch_rows,
            max_grad_norm=config.max_grad_norm,
            eval_every=config.eval_every,
            save_every=config.save_every,
            sample_every=config.sample_every,
            quiet=config.quiet,
        ),
        describe={"tokenizer": tokenizer.sha256, "tokens of the documents": shards.tokens},
    )
    if config.resume and trainer.resume():
        say(f"resuming after step {trainer.step}", config.quiet)

    # train
    evaluate = None
    if val_shards is not None:
        val_batches = EvaluationBatches(val_shards, plan.sequence_length, max(1, plan.micro_batch_rows))
        evaluate = lambda: held_out_loss(model, val_batches)  # noqa: E731
    last = trainer.fit(
        total_steps=plan.total_steps,
        seconds=plan.seconds,
        evaluate=evaluate,
        sample=lambda: continue_text(model, tokenizer, config.prompt, max_tokens=40, seed=config.seed),
        flops_per_token=plan.model.flops_per_token(plan.sequence_length),
        peak_flops=speed.peak_flops(device, dtype),
    )

    # save
    results = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "parameters": plan.model.parameter_count,
        "loss": round(last.get("loss", trainer.average_loss), 4),
        **{name: round(value, 4) for name, value in trainer.scores.items()},
        "seconds": round(time.monotonic() - STARTED, 1),
    }
    tokenizer.copy_to(work)
    write_manifest(
        work,
        "pretrain",
        as_options(config) | {"plan": plan.to_json()},
        inputs=describe_inputs(inputs),
        parents=[str(config.tokenizer)],
        results=results,
    )
    write_loss_curve(work)
    write_model_card(work)
    save_model(setup.float32_copy(model, optimizer), work)
    finish_run(work, out)

    # summarise
    return Summary(path=str(out), **results)


def _checked_paths(config: PretrainConfig) -> tuple[Path, list[str]]:
    if config.out is None:
        raise UserError("--out is required: the folder for the model, such as -o base/")
    if config.tokenizer is None:
        raise UserError("--tokenizer is required: a folder from llmkit train-bpe, such as --tokenizer tok/")
    if not config.dry_run:
        check_output(config.out, config.force, config.resume)
    out = Path(config.out.rstrip("/") or "/")
    if config.resume and not out.is_dir() and not Path(str(out) + PARTIAL).is_dir():
        raise UserError(f"{out}{PARTIAL}: nothing to resume; start without --resume")
    if not Path(config.tokenizer).exists():
        raise UserError(f"--tokenizer: expected a folder from llmkit train-bpe, found no {config.tokenizer}")
    return out, list(config.inputs) or ["-"]


# What may differ between a run and its resumption without changing what it computes
FREE = (
    "resume",
    "force",
    "quiet",
    "workers",
    "out",
    "token_cache",
    "eval_every",
    "save_every",
    "sample_every",
    "prompt",
)


def _identity(config: PretrainConfig) -> dict[str, Any]:
    return {name: value for name, value in as_options(config).items() if name not in FREE}


def _check_same_options(config: PretrainConfig, before: dict[str, Any]) -> None:
    for name, value in _identity(config).items():
        if before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} was {before.get(name)} and is now {value}; "
                "resume with the same options, or start again with --force"
            )


def _finished(out: Path) -> Summary:
    """The summary of a run that is done: resuming it is no work, and no mistake."""
    results = (read_manifest(out) or {}).get("results", {})
    known = {item.name for item in fields(Summary)} - {"path"}
    if not known - {"val_bits_per_byte", "val_loss"} <= set(results):
        raise UserError(f"{out}: not a finished pretrain run; choose another --out, or replace it with --force")
    return Summary(path=str(out), **{name: value for name, value in results.items() if name in known})


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path, "w") as handle:
        json.dump(value, handle, indent=1)
