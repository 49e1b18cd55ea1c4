"""The examples of one step -> micro-batches. Layout changes speed and memory, never the numbers.

Owns what a micro-batch is and how many supervised tokens it has, counted on the host before
anything moves to a device. Knows neither models nor files. `as_given` runs the user's own padded
batches literally; it is the only layout of this version.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels.cross_entropy import supervised_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward takes.

    Attributes:
        inputs: The model's keyword arguments, labels among them; or what a collator of the user's
            made for an override of theirs.
        supervised: Tokens that carry loss; 0 where there are no "labels" to count.
        tokens: Real tokens, padding left out.
        positions: Tokens with their padding: what the forward is run on.
        rows: How many examples.
    """

    inputs: Any
    supervised: int
    tokens: int
    positions: int
    rows: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with its inputs on `device`."""
        return replace(self, inputs=moved(self.inputs, device))


def moved(value: Any, device: torch.device) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples on `device`; copies are
    asynchronous. Mappings become dicts, which an override may change."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value


def as_given(batches: Iterable[Any], *, shifted: bool) -> list[MicroBatch]:
    """One micro-batch for each batch that the collator made, in its order.

    Args:
        batches: Mappings, of tensors for the most part; what else a collator made goes through.
        shifted: Whether token t is predicted from t - 1, so that a row's first label is no target.
    """
    return [_micro_batch(batch, shifted=shifted) for batch in batches]


def _micro_batch(inputs: Any, *, shifted: bool) -> MicroBatch:
    named = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    tensors: dict[Any, Tensor] = {name: item for name, item in named if isinstance(item, Tensor)}
    none = torch.empty(0)
    ids = tensors.get("input_ids", none)
    return MicroBatch(
        inputs=inputs,
        supervised=supervised_tokens(tensors.get("labels", none), shifted=shifted),
        tokens=int(tensors.get("attention_mask", torch.ones_like(ids)).count_nonzero()),
        positions=ids.numel(),
        rows=next((len(value) for value in tensors.values() if value.ndim), 0),
    )
