"""The examples of one step -> micro-batches. Layout changes speed and memory, never the numbers.

Owns what a micro-batch is and how many supervised tokens it has, counted on the host before
anything moves to a device. Knows neither models nor files. `as_given` runs the user's own padded
batches literally; it is the only layout of this version.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        positions: Tokens with their padding: what the forward is run on.
        rows: How many examples.
    """

    inputs: dict[str, Any]
    supervised: int
    tokens: int
    positions: int
    rows: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with every tensor on `device`, nested ones too; copies are asynchronous."""
        inputs = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else _moved(v, device)
            for k, v in self.inputs.items()
        }
        return replace(self, inputs=inputs)


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def as_given(batches: Iterable[Any], *, shifted: bool, labels: Sequence[str]) -> list[MicroBatch]:
    """One micro-batch for each batch that the collator made, in its order.

    Args:
        batches: Mappings, of tensors for the most part.
        shifted: Whether token t is predicted from t - 1, so that a row's first label is no target.
        labels: Names under which labels may lie; the first present is counted.
    """
    return [_micro_batch(dict(batch), labels, shifted=shifted) for batch in batches]


def _micro_batch(inputs: dict[str, Any], names: Sequence[str], *, shifted: bool) -> MicroBatch:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    none = torch.empty(0)
    ids = tensors.get("input_ids", none)
    labels = next((tensors[name] for name in names if name in tensors), none)
    return MicroBatch(
        inputs=inputs,
        supervised=supervised_tokens(labels, shifted=shifted),
        tokens=int(tensors.get("attention_mask", torch.ones_like(ids)).count_nonzero()),
        positions=ids.numel(),
        rows=next((len(value) for value in tensors.values() if value.ndim), 0),
    )
