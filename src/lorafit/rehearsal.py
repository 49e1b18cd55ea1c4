"""The practice run: a trainer's own path, tried on a few hundred rows before hours are given to it.

Measures; `run/practice.py` judges. Trains copies of the trainer (same model, same settings, another
folder), takes up again what was interrupted, loads again what was saved, generates, and leaves
model, optimiser, random state and folder as they were. What needs another process or a second copy
of the base is handed over by the command line.
"""

# a rehearsal is the trainer's own affair, in a file of its own
# pyright: reportPrivateUsage=false

import copy
import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console as Terminal
from torch import Tensor, nn
from torch.utils.data import Subset

from lorafit import packing, parts, ranging
from lorafit.amounts import duration
from lorafit.data import loader
from lorafit.data.audit import pieces
from lorafit.data.shapes import IGNORE
from lorafit.deploy import samples
from lorafit.engine import limits, probe, room
from lorafit.engine.layout import MicroBatch, as_given
from lorafit.engine.objective import Whole
from lorafit.engine.precision import Precision
from lorafit.errors import ConfigError, ModelError, NonFiniteError, OutOfMemoryError
from lorafit.events import Event, Saved, StepEnd
from lorafit.hooks import Hooks
from lorafit.model import adapters, base, quantised
from lorafit.model.lora import counting_dropout
from lorafit.run import practice, store
from lorafit.run.callbacks import Callbacks
from lorafit.run.console import Console
from lorafit.run.observers import Observers
from lorafit.run.practice import Change, Finding, Forecast, Practice
from lorafit.run.rates import Curve
from lorafit.run.signals import Signals
from lorafit.run.trial import states_kept, untouched

ROWS, HELD_OUT = 500, 100
LEAST_STEPS, LEAST_HELD_OUT = 4, 32
SECONDS, SHARE = 180.0, 0.05
"""A practice run takes so many seconds, or this share of the full run if that is longer."""
FOLDER = "practice"
"""Below the output folder; gone again afterwards."""
NOISE = 20_261_127
"""The seed of what adapters and generators are overwritten with."""


class Killed(Protocol):
    """Lets a process go on from `checkpoint` in `folder`, and kills it once it has saved; whether
    it had."""

    def __call__(self, checkpoint: Path, folder: Path, *, steps: int) -> bool: ...


@dataclass(frozen=True)
class Helpers:
    """What needs more than this process and this copy of the base; each may be left out.

    Attributes:
        killed: Trains on in another process.
        reloaded: (folder of an adapter, ids [T]) -> the logits that it gives over a fresh base.
        gap: (batches as the collator made them, how they are run) -> nats per token that it costs
            to quantise the base, None where that was not measured; and a line about it.
        data: What was found in the data before.
    """

    killed: Killed | None = None
    reloaded: Callable[[Path, Tensor], Tensor | None] | None = None
    gap: Callable[[Sequence[Any], Precision], tuple[float | None, str]] | None = None
    data: tuple[Finding, ...] = ()


ALONE = Helpers()
"""Everything in this process, over this copy of the base."""


@dataclass(frozen=True)
class Read:
    """Held-out rows: nats summed over each row's supervised tokens, how many these are, and the
    seconds that all rows took."""

    nats: list[float]
    supervised: list[int]
    seconds: float


def rehearse(trainer: Hooks, helpers: Helpers, *, find_lr: bool = False) -> Practice:
    """Everything that the full run does, on a few rows, and what was found.

    Args:
        find_lr: Whether the learning rate's range test is made too.

    Raises:
        ConfigError: there is no training set that can be counted.
    """
    if not loader.length_of(trainer.train_dataset):
        raise ConfigError(
            "A practice run needs a training set that can be counted.",
            why="It practises on some of its rows, and forecasts the time of all.",
            fix="Give a list or a map-style set.",
        )
    folder = store.make_folder(Path(trainer._settings.output_dir)) / FOLDER
    theirs = [own for own in (trainer.optimizer, trainer.lr_scheduler) if own is not None]
    with untouched(trainer.model), states_kept(*theirs, trainer._precision.scaler):
        try:
            return _Rehearsal(trainer, folder, helpers=helpers).run(find_lr=find_lr)
        finally:
            rmtree(folder, ignore_errors=True)


def go_on_from(trainer: Hooks, checkpoint: Path, *, folder: Path, steps: int) -> None:
    """What the process does that is to be killed: take the run up again, save after each step."""
    made = _Rehearsal(trainer, folder.parent, helpers=ALONE).copy(folder.name, steps=steps)
    made.args.save_steps = 1
    made.train(str(checkpoint))


class _Rehearsal:
    """Mutable: `findings` are added as they are made; `events` are those of the last copy.

    Attributes:
        rates: The range test's curve, once it was made.
        per_step: Examples of a step.
        train, held_out: The rows that are practised on, and those that are read.
        plan: The full run's.
    """

    def __init__(self, trainer: Hooks, folder: Path, *, helpers: Helpers) -> None:
        self.trainer, self.folder, self.helpers = trainer, folder, helpers
        self.settings, self.model = trainer._settings, trainer.model
        self.findings = list(helpers.data)
        self.events: list[Event] = []
        self.rates: Curve | None = None
        self.per_step = self.settings.effective_batch_size
        self.train = parts.subset(trainer.train_dataset, ROWS, seed=self.settings.seed)
        self.held_out, self.unseen = _held_out(trainer)
        steps = parts.steps_of(trainer.get_train_dataloader(), self.settings)
        self.plan = parts.plan(self.settings, steps, done=parts.START)

    def run(self, *, find_lr: bool) -> Practice:
        """All of it, in the order in which a run would meet it."""
        self.say("one step, to know its time")
        step = _Step.of(self.copy("first", steps=LEAST_STEPS))
        seconds = step.seconds()
        steps, rows = self._size(seconds)
        before = self.read(rows)
        self.say(f"{steps} steps of {self.per_step} examples, {rows} rows held out")
        if not self._check_longest():
            return self._made(step, [], reading=before)
        self.rates = self._find_rate(seconds) if find_lr else None
        self._check_quantising()
        first = self.copy("first", steps=steps)
        fresh, told = _clones(adapters.adapter_state(self.model)), self.events
        self._check_labels(step)
        try:
            first.train()
        except (NonFiniteError, OutOfMemoryError, ModelError) as error:
            title = "loss" if isinstance(error, NonFiniteError) else "training"
            self.findings.append(Finding(title, "stop", error.what, error.fix))
            return self._made(step, told, reading=before)
        trained = _clones(adapters.adapter_state(self.model))
        after = self.read(rows)
        measured = practice.change(before.nats, after.nats, supervised=before.supervised)
        self._judge(measured, told)
        still = {name for name, tensor in trained.items() if torch.equal(tensor, fresh[name])}
        self._check_gradients(_Step.of(first), still)
        self.say("killing, resuming and loading it again")
        self._check_resuming(first, trained)
        adapters.load_adapter_state(self.model, trained)
        self._check_loading(first, step)
        self._check_stopping(step)
        self._check_memory(told)
        return replace(self._made(step, told, reading=after), change=measured)

    def say(self, line: str) -> None:
        """Tell a person what is being tried."""
        self.trainer.observers.say(f"practice: {line}")

    def copy(self, name: str, *, steps: int) -> Any:
        """The trainer with other rows, another folder and so many steps, watched by nobody else.
        Its schedule has the shape of the full run's, within these steps."""
        made: Any = copy.copy(self.trainer)
        self.events = []
        settings = copy.copy(self.settings)
        vars(settings).update(
            output_dir=str(self.folder / name), max_steps=steps, save_strategy="steps",
            save_steps=max(1, steps - 2), save_total_limit=None, save_only_model=False,
            eval_strategy="no", eval_on_start=False, load_best_model_at_end=False,
            stop_when_memorising=False, show_samples=0,
            metric_for_best_model=None, logging_strategy="steps", logging_steps=1,
            report_to=[], disable_tqdm=True, resume_from_checkpoint=None,
            per_device_eval_batch_size=1,
        )  # fmt: skip
        made.args, made.model_init = settings, None
        made.train_dataset, made.eval_dataset = self.train, None
        made.observers = Observers([self.events.append])
        made._console = Console(live=False, terminal=Terminal(quiet=True))
        made._objective_of, made._eval_loaders = None, {}
        made._signals, made._running, made._held = Signals(), None, None
        made.resume_command = self.trainer.resume_command
        made._callbacks = Callbacks(
            made._callback_arguments(),
            (),
            model=made.model,
            processing_class=made.processing_class,
        )
        return made

    def read(self, rows: int) -> Read:
        """The loss of each of the held-out rows, alone."""
        reader = self.copy("first", steps=LEAST_STEPS)
        made = Read([], [], 0.0)
        began = perf_counter()
        chosen = Subset(self.held_out, range(min(rows, len(self.held_out))))

        def keep(predicted: Any) -> None:
            self.trainer._signals.poll()
            count = predicted.batch.supervised
            made.supervised.append(count)
            made.nats.append(float(predicted.loss) * count if count else 0.0)

        reader._measured(reader.get_test_dataloader(chosen), loss_only=True, keep=keep)
        return Read(made.nats, made.supervised, perf_counter() - began)

    def _cap(self, seconds: float) -> float:
        """Seconds that it may take, a step of the full run taking so many."""
        return max(SECONDS, SHARE * seconds * self.plan.steps)

    def _size(self, seconds: float) -> tuple[int, int]:
        """Steps and held-out rows within the cap, a step taking so long."""
        cap = self._cap(seconds)
        most = min(self.plan.steps, -(-len(self.train) // self.per_step))
        steps = max(min(LEAST_STEPS, self.plan.steps), min(most, int(cap / 2 / seconds)))
        per_row = seconds / self.per_step / 2  # a forward of one row, of which two readings
        rows = max(LEAST_HELD_OUT, min(HELD_OUT, int(cap / 10 / per_row)))
        return steps, min(rows, len(self.held_out))

    def _find_rate(self, seconds: float) -> Curve | None:
        """The range test, a step taking so many seconds; None where it was not made."""
        cap = self._cap(seconds)
        steps = ranging.steps_within(cap, each=seconds)
        if not steps:
            why = f"{ranging.LEAST} steps of {seconds:.2g} s take more than {duration(cap)}."
            self.findings.append(practice.rates_not_tried(why))
            return None
        self.say("{} steps at rates from {:.0e} to {:.0e}".format(steps, *ranging.SPAN))
        made = self.copy("rates", steps=steps)
        made.train_dataset, made._signals = self.trainer.train_dataset, self.trainer._signals
        try:
            found = ranging.find_rate(made, steps=steps)
        except OutOfMemoryError as error:
            self.findings.append(practice.rates_not_tried(error.what, error.fix))
            return None
        curve = replace(found, given=self.settings.learning_rate)
        self.findings.append(practice.rates(curve))
        return curve

    def _judge(self, measured: Change, events: Sequence[Event]) -> None:
        curve = [event.loss for event in events if isinstance(event, StepEnd)]
        found = practice.learning(measured, curve)
        seen = "" if self.unseen else " (rows that it trains on: there is no evaluation set)"
        self.findings.append(Finding(found.title, found.mark, found.said + seen, found.advice))

    def _check_quantising(self) -> None:
        """What it costs, on a few of the held-out rows: nothing has been trained yet."""
        kind = quantised.scheme(base.unwrap(self.model))
        if kind == "none" or not self.helpers.gap:
            return
        self.say(f"the base without {kind}")
        reader = self.copy("first", steps=LEAST_STEPS)
        chosen = Subset(self.held_out, range(min(LEAST_HELD_OUT, len(self.held_out))))
        batches = list(reader.get_test_dataloader(chosen))
        nats, said = self.helpers.gap(batches, self.trainer._precision)
        self.findings.append(practice.quantising(kind, nats, said=said))

    def _check_longest(self) -> bool:
        """Forward and backward of the largest micro-batch that the full run can meet; whether it
        fits."""
        rows = self.trainer.train_dataset
        lengths = packing.lengths_of(rows)
        reader = self.copy("first", steps=LEAST_STEPS)
        if len(lengths):
            longest = np.argsort(-lengths, kind="stable")[: self.per_step]
            reader.train_dataset = Subset(rows, longest.tolist())
        step = _Step.of(reader)
        batch = max(step.laid_out(), key=lambda batch: batch.positions)
        parts_of, objective = reader._packing, reader._objective()
        try:
            peak = probe.peak(self.model, objective, batch=batch, precision=self.trainer._precision)
        except (RuntimeError, MemoryError) as error:
            short = room.shortage(error)
            if short is None:
                raise
            self.findings.append(practice.cut_off(batch.positions, short))
            return False
        self.findings.append(practice.longest(batch.positions, peak, planned=parts_of.planned))
        return True

    def _check_labels(self, step: "_Step") -> None:
        rows = list(step.rows())
        learned = sum(int((labels[1:] != IGNORE).sum()) for _, labels in rows)
        self.findings.append(practice.labels(learned, sum(len(ids) for ids, _ in rows)))
        self.findings.append(practice.padding(*step.padding()))

    def _check_gradients(self, step: "_Step", still: Collection[str]) -> None:
        """What each tensor receives, and whether padding and accumulation change it.

        Args:
            still: Names of the adapter's tensors that no step has changed.
        """
        run = step.gradients(step.laid_out())
        norms = {name: float(gradient.norm()) for name, gradient in run.items()}
        self.findings.append(practice.gradients(norms, unmoved=len(still)))
        divides = step.trainer._objective().divides
        difference = _difference(run, step.gradients(step.padded())) if divides else 0.0
        rounded = any(p.dtype != torch.float32 for p in self.model.parameters())
        rounded |= self.trainer._precision.dtype is not None
        self.findings.append(practice.layouts(difference, rounded=rounded, divides=divides))

    def _check_resuming(self, first: Any, trained: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint to the end; the adapter must be the one that was not stopped."""
        steps = first.args.max_steps
        whole = self.folder / "first" / f"checkpoint-{max(1, steps - 2)}"
        second = self.copy("second", steps=steps)
        target = Path(second.args.output_dir)
        killed = bool(self.helpers.killed and self.helpers.killed(whole, target, steps=steps))
        _scramble(self.model)
        second.train("auto" if killed else str(whole))
        difference = _difference(adapters.adapter_state(self.model), trained)
        self.findings.append(practice.resuming(difference, killed=killed))

    def _check_loading(self, first: Any, step: "_Step") -> None:
        """Save, overwrite with noise, load; and where there is room over another copy of the base:
        the logits must be the same."""
        folder = self.folder / "adapter"
        first.save_model(str(folder))
        ids = step.row()[0]
        expected = base.logits_of(self.model, ids)
        _scramble(self.model)
        adapters.restore(self.model, folder)
        again = [base.logits_of(self.model, ids)]
        fresh = self.helpers.reloaded(folder, ids) if self.helpers.reloaded else None
        again += [fresh] if fresh is not None else []
        size = float(expected.abs().max())
        differences = [float((each - expected).abs().max()) / size for each in again]
        self.findings.append(practice.loading(max(differences), fresh=fresh is not None))

    def _check_stopping(self, step: "_Step") -> None:
        """Whether answers end with a learned stop token, and what the model answers by itself."""
        tokenizer = self.trainer.processing_class
        told = self.trainer.contract.get("stop_ids")
        stops = told or base.stop_ids(self.model, tokenizer)
        ends = [labels[labels != IGNORE] for _, labels in step.rows() if (labels != IGNORE).any()]
        learned = sum(int(end[-1]) in stops for end in ends)
        text, stopped = "", None
        prompt, _ = samples.parted(*step.row())
        with suppress(AttributeError, NotImplementedError):  # a module that does not generate
            new, stopped = samples.answer(self.model, prompt, stops=stops)
            text = tokenizer.decode(new, skip_special_tokens=True) if tokenizer else ""
        self.findings.append(practice.stopping(len(ends), learned, stopped=stopped, text=text))

    def _check_memory(self, events: Sequence[Event]) -> None:
        device = self.trainer._device
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if cuda else limits.peak()
        self.findings.append(practice.memory(peak, events))

    def _made(self, step: "_Step", events: Sequence[Event], *, reading: Read) -> Practice:
        done = [event for event in events if isinstance(event, StepEnd)]
        return Practice(
            findings=tuple(self.findings),
            pieces=step.pieces(self.trainer.processing_class),
            curve=tuple(event.loss for event in done),
            time=self._time(done, reading),
            disk=self._disk(events),
            rates=self.rates,
            facts=(
                f"{len(done)} of {self.plan.steps:,} steps, {self.per_step} examples each",
                f"{len(reading.nats)} rows read before and after",
                "the schedule of the learning rate is that of the full run, within these steps",
            ),
        )

    def _time(self, ends: Sequence[StepEnd], reading: Read) -> Forecast:
        settings = self.settings
        evaluations = {
            "no": 0.0,
            "epoch": float(self.plan.epochs),
            "steps": self.plan.steps / max(settings.eval_steps or settings.logging_steps or 1, 1),
        }[settings.eval_strategy]
        held_out = loader.length_of(self.trainer.eval_dataset) or 0
        each = reading.seconds / max(len(reading.nats), 1) * held_out
        return practice.forecast(
            [(end.tokens, end.seconds) for end in ends],
            steps_to_come=self.plan.steps,
            besides=evaluations * each,
        )

    def _disk(self, events: Sequence[Event]) -> int:
        saved = [event.bytes for event in events if isinstance(event, Saved)]
        weights = adapters.saved_bytes(self.model)
        return (
            parts.disk(
                self.settings, self.plan, left=self.plan.steps, each=max(saved, default=weights)
            )
            + weights
        )


@dataclass(frozen=True)
class _Step:
    """The first step of a copy: its batches as the collator made them."""

    trainer: Any
    batches: list[Any]

    @classmethod
    def of(cls, trainer: Any) -> "_Step":
        steps = parts.steps_of(trainer.get_train_dataloader(), trainer.args)
        trainer._objective()
        return cls(trainer, next(iter(steps.epoch(0))).batches)

    def laid_out(self) -> list[MicroBatch]:
        """As the run lays it out."""
        packing, shifted = self.trainer._packing, self.trainer._objective().shifted
        return packing.lay_out(self.batches, packing.tokens, step=0, shifted=shifted)

    def padded(self) -> list[MicroBatch]:
        """Otherwise: padded, where the run packs; each row alone, where it is run as given."""
        packing, shifted = self.trainer._packing, self.trainer._objective().shifted
        draw = None if packing.seed is None else (packing.seed, 0)
        widest = max((batch["input_ids"].shape[-1] for batch in self.batches), default=1)
        most = 2 * widest if packing.runner else 1
        return as_given(self.batches, shifted=shifted, draw=draw, most=most)

    def gradients(self, parts: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """The gradient of every trained tensor, torch's own dropout off; zeros where none came."""
        trainer, model = self.trainer, self.trainer.model
        objective = trainer._objective()
        whole = Whole(sum(part.supervised for part in parts), len(parts))
        model.zero_grad()
        model.eval()
        with counting_dropout(model, trainer._packing.drawn), base.without_cache(model):
            for part in parts:
                trainer._signals.poll()
                objective.part(model, part.to(trainer._device), whole=whole).backward()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        made = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained}
        model.zero_grad()
        return made

    def seconds(self) -> float:
        """Of a forward and backward, the second time."""
        self.gradients(self.laid_out()[:1])
        began = perf_counter()
        self.gradients(self.laid_out())
        return perf_counter() - began

    def rows(self) -> Generator[tuple[Tensor, Tensor]]:
        """Ids and labels [T] of each row, without padding."""
        for batch in self.batches:
            yield from samples.unpadded(batch)

    def row(self) -> tuple[Tensor, Tensor]:
        """The shortest that has supervision."""
        supervised = [row for row in self.rows() if (row[1] != IGNORE).any()]
        return min(supervised or self.rows(), key=lambda row: len(row[0]))

    def padding(self) -> tuple[int, int]:
        """Tokens of padding in the batches, and those of them that carry loss."""
        masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in self.batches]
        pairs = list(zip(masks, self.batches, strict=True))
        learned = sum(int(((m == 0) & (b["labels"] != IGNORE)).sum()) for m, b in pairs)
        return sum(int((mask == 0).sum()) for mask in masks), learned

    def pieces(self, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
        """One example as text, in stretches that are learned or not."""
        if tokenizer is None:
            return ()
        ids, labels = self.row()
        return pieces(ids.tolist(), labels.tolist(), tokenizer=tokenizer)


def _held_out(trainer: Hooks) -> tuple[Any, bool]:
    """Rows that are not trained on, if there are any; and whether there are."""
    given, seed = trainer.eval_dataset, trainer._settings.seed
    chosen = next(iter(given.values())) if isinstance(given, dict) else given
    if chosen is not None and loader.length_of(chosen):
        return parts.subset(chosen, HELD_OUT, seed=seed), True
    size = loader.length_of(trainer.train_dataset) or 0
    others = loader.order(size, seed=seed, epoch=0)[ROWS : ROWS + HELD_OUT]
    return Subset(trainer.train_dataset, others or range(min(size, HELD_OUT))), bool(others)


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _scramble(model: nn.Module) -> None:
    """Overwrite all that is trained, and the random state, with noise."""
    torch.manual_seed(NOISE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape))


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor by norm; those that hold next to nothing of the
    whole are left out, as what they hold is rounding."""
    whole = math.sqrt(sum(float(t.double().square().sum()) for t in other.values()))
    norms = {name: float(t.double().norm()) for name, t in other.items()}
    kept = [name for name, norm in norms.items() if norm > 1e-6 * whole]
    return max(
        (float((one[n].double() - other[n].double()).norm()) / norms[n] for n in kept), default=0.0
    )
