"""Readings keep to their share; sums do not depend on batches; modes are put back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorafit.engine.evaluation import FORWARD, SHARE, evaluate, measuring, plan_readings
from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Measured, Objective, summed
from lorafit.engine.precision import Precision

COUNTS = st.integers(1, 2000)


@given(COUNTS, COUNTS, st.integers(1, 100_000), st.integers(1, 5000))
def test_readings_keep_to_their_share(
    steps: int, per_epoch: int, examples: int, held_out: int
) -> None:
    planned = plan_readings(
        steps=steps, steps_per_epoch=per_epoch, examples=examples, held_out=held_out
    )
    assert {0, steps} <= planned.steps <= {0, steps, *range(per_epoch, steps, per_epoch)}
    assert len(planned.steps) <= 21
    assert 1 <= planned.examples <= held_out
    cost = len(planned.steps) * planned.examples * FORWARD
    assert cost <= SHARE * examples or planned.examples == min(held_out, 8)


def test_readings_at_each_epochs_end() -> None:
    planned = plan_readings(steps=90, steps_per_epoch=30, examples=3600, held_out=50)
    assert planned.steps == {0, 30, 60, 90} and planned.examples == 50
    assert "read 4 times" in planned.notice


def test_fewer_examples_before_fewer_readings() -> None:
    planned = plan_readings(steps=90, steps_per_epoch=30, examples=1000, held_out=500)
    assert planned.steps == {0, 30, 60, 90} and planned.examples == 25
    planned = plan_readings(steps=90, steps_per_epoch=30, examples=500, held_out=500)
    assert planned.steps == {0, 90} and planned.examples == 25
    planned = plan_readings(steps=90, steps_per_epoch=30, examples=10, held_out=500)
    assert planned.steps == {0, 90} and planned.examples == 8


def test_short_epochs_are_read_every_twentieth_of_the_run() -> None:
    planned = plan_readings(steps=1000, steps_per_epoch=10, examples=10**6, held_out=10)
    assert planned.steps == set(range(0, 1001, 50))


def constant(nats: float, count: int) -> MicroBatch:
    return MicroBatch({"nats": torch.tensor(nats)}, count, 0, 0, 1)


def measure(model: nn.Module, batch: MicroBatch) -> Measured:
    return Measured(batch.inputs["nats"], batch.supervised)


SUMS = Objective(summed().part, measure, shifted=True)
FULL = Precision(torch.device("cpu"))


def test_nats_are_summed_in_float64() -> None:
    many = [constant(1e8, 1), *(constant(1.0, 1) for _ in range(1000))]
    found = evaluate(nn.Linear(1, 1), many, objective=SUMS, precision=FULL)
    assert found.loss * 1001 == pytest.approx(1e8 + 1000, rel=1e-12)
    assert (found.supervised, found.examples) == (1001, 1001)


def test_batches_weigh_by_their_tokens() -> None:
    found = evaluate(
        nn.Linear(1, 1), [constant(9.0, 9), constant(7.0, 1)], objective=SUMS, precision=FULL
    )
    assert found.loss == 1.6


def test_an_empty_set_has_no_loss() -> None:
    assert math.isnan(evaluate(nn.Linear(1, 1), [], objective=SUMS, precision=FULL).loss)


def test_modes_are_put_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), measuring(model):  # noqa: PT012
        assert not model[0].training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and model[0].training and not model[1].training
    assert torch.is_grad_enabled()
