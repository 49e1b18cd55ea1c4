"""What a micro-batch is, and what is counted before anything moves."""

import pytest
import torch

from lorafit.engine.layout import as_given

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([[5, 6, 7], [-100, 6, -100]]),
}


@pytest.mark.parametrize(("shifted", "supervised"), [(True, 3), (False, 4)])
def test_counts(shifted: bool, supervised: int) -> None:
    first, second = as_given([BATCH, BATCH], shifted=shifted)
    assert (first.supervised, first.tokens, first.positions, first.rows) == (supervised, 5, 6, 2)
    assert second == first and first.inputs == BATCH


def test_without_a_mask_every_position_is_a_token() -> None:
    (batch,) = as_given([{"input_ids": BATCH["input_ids"]}], shifted=True)
    assert (batch.supervised, batch.tokens, batch.positions, batch.rows) == (0, 6, 6, 2)


def test_only_labels_are_counted() -> None:
    """As transformers does: a loss of other labels is told no number."""
    given = {"x": torch.ones(4, 3), "target": torch.tensor([1, -100, 2, 0])}
    (batch,) = as_given([given], shifted=False)
    assert (batch.supervised, batch.tokens, batch.rows) == (0, 0, 4)


def test_what_else_a_collator_makes_goes_through() -> None:
    (batch,) = as_given([(torch.ones(4, 3), "text")], shifted=False)
    assert batch.rows == 4 and batch.to(torch.device("meta")).inputs[1] == "text"


def test_nested_tensors_move_too() -> None:
    given = {**BATCH, "past": [(torch.ones(1), "text")], "more": {"deep": torch.ones(2)}}
    (batch,) = as_given([given], shifted=True)
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["past"][0][1] == "text"
    tensors = [moved.inputs["input_ids"], moved.inputs["past"][0][0], moved.inputs["more"]["deep"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.supervised == batch.supervised
