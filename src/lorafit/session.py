"""One call of `train`: its parts, where it stands, and how both are kept and taken up again.

Owns position and random state, and what happens inside a step besides arithmetic; the numbers of
the run are `run/progress.py`'s. Decides nothing: the trainer does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.arguments import TrainingArguments
from lorafit.data.loader import Loader
from lorafit.engine.evaluation import Readings
from lorafit.engine.step import Engine
from lorafit.events import Reason, RunEnded, RunStarted
from lorafit.model import adapters
from lorafit.parts import Plan
from lorafit.run import checkpoint
from lorafit.run.callbacks import Callbacks
from lorafit.run.checkpoint import Position, RunState
from lorafit.run.progress import Progress
from lorafit.run.signals import Signals

START = Position(0, 0, 0)


@dataclass(frozen=True)
class Watch:
    """What happens inside a step besides arithmetic: signals are polled, callbacks told."""

    callbacks: Callbacks
    signals: Signals

    def after_micro_batch(self, *, last: bool) -> None:
        """After each backward; may raise `Asked`."""
        self.signals.poll()
        if not last:
            self.callbacks.fire("on_substep_end")

    def before_update(self) -> None:
        """Gradients are summed and clipped."""
        self.callbacks.fire("on_pre_optimizer_step")

    def after_update(self) -> None:
        """The optimiser has stepped; the schedule has not."""
        self.callbacks.fire("on_optimizer_step")


@dataclass
class Session:
    """Mutable: `position` counts finished steps; `step_began` is the random state at the beginning
    of a step that has not finished, None between steps."""

    plan: Plan
    engine: Engine
    loader: Loader
    progress: Progress
    signals: Signals
    readings: Readings
    started: float
    position: Position = START
    step_began: dict[str, Any] | None = None
    read_at: set[int] = field(default_factory=set)

    def epoch(self) -> float:
        """The position in epochs."""
        if self.plan.batches_per_epoch is None:
            return self.position.step / self.plan.steps
        batches = self.position.in_epoch * self.loader.batches_per_step
        return self.position.epoch + min(1.0, batches / self.plan.batches_per_epoch)

    def begin_step(self) -> None:
        """Remember the random state, for a step that may be abandoned."""
        self.step_began = checkpoint.random_state()

    def finish_step(self) -> None:
        """Move on by one step."""
        here = self.position
        self.position = Position(here.step + 1, here.epoch, here.in_epoch + 1)
        self.step_began = None

    def started_event(self, arguments: TrainingArguments, examples: int | None) -> RunStarted:
        """What will be run, for observers."""
        trainable, total = adapters.trainable_share(self.engine.model)
        return RunStarted(
            examples=examples,
            examples_per_step=arguments.effective_batch_size,
            batch_size=arguments.per_device_train_batch_size,
            accumulation=arguments.gradient_accumulation_steps,
            processes=1,
            steps=self.plan.steps,
            first_step=self.position.step,
            epochs=self.plan.steps / (self.plan.steps_per_epoch or self.plan.steps),
            trainable_parameters=trainable,
            parameters=total,
            device=str(self.engine.precision.device),
            precision=str(self.engine.precision),
            layout=arguments.layout,
        )

    def ended_event(self, reason: Reason, *, restored: str = "") -> RunEnded:
        """Where and why the run ended, for observers."""
        return RunEnded(
            step=self.position.step,
            epoch=self.epoch(),
            loss=self.progress.mean_loss,
            seconds=time.time() - self.started,
            reason=reason,
            restored=restored,
        )

    def abandon_step(self) -> None:
        """Forget the step that was begun, if one was: its gradients and its random numbers."""
        self.engine.abandon()
        if self.step_began is not None:
            checkpoint.set_random_state(self.step_began)
            self.step_began = None

    def save(self, folder: Path, write_files: Callable[[Path], None], *, whole: bool) -> int:
        """Write a checkpoint to `folder`, with what resuming needs if `whole`; its bytes."""
        return checkpoint.save(folder, write_files, state=self._state() if whole else None)

    def _state(self) -> RunState:
        scaler = self.engine.precision.scaler
        return RunState(
            position=self.position,
            optimizer=self.engine.updater.state_dict(),
            schedule=dict(self.engine.schedule.state_dict()),
            scaler=scaler.state_dict() if scaler else {},
            sums=self.progress.sums(),
            random_state=checkpoint.random_state(),
        )

    def resume(self, folder: Path) -> None:
        """Take up the run that `save` kept in `folder`.

        Raises:
            UsageError: it is not whole, or was saved without the state of a run.
            ModelError: its weights do not fit the model.
        """
        state = checkpoint.load(folder)
        adapters.load_adapter_state(self.engine.model, adapters.read_adapter_state(folder))
        self.engine.updater.load_state_dict(state.optimizer)
        self.engine.schedule.load_state_dict(state.schedule)
        if self.engine.precision.scaler and state.scaler:
            self.engine.precision.scaler.load_state_dict(state.scaler)
        self.progress.resume(state.sums, step=state.position.step)
        self.position = state.position
        checkpoint.set_random_state(state.random_state)
