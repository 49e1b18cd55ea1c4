"""One call of `train`: its parts, where it stands, and how both are kept and taken up again.

Owns position and random state, and what happens inside a step besides arithmetic; the numbers of
the run are `run/progress.py`'s. Decides nothing: the trainer does.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit import compat, parts
from lorafit.arguments import TrainingArguments
from lorafit.data.loader import Loader, StepBatches, rows_of
from lorafit.engine import limits
from lorafit.engine.evaluation import Readings
from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Whole
from lorafit.engine.optim import Updater
from lorafit.engine.room import Room, shortage
from lorafit.engine.step import Engine, StepResult
from lorafit.errors import ConfigError
from lorafit.events import MemoryPeak, Reason, RunEnded, RunStarted
from lorafit.model import adapters
from lorafit.parts import START, Plan
from lorafit.run import checkpoint
from lorafit.run.callbacks import Callbacks, speed_metrics
from lorafit.run.checkpoint import Kept, Position, RunState
from lorafit.run.journal import Journal
from lorafit.run.progress import Done, Progress
from lorafit.run.readings import Cost
from lorafit.run.signals import Signals
from lorafit.world import ALONE, World

_MOMENTS, _BESIDE_WEIGHTS = 12, 1 << 20
"""Bytes of optimiser state per trained number (two moments and a master in float32, at most), and
bytes of a checkpoint's small files."""

_FLAGS = (
    "should_log",
    "should_evaluate",
    "should_save",
    "should_epoch_stop",
    "should_training_stop",
)
_ACTS = 3
"""Of transformers' TrainerControl; the first so many ask for something at once."""

Layout = Callable[..., Sequence[MicroBatch]]
"""The collated batches of a step, a number of tokens, and `step`, its number -> its micro-batches,
of so many tokens at most."""


@dataclass
class Watch:
    """What happens inside a step besides arithmetic: signals are polled, callbacks told.

    Mutable: `substeps` are the ends of micro-batches that callbacks have yet to be told of, as many
    as the step's batches have, however they are laid out.
    """

    callbacks: Callbacks
    signals: Signals
    updater: Updater
    room: Room
    world: World = ALONE
    substeps: int = 0

    @contextmanager
    def backward(self) -> Generator[None]:
        """Around all micro-batches. A shortage of memory is a process's own affair as long as it
        can run them again alone."""
        with self.world.jointly(unless=shortage):
            yield
        self.room.committed = self.world.size > 1

    def after_micro_batch(self, *, last: bool) -> None:
        """After each backward; may raise `Asked`."""
        self.room.passed += 1
        self.signals.poll()
        told = self.substeps if last else min(1, self.substeps)
        self.substeps -= told
        for _ in range(told):
            self.callbacks.fire("on_substep_end")

    def before_update(self) -> None:
        """Gradients are summed and clipped."""
        with self.updater.showing_gradients():
            self.callbacks.fire("on_pre_optimizer_step")
        self.room.committed = True

    def after_update(self) -> None:
        """The optimiser has stepped; the schedule has not."""
        self.callbacks.fire("on_optimizer_step")


@dataclass
class Session:
    """Mutable: `position` counts finished steps, from where it `began`; `step_began` is the random
    state at the beginning of a step that has not finished, None between steps; `epoch_began` that
    at the beginning of the epoch; `saved_in` is the whole checkpoint that was saved at step
    `saved_at`, None before the first. `made_with`: see `RunState`. `say` tells a person a line. So
    many `samples` are shown at each reading; `planned` bytes, 0: unknown. `lowest` is the step of
    the lowest evaluation loss, kept up to date where memorising is watched for. `saving`: a signal
    to any process has asked for a checkpoint that is not there yet."""

    arguments: TrainingArguments
    plan: Plan
    engine: Engine
    loader: Loader
    layout: Layout
    laid_out: str
    progress: Progress
    readings: Readings
    watch: Watch
    say: Callable[[str], None]
    made_with: dict[str, Any] = field(default_factory=dict[str, Any])
    journal: Journal | None = None
    notices: tuple[str, ...] = ()
    started: float = field(default_factory=time.time)
    position: Position = START
    began: Position = START
    step_began: dict[str, Any] | None = None
    epoch_began: dict[str, Any] | None = None
    resumed: Kept | None = None
    ignore_keys: list[str] | None = None
    clock: float = 0.0
    goes_on: dict[str, Any] = field(default_factory=dict)
    saved_at: int = 0
    saved_in: Path | None = None
    saved_bytes: int = 0
    read_at: set[int] = field(default_factory=set)
    samples: int = 0
    planned: int = 0
    lowest: int | None = None
    saving: bool = False
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        self.cost = Cost(self.plan.steps)

    @property
    def room(self) -> Room:
        """How much of a step runs at a time."""
        return self.watch.room

    @property
    def world(self) -> World:
        """The processes that run it together."""
        return self.watch.world

    @property
    def signals(self) -> Signals:
        """What has been asked of the process since the run began."""
        return self.watch.signals

    def epoch(self) -> float:
        """The position in epochs, by batches as transformers counts them."""
        batches = -(-self.position.rows // self.loader.size)
        return self.position.epoch + min(1.0, batches / self.plan.batches_per_epoch)

    def steps(self, epoch: int) -> Iterator[StepBatches]:
        """What is left of `epoch`. The random state before each step's rows are read is remembered,
        as the step may be abandoned and its rows read again."""
        for step in self._begin_epoch(epoch):
            yield step
            self._begin_step()
        self.step_began = None

    def _begin_epoch(self, epoch: int) -> Iterator[StepBatches]:
        """The steps of `epoch`, whose beginning draws random numbers: for the workers, and for the
        order that a loader of the user's own has. A resumed epoch is begun with the random state
        that it began with, and goes on with the one that it was `taken_up` with."""
        kept, self.resumed = self.resumed, None
        if kept:
            checkpoint.set_random_state(kept.state.epoch_began or self.goes_on)
        self._begin_step()
        self.epoch_began = self.step_began
        if kept:  # what an interruption while rows are skipped goes back to
            self.step_began = self.goes_on
        steps = self.loader.epoch(epoch, skip=self.position.rows, moved=self._left_out)
        if self.position.rows:
            if kept:
                checkpoint.set_random_state(self.goes_on)
            self._begin_step()
        # a run that had reached its last step and is resumed has none left, whatever rows there are
        return steps if self.position.step < self.plan.steps else iter(())

    @contextmanager
    def taken_up(self) -> Generator[None]:
        """Inside, a resumed run does what it was interrupted at before its next step, with the
        random state that the checkpoint kept; what is drawn there counts, nothing else does."""
        if self.resumed:
            checkpoint.set_random_state(self.resumed.state.random_state)
        yield
        self.goes_on = checkpoint.random_state()

    def _left_out(self, done: int, total: int) -> None:
        """Batches were read that are left out: at first, at last and every ten seconds a line."""
        self.poll()
        if done in (1, total) or time.perf_counter() - self.clock > 10:
            self.clock = time.perf_counter()
            self.say(f"reading past what was trained on: {done:,} of {total:,} batches")

    def _begin_step(self) -> None:
        self.step_began, self.clock = checkpoint.random_state(), time.perf_counter()

    def take(self, step: StepBatches) -> StepResult:
        """The step that comes next, in parts that memory holds. Where it does not hold them the
        step begins anew, with the random numbers that it began with.

        Raises:
            Full: it holds not even the smallest.
        """
        number, whole = self.position.step, list[Whole]()
        self.watch.substeps = len(step.batches[self.world.number :: self.world.size]) - 1

        def again() -> None:
            self.engine.abandon()
            checkpoint.set_random_state(before)

        def run(parts: Sequence[MicroBatch]) -> StepResult:
            if not whole:  # once: a process may run it again alone
                whole.append(Whole.of(parts, self.world))
            return self.engine.step(parts, self.watch, whole=whole[0])

        if self.world.size > 1:
            self._check_alike(step.batches)
        with self._numbers_of_its_own() if self.world.size > 1 else nullcontext():
            before = checkpoint.random_state()
            return self.room.held(
                lambda tokens: self.layout(step.batches, tokens, step=number),
                run,
                step=number + 1,
                again=again,
            )

    def _check_alike(self, batches: Sequence[Any]) -> None:
        """Nothing, if every process has read the same rows, of which it takes its share.

        Raises:
            ConfigError: they have not, and shares are dealt out by length. As given, where rows may
                be drawn anew by each process, it is said once.
        """
        ids = (b["input_ids"] for b in batches if isinstance(b, Mapping) and "input_ids" in b)
        if self.world.agrees([rows.tolist() for rows in ids]):
            return
        told = (
            "The processes have read different rows for a step.",
            "Each takes its share of a step's rows, and so must see them all.",
            "Leave out what deals rows out by process (split_dataset_by_node), and seed what draws "
            "rows alike in each.",
        )
        if self.laid_out == "packed":
            raise ConfigError(told[0], why=told[1], fix=told[2])
        if self.position == self.began:
            self.say(" ".join(told))

    @contextmanager
    def _numbers_of_its_own(self) -> Generator[None]:
        """Inside, each of several processes draws its own random numbers, by seed, step and number;
        outside, all draw the same ones."""
        with checkpoint.random_state_kept():
            named = (self.arguments.seed, self.position.step, self.world.number)
            compat.set_seed(int.from_bytes(blake2b(repr(named).encode(), digest_size=4).digest()))
            yield

    def poll(self) -> None:
        """Nothing, or `Asked`, where a signal has asked any process to stop."""
        with self.world.jointly():
            self.signals.poll()

    def agree(self, control: Any) -> bool:
        """Let the first process's control flags, and any one's wish for a checkpoint, be every
        one's; whether logging, evaluating or saving is asked for now."""
        wished, self.signals.save = self.signals.save, False
        own = [self.world.is_first and vars(control)[name] for name in _FLAGS]
        saves, *flags = map(bool, self.world.highest(wished, *own))
        self.saving = self.saving or saves
        vars(control).update(zip(_FLAGS, flags, strict=True))
        return self.saving or any(flags[:_ACTS])

    def finish_step(self, result: StepResult, *, of: StepBatches) -> None:
        """Move on by one step, the one `of` these batches."""
        here = self.position
        self.position = Position(here.step + 1, here.epoch, here.rows + of.rows)
        self.step_began = None
        seconds = time.perf_counter() - self.clock
        self.progress.add(Done(here.step + 1, self.epoch(), result, of.examples, seconds))

    def reading_is_due(self) -> bool:
        """Whether an automatic reading belongs here and was not taken yet."""
        return self.position.step in self.readings.steps - self.read_at

    def memory_peak(self) -> MemoryPeak:
        """The most memory held so far, for observers."""
        device = self.engine.precision.device
        held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else limits.peak()
        return MemoryPeak(self.position.step, held, self.planned)

    def save_is_asked(self) -> bool:
        """Whether a signal wants a checkpoint that is not there yet; answers it."""
        here = self.position.step
        if not (self.saving and here):
            return False
        self.saving = False
        return here != self.saved_at

    def exhausted(self) -> str:
        """One line where the epoch that was run gave no row, as an exhausted stream's; else empty.

        Raises:
            ConfigError: no epoch ever gave one.
        """
        if self.position == START:
            raise ConfigError(
                "The training set gave no row.",
                why="It is a stream that is empty, or that was read to its end before.",
                fix="Make its __iter__ start afresh each time (an exhausted generator does not).",
            )
        step, steps = self.position.step, self.plan.steps
        return "" if self.position.rows else f"the stream ended: stopped at step {step} of {steps}"

    def finish_epoch(self, *, stopped: bool) -> None:
        """Move on to the next epoch, unless the run was stopped in the middle of this one."""
        here = self.position
        if not stopped or self.epoch() == here.epoch + 1:
            self.position = Position(here.step, here.epoch + 1, 0)

    def started_event(self, examples: int | None) -> RunStarted:
        """What will be run, for observers."""
        arguments = self.arguments
        trainable, total = adapters.trainable_share(self.engine.model)
        return RunStarted(
            examples=examples,
            examples_per_step=arguments.effective_batch_size,
            batch_size=arguments.per_device_train_batch_size,
            accumulation=arguments.gradient_accumulation_steps,
            processes=self.world.size,
            steps=self.plan.steps,
            first_step=self.position.step,
            epochs=self.plan.steps / (self.plan.steps_per_epoch or self.plan.steps),
            trainable_parameters=trainable,
            parameters=total,
            device=str(self.engine.precision.device),
            precision=str(self.engine.precision),
            layout=self.laid_out,
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

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint takes: the last one's bytes, before that an estimate from above."""
        return self.saved_bytes or adapters.saved_bytes(self.engine.model) + _BESIDE_WEIGHTS + sum(
            _MOMENTS * tensor.numel() for tensor in self.engine.updater.parameters
        )

    def bytes_to_come(self) -> int:
        """What this run will take on the disk at most: its checkpoints, and the final adapter."""
        left, each = self.plan.steps - self.position.step, self.checkpoint_bytes
        checkpoints = parts.disk(self.arguments, self.plan, left=left, each=each)
        return checkpoints + adapters.saved_bytes(self.engine.model)

    def save(self, folder: Path, write_files: Callable[[Path], None], *, whole: bool) -> int:
        """Write a checkpoint to `folder`, with what resuming needs if `whole`; its bytes."""
        size = checkpoint.save(folder, write_files, state=self._state() if whole else None)
        self.saved_bytes = size
        self.is_saved(folder, whole=whole)
        return size

    def is_saved(self, folder: Path, *, whole: bool) -> None:
        """Take note that it is, by this process or by the first."""
        if whole:
            self.saved_at, self.saved_in = self.position.step, folder

    def farewell(self, asked: str, *, resume: str) -> str:
        """What a run that was interrupted says last.

        Args:
            resume: The command that resumes it.
        """
        if self.saved_in is None:
            return f"Stopped by {asked} before the first step: there is nothing to save yet."
        step, steps = self.position.step, self.plan.steps
        return f"Stopped by {asked} at step {step} of {steps}; saved {self.saved_in}.\n{resume}"

    def metrics(self) -> dict[str, float]:
        """The run's speed and mean loss, under transformers' names."""
        steps = self.position.step - self.progress.first_step
        per_epoch = rows_of(self.loader.batches)
        rows = steps * self.arguments.effective_batch_size
        if per_epoch is not None:
            passes = self.position.epoch - self.began.epoch
            rows = passes * per_epoch + self.position.rows - self.began.rows
        speed = speed_metrics("train", self.started, num_samples=rows, num_steps=steps)
        return {**speed, "train_loss": self.progress.mean_loss}

    def _state(self) -> RunState:
        return RunState(
            epoch_began=self.epoch_began if self.position.rows else None,
            read_at=sorted(self.read_at),
            journal=self.journal.synced() if self.journal else 0,
            made_with=self.made_with,
            position=self.position,
            optimizer=self.engine.updater.state_dict(),
            schedule=dict(self.engine.schedule.state_dict()),
            scaler=self.engine.precision.scaler.state_dict(),
            sums=self.progress.sums(),
            random_state=checkpoint.random_state(),
        )

    def resume(self, kept: Kept, model: nn.Module) -> None:
        """Take up the run that `save` kept, with `model`, which the engine runs.

        Raises:
            ModelError: its weights do not fit the model.
            ConfigError: the rest of its state does not fit the run.
        """
        state = kept.state
        adapters.restore(model, kept.folder)
        try:
            self._put_back(state)
        except checkpoint.UNFIT as misfit:
            raise ConfigError(
                f"The state in {kept.folder} does not fit this run: {str(misfit)!r:.200}",
                why="Optimiser and schedule would go on as those of another run.",
                fix="Put back the arguments that it was saved with, or start afresh.",
            ) from misfit
        self.position = self.began = state.position
        self.resumed, self.epoch_began = kept, state.epoch_began
        self.read_at = set(state.read_at)
        checkpoint.set_random_state(state.random_state)

    def _put_back(self, state: RunState) -> None:
        own, scaler = self.engine.schedule, self.engine.precision.scaler
        fresh = checkpoint.plain(own.state_dict())
        for what, kept, usual in (
            # it may have come to know more since it was made, but not in place of its own methods
            ("schedule", state.schedule, {**state.schedule, **fresh}),
            ("gradient scaler", state.scaler, scaler.state_dict()),
            ("sums", state.sums, self.progress.sums()),
        ):
            if not checkpoint.fits(kept, usual):
                raise ValueError(f"the {what} is another's")
        if (state.schedule.keys() - fresh.keys()) & {*dir(type(own)), "optimizer"}:
            raise ValueError("the schedule is another's")
        self.engine.updater.load_state_dict(state.optimizer)
        # base rates are what the arguments say; the updater has scaled the current ones to them
        schedule = {name: value for name, value in state.schedule.items() if name != "base_lrs"}
        own.load_state_dict(schedule)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        self.progress.resume(state.sums, step=state.position.step)
