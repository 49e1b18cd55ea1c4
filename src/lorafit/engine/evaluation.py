"""Evaluation: nats over supervised tokens, both summed over the whole set, divided once.

The number does not depend on batch size or padding. Logits are kept only when predictions are
wanted; otherwise memory does not grow with the set. Also decides which automatic readings fit
within their share of a run. Knows no files and no optimiser.
"""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Objective
from lorafit.engine.precision import Precision


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` in nats per supervised token (float64 arithmetic); NaN for an empty set."""

    loss: float
    supervised: int
    examples: int
    seconds: float


def evaluate(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    *,
    objective: Objective,
    precision: Precision,
    keep: Callable[[MicroBatch, object], None] | None = None,
) -> Evaluation:
    """Total loss over `batches`, with dropout off and without gradients.

    Args:
        keep: Given each micro-batch (on the device) and its logits, for metrics and predictions.
    """
    # Metal has no float64
    home = torch.device("cpu") if precision.device.type == "mps" else precision.device
    nats = torch.zeros((), dtype=torch.float64, device=home)
    count = examples = 0
    started = time.perf_counter()
    with measuring(model):
        for batch in batches:
            placed = batch.to(precision.device)
            with precision.autocast():
                measured = objective.measure(model, placed)
            nats += measured.nats.to(nats)
            count += measured.count
            examples += batch.rows
            if keep is not None:
                keep(placed, measured.logits)
    return Evaluation(_mean(nats, count), count, examples, time.perf_counter() - started)


def _mean(nats: Tensor, count: int) -> float:
    return float(nats) / count if count else float("nan")


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
