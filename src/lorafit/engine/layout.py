"""The examples of one step -> micro-batches. Layout changes speed and memory, never the numbers.

Owns what a micro-batch is and how many supervised tokens it has, counted on the host before
anything moves to a device. Knows neither models nor files. `as_given` runs the user's own padded
batches literally; it is the only layout of this version.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels.cross_entropy import supervised_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward takes.

    Attributes:
        inputs: The model's keyword arguments, labels among them.
        supervised: Tokens that carry loss; 0 where there are no labels to count.
        tokens: Real tokens, padding left out.
        rows: How many examples.
    """

    inputs: dict[str, Any]
    supervised: int
    tokens: int
    rows: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with every tensor on `device`, nested ones too; copies are asynchronous."""
        return MicroBatch(move(self.inputs, device), self.supervised, self.tokens, self.rows)


def move(value: Any, device: torch.device) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


def as_given(
    batches: Iterable[Any], *, shifted: bool, label_names: tuple[str, ...] = ("labels",)
) -> list[MicroBatch]:
    """One micro-batch for each batch that the collator made, in its order.

    Args:
        batches: Mappings of tensors; a batch that is a tuple or a bare tensor is refused by the
            model's forward, not here.
        shifted: Whether token t is predicted from t - 1, so that a row's first label is no target.
        label_names: Where labels lie; the first present is counted.
    """
    return [_micro_batch(dict(batch), label_names, shifted=shifted) for batch in batches]


def _micro_batch(
    inputs: dict[str, Any], label_names: tuple[str, ...], *, shifted: bool
) -> MicroBatch:
    labels = next((inputs[name] for name in label_names if name in inputs), None)
    sequences = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    first = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
    if isinstance(mask, Tensor):
        tokens = int(mask.count_nonzero())
    else:
        tokens = sequences.numel() if isinstance(sequences, Tensor) else 0
    return MicroBatch(
        inputs=inputs,
        supervised=supervised_tokens(labels, shifted=shifted) if isinstance(labels, Tensor) else 0,
        tokens=tokens,
        rows=first.shape[0] if first is not None and first.ndim else 0,
    )
