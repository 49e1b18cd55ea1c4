"""One optimiser step on tensors: no files, no printing, no clock.

Reads like the textbook: count the supervised tokens of the whole step; for each micro-batch run
backward on its share of the loss; add up over processes; clip; update; report. Knows neither data
sets nor schedules' names; the trainer decides what comes next.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Objective, Whole
from lorafit.engine.optim import Updater
from lorafit.engine.precision import Precision


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did. The three tensors are scalars still on the device: reading them waits.

    Attributes:
        loss: Nats per supervised token of the whole step.
        gradient_norm: Before clipping.
        applied: False where loss or gradient was not finite and nothing was changed.
        learning_rate: The rate the update used.
        tokens: Real ones; `positions` are those with their padding.
    """

    loss: Tensor
    gradient_norm: Tensor
    applied: Tensor
    learning_rate: float
    tokens: int
    positions: int
    supervised: int


class Watch(Protocol):
    """Who is told inside a step; any of them may raise to abandon it, nothing applied."""

    def backward(self) -> AbstractContextManager[None]:
        """Around all micro-batches; it ends once every process has run its own."""
        ...

    def after_micro_batch(self, *, last: bool) -> None:
        """After each backward."""
        ...

    def before_update(self) -> None:
        """Gradients are summed and clipped."""
        ...

    def after_update(self) -> None:
        """The optimiser has stepped; the schedule has not."""
        ...


class Engine:
    """A model, its objective and its updater, ready to step.

    Args:
        run_part: Forward and backward of one micro-batch of a whole step -> its part of the loss,
            detached; None for the engine's own.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        updater: Updater,
        schedule: LRScheduler | ReduceLROnPlateau,
        precision: Precision,
        max_norm: float,
        run_part: Callable[[MicroBatch, Whole], Tensor] | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        self.updater, self.schedule = updater, schedule
        self.precision, self.max_norm = precision, max_norm
        self.run_part = run_part or self._run_part
        self._modules = list(model.modules())

    def step(
        self, batches: Sequence[MicroBatch], watch: Watch, *, whole: Whole | None = None
    ) -> StepResult:
        """One update on the examples of `batches`, whose gradients add up to the step's.

        Args:
            whole: The step over all processes; None: `batches` are all of it.

        Raises:
            Whatever `watch` raises between micro-batches, here or in another process; call
            `abandon` then.
        """
        whole = whole or Whole.of(batches)
        device = self.precision.device
        loss = torch.zeros((), device=device)
        if not all(module.training for module in self._modules):  # `train` visits each and sets it
            self.model.train()
            self._modules = list(self.model.modules())
        with watch.backward():
            for index, batch in enumerate(batches):
                loss += self.run_part(batch.to(device), whole)
                watch.after_micro_batch(last=index + 1 == len(batches))
        self.updater.add_up(loss)
        norm, applied = self._update(loss, watch)
        rate = self._advance(applied)
        counts = (whole.tokens, whole.positions, whole.supervised)
        return StepResult(loss, norm, applied, rate, *counts)

    def _run_part(self, batch: MicroBatch, whole: Whole) -> Tensor:
        part = self.objective.part(self.model, batch, whole=whole)
        self.precision.scaler.scale(part).backward()
        return part.detach()

    def abandon(self) -> None:
        """Forget the gradients of a step that was not finished."""
        self.updater.zero_grad()

    def _update(self, loss: Tensor, watch: Watch) -> tuple[Tensor, Tensor]:
        scaler = self.precision.scaler
        scaler.scale(loss)  # which begins it, where this process had nothing to run
        scaler.unscale_(self.updater.optimizer)
        norm = self.updater.norm(max_norm=self.max_norm)
        applied = torch.isfinite(loss) & torch.isfinite(norm)
        watch.before_update()
        self.updater.apply(applied)
        scaler.update()
        watch.after_update()
        return norm, applied

    def _advance(self, applied: Tensor) -> float:
        """Move the schedule on and forget the gradients; the rate that the update used."""
        rate = self.updater.optimizer.param_groups[0]["lr"]
        # as transformers: a step that the scaler has skipped is none; asking waits for the device
        skipped = self.precision.scaler.is_enabled() and not bool(applied)
        if not (skipped or isinstance(self.schedule, ReduceLROnPlateau)):
            self.schedule.step()
        self.updater.zero_grad()
        return float(rate)
