"""The training loop: micro-batches, out-of-memory back-off, guards, interruption, and bit-exact resuming."""

import json
import math
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from llmkit.errors import Interrupted, SavedError, UserError
from llmkit.training.loss import Summed
from llmkit.training.optimizer import GroupSettings, Optimizer, Schedule
from llmkit.training.trainer import Trainer, TrainerSettings


class Toy(nn.Module):
    """Learns y = x @ weight from rows of 4 numbers; can pretend to run out of memory."""

    def __init__(self, most_rows: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.most_rows = most_rows

    def forward(self, x):
        if self.most_rows is not None and len(x) > self.most_rows:
            raise torch.OutOfMemoryError("out of memory")
        return x @ self.weight


class Rows(NamedTuple):
    x: np.ndarray
    y: np.ndarray

    @property
    def tokens(self):
        return self.x.size


def batches(step, poison_at=None):
    while True:
        x = np.random.default_rng(step).standard_normal((8, 4)).astype(np.float32)
        yield Rows(x * np.inf if step == poison_at else x, 2 * x)
        step += 1


def die_at(step, source):
    for number, batch in enumerate(source):
        yield batch if number != step else 1 / 0


def squared_error(model, rows):
    x, y = (torch.from_numpy(part) for part in rows)
    return Summed((model(x) - y).square().sum(), x.numel())


def make(folder, model=None, *, rows=8, source=batches, **settings):
    model = model or Toy()
    optimizer = Optimizer([("weight", model.weight, GroupSettings("adamw", 0.05))])
    folder.mkdir(exist_ok=True)
    schedule = Schedule(warmup_steps=2, decay_fraction=0.5)
    settings = TrainerSettings(micro_batch_rows=rows, quiet=True, **settings)
    return Toys(model, optimizer, schedule, squared_error, folder=folder, settings=settings, source=source)


class Toys(Trainer):
    """A trainer that keeps the source of its batches."""

    def __init__(self, *parts, source, **details):
        super().__init__(*parts, **details)
        self.batches = source

    def fit(self, **horizon):
        super().fit(self.batches(self.step), **horizon)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (UserError("the reward failed"), "the reward failed; saved after step 3 in .*; --resume continues"),
        (KeyboardInterrupt(), "stopped; saved after step 3 in .*; --resume continues"),
        (ZeroDivisionError("division by zero"), "division by zero"),
    ],
)
def test_the_steps_of_a_run_are_kept_for_any_exit(tmp_path, failure, told):
    def failing(step):
        for number, batch in enumerate(batches(step), step):
            if number == 3:
                raise failure
            yield batch

    make(tmp_path / "whole").fit(total_steps=6)
    with pytest.raises(BaseException, match=told):
        make(tmp_path / "cut", source=failing).fit(total_steps=6)
    resumed = make(tmp_path / "cut")
    assert resumed.resume() and resumed.step == 3
    resumed.fit(total_steps=6)
    whole, again = make(tmp_path / "whole"), resumed
    assert whole.resume() and torch.equal(whole.model.weight, again.model.weight)


def test_half_an_update_is_not_kept(tmp_path):
    """The second of a step's two updates fails; the run can only resume from earlier steps."""
    trainer = make(tmp_path, updates_per_batch=2, save_every=1)
    loss, calls = trainer.loss, []

    def failing(model, rows):
        calls.append(1)
        if len(calls) == 6:
            raise UserError("no")
        return loss(model, rows)

    trainer.loss = failing
    with pytest.raises(UserError, match=r"^no$"):
        trainer.fit(total_steps=6)
    trainer.checkpoints.wait()
    resumed = make(tmp_path)
    assert resumed.resume() and resumed.step == 2


def test_it_learns_and_writes_metrics(tmp_path):
    make(tmp_path).fit(total_steps=60)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert rows[-1]["tokens"] == 60 * 32


def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path):
    whole, parts = make(tmp_path / "a", rows=8), make(tmp_path / "b", rows=3)
    whole.fit(total_steps=5)
    parts.fit(total_steps=5)
    torch.testing.assert_close(whole.model.weight, parts.model.weight, rtol=1e-5, atol=1e-6)


def test_memory_back_off_halves_the_micro_batch_and_loses_nothing(tmp_path):
    plain, tight = make(tmp_path / "a"), make(tmp_path / "b", Toy(most_rows=3))
    plain.fit(total_steps=5)
    tight.fit(total_steps=5)
    assert tight.micro_batch_rows == 2
    torch.testing.assert_close(plain.model.weight, tight.model.weight, rtol=1e-5, atol=1e-6)


def test_memory_for_not_one_row_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="memory runs out with one sequence at a time"):
        make(tmp_path, Toy(most_rows=0)).fit(total_steps=1)


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path):
    whole = make(tmp_path / "whole")
    whole.fit(total_steps=20)
    killed = make(tmp_path / "cut", source=lambda step: die_at(12, batches(step)), save_every=7)
    with pytest.raises(ZeroDivisionError):
        killed.fit(total_steps=20)
    killed.checkpoints.wait()
    resumed = make(tmp_path / "cut")
    assert resumed.resume() and resumed.step == 12
    resumed.fit(total_steps=20)
    assert torch.equal(whole.model.weight, resumed.model.weight)
    pairs = zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True)
    assert all(a["step"] == b["step"] and a["loss"] == b["loss"] for a, b in pairs)


def signal_at(call, made):
    """Return `made`, wrapped to send SIGTERM to this process at its `call`-th call."""
    calls = []

    def called(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments)

    return called


@pytest.mark.parametrize("moment", ["a batch is made", "between micro-batches", "an evaluation", "a sample"])
def test_a_signal_gives_up_what_is_begun_and_keeps_the_steps_before(tmp_path, moment):
    make(tmp_path / "whole").fit(total_steps=9)
    trainer = make(tmp_path / "cut", rows=4, sample_every=6, eval_every=6)
    more = {}
    if moment == "a batch is made":
        trainer.batches = lambda step: map(signal_at(7, lambda batch: batch), batches(step))
    elif moment == "between micro-batches":
        trainer.loss = signal_at(13, squared_error)
    elif moment == "an evaluation":
        more["evaluate"] = signal_at(1, dict)
    else:
        more["sample"] = signal_at(1, str)
    with pytest.raises(Interrupted, match=r"stopped; saved after step 6 in .*state; --resume continues"):
        trainer.fit(total_steps=9, **more)
    resumed = make(tmp_path / "cut")
    assert resumed.resume() and resumed.step == 6
    assert torch.equal(resumed.model.weight, trainer.model.weight)
    resumed.fit(total_steps=9)
    whole = make(tmp_path / "whole")
    assert whole.resume()
    torch.testing.assert_close(whole.model.weight, resumed.model.weight)


def test_a_signal_in_the_first_step_leaves_nothing_to_resume(tmp_path):
    trainer = make(tmp_path, rows=4)
    trainer.loss = signal_at(1, squared_error)
    with pytest.raises(Interrupted, match=r"stopped in the first step, so nothing is saved; --resume starts over"):
        trainer.fit(total_steps=9)
    assert not make(tmp_path).resume()


def test_a_step_whose_weights_are_updated_is_finished_first(tmp_path):
    trainer = make(tmp_path, updates_per_batch=3)
    trainer.loss = signal_at(5, squared_error)
    with pytest.raises(Interrupted, match=r"saved after step 2"):
        trainer.fit(total_steps=9)


def test_a_nan_loss_stops_before_the_update(tmp_path):
    trainer = make(tmp_path, source=lambda step: batches(step, poison_at=4))
    with pytest.raises(UserError, match=r"the loss is (inf|nan) .* at step 4; saved in .*; start over with .* a lower"):
        trainer.fit(total_steps=10)
    assert torch.isfinite(trainer.model.weight).all()
    assert make(tmp_path).resume()


def test_a_lasting_spike_stops_and_a_short_one_does_not(tmp_path):
    def spikes(first, count):
        def source(step):
            for x, y in batches(step):
                yield Rows(x, y + 100 * (first <= step < first + count))
                step += 1

        return source

    make(tmp_path / "short", source=spikes(10, 3), spike_patience=5).fit(total_steps=30)
    with pytest.raises(UserError, match="nats above its average"):
        make(tmp_path / "long", source=spikes(10, 20), spike_patience=5).fit(total_steps=30)


@pytest.mark.parametrize(("weight", "told"), [(math.nan, "not finite numbers"), (1e30, r"has grown to 1e\+30")])
def test_spoiled_weights_are_reported_and_not_saved(tmp_path, weight, told):
    """The loss stays finite, because the norms bound it for any weights."""
    trainer = make(tmp_path, save_every=2)

    def loss(model, rows):
        if trainer.step == 3:
            model.weight.data.fill_(weight)
        return Summed((model.weight * 0).nan_to_num().sum(), 1)

    trainer.loss = loss
    with pytest.raises(SavedError, match=f"{told} after step 4; step 2 is saved in .*lower --learning-rate"):
        trainer.fit(total_steps=10)
    resumed = make(tmp_path)
    assert resumed.resume() and resumed.step == 2


def test_a_run_with_spoiled_weights_ends_with_that_reason(tmp_path):
    def failing(step):
        for number, batch in enumerate(batches(step), step):
            if number == 3:
                trainer.model.weight.data.fill_(math.inf)
                raise UserError("its logits are not finite")
            yield batch

    trainer = make(tmp_path, source=failing)
    with pytest.raises(SavedError, match="weights are not finite numbers after step 3; nothing was saved"):
        trainer.fit(total_steps=6)


def constant(trainer, loss_at):
    """Make the loss a function of the step alone."""
    trainer.loss = lambda model, rows: Summed((model.weight * 0).sum() + loss_at(trainer.step), 1)
    return trainer


@pytest.mark.parametrize(
    ("loss_at", "told"),
    [
        (lambda step: 1, ""),
        (lambda step: 1 + (step >= 8), "the loss has grown from 1.00 to 1.80: a lower --learning-rate"),
        (lambda step: 2 - 1.2 * (step == 0), ""),  # an easy first batch
    ],
)
def test_an_increased_loss_is_reported_at_the_end(tmp_path, capsys, loss_at, told):
    constant(make(tmp_path, spike_patience=15), loss_at).fit(total_steps=20)
    assert told in (err := capsys.readouterr().err) and bool(told) == bool(err)


def test_a_loss_that_has_grown_beyond_a_guess_ends_the_run_at_its_end(tmp_path):
    trainer = constant(make(tmp_path, spike_patience=15), lambda step: 1 + 50 * (step >= 8))
    with pytest.raises(SavedError, match=r"^the loss has grown from 1\.00 to 41\.00 at step 20; saved in .*lower"):
        trainer.fit(total_steps=20)


def test_a_resumed_run_is_judged_by_the_losses_before_it_too(tmp_path, capsys):
    """Regression: only its last batch counted, which may be harder than all others."""

    def loss_at(step):
        return 1 + (step == 19)

    trainer = constant(make(tmp_path), loss_at)
    trainer.batches = lambda step: die_at(19, batches(step))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(total_steps=20)
    resumed = constant(make(tmp_path), loss_at)
    assert resumed.resume() and resumed.step == 19
    capsys.readouterr()
    resumed.fit(total_steps=20)
    assert not capsys.readouterr().err


def test_two_threads_do_not_write_at_once(tmp_path):
    """One saves because another process failed, while this process is saving."""
    trainer, at_once, most = make(tmp_path), [], []
    write = trainer.checkpoints.save

    def slow(*what):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.3)
        write(*what)
        at_once.pop()

    trainer.checkpoints.save = slow
    trainer.step, trainer._updates = 1, trainer.optimizer.count
    main = threading.Thread(target=trainer.save)
    main.start()
    time.sleep(0.1)
    assert trainer._save_with_others(lambda value: value == [1, 1])
    main.join()
    assert most == [1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make(tmp_path).fit(total_steps=2)
    other = Toy()
    other.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(UserError, match="a checkpoint of another model"):
        make(tmp_path, other).resume()


def test_a_run_resumed_at_its_end_has_the_results_of_the_whole(tmp_path):
    whole = make(tmp_path)
    whole.fit(total_steps=3, evaluate=lambda: {"val_loss": 0.123456})
    again = make(tmp_path)
    again.resume()
    again.fit(total_steps=3, evaluate=lambda: {"val_loss": 0.123456})
    assert again.results() == whole.results()
    assert whole.results() == {"steps": 3, "tokens": 96, "loss": round(whole.last_loss, 4), "val_loss": 0.1235}


def test_it_saves_before_it_evaluates(tmp_path):
    def evaluate():
        raise MemoryError("evaluation ran out of memory")

    with pytest.raises(MemoryError):
        make(tmp_path, eval_every=3).fit(total_steps=9, evaluate=evaluate)
    resumed = make(tmp_path)
    assert resumed.resume() and resumed.step == 3


def test_a_time_budget_ends_with_the_rate_at_its_end(tmp_path, monkeypatch):
    """Even if the machine becomes 20 times slower half-way: with a simulated clock, a step takes 1 ms, then 20."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("llmkit.training.trainer.time", clock)

    def source(step):
        for batch in batches(step):
            clock.now += 0.02 if step > 20 else 0.001
            step += 1
            yield batch

    trainer = make(tmp_path, source=source)
    trainer.fit(seconds=0.5)
    assert 0.5 <= trainer.elapsed < 0.53 and trainer.step > 21
    assert metrics(tmp_path)[-1]["lr_factor"] < 0.1


def test_an_evaluation_and_a_sample_prevented_by_a_kill_are_made_after_resuming(tmp_path):
    def rows(folder):
        return [
            (row["step"], *(key for key in ("loss", "val_loss", "sample") if key in row)) for row in metrics(folder)
        ]

    asked = {"total_steps": 6, "evaluate": lambda: {"val_loss": 1.0}, "sample": lambda: "text"}
    every = {"eval_every": 2, "sample_every": 3, "save_every": 1}
    make(tmp_path / "whole", **every).fit(**asked)
    for calls in (2, 3, 4, 5):  # the call that ends the run, of samples or evaluations
        for kind in ("evaluate", "sample"):
            left = iter(range(calls - 1))
            folder = tmp_path / f"{kind}{calls}"

            def ending(kind=kind, left=left):
                if next(left, None) is None:
                    raise ZeroDivisionError
                return asked[kind]()

            try:
                make(folder, **every).fit(**{**asked, kind: ending})
            except ZeroDivisionError:
                resumed = make(folder, **every)
                resumed.resume()
                resumed.fit(**asked)
            assert rows(folder) == rows(tmp_path / "whole")


def test_a_resumed_time_budget_counts_the_time_before(tmp_path):
    first = make(tmp_path)
    first.fit(seconds=0.3)
    second = make(tmp_path)
    assert second.resume() and second.elapsed >= 0.3
    second.fit(seconds=0.3)
    assert second.step == first.step
