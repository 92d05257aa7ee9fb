"""The frame of every command that trains, from the check of --out to the finished folder; it works under torchrun.

    run = Run("sft", config, "chat/")                        # --out is fit for it; nothing heavy is imported yet
    if results := run.finished():
        return Summary(**results)
    run.join()                                               # run.device, run.dtype, run.world
    ...                                                      # load and read, bad records to run.bad
    if config.dry_run:
        return None
    run.begin({"the data": digests})                         # the same in all processes, and in a resumed run
    trainer = run.trainer(model, optimizer, schedule, loss, TrainerSettings(micro_batch_rows=8))
    with run.training(trainer):
        trainer.fit(batches.prefetch(trainer.step), total_steps=100, seconds=run.seconds_left(config.time_budget))
    values = tuning.trained_values()                         # all processes gather them
    if not run.world.leads:
        return None
    return Summary(**run.finish(trainer.results(), inputs=inputs, parents=[model], write=write))

`write(folder)` puts the model and what belongs to it into the folder, the weights last.
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

LONG_RUN_FLOPS = 1e16  # on a CPU, torch.compile costs 20-50 s and a C++ compiler: worth it for hours


class Run(RunFolder):
    """See the module.

    stage    of the command, as the manifest names it
    example  of an output folder, for messages

    `folder` is where it ends, `work` where it is made; `resume` is false where there is nothing to resume.
    """

    device: torch.device
    dtype: torch.dtype
    world: World

    def __init__(self, stage: str, config: TrainingConfig, example: str) -> None:
        """Raises UserError for an --out that cannot be had."""
        self.started = time.monotonic()  # a time budget covers the start-up, too
        self.stage = stage
        super().__init__(config.out, example, resume=config.resume, force=config.force, dry_run=config.dry_run)
        self.config = replace(config, resume=self.resume)
        self.bad = BadRecords(config.max_bad, config.quiet)

    def finished(self) -> dict[str, Any] | None:
        """Return the results of the run that --resume finds finished, else None.

        Raises UserError for a folder from elsewhere, and for other options.
        """
        if not self.is_finished:
            return None
        return {"path": str(self.folder), **finished_results(self.folder, self.stage, self.config)}

    def join(self) -> None:
        """Choose device and precision, and join the other processes of the job. Raises UserError where that fails."""
        from llmkit.model.devices import choose_device, choose_dtype
        from llmkit.training.distributed import join

        self.device = choose_device(self.config.device)
        self.dtype = choose_dtype(self.config.dtype, self.device)
        self.world = join(self.device, self.config)

    @property
    def seconds(self) -> float:
        """Seconds since the run was begun, or resumed."""
        return time.monotonic() - self.started

    def seconds_left(self, budget: float | None) -> float | None:
        """Return what is left of a time budget; None where there is none."""
        return None if budget is None else budget - self.seconds

    def _identity(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return lasting_options(self.config) | dict(more)

    def notes(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the notes of `begin` for the run that is resumed; None for a new one.

        identity: beside the options, what all processes and a resumption must have in common; JSON values, by names
        that the user knows. Raises UserError naming the first that differs.
        """
        identity = self._identity(identity)
        self.world.check_same(identity)
        return super().notes(identity)

    def begin(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Make the folder, empty, or as it is for a resumed run; errors are those of `notes`."""
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
        """The trainer of this run, as its options want it; with --resume, gone on from the last checkpoint.

        model and optimizer are on their device and in their dtype
        flops: of the whole training, about; None: torch.compile must be asked for, for it was never tried here
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
                say("--compile on: left out, for it is of families that llmkit computes itself", config.quiet)
        elif config.compile != "auto" or flops is None or is_quantized(model):
            compiled = config.compile == "on"
        else:  # by default on a GPU, or for a long run on a CPU
            compiled = self.device.type == "cuda" or (flops > LONG_RUN_FLOPS and shutil.which("c++") is not None)
        if compiled:
            say("torch.compile: the first step takes a minute or so (--compile off does without)", config.quiet)
            if is_sharded(model.embed_tokens):  # FSDP puts a layer together outside of what is compiled
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
        """Document the run, have `write` put the model beside that, and rename the folder. The first process calls it.

        `derived` stands beside the options in the manifest; `curves` are those of `write_curves`, `not_in` the
        evaluations whose items were taken out of the inputs. Returns `path` and results, with the seconds of the run
        and its bad records.
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
