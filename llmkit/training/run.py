"""The frame of every command that trains, from the check of --out to the finished folder; it works under torchrun.

    run = Run("sft", config, "chat/")                        # checks --out; imports nothing heavy
    if results := run.finished():
        return Summary(**results)
    run.join()                                               # run.device, run.dtype, run.world
    ...                                                      # load and read; bad records go to run.bad
    if config.dry_run:
        return None
    run.begin({"the data": digests})                         # the same on all ranks and in a resumed run
    trainer = run.trainer(model, optimizer, schedule, loss, TrainerSettings(micro_batch_rows=8))
    with run.training(trainer):
        trainer.fit(batches.prefetch(trainer.step), total_steps=100, seconds=run.seconds_left(config.time_budget))
    values = tuning.trained_values()                         # collective
    if not run.world.leads:
        return None
    return Summary(**run.finish(trainer.results(), inputs=inputs, parents=[model], write=write))

`write(folder)` writes the model and its files to the folder, the weights last.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.config import TrainingConfig, as_options, lasting_options
from llmkit.io.manifest import write_manifest, write_model_card
from llmkit.io.metrics import mirrors
from llmkit.io.progress import say
from llmkit.io.records import BadRecords
from llmkit.io.run_folder import NOTES, RunFolder, finished_results

if TYPE_CHECKING:
    import torch

    from llmkit.model.transformer import Transformer
    from llmkit.training.distributed import World
    from llmkit.training.loss import Loss
    from llmkit.training.optimizer import Optimizer, Schedule
    from llmkit.training.trainer import Trainer, TrainerSettings

LONG_RUN_FLOPS = 1e16  # on a CPU, torch.compile takes 20-50 s and a C++ compiler: worth it for hours


class Run(RunFolder):
    """A run of a training command; see the module.

    stage    name of the command in the manifest
    example  of an output folder, for messages

    `folder` is the final folder, `work` the one until then; `resume` is False if there is nothing to resume.
    """

    device: torch.device
    dtype: torch.dtype
    world: World

    def __init__(self, stage: str, config: TrainingConfig, example: str) -> None:
        """Raise UserError if --out cannot be used."""
        self.started = time.monotonic()  # a time budget covers the start-up, too
        self.stage = stage
        super().__init__(config.out, example, resume=config.resume, force=config.force, dry_run=config.dry_run)
        self.config = replace(config, resume=self.resume)
        self.bad = BadRecords(config.max_bad, config.quiet)

    def finished(self) -> dict[str, Any] | None:
        """Return the results of a run that --resume finds finished, else None.

        Raises UserError if the folder is not of this command, or has other options.
        """
        if not self.is_finished:
            return None
        return {"path": str(self.folder), **finished_results(self.folder, self.stage, self.config)}

    def join(self) -> None:
        """Choose device and precision, and join the other ranks of the job. Raises UserError if that fails."""
        from llmkit.model.devices import choose_device, choose_dtype
        from llmkit.training.distributed import join

        self.device = choose_device(self.config.device)
        self.dtype = choose_dtype(self.config.dtype, self.device)
        self.world = join(self.device, self.config)

    @property
    def seconds(self) -> float:
        """Seconds since the run was started or resumed."""
        return time.monotonic() - self.started

    def seconds_left(self, budget: float | None) -> float | None:
        """Return the rest of a time budget; None without one."""
        return None if budget is None else budget - self.seconds

    def _identity(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return lasting_options(self.config) | dict(more)

    def notes(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the notes that `begin` wrote if a run is resumed; None for a new one.

        identity: what must be the same on all ranks and in a resumed run, besides the options: JSON values, under names
        that users know. Raises UserError naming the first that differs.
        """
        identity = self._identity(identity)
        self.world.check_same(identity)
        return super().notes(identity)

    def begin(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Create an empty folder, or keep that of a resumed run. Raises UserError as `notes` does."""
        self.notes(identity)
        super().begin(self._identity(identity), notes)

    def trainer(
        self,
        model: Transformer,
        optimizer: Optimizer,
        schedule: Schedule,
        loss: Loss,
        settings: TrainerSettings,
        *,
        flops: float | None = None,
    ) -> Trainer:
        """Build the trainer of this run from its options; with --resume, load the last checkpoint.

        model and optimizer are on their device and in their dtype
        flops: approximate FLOPs of the training; None: compile only with --compile on, because it was never tried here
        """
        import torch

        from llmkit.model.quantized import is_quantized
        from llmkit.training.distributed import is_sharded
        from llmkit.training.speed import most_threads, peak_flops
        from llmkit.training.trainer import Trainer

        config = self.config
        model.checkpoint_layers = config.activation_checkpointing
        self.world.check_folder(self.work, NOTES, fresh=not self.resume)
        if model.config.backend != "llmkit":
            compiled = False
            if config.compile == "on":
                say("--compile on is ignored: models that run through transformers are not compiled", config.quiet)
        elif config.compile != "auto" or flops is None or is_quantized(model):
            compiled = config.compile == "on"
        else:  # by default on a GPU, or for a long run on a CPU
            compiled = self.device.type == "cuda" or (flops > LONG_RUN_FLOPS and shutil.which("c++") is not None)
        if compiled:
            say("torch.compile: the first step takes about a minute (--compile off avoids it)", config.quiet)
            if is_sharded(model.embed_tokens):  # FSDP gathers a layer outside of the compiled code
                model.compile_layers()
            else:
                loss = torch.compile(loss, dynamic=False)
        settings = replace(
            settings,
            eval_every=config.eval_every,
            save_every=config.save_every,
            sample_every=config.sample_every,
            most_threads=most_threads(self.device, self.world.size, compiled),
            mirrors=tuple(mirrors(config, self.work)) if self.world.leads else (),
            quiet=config.quiet,
        )
        if settings.flops_per_token:
            settings = replace(settings, peak_flops=peak_flops(self.device, self.dtype) * self.world.size)
        trainer = Trainer(model, optimizer, schedule, loss, folder=self.work, settings=settings)
        if self.resume and trainer.resume():
            say(f"resuming after step {trainer.step}")
        elif self.resume:
            say(
                f"--resume: no checkpoint in {trainer.checkpoints.folder} yet, so the training starts at its first step"
            )
        return trainer

    def finish(
        self,
        results: Mapping[str, Any],
        *,
        inputs: Sequence[str],
        parents: Sequence[str],
        write: Callable[[Path], None],
        derived: Mapping[str, Any] | None = None,
        curves: Mapping[str, Mapping[str, str]] | None = None,
        not_in: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write manifest, model card and curves, have `write` add the model, and rename the folder. Only on rank 0.

        `derived` is added to the options in the manifest; `curves` are those of `write_curves`; `not_in` are the
        evaluations whose items were removed from the inputs. Returns `path` and results, with the run's seconds and bad
        records.
        """
        from llmkit.report.page import write_curves  # brings jinja2

        results = {**results, "seconds": round(self.seconds, 1), **self.bad.results}
        options = as_options(self.config) | dict(derived or {})
        manifest = write_manifest(
            self.work, self.stage, options, inputs=[*inputs, *not_in], parents=parents, results=results, not_in=not_in
        )
        write_model_card(self.work, manifest)
        write_curves(self.work, curves or {})
        write(self.work)
        self.put_in_place()
        return {"path": str(self.folder), **results}
