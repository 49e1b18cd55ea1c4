"""Evaluation: nats over supervised tokens, both summed over the whole set, divided once.

The number does not depend on batch size or padding. Predictions are kept only where somebody wants
them; otherwise memory does not grow with the set. Also decides which automatic readings fit within
their share of a run. Knows no files and no optimiser.
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.engine.layout import MicroBatch
from lorafit.engine.room import Room

T = TypeVar("T")

LayOut = Callable[[Any, int], list[MicroBatch]]
"""What the collator made, and a number of tokens -> its micro-batches, of so many at most."""

Predict = Callable[[MicroBatch], tuple[Tensor | None, Any, Any]]
"""A micro-batch -> its mean loss, predictions and labels, each None where there is none."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` in nats per supervised token (float64 arithmetic): NaN where nothing is supervised,
    None where nothing has labels."""

    loss: float | None
    supervised: int
    examples: int
    seconds: float


class Predicted(NamedTuple):
    """One micro-batch after `Predict`; `last` of its set or not."""

    batch: MicroBatch
    loss: Tensor | None
    logits: Any
    labels: Any
    last: bool = False


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    lay_out: LayOut,
    predict: Predict,
    room: Room,
    step: int = 0,
    keep: Callable[[Predicted], None] | None = None,
) -> Evaluation:
    """The mean loss over `batches`, with dropout off and without gradients.

    A micro-batch weighs by its supervised tokens; by its rows, where it has no "labels".

    Args:
        room: How much runs at a time.
        step: Where the run stands, for `room`'s events.
        keep: Given what was predicted of each micro-batch, for metrics and predictions.

    Raises:
        Full: memory does not hold a single row.
    """
    nats: Tensor | float = 0.0
    count = examples = 0
    has_loss = False
    started = time.perf_counter()

    with measuring(model):
        for predicted in _predicted(batches, lay_out, predict=predict, room=room, step=step):
            batch, loss = predicted.batch, predicted.loss
            weight = batch.supervised if batch.has_labels else batch.rows
            has_loss |= loss is not None
            if loss is not None and weight:  # without supervision there is no mean to weigh
                nats = nats + exact(loss) * weight
                count += weight
            examples += batch.rows
            if keep is not None:
                keep(predicted)
    mean = float(nats) / count if count else float("nan")
    return Evaluation(mean if has_loss else None, count, examples, time.perf_counter() - started)


def _predicted(
    batches: Iterable[Any], lay_out: LayOut, *, predict: Predict, room: Room, step: int
) -> Generator[Predicted]:
    """What is predicted of each micro-batch, in parts as small as memory needs."""

    def run(parts: Sequence[MicroBatch]) -> list[Predicted]:
        made: list[Predicted] = []
        for part in parts:
            made.append(Predicted(part, *predict(part)))
            room.passed += 1
        return made

    for batch, last in with_last(batches):
        made = room.held(partial(lay_out, batch), run, step=step)
        yield from made[:-1]
        yield made[-1]._replace(last=last)


def exact(loss: Tensor) -> Tensor:
    """The mean of `loss` in float64: on its device, or on the CPU for Metal, which has none."""
    home = torch.device("cpu") if loss.device.type == "mps" else loss.device
    return loss.detach().mean().to(home, torch.float64)


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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class Gathered:
    """What metrics and predictions are made of, gathered from each micro-batch: call it with one.

    Batches of unequal widths are joined by padding with -100 on the right (transformers' rule).

    Attributes:
        compute_metrics: Takes an `EvalPrediction`; with `batch_eval_metrics` also whether to return
            the result, which is asked for at the last micro-batch.
        preprocess: (predictions, labels) -> what is kept of the predictions.
        main_input: The name of the input that `include_for_metrics` means.
        keeps: Whether arrays are wanted; if not, metrics are computed batch by batch.
    """

    arguments: TrainingArguments
    compute_metrics: Callable[..., Mapping[str, Any] | None] | None
    preprocess: Callable[[Any, Any], Any] | None
    main_input: str
    keeps: bool
    _kept: dict[str, Any] = field(default_factory=dict)
    _metrics: Mapping[str, Any] | None = None
    _seen: int = 0

    def __call__(self, predicted: Predicted) -> None:
        """Keep what is wanted of one micro-batch."""
        batch, loss, logits, labels, last = predicted
        if logits is not None and self.preprocess is not None:
            logits = self.preprocess(logits, labels)
        wanted = self.arguments.include_for_metrics
        parts: dict[str, Any] = {
            "predictions": logits,
            "label_ids": labels,
            "inputs": batch.inputs[self.main_input] if "inputs" in wanted else None,
            "losses": loss.repeat(batch.rows) if loss is not None and "loss" in wanted else None,
        }
        by_batch = self.arguments.batch_eval_metrics and self.compute_metrics is not None
        if by_batch and logits is not None and labels is not None:
            assert self.compute_metrics is not None
            # one batch at a time the metrics see all inputs, else the main one: transformers' rule
            given = compat.eval_prediction(
                parts | {"inputs": batch.inputs if "inputs" in wanted else None}
            )
            self._metrics = self.compute_metrics(given, compute_result=last)
        if self.keeps or not by_batch:
            self._add(parts)

    def _add(self, parts: Mapping[str, Any]) -> None:
        self._seen += 1
        every = self.arguments.eval_accumulation_steps
        for name, part in parts.items():
            if part is not None:
                joined = self.arguments.eval_do_concat_batches
                kept = self._kept.setdefault(name, compat.eval_container(joined=joined))
                kept.add(part)
                if every and self._seen % every == 0:
                    kept.to_cpu_and_numpy()

    def arrays(self, name: str) -> Any:
        """The `predictions` or `label_ids` of the whole set in numpy; None where there are none."""
        return self._kept[name].get_arrays() if name in self._kept else None

    def metrics(self) -> dict[str, Any]:
        """What `compute_metrics` returns, in plain numbers; empty without it, or without labels."""
        parts = {name: self.arrays(name) for name in self._kept}
        ready = "predictions" in parts and "label_ids" in parts
        if self._metrics is None and self.compute_metrics is not None and ready:
            self._metrics = self.compute_metrics(compat.eval_prediction(parts))
        return compat.plain_metrics(self._metrics or {})


SHARE = 0.05
"""Automatic readings may cost this much of a run."""
FORWARD = 0.5
"""An evaluated example's cost beside a trained one: LoRA's backward costs about one forward."""


@dataclass(frozen=True, slots=True)
class Readings:
    """When to read the evaluation loss by itself (`steps`; 0 is before training), on the first
    `examples` of the evaluation set in an order drawn once from the seed."""

    steps: frozenset[int]
    examples: int

    @property
    def notice(self) -> str:
        """One line about them; empty where there are none."""
        if not self.examples:
            return ""
        return (
            f"eval_dataset without eval_strategy: the loss on {self.examples} of its examples is "
            f"read {len(self.steps)} times, within 5% of the run's cost"
        )


def plan_readings(*, steps: int, steps_per_epoch: int, examples: int, held_out: int) -> Readings:
    """Before training, at each epoch's end but at most every 5% of the run, and at the end.

    Their cost is held within `SHARE` of the run's by reading fewer examples, always the same ones;
    where fewer than 16 would be left, the epochs' readings go first, then the bound gives way
    to 8 examples, below which a reading says nothing.

    Args:
        steps: Optimiser steps of the run.
        steps_per_epoch: Optimiser steps of an epoch.
        examples: Training examples the run processes, epochs counted.
        held_out: Examples in the evaluation set.
    """
    spacing = max(1, -(-steps // 20))
    inner: list[int] = []
    for step in range(steps_per_epoch, steps, steps_per_epoch):
        if step - (inner[-1] if inner else 0) >= spacing and steps - step >= spacing:
            inner.append(step)
    affordable = int(examples * SHARE / FORWARD)
    for chosen in ({0, *inner, steps}, {0, steps}):
        size = min(held_out, affordable // len(chosen))
        if size >= min(16, held_out):
            return Readings(frozenset(chosen), size)
    return Readings(frozenset({0, steps}), min(held_out, 8))
