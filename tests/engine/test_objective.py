"""The division by the whole step, and what other losses are taken for."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer_pt_utils import LabelSmoother

from lorafit.engine.layout import MicroBatch, as_given
from lorafit.engine.objective import Whole, own, own_loss, predictions_of, smoothed, summed
from lorafit.engine.precision import Precision
from lorafit.errors import ConfigError

PLAIN = Precision(torch.device("cpu"))


class Scores(nn.Module):
    """Logits from a table, by id; refuses labels, as `summed` must not pass them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table[input_ids]}


def batches(*sizes: int) -> list[MicroBatch]:
    made = []
    for size in sizes:
        ids = torch.arange(size * 4).reshape(size, 4) % 9
        labels = ids.clone()
        labels[0, :3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return as_given(made, shifted=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_shares_add_up_to_the_mean_over_the_step(smoothing: float) -> None:
    model, split = Scores(), batches(1, 3)
    whole = Whole(sum(batch.supervised for batch in split), 2)
    shares = [summed(PLAIN, smoothing=smoothing).part(model, batch, whole=whole) for batch in split]
    logits = [model(b.inputs["input_ids"])["logits"][:, :-1].flatten(0, 1) for b in split]
    targets = torch.cat([b.inputs["labels"][:, 1:].flatten() for b in split])
    expected = functional.cross_entropy(
        torch.cat(logits).double(), targets, label_smoothing=smoothing
    )
    assert sum(shares).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_step_without_supervision_is_zero_with_a_graph() -> None:
    model, (batch,) = Scores(), batches(1)
    batch.inputs["labels"][:] = -100
    loss = summed(PLAIN).part(model, batch, whole=Whole(0, 1))
    loss.backward()
    assert loss == 0 and not model.table.grad.any()


def test_evaluation_is_never_smoothed() -> None:
    model, (batch,) = Scores(), batches(2)
    plain, smooth = (summed(PLAIN, smoothing=s).measure(model, batch) for s in (0.0, 0.3))
    assert plain.loss == smooth.loss


def test_missing_labels_are_named() -> None:
    (batch,) = as_given([{"input_ids": torch.ones(1, 3).long()}], shifted=True)
    with pytest.raises(ConfigError, match="no labels, only input_ids"):
        summed(PLAIN).part(Scores(), batch, whole=Whole(1, 1))


@pytest.mark.parametrize(("divided", "share"), [(True, 6.0), (False, 3.0)])
def test_own_losses_are_divided_once(divided: bool, share: float) -> None:
    seen: list[Any] = []

    def compute(model: nn.Module, inputs: Any, *, count: int | None, outputs: bool) -> Any:
        seen.append((count, outputs))
        return torch.tensor(6.0), None

    (batch,) = batches(2)
    objective = own(compute, divided=lambda _: divided, shifted=True, precision=PLAIN)
    assert objective.part(Scores(), batch, whole=Whole(10, 2)) == share
    assert objective.measure(Scores(), batch).loss == 6
    assert seen == [(10, False), (batch.supervised, True)]


Output = namedtuple("Output", "loss logits")


@pytest.mark.parametrize(
    "outputs",
    [{"loss": torch.tensor(2.0), "logits": 1}, Output(torch.tensor(2.0), 1), torch.tensor(2.0)],
)
def test_a_loss_is_found_in_what_a_module_returns(outputs: Any) -> None:
    given: dict[str, Any] = {}

    class Returns(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            given.update(inputs)
            return outputs

    loss, _ = own_loss(Returns(), {"x": 1}, function=None, count=7, passed_on=True)
    assert loss == 2 and given == {"x": 1, "num_items_in_batch": 7}
    given.clear()
    own_loss(Returns(), {"x": 1}, function=None, count=7, passed_on=False)
    assert given == {"x": 1}


def test_a_loss_function_gets_labels_apart() -> None:
    class Echo(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return inputs

    def function(outputs: Any, labels: Any, num_items_in_batch: int | None) -> Any:
        return outputs, labels, num_items_in_batch

    loss, _ = own_loss(Echo(), {"x": 1, "labels": 2}, function=function, count=3, passed_on=False)
    assert loss == ({"x": 1}, 2, 3)


def test_predictions_are_every_output_but_the_loss() -> None:
    def found(outputs: Any, with_loss: bool = True, ignored: tuple[str, ...] = ()) -> Any:
        return predictions_of(outputs, ignored=ignored, with_loss=with_loss)

    assert found({"loss": 0, "logits": 1}) == 1
    assert found({"loss": 0, "logits": 1, "hidden": 2}) == (1, 2)
    assert found({"loss": 0, "logits": 1, "hidden": 2}, ignored=("hidden",)) == 1
    assert found((0, 1)) == 1
    assert found((0, 1), with_loss=False) == (0, 1)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("count", [None, 10])
def test_smoothing_is_transformers(shifted: bool, count: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, 2:] = -100
    ours = smoothed(0.2, shifted=shifted)({"logits": logits}, labels, num_items_in_batch=count)
    theirs = LabelSmoother(0.2)({"logits": logits}, labels.clone(), shift_labels=shifted)
    kept = int(((labels[:, 1:] if shifted else labels) != -100).sum())
    assert ours.item() == pytest.approx(theirs.item() * kept / (count or kept), rel=1e-6)
