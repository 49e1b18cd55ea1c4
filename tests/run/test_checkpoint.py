"""Run state goes to disk and back, exactly, without pickle."""

import random
from pathlib import Path

import numpy
import pytest
import torch

from lorafit.errors import UsageError
from lorafit.run import checkpoint, store


def state() -> checkpoint.RunState:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.arange(3.0)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    return checkpoint.RunState(
        position=checkpoint.Position(5, 1, 2),
        optimizer={**optimizer.state_dict(), "masters": [torch.ones(2)]},
        schedule=schedule.state_dict(),
        scaler={},
        sums={"window_loss": 1.25},
        random_state=checkpoint.random_state(),
        epoch_began=checkpoint.random_state(),
        read_at=[0, 3],
        journal=120,
        made_with={"learning_rate": 0.1},
    )


def write_file(folder: Path) -> None:
    (folder / "x").write_text("hello")


def test_round_trip(tmp_path: Path) -> None:
    saved, folder = state(), tmp_path / "checkpoint-5"
    size = checkpoint.save(folder, write_file, state=saved)
    assert size == store.bytes_of(folder)
    loaded = checkpoint.load(folder)
    assert loaded.position == saved.position
    assert loaded.sums == saved.sums and loaded.made_with == saved.made_with
    assert (loaded.read_at, loaded.journal) == ([0, 3], 120)
    first = loaded.optimizer["state"][0]
    for name, value in saved.optimizer["state"][0].items():
        assert torch.equal(first[name], value) and first[name].dtype == value.dtype
    assert torch.equal(loaded.optimizer["masters"][0], torch.ones(2))
    assert loaded.optimizer["param_groups"][0]["betas"] == [0.9, 0.999]
    assert loaded.schedule["base_lrs"] == saved.schedule["base_lrs"]
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ""}


def test_random_generators_continue(tmp_path: Path) -> None:
    saved, folder = state(), tmp_path / "checkpoint-5"
    checkpoint.save(folder, write_file, state=saved)
    expected = random.random(), numpy.random.rand(), torch.rand(2)
    checkpoint.set_random_state(checkpoint.load(folder).random_state)
    assert random.random() == expected[0]
    assert numpy.random.rand() == expected[1]
    assert torch.equal(torch.rand(2), expected[2])


def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    checkpoint.save(folder, write_file, state=state())
    (folder / checkpoint.TENSORS).write_bytes(b"x")
    with pytest.raises(
        UsageError, match=r"Can't find a valid checkpoint at .*: run_state\.safetensors has 1 bytes"
    ):
        checkpoint.load(folder)


def test_without_run_state_there_is_nothing_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    checkpoint.save(folder, write_file)
    with pytest.raises(UsageError, match="save_only_model"):
        checkpoint.load(folder)
