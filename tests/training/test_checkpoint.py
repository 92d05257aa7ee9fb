"""Checkpoints survive kills and full disks, and damaged ones are reported."""

import os

import pytest
import torch

from llmkit.errors import UserError
from llmkit.training.checkpoint import STATE, TENSORS, Checkpoints


def test_newest_is_loaded_and_older_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path / "state", keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, {"weight": torch.full((2,), float(step))}, {"tokens": step * 8})
    checkpoints.wait()
    tensors, state = checkpoints.load()
    assert checkpoints.steps() == [20, 30]
    assert tensors["weight"].tolist() == [30.0, 30.0]
    assert state["step"] == 30 and state["tokens"] == 240


def test_the_saved_state_is_that_of_the_call_of_save(tmp_path):
    checkpoints, weight = Checkpoints(tmp_path), torch.zeros(1000)
    checkpoints.save(1, {"weight": weight}, {})
    weight.add_(1)
    checkpoints.wait()
    assert checkpoints.load()[0]["weight"].sum() == 0


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"weight": torch.ones(1)}, {}, wait=True)
    half = tmp_path / "step-00000006.partial"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    assert checkpoints.steps() == [5]
    assert checkpoints.load()[1]["step"] == 5


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_damage_is_named(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"weight": torch.ones(100)}, {}, wait=True)
    place = tmp_path / "step-00000005" / name
    place.write_bytes(place.read_bytes()[:-7])
    with pytest.raises(UserError, match="step-00000005: damaged checkpoint"):
        checkpoints.load()


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys, name):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 6):
        checkpoints.save(step, {"weight": torch.full((100,), float(step))}, {"tokens": step}, wait=True)
    place = tmp_path / "step-00000006" / name
    content = bytearray(place.read_bytes())
    content[-20 if name == TENSORS else content.index(b"tokens") + len('tokens": ')] ^= 1
    place.write_bytes(content)
    again = Checkpoints(tmp_path)
    assert again.state()["step"] == 5
    tensors, state = again.load()
    assert (tensors["weight"][0], state["step"]) == (5, 5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "step-00000006: damaged checkpoint (" in said[0] and name in said[0]
    again.save(6, {"weight": torch.ones(1)}, {}, wait=True)
    assert Checkpoints(tmp_path).load()[1]["step"] == 6


@pytest.mark.parametrize(
    "state", [b"{}", b"", b"[]", b'{"step": "b"}', b'{"step": 1000000000}', b'{"step":6,"seal":""}']
)
def test_a_state_that_was_not_written_so_is_damage(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(6, {"weight": torch.ones(1)}, {}, wait=True)
    (tmp_path / "step-00000006" / STATE).write_bytes(state)
    with pytest.raises(UserError, match="step-00000006: damaged checkpoint"):
        Checkpoints(tmp_path).load()


def test_other_files_than_checkpoints_are_ignored(tmp_path, capsys):
    Checkpoints(tmp_path).save(6, {"weight": torch.ones(1)}, {}, wait=True)
    for name in ("step-00000006.former", "step-00000008.partial", "step-junk", "step-00000010"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000012").write_text("")
    assert Checkpoints(tmp_path).load()[1]["step"] == 6
    assert capsys.readouterr().err.count("\n") == 1  # the empty folder is named


def test_an_error_of_the_background_write_reaches_the_caller(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    checkpoints = Checkpoints(tmp_path / "state")
    checkpoints.save(1, {"weight": torch.ones(1)}, {})
    with pytest.raises(OSError):
        checkpoints.wait()


def test_a_pipe_in_place_of_the_tensors_is_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"weight": torch.ones(1)}, {}, wait=True)
    tensors = tmp_path / "step-00000005" / TENSORS
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(UserError, match=f"step-00000005: damaged checkpoint .*{TENSORS} is not a file"):
        Checkpoints(tmp_path).load()
