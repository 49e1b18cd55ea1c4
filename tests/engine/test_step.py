"""One step: shares summed, clipped once, applied or not, and reported."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Measured, Objective, Whole
from lorafit.engine.optim import Updater
from lorafit.engine.precision import Precision
from lorafit.engine.step import Engine

CPU = torch.device("cpu")


class Told:
    """Writes down what a watch is told; raises after micro-batch `stop`."""

    def __init__(self, stop: int = -1) -> None:
        self.seen: list[Any] = []
        self.stop = stop

    def backward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_micro_batch(self, *, last: bool) -> None:
        self.seen.append(last)
        if len(self.seen) == self.stop:
            raise InterruptedError

    def before_update(self) -> None:
        self.seen.append("before")

    def after_update(self) -> None:
        self.seen.append("after")


def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
    return (model.weight * batch.inputs["x"]).sum() / whole.supervised  # type: ignore[operator]


def measure(model: nn.Module, batch: MicroBatch) -> Measured:
    raise NotImplementedError


def engine(*, max_norm: float = 0.0, plateau: bool = False) -> Engine:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = (
        ReduceLROnPlateau(optimizer) if plateau else LambdaLR(optimizer, lambda s: 1 / (1 + s))
    )
    return Engine(
        model,
        Objective(part, measure, shifted=True, divides=True),
        updater=Updater(optimizer),
        schedule=schedule,
        precision=Precision(CPU),
        max_norm=max_norm,
    )


def batch(x: list[float], supervised: int) -> MicroBatch:
    return MicroBatch({"x": torch.tensor([x])}, supervised, tokens=3, positions=5)


BATCHES = [batch([3.0, 0.0], 1), batch([0.0, 12.0], 2)]


def test_a_step_is_the_sum_over_its_micro_batches() -> None:
    made, told = engine(), Told()
    result = made.step(BATCHES, told)
    assert result.gradient_norm == pytest.approx((1 + 16) ** 0.5)
    assert made.model.weight.tolist() == [[-0.5, -2.0]]
    assert (result.tokens, result.positions, result.supervised) == (6, 10, 3)
    assert bool(result.applied) and result.learning_rate == 0.5
    assert told.seen == [False, True, "before", "after"]
    assert made.model.weight.grad is None
    assert made.step(BATCHES, Told()).learning_rate == 0.25


def test_clipping_acts_on_the_total_and_reports_what_was() -> None:
    made = engine(max_norm=1.0)
    result = made.step(BATCHES, Told())
    assert result.gradient_norm == pytest.approx(17**0.5)
    assert made.model.weight.norm().item() == pytest.approx(0.5, rel=1e-5)


def test_no_clipping_leaves_gradients_bitwise() -> None:
    made = engine()
    made.step([batch([0.1, 1e10], 1)], Told())
    assert torch.equal(made.model.weight, -0.5 * torch.tensor([[0.1, 1e10]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_and_not_applied(bad: float) -> None:
    made = engine()
    result = made.step([BATCHES[0], batch([bad, 0.0], 2)], Told())
    assert not result.applied and not made.model.weight.any()
    assert made.model.weight.grad is None
    assert bool(made.step(BATCHES, Told()).applied)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_schedule_waits_where_a_scaler_skips(scaled: bool) -> None:
    made = engine()
    made.precision = Precision(CPU, scaler=torch.amp.GradScaler("cpu", enabled=scaled))
    assert not bool(made.step([batch([float("inf"), 0.0], 1)], Told()).applied)
    assert made.step(BATCHES, Told()).learning_rate == (0.5 if scaled else 0.25)


def test_an_abandoned_step_leaves_nothing() -> None:
    made = engine()
    with pytest.raises(InterruptedError):
        made.step(BATCHES, Told(stop=1))
    made.abandon()
    assert made.model.weight.grad is None and not made.model.weight.any()
    assert made.schedule.last_epoch == 0


def test_forward_and_backward_may_be_anothers() -> None:
    made, seen = engine(), []

    def run(batch: MicroBatch, whole: Whole) -> Tensor:
        seen.append(whole)
        loss = part(made.model, batch, whole=whole)
        loss.backward()
        return loss.detach()

    made.run_part = run
    assert made.step(BATCHES, Told()).gradient_norm == pytest.approx(17**0.5)
    assert seen == [Whole(3, 2, tokens=6, positions=10)] * 2


def test_a_plateau_schedule_waits_for_its_metric() -> None:
    made = engine(plateau=True)
    made.step(BATCHES, Told())
    assert made.schedule.last_epoch == 0
