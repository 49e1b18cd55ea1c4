"""The examples of one step -> micro-batches. Layout changes speed and memory, never the numbers.

Owns what a micro-batch is and how many supervised tokens it has, counted on the host before
anything moves to a device. Knows neither models nor files. `as_given` runs the user's own padded
batches literally; it is the only layout of this version.
"""

from collections.abc import Callable, Iterable, Mapping
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
    """

    inputs: Any
    supervised: int
    tokens: int
    positions: int

    @property
    def rows(self) -> int:
        """How many examples."""
        return _rows(self.inputs)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with its inputs on `device`."""
        return replace(self, inputs=mapped(self.inputs, lambda t: t.to(device, non_blocking=True)))


def moved(value: Any, device: torch.device) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples on `device`; copies are
    asynchronous. Mappings are copied, as an override may change them."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples changed; types are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)({key: mapped(item, change) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def as_given(batches: Iterable[Any], *, shifted: bool) -> list[MicroBatch]:
    """One micro-batch for each batch that the collator made, in its order.

    Args:
        batches: Mappings, of tensors for the most part; what else a collator made goes through.
        shifted: Whether token t is predicted from t - 1, so that a row's first label is no target.
    """
    return [_micro_batch(batch, shifted=shifted) for batch in batches]


def _rows(value: Any) -> int:
    """The length of the first tensor inside that has one; 0 without any."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    parts = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, Mapping | list | tuple)
    return next((rows for part in parts if (rows := _rows(part))), 0) if nested else 0


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
    )
