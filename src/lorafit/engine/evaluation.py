"""Evaluation: nats over supervised tokens, both summed over the whole set, divided once.

The number does not depend on batch size or padding. Predictions are kept only where somebody wants
them; otherwise memory does not grow with the set. Also plans which automatic readings fit within
their share of a run. Knows no files and no optimiser.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorafit.engine.layout import MicroBatch
from lorafit.engine.room import Room
from lorafit.model.base import modes_kept
from lorafit.world import ALONE, World

T = TypeVar("T")

LayOut = Callable[[Any, int], list[MicroBatch]]
"""What the collator made, and a number of tokens -> its micro-batches, of so many at most."""

Predict = Callable[[MicroBatch], tuple[Tensor | None, Any, Any, Tensor | None]]
"""A micro-batch -> its mean loss, predictions, labels, and the nats of each supervised token, each
None where there is none."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` in nats per supervised token (float64 arithmetic): NaN where nothing is supervised,
    None where nothing has labels. `nats` and `tokens`: see `Groups`; empty where
    the loss is not finite."""

    loss: float | None
    supervised: int
    examples: int
    seconds: float
    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


class Predicted(NamedTuple):
    """One micro-batch after `Predict`; `last` of its set or not. `each`: see `Measured`."""

    batch: MicroBatch
    loss: Tensor | None
    logits: Any
    labels: Any
    each: Tensor | None = None
    last: bool = False

    @property
    def weight(self) -> int:
        """Its supervised tokens; its rows, where it has no labels."""
        return self.batch.supervised if self.batch.has_labels else self.batch.rows


GROUPS = 512
"""So many sums of nats are kept of a set at most, however many examples it has."""


@dataclass
class Groups:
    """Summed nats and supervised tokens of a set's examples, number i in group i mod `GROUPS`, so
    that neither batches nor layout matter. Where only the module knows its loss, a micro-batch's
    counts as that of its first example.

    Mutable: `seen` examples have been added.
    """

    seen: int = 0
    _nats: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.float64))
    _tokens: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.int64))

    def add(self, parts: Sequence[Predicted]) -> None:
        """The parts of the next batch."""
        began = self.seen
        for part in parts:
            first = began if part.batch.documents else self.seen
            self.seen += part.batch.rows
            if part.loss is None or not part.weight:
                continue
            owners_N, nats_N = torch.zeros(1, dtype=torch.int64), exact(part.loss)[None]
            tokens_N = torch.tensor([part.weight])
            nats_N = nats_N * part.weight
            if part.each is not None:
                owners_N, nats_N = part.batch.owners, wide(part.each)
                tokens_N = torch.ones_like(owners_N)
            groups_N = (owners_N + first) % GROUPS
            self._tokens.index_add_(0, groups_N, tokens_N)
            self._nats = self._nats.to(nats_N.device)
            self._nats.index_add_(0, groups_N.to(nats_N.device), nats_N)

    def told(self, world: World = ALONE) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Nats, to six digits after the point, and tokens, of each group that has an example, over
        the processes that have worked on the set together."""
        count = min(self.seen, GROUPS)
        nats_N = world.added_exactly(self._nats[:count].cpu())
        nats = tuple(round(each, 6) for each in nats_N.tolist())
        return nats, tuple(world.added(*self._tokens[:count].tolist()))


def evaluate(
    batches: Iterable[Any],
    *,
    lay_out: LayOut,
    predict: Predict,
    room: Room,
    step: int = 0,
    keep: Callable[[Predicted], None] | None = None,
    world: World = ALONE,
) -> Evaluation:
    """The mean loss over `batches`; the model is to be in evaluation (`measuring`).

    A micro-batch weighs by its supervised tokens; by its rows, where it has no "labels".

    Args:
        room: How much runs at a time.
        step: Where the run stands, for `room`'s events.
        keep: Given what was predicted of each micro-batch, for metrics and predictions.
        world: The processes that evaluate together, each its share of the batches.

    Raises:
        Full: memory does not hold a single row.
    """
    nats: Tensor | float = 0.0
    count = 0
    has_loss = False
    started, groups = time.perf_counter(), Groups()

    with world.jointly():
        told = _predicted(
            batches, lay_out, predict=predict, room=room, step=step, groups=groups, world=world
        )
        for predicted in told:
            loss, weight = predicted.loss, predicted.weight
            has_loss |= loss is not None
            if loss is not None and weight:  # without supervision there is no mean to weigh
                nats = nats + exact(loss) * weight
                count += weight
            if keep is not None:
                keep(predicted)
    nats, count, losses = world.added_exactly(
        torch.tensor([float(nats), count, has_loss], dtype=torch.float64)
    ).tolist()
    mean = nats / count if count else float("nan")
    each = groups.told(world) if math.isfinite(mean) else ((), ())
    seconds = time.perf_counter() - started
    return Evaluation(mean if losses else None, int(count), groups.seen, seconds, *each)


def _predicted(
    batches: Iterable[Any],
    lay_out: LayOut,
    *,
    predict: Predict,
    room: Room,
    step: int,
    groups: Groups,
    world: World,
) -> Generator[Predicted]:
    """What is predicted of each micro-batch of this process's batches, in parts as small as memory
    needs."""

    def run(parts: Sequence[MicroBatch]) -> list[Predicted]:
        made: list[Predicted] = []
        for part in parts:
            made.append(Predicted(part, *predict(part)))
            room.passed += 1
        return made

    for number, (batch, last) in enumerate(with_last(batches)):
        if not world.owns(number):
            groups.seen += sum(part.rows for part in lay_out(batch, room.tokens))
            continue
        made = room.held(partial(lay_out, batch), run, step=step)
        groups.add(made)
        yield from made[:-1]
        yield made[-1]._replace(last=last)


def exact(loss: Tensor) -> Tensor:
    """The mean of `loss` in float64."""
    return wide(loss.detach().mean())


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64: on its device, or on the CPU for Metal, which has none."""
    home = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.to(home, torch.float64)


def with_last(batches: Iterable[T]) -> Generator[tuple[T, bool]]:
    """Each batch, and whether it is the last one; reads one batch ahead."""
    waiting: list[T] = []
    for batch in batches:
        yield from ((before, False) for before in waiting)
        waiting = [batch]
    yield from ((batch, True) for batch in waiting)


@contextmanager
def measuring(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; each module's own mode is put back afterwards."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


SHARE = 0.05
"""Automatic readings may cost this much of a run."""
FORWARD = 0.5
"""An evaluated example's cost beside a trained one: LoRA's backward costs about one forward."""


@dataclass(frozen=True, slots=True)
class Readings:
    """When to read the evaluation loss by itself (`steps`; 0 is before training), on the first
    `examples` of the evaluation set in an order drawn once from the seed. So many of the training
    set are read beside it, and beside evaluations that were asked for; 0: nothing is."""

    steps: frozenset[int]
    examples: int

    @property
    def notice(self) -> str:
        """One line about them; empty where there are none."""
        if not self.steps:
            return ""
        return (
            f"eval_dataset without eval_strategy: the loss on {self.examples} of its examples, and "
            f"on as many of training, is read {len(self.steps)} times, within 5% of the run's cost"
        )


def plan_readings(
    *, steps: int, steps_per_epoch: int, examples: int, held_out: int, often: bool = False
) -> Readings:
    """Before training, at each epoch's end but at most every 5% of the run, and at the end.

    Their cost is held within `SHARE` of the run's by reading fewer examples, always the same ones;
    where fewer than 16 would be left, the epochs' readings go first, then the bound gives way
    to 8 examples, below which a reading says nothing. The training examples beside are not
    counted: what readings really take is held by reading less often (`run.readings`).

    Args:
        steps: Optimiser steps of the run.
        steps_per_epoch: Optimiser steps of an epoch.
        examples: Training examples the run processes, epochs counted.
        held_out: Examples in the evaluation set.
        often: Every 5% of the run, whatever its epochs, and on 16 examples at least.
    """
    spacing = max(1, -(-steps // 20))
    between = spacing if often else steps_per_epoch
    inner: list[int] = []
    for step in range(between, steps, between):
        if step - (inner[-1] if inner else 0) >= spacing and steps - step >= spacing:
            inner.append(step)
    affordable = int(examples * SHARE / FORWARD)
    for chosen in ({0, *inner, steps}, {0, steps}):
        size = min(held_out, affordable // len(chosen))
        if often:
            size = max(size, min(16, held_out))
        if size >= min(16, held_out):
            return Readings(frozenset(chosen), size)
    return Readings(frozenset({0, steps}), min(held_out, 8))
