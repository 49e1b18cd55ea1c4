"""Readings keep to their share; sums do not depend on batches; modes are put back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafit.engine.evaluation import (
    FORWARD,
    GROUPS,
    SHARE,
    Evaluation,
    Predict,
    evaluate,
    measuring,
    plan_readings,
    with_last,
)
from lorafit.engine.layout import MicroBatch
from lorafit.engine.room import Room

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
    return MicroBatch({"labels": torch.tensor([nats / count])}, count, 0, 0)


def read(batches: list[MicroBatch], *, predict: Predict) -> Evaluation:
    room = Room()
    return evaluate(batches, lay_out=lambda batch, _: [batch], predict=predict, room=room)


def predict(batch: MicroBatch) -> tuple[Tensor, None, None, None]:
    return batch.inputs["labels"], None, None, None


def test_nats_are_summed_in_float64() -> None:
    many = [constant(1e8, 1), *(constant(1.0, 1) for _ in range(1000))]
    found = read(many, predict=predict)
    assert found.loss is not None and found.loss * 1001 == pytest.approx(1e8 + 1000, rel=1e-12)
    assert (found.supervised, found.examples) == (1001, 1001)


def test_batches_weigh_by_their_tokens() -> None:
    found = read([constant(9.0, 9), constant(7.0, 1)], predict=predict)
    assert found.loss == 1.6


def test_a_batch_without_supervision_weighs_nothing() -> None:
    empty = MicroBatch({"labels": torch.full((5,), math.nan)}, 0, 0, 0)
    found = read([constant(9.0, 9), empty], predict=predict)
    assert found.loss == 1.0 and found.examples == 6
    alone = read([empty], predict=predict).loss
    assert alone is not None and math.isnan(alone)


def test_a_batch_without_labels_weighs_by_its_rows() -> None:
    many = [MicroBatch({"x": torch.full((n,), float(n))}, 0, 0, 0) for n in (1, 3)]
    found = read(many, predict=lambda batch: (batch.inputs["x"], None, None, None))
    assert found.loss == 2.5


def test_of_a_loss_of_the_modules_own_a_micro_batch_is_a_group() -> None:
    found = read([constant(9.0, 9), constant(7.0, 2)], predict=predict)
    assert (found.nats, found.tokens) == ((9.0, 7.0), (9, 2))
    many = read([constant(1.0, 1) for _ in range(GROUPS + 2)], predict=predict)
    assert many.tokens == (2, 2, *[1] * (GROUPS - 2)) and many.nats[:3] == (2.0, 2.0, 1.0)


def test_a_set_without_losses_has_none() -> None:
    assert read([], predict=predict).loss is None
    unlabelled = MicroBatch({"x": torch.ones(1)}, 0, 0, 0)
    assert read([unlabelled], predict=lambda _: (None, None, None, None)).loss is None


def test_the_last_batch_is_known() -> None:
    made = [constant(1.0, 1), constant(1.0, 1), constant(1.0, 1)]
    assert [last for _, last in with_last(made)] == [False, False, True]
    assert list(with_last([])) == []


def test_modes_are_put_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), measuring(model):  # noqa: PT012
        assert not model[0].training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and model[0].training and not model[1].training
    assert torch.is_grad_enabled()
