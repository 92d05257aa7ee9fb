"""Optimizer and trainer put together, the same way for every stage that trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmkit.config import TrainingConfig
from llmkit.io.metrics import mirrors
from llmkit.io.progress import say
from llmkit.io.run_folder import NOTES
from llmkit.model.transformer import Transformer
from llmkit.training.distributed import world
from llmkit.training.optimizer import GroupSettings, Optimizer, Schedule
from llmkit.training.scaling import Recipe
from llmkit.training.sharding import is_sharded
from llmkit.training.threads import most_threads
from llmkit.training.trainer import Batch, Loss, Trainer, TrainerSettings

LONG_RUN_FLOPS = 1e16  # on a CPU, torch.compile costs 20-50 s and a C++ compiler: worth it for hours


def build_optimizer(model: Transformer, recipe: Recipe) -> Optimizer:
    """Muon for the blocks' matrices, AdamW for embedding, head, gains and biases; by the recipe, AdamW for all."""
    matrices = {name: blocks for name, _, blocks in model.matrices()}
    groups = []
    for name, parameter in model.named_parameters():
        if name in matrices:
            blocks = matrices[name] if recipe.optimizer == "muon" else ()
            settings = GroupSettings(recipe.optimizer, recipe.matrix_learning_rate, recipe.weight_decay, blocks=blocks)
        elif name == "embed_tokens":
            rate = recipe.head_learning_rate if model.lm_head is None else recipe.embedding_learning_rate
            settings = GroupSettings("adamw", rate)
        elif name == "lm_head":
            settings = GroupSettings("adamw", recipe.head_learning_rate)
        else:
            settings = GroupSettings("adamw", recipe.gain_learning_rate)
        groups.append((name, parameter, settings))
    return Optimizer(groups)


def is_compiled(choice: str, device: torch.device, flops: float) -> bool:
    """True if to train through torch.compile: where `choice` is on, or auto on a GPU or for a long run on a CPU."""
    long_run = device.type == "cuda" or (flops > LONG_RUN_FLOPS and shutil.which("c++") is not None)
    return choice == "on" or (choice == "auto" and long_run)


def build_trainer(
    model: Transformer,
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    batches: Callable[[int], Iterator[Batch]],
    loss: Loss,
    micro_batch_rows: int,
    flops: float,
    folder: Path,
    options: TrainingConfig,
    **settings: Any,
) -> Trainer:
    """The trainer of a stage, as its options want it; with --resume, gone on from its last checkpoint.

    model and optimizer are on their device and in their dtype; flops: of the whole training, about; settings: more of
    `TrainerSettings`.
    """
    model.checkpoint_layers = options.activation_checkpointing
    world().check_folder(folder, NOTES, fresh=not options.resume)
    device = model.embed_tokens.device
    compiled = is_compiled(options.compile, device, flops)
    if compiled:
        say("torch.compile: the first step takes a minute or so (--compile off does without)", options.quiet)
        if is_sharded(model.embed_tokens):  # FSDP puts a layer together outside of what is compiled
            model.compile_layers()
        else:
            loss = torch.compile(loss, dynamic=False)
    trainer = Trainer(
        model,
        optimizer,
        schedule,
        batches=batches,
        loss=loss,
        folder=folder,
        settings=TrainerSettings(
            micro_batch_rows=micro_batch_rows,
            max_grad_norm=options.max_grad_norm,
            eval_every=options.eval_every,
            save_every=options.save_every,
            sample_every=options.sample_every,
            most_threads=most_threads(device, world().size, compiled),
            mirrors=tuple(mirrors(options, folder)) if world().leads else (),
            quiet=options.quiet,
            **settings,
        ),
    )
    if options.resume and trainer.resume():
        say(f"resuming after step {trainer.step}")
    elif options.resume:
        say(f"--resume: no checkpoint in {trainer.checkpoints.folder} yet, so the training starts at its first step")
    return trainer


def float32_copy(model: Transformer, optimizer: Optimizer) -> Transformer | None:
    """Copy the model to the CPU with the optimizer's fp32 masters for parameters, for the first process to save.

    All processes call it; the others get None.
    """
    masters = optimizer.whole_masters()
    if not masters:
        return None
    copy = Transformer(model.config)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(masters[name])
    return copy.eval()
