"""The training loop under pretrain, sft, train-reward and rl: batches in, an updated model and metrics out.

It knows a model, an optimizer, a loss and a folder for its state. It does not know what a document or a conversation
is, nor what the loss means. Each rank takes its share of a batch's rows; rank 0 decides all that depends on a clock.

    trainer = Trainer(model, optimizer, schedule, next_token_loss, folder=work, settings=...)
    trainer.resume()
    trainer.fit(batches.prefetch(trainer.step), total_steps=1000, evaluate=bits_per_byte)

A stage whose batches depend on the current model writes the loop itself:

    with trainer.session(total_steps=1000, evaluate=evaluate):
        while trainer.goes_on:
            with trainer.interruptible():          # a signal ends this at once
                batch = sample_and_reward(...)
            metrics = trainer.train_step(batch)
            trainer.end_step({**metrics, **policy_figures(trainer.figures)})
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.display import write_message
from llmkit.errors import Interrupted, LlmkitError, SavedError, SharedError, UserError
from llmkit.io.files import sync
from llmkit.io.metrics import METRICS, MetricsLog, read_metrics, trim_metrics
from llmkit.io.progress import Progress, counted, say
from llmkit.model.devices import keep_freed_memory
from llmkit.training.checkpoint import Checkpoints
from llmkit.training.distributed import world
from llmkit.training.failures import is_lost
from llmkit.training.loss import Batch, Loss, rows_of
from llmkit.training.optimizer import Optimizer, Schedule
from llmkit.training.speed import StepThreads

LAST_UPDATE_SECONDS = 10.0  # to finish an update that other ranks have finished
FIRST_SAVE_SECONDS = 60.0  # a run without a checkpoint loses everything
LARGEST_WEIGHT = 65504.0  # largest float16; with a usable learning rate, weights are a thousand times smaller
FIRST_STEPS = 8  # their mean loss is the initial loss: a single batch may be easier than all others
ABSURD_NATS = 10.0  # above the initial loss: worse than guessing with any tokenizer
GROWN_NATS = 0.5  # above the initial loss at the end: worth a note
RESTART = "start over with --force and a lower --learning-rate, or look at the data"

Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the loop. Steps and seconds of None mean never."""

    micro_batch_rows: int
    max_grad_norm: float | None = 1.0
    momentum: float = 0.95
    momentum_warmup_steps: int = 300
    eval_every: int | None = None
    save_every: int | None = None
    sample_every: int | None = None
    save_seconds: float | None = 600.0
    spike_nats: float = 1.5  # infinite for a loss that does not measure progress
    spike_patience: int = 20
    updates_per_batch: int = 1
    micro_batch_tokens: int | None = None  # upper bound: long rows are computed fewer at a time
    memory_advice: str = "lower --sequence-length or --depth"
    shown: str = "loss"  # the metric next to the progress bar
    flops_per_token: float | None = None  # with peak_flops, `mfu` is in the metrics
    peak_flops: float | None = None
    mirrors: tuple[Callable[[], Any], ...] = ()  # other loggers of the metrics
    most_threads: int = 1  # upper bound of threads to try; 1 keeps torch's setting
    quiet: bool = False


class Trainer:
    """The training loop; see the module.

    Raises UserError if the loss is not finite or stays far above its average or its initial value, or if a weight
    outgrows half precision, and Interrupted on SIGINT, SIGTERM or SIGHUP, which abandon the current step. Whatever ends
    a run, its steps are saved first if their weights are usable.

    `figures` are those of the loss in the last step: a list per update, with an item per micro-batch of this rank. An
    evaluation sets `stopping` to end the training.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        schedule: Schedule,
        loss: Loss,
        *,
        folder: Path,
        settings: TrainerSettings,
    ) -> None:
        keep_freed_memory()
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.loss, self.folder, self.settings = loss, folder, settings
        self.threads = StepThreads(settings.most_threads)
        self.checkpoints = Checkpoints(folder / "state")
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.micro_batch_rows = settings.micro_batch_rows
        self.last_loss = self.average_loss = math.nan
        self.first_losses: list[float] = []
        self.recent_losses: deque[float] = deque(maxlen=settings.spike_patience)
        self.high_steps = 0
        self.figures: list[list[Mapping[str, float]]] = []
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.evaluated_step = self.sampled_step = -1
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.stopping = False
        self._total_steps: int | None = None
        self._seconds: float | None = None
        self._evaluate: Evaluate | None = None
        self._sample: Callable[[], str] | None = None
        self._writing = threading.RLock()  # writes in two threads would mix their collectives
        self._updates = 0  # optimizer updates at the end of the last complete step
        self._signals = Signals()

    @property
    def has_begun(self) -> bool:
        """True if there is something to resume: a step, a checkpoint or an evaluation."""
        return self.step > 0 or self.saved_step >= 0 or self.evaluated_step >= 0

    # ---- one step

    @property
    def progress(self) -> float:
        """Fraction of the training that is done, from 0 to 1, which the learning rate follows.

        With a time budget it follows the clock: a machine that slows down half-way still ends in time, with the
        schedule complete, but no two runs are equal.
        """
        if self._seconds is not None:
            return self.elapsed / max(self._seconds, 1e-9)
        return self.step / (self._total_steps or 1) if self._total_steps is not None else 0.0

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Run forward, backward and update on a batch, `updates_per_batch` times; return the last update's metrics."""
        metrics: dict[str, float] = {}
        self.figures, size = [], batch.tokens
        factor = self.schedule.factor(self.step, self.progress)
        with self.threads.step(size):
            for _ in range(self.settings.updates_per_batch):
                total, targets = world().sum(*self._backward(batch))
                loss, norm = total / max(1, targets), float(self.optimizer.gradient_norm(max(1, targets)))
                self._guard(loss, norm)
                limit = self.settings.max_grad_norm
                clip = 1.0 if limit is None or norm <= limit else limit / norm
                ramp = min(1.0, self.step / max(1, self.settings.momentum_warmup_steps))
                momentum = self.settings.momentum - 0.1 * (1 - ramp)
                self.optimizer.step(factor, momentum, clip / max(1, targets))
                metrics = {"loss": loss, "grad_norm": norm, "lr_factor": factor, "targets": int(targets)}
        self.step += 1
        self.tokens += size
        self.last_loss = metrics["loss"]
        self.recent_losses.append(self.last_loss)
        if len(self.first_losses) < FIRST_STEPS:
            self.first_losses.append(self.last_loss)
        self._updates = self.optimizer.count
        return metrics

    def _backward(self, batch: Batch) -> tuple[float, int]:
        """Accumulate the gradients of this rank's rows and return their summed loss and targets; halve the micro-batch
        if memory runs out."""
        (first, stop), rows = world().share(len(batch[0])), -(-len(batch[0]) // world().size)  # of the largest share
        at_once = self.micro_batch_rows
        if self.settings.micro_batch_tokens is not None:
            at_once = max(1, min(at_once, self.settings.micro_batch_tokens // batch[0].shape[1]))
        while True:
            try:
                totals, targets, figures = [], 0, []
                for done in range(0, rows, at_once):
                    # a step that has already updated the weights is completed
                    if self.optimizer.count == self._updates and world().sum(float(self._signals.arrived))[0] > 0:
                        raise StepGivenUp
                    start, last = first + done, done + at_once >= rows
                    micro_batch = rows_of(batch, start, min(start + at_once, stop))
                    if not len(micro_batch[0]):  # FSDP needs equally many passes on all ranks
                        micro_batch = batch.nothing()
                    if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP
                        self.model.set_requires_gradient_sync(last)  # gradients are reduced after the last micro-batch
                    summed = self.loss(self.model, micro_batch)
                    summed.total.backward()
                    self.optimizer.accumulate(last)
                    totals.append(summed.total.detach())
                    targets += summed.targets
                    figures.append(summed.figures or {})
                total = float(torch.stack(totals).sum())
                self.figures.append(figures)
                return total, targets
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
                    raise
                self.optimizer.discard()
                if world().size > 1:  # the other ranks keep more rows at a time
                    settings = self.settings
                    smaller = settings.memory_advice if settings.micro_batch_tokens else "lower --micro-batch-size"
                    raise UserError(
                        f"memory runs out with {counted(at_once, 'row')} at a time; {smaller}, or use "
                        "--activation-checkpointing"
                    ) from error
                if at_once == 1:
                    raise UserError(
                        f"memory runs out with one sequence at a time; {self.settings.memory_advice}, "
                        "or use --activation-checkpointing"
                    ) from error
                at_once = self.micro_batch_rows = max(1, min(at_once, rows) // 2)
                say(f"memory ran out; micro-batch is now {counted(at_once, 'sequence')}", self.settings.quiet)

    def _guard(self, loss: float, norm: float) -> None:  # before the update that would spoil the weights
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(f"the loss is {loss:.3g} and the gradient norm {norm:.3g} at step {self.step}")
        high = self.average_loss + self.settings.spike_nats
        self.high_steps = self.high_steps + 1 if loss > high else 0
        if self.high_steps >= self.settings.spike_patience:
            self._stop(
                f"the loss has stayed {loss - self.average_loss:.2f} nats above its average of "
                f"{self.average_loss:.2f} for {counted(self.high_steps, 'step')}, at step {self.step}"
            )
        if math.isnan(self.average_loss):
            self.average_loss = loss
        elif self.high_steps == 0:
            self.average_loss += 0.05 * (loss - self.average_loss)

    def _stop(self, reason: str) -> None:
        self.optimizer.discard()
        self._check_weights(f"{reason}; ")
        self._write()
        self.checkpoints.wait()
        raise SavedError(f"{reason}; saved in {self.checkpoints.folder}; {RESTART}")

    def _check_weights(self, reason: str = "") -> None:
        """Raise SavedError, without saving them, if the last update left unusable weights."""
        (largest,) = world().largest(self.optimizer.largest_weight())
        if largest <= LARGEST_WEIGHT:
            return
        fault = f"a weight has grown to {largest:.2g}" if math.isfinite(largest) else "weights are not finite numbers"
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        saved = f"step {steps[-1]} is saved in {self.checkpoints.folder}" if steps else "nothing was saved"
        raise SavedError(f"{reason}{fault} after step {self.step}; {saved}; {RESTART}")

    def _check_growth(self) -> None:
        """Stop at the end of a training if the loss is far above the initial loss; if less far, print a note."""
        if not self.recent_losses or not self.first_losses or math.isinf(self.settings.spike_nats):
            return
        first, final = (sum(some) / len(some) for some in (self.first_losses, self.recent_losses))
        losses = f"the loss has grown from {first:.2f} to {final:.2f}"
        if final > first + ABSURD_NATS:
            self._stop(f"{losses} at step {self.step}")
        if final > first + GROWN_NATS:
            say(f"{losses}: a lower --learning-rate may be better")

    # ---- many steps

    def fit(
        self,
        batches: Iterator[Batch],
        *,
        total_steps: int | None = None,
        seconds: float | None = None,
        evaluate: Evaluate | None = None,
        evaluate_first: bool = False,
        sample: Callable[[], str] | None = None,
        figures: Callable[[int], Mapping[str, float]] = lambda step: {},
    ) -> None:
        """Train on the batches from `step` on, until a limit of `session` or the last batch.

        figures: more figures to log with the metrics of a step, by its number from 1
        """
        limits = {"total_steps": total_steps, "seconds": seconds}
        with self.session(**limits, evaluate=evaluate, evaluate_first=evaluate_first, sample=sample):
            while self.goes_on:
                with self.interruptible():
                    batch = next(batches, None)
                if batch is None:
                    break
                self.end_step({**self.train_step(batch), **figures(self.step)})

    @contextmanager
    def session(
        self,
        *,
        total_steps: int | None = None,
        seconds: float | None = None,
        evaluate: Evaluate | None = None,
        evaluate_first: bool = False,
        sample: Callable[[], str] | None = None,
    ) -> Iterator[None]:
        """Record signals, log, evaluate, sample and save around the steps of the block: up to `total_steps`, or until
        `seconds` of this run have passed, but at least one step."""
        self._total_steps, self._seconds = total_steps, world().broadcast(seconds)
        self._evaluate, self._sample = evaluate, sample
        self._started, self._before = time.monotonic(), self.elapsed
        self._logged, self._logged_tokens = self._started, self.tokens
        self._log = MetricsLog(self.folder / METRICS, self.settings.mirrors)
        self._bar = Progress("training", 1.0, quiet=self.settings.quiet)
        with self._log, self._signals.noted(), self._saving(), self._bar:
            self._bar.advance(self.progress)
            if evaluate_first if self.step == 0 else self._due(self.settings.eval_every):
                self.evaluate()  # missed because of a kill, or that of step 0
            if self.step > 0 and self._due(self.settings.sample_every):
                self._log_sample()
            yield
            self._check_growth()
            self.save(wait=True)
            self.evaluate()
        self.checkpoints.wait()

    @property
    def goes_on(self) -> bool:
        """True while steps remain."""
        return not self.stopping and self.progress < 1

    def interruptible(self) -> AbstractContextManager[None]:
        """Let a signal end the block, which may take hours and changes no weights, at once."""
        return self._signals.at_once()

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the last step; save, evaluate and sample when due."""
        now, settings, before = time.monotonic(), self.settings, self._bar.done
        limit = settings.save_seconds
        if limit is not None and self.saved_step < 0:
            limit = min(limit, FIRST_SAVE_SECONDS)
        late = limit is not None and now - self.saved_at > limit
        clock = (self._before + now - self._started, late) if world().leads else (0.0, 0.0)
        signals, self.elapsed, late = world().sum(float(self._signals.arrived), *clock)
        rate = (self.tokens - self._logged_tokens) / max(now - self._logged, 1e-9)
        self._logged, self._logged_tokens = now, self.tokens
        row = {**metrics, "step": self.step, "tokens": self.tokens, "seconds": round(self.elapsed, 3)}
        row["tokens_per_second"] = round(rate, 1)
        if settings.flops_per_token and settings.peak_flops:
            row["mfu"] = round(rate * settings.flops_per_token / settings.peak_flops, 4)
        self._log.write(row)
        self._bar.advance(self.progress - before, step=self.step, **{settings.shown: row[settings.shown]})
        if signals > 0:
            raise StepGivenUp  # ends the next step

        evaluates = self._evaluate is not None and self._due(settings.eval_every)
        # a run that dies in its evaluation must not lose its training: save first (nanochat #446)
        if evaluates or late > 0 or self._due(settings.save_every):
            self.save(wait=evaluates)
        if evaluates:
            self.evaluate()
        if self._due(settings.sample_every):
            self._log_sample()

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def evaluate(self) -> None:
        """Evaluate the current model and log the scores, unless that is done."""
        if self._evaluate is None or self.evaluated_step == self.step:
            return
        with self.interruptible():
            scores = dict(self._evaluate())
        self.scores, self.evaluated_step = scores, self.step
        self._log.write({"step": self.step, "tokens": self.tokens, **scores})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        say(f"step {self.step}: {figures}", self.settings.quiet)

    def _log_sample(self) -> None:
        if self._sample is None or self.sampled_step == self.step:
            return
        with self.interruptible():
            text = self._sample()
        self.sampled_step = self.step
        self._log.write({"step": self.step, "sample": text})
        say(f"step {self.step} sample: {text!r}", self.settings.quiet)

    def results(self) -> dict[str, Any]:
        """Return figures for the summary of a stage: steps, tokens, last loss, last scores."""
        figures = {k: round(v, 4) for k, v in {"loss": self.last_loss, **self.scores}.items()}
        tasks = {k.removeprefix("task/"): figures.pop(k) for k in list(figures) if k.startswith("task/")}
        return {"steps": self.step, "tokens": self.tokens, **figures, **({"tasks": tasks} if tasks else {})}

    # ---- state

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save the completed steps if an error ends the training, on one rank or all, but not in the middle of an
        update."""
        self._updates = self.optimizer.count
        self.checkpoints.prepare(self.optimizer.state_dict())
        try:
            with world().saving_by(self._save_with_others):
                yield
        except (SavedError, Interrupted):
            raise
        except (Exception, KeyboardInterrupt) as error:
            shared = world().size == 1 or isinstance(error, SharedError | StepGivenUp)
            if shared and self.step == 0 and isinstance(error, KeyboardInterrupt):
                raise Interrupted("stopped in the first step, so nothing is saved; --resume starts over") from None
            if self.step == 0 or self.optimizer.count != self._updates:
                raise
            if shared:
                self.optimizer.discard()
                try:
                    self.save(wait=True)
                except SavedError:  # unusable weights explain what ended the run
                    raise
                except Exception:  # such as a full disk: the first error says more
                    raise error from None
            elif is_lost(error) or not world().watch.call_for_saving():
                raise
            saved = f"saved after step {self.step} in {self.checkpoints.folder}; --resume continues"
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"stopped; {saved}") from None
            if isinstance(error, LlmkitError):
                raise SavedError(f"{error}; {saved}") from error
            write_message(f"llmkit: {saved}")
            raise

    def _save_with_others(self, all_have: Callable[[Any], bool]) -> bool:
        """Write this rank's part of a checkpoint if all ranks are at the same step. Another thread may be inside the
        next step, which never reaches its update."""
        deadline = time.monotonic() + LAST_UPDATE_SECONDS
        while self.optimizer.count != self._updates and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            all_have(None)
            return False
        device = next(self.model.parameters()).device
        # a separate stream: work queued after a wait for the failed rank would never run
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
        try:
            with stream:
                sound = self.step > 0 and self.optimizer.largest_weight() <= LARGEST_WEIGHT
                complete = sound and self.optimizer.count == self._updates
                if not all_have([self.step, self.saved_step] if complete else None):
                    return False
                self._write()
                self.checkpoints.wait()
                return True
        finally:
            self._writing.release()

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint of the last complete step, unless it exists. Raises SavedError for unusable weights."""
        if self.saved_step != self.step:
            self._check_weights()
        self._write()
        if wait:
            self.checkpoints.wait()

    def _write(self) -> None:
        with self._writing:
            if self.saved_step == self.step:
                return
            state = {
                "tokens": self.tokens,
                "elapsed": self.elapsed,
                "last_loss": self.last_loss,
                "average_loss": self.average_loss,
                "high_steps": self.high_steps,
                "first_losses": list(self.first_losses),  # copied, because a thread writes it later
                "recent_losses": list(self.recent_losses),
            }
            if world().leads and (self.folder / METRICS).exists():
                sync(self.folder / METRICS)  # the metrics on disk must include all steps before the checkpoint
            self.checkpoints.save(self.step, self.optimizer.state_dict(), state)
            self.saved_step, self.saved_at = self.step, time.monotonic()

    def resume(self) -> bool:
        """Load the newest checkpoint; return False if there is none. Raises UserError if it is of another model."""
        loaded = self.checkpoints.load(self.optimizer.state_dict())
        if loaded is None:  # killed before the first one: begin again
            self._restore_evaluation(0)
            return False
        tensors, state = loaded
        try:
            self.optimizer.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{self.checkpoints.folder}: a checkpoint of another model ({error})") from error
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        # JSON has no NaN, the average before the first step
        self.last_loss, self.average_loss = (
            math.nan if state[name] is None else state[name] for name in ("last_loss", "average_loss")
        )
        self.high_steps, self.saved_step = state["high_steps"], self.step
        self.first_losses = list(state["first_losses"])
        self.recent_losses.extend(state["recent_losses"])
        self._restore_evaluation(self.step)
        return True

    def _restore_evaluation(self, step: int) -> None:
        """Drop the metrics of later steps, and restore the last evaluation and sample from those on disk."""
        path = self.folder / METRICS
        with world().in_turn():
            if world().leads:
                trim_metrics(path, step)
            for row in read_metrics(path):
                if scores := {name: value for name, value in row.items() if name.startswith("val_")}:
                    self.scores, self.evaluated_step = scores, int(row.get("step", -1))
                if "sample" in row:
                    self.sampled_step = int(row.get("step", -1))


class StepGivenUp(KeyboardInterrupt):
    """Raised on all ranks, between two micro-batches or two steps, after a signal."""


class Signals:
    """Records whether SIGINT, SIGTERM or SIGHUP (a closed terminal) has arrived."""

    def __init__(self) -> None:
        self.arrived = self._acts = False

    def _note(self, number: int, frame: object) -> None:
        self.arrived = True
        if world().size == 1:  # torchrun sends a second one on its own
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._acts:
            raise KeyboardInterrupt

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record signals during the block; a second Ctrl-C acts at once. SIGHUP stays ignored if it is (nohup)."""
        try:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            former = {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:  # not in the main thread: the caller's signals are not ours
            yield
            return
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block at once, as Ctrl-C does. With several ranks, which must agree, it waits."""
        self._acts = world().size == 1
        try:
            if self._acts and self.arrived:
                raise KeyboardInterrupt
            yield
        finally:
            self._acts = False
