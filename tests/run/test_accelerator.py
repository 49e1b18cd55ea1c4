"""`trainer.accelerator` answers as accelerate's does in one process."""

from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lorafit.engine.precision import Precision
from lorafit.run.accelerator import Accelerator

CPU = torch.device("cpu")


def make(dtype: torch.dtype | None = None) -> Any:
    return Accelerator(Precision(CPU, dtype), seed=3)


def public(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


@pytest.mark.parametrize("name", public(Accelerator))
def test_every_name_is_accelerates(name: str) -> None:
    assert hasattr(accelerate.Accelerator, name) or name in vars(accelerate.Accelerator(cpu=True))


def test_values_are_accelerates() -> None:
    theirs, ours = accelerate.Accelerator(cpu=True), make()
    for name in ("is_main_process", "is_local_main_process", "num_processes", "process_index",
                 "local_process_index", "is_last_process", "device", "mixed_precision",
                 "sync_gradients"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert make(torch.bfloat16).mixed_precision == "bf16"


def test_models_are_unwrapped() -> None:
    model = nn.Linear(2, 2)
    assert make().unwrap_model(model) is model
    assert make().unwrap_model(torch.compile(model)) is model


def test_work_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    ours, model = make(), nn.Linear(2, 1)
    with ours.accumulate(model), ours.autocast(), ours.main_process_first():
        ours.backward(model(torch.ones(1, 2)).sum())
    assert model.weight.grad is not None
    norm = ours.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1 and model.weight.grad.norm() < 1e-2
    tensor = torch.ones(2)
    assert all(
        same(tensor) is tensor for same in (ours.gather, ours.gather_for_metrics, ours.reduce)
    )
    ours.print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"
    assert ours.on_main_process(public) is public


def test_a_loader_that_shuffles_is_given_the_runs_order() -> None:
    loader = DataLoader(list(range(8)), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    model, prepared = make().prepare(nn.Linear(1, 1), loader)
    assert isinstance(model, nn.Linear)
    assert [b.tolist() for b in prepared] != [[0, 1], [2, 3], [4, 5], [6, 7]]
    again = make().prepare_data_loader(loader)
    assert [b.tolist() for b in make().prepare(loader)] == [b.tolist() for b in again]
