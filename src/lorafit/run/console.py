"""What a person sees while a run goes: a live bar in a terminal, a table that grows in a notebook
(`notebook.py`), plain lines elsewhere.

Observes events and nothing else; the only place in `run` that writes to the terminal.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lorafit.amounts import shown as bytes_shown
from lorafit.data.audit import Audit
from lorafit.errors import shown
from lorafit.events import (
    PROBE,
    Evaluated,
    Event,
    Logged,
    MemoryPeak,
    Notice,
    OutOfMemory,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepEnd,
    StepSkipped,
)
from lorafit.run.notebook import Cell, output
from lorafit.run.practice import RATES, Practice

_BLOCKS, _WIDE = "▁▂▃▄▅▆▇█", 16
_ASKED, _ANSWERED = 60, 240
"""Characters of a prompt's end, and of an answer's beginning: report.html has both in full."""


@contextmanager
def counting(what: str) -> Generator[Callable[[int, int | None], None]]:
    """A live bar in a terminal, told how many of `what` are done and of how many; a live count
    where that is None; nothing elsewhere."""
    terminal = Terminal()
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )
    task = bar.add_task(what, total=None)

    def moved(done: int, total: int | None) -> None:
        of = f" of {total:,}" if total else ""
        bar.update(task, completed=done, total=total, description=f"{done:,}{of} {what}")

    with bar:
        yield moved


def show_report(terminal: Terminal, report: Audit, *, notices: Sequence[str] = ()) -> None:
    """The data report as a page: sources, lengths, one example, and what would hurt.

    What is learned is green; «marked» where there is no colour.
    """
    for text in (*(f"note: {notice}" for notice in notices), *report.sources):
        terminal.print(shown(text), markup=False)
    for name, side in (("training", report.train), ("evaluation", report.evaluation)):
        if side:
            terminal.print(f"\n{name}: {side.examples:,} examples of {report.shape}", markup=False)
            terminal.print(f"  tokens   {side.lengths}", markup=False)
            terminal.print(
                f"  learned  {side.supervised:,} of {side.tokens:,} tokens "
                f"({side.supervised / side.tokens:.1%})"
            )
    terminal.print(
        f"\nOne example, {shown(report.shown_source)}; what is learned is marked:", markup=False
    )
    terminal.print(marked(report.shown, colour=terminal.color_system is not None))
    for remark in report.remarks:
        terminal.print(f"note: {shown(remark)}", markup=False)
    for harm in report.harms:
        terminal.print(f"WOULD HURT: {shown(harm)}", markup=False, style="bold red")
    if not report.harms:
        terminal.print("Nothing was found that would hurt.", style="bold green")


_COLOURS = {"good": "green", "note": "yellow", "stop": "bold red"}


def show_practice(found: Practice, terminal: Terminal | None = None) -> None:
    """The practice run as a page: what was found, the forecast, the verdict."""
    terminal = terminal or Terminal(highlight=False, emoji=False, soft_wrap=True)
    # in a notebook one output for all of it; each print, even of half a line, has its own otherwise
    with terminal:
        colour = terminal.color_system is not None
        terminal.print(f"\nPractice: {'; '.join(found.facts)}", markup=False)
        if found.pieces:
            terminal.print("One example; what is learned is marked:", markup=False)
            terminal.print(marked(found.pieces, colour=colour))
        for finding in found.findings:
            terminal.print(
                f"{finding.mark:>4}  {finding.title}: ", style=_COLOURS[finding.mark], end=""
            )
            terminal.print(shown(finding.said), markup=False)
            if finding.advice:
                terminal.print(f"      {shown(finding.advice)}", markup=False)
            if finding.title == RATES and found.rates:
                rows = (f"      {row}" for row in found.rates.table())
                terminal.print("\n".join(rows), markup=False)
        terminal.print(
            f"full run: {found.time}, {found.disk / 1e6:,.0f} MB on the disk at most", markup=False
        )
        terminal.print(found.verdict, style="bold green" if found.go else "bold red", markup=False)


def marked(pieces: Sequence[tuple[str, bool]], *, colour: bool) -> Text:
    """Pieces of text of which the learned ones stand out; control characters are written out."""
    made = Text()
    for text, is_learned in pieces:
        written = shown(text, keep="\n")
        if is_learned and not colour:
            written = f"«{written}»"
        made.append(written, style="green" if is_learned else "dim")
    return made


@dataclass
class Shown:
    """What the bar says besides the step. Mutable: the `smooth` loss, corrected at its start as
    Adam's moments are, over some twenty steps; its `curve`, a value for each step, thinned to half
    where it grows too long; the last `evaluation` loss; the peak of `memory` and its plan; the
    losses since the last log, `window`."""

    smooth: float = 0.0
    weight: float = 0.0
    curve: list[float] = field(default_factory=list[float])
    evaluation: float | None = None
    memory: str = ""
    window: list[float] = field(default_factory=list[float])

    @property
    def mean(self) -> float | None:
        """The mean loss of the steps since the last log; None if there are none."""
        return math.fsum(self.window) / len(self.window) if self.window else None

    def after(self, event: StepEnd) -> str:
        """The text after a step: losses, learning rate, gradient norm, speed, and the curve."""
        self.window.append(event.loss)
        if math.isfinite(event.loss):
            self.smooth += (event.loss - self.smooth) * 0.05
            self.weight += (1 - self.weight) * 0.05
            self.curve.append(self.smooth / self.weight)
        if len(self.curve) >= 2 * _WIDE:
            self.curve = self.curve[1::2]
        mean = f" (mean {self.curve[-1]:.4f})" if self.curve else ""
        read = "" if self.evaluation is None else f" · eval {self.evaluation:.4f}"
        return (
            f"{sparkline(self.curve)} loss {event.loss:.4f}{mean}{read} · "
            f"lr {event.learning_rate:.1e} · norm {event.gradient_norm:.2g} · "
            f"{event.tokens / max(event.seconds, 1e-9):,.0f} tokens/s{self.memory}"
        )


def sparkline(values: Sequence[float]) -> str:
    """One character for each value, the last ones where they are many: higher for more."""
    late = values[-_WIDE:]
    low, high = min(late, default=0.0), max(late, default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round((value - low) / (high - low) * steps) if high > low else 0] for value in late
    )


class Console:
    """Call it with each event.

    Args:
        live: Draw a bar where the terminal can; lines are printed in any case. In a notebook, a
            bar and a table stand for the lines of logs and readings.
    """

    def __init__(self, *, live: bool, terminal: Terminal | None = None) -> None:
        self._terminal = terminal or Terminal(highlight=False, emoji=False, soft_wrap=True)
        self._live = live and (self._terminal.is_terminal or self._terminal.is_jupyter)
        self._bar: Progress | Cell = Progress(disable=True)
        self._task = self._bar.add_task("")
        self._shown = Shown()

    def __call__(self, event: Event) -> None:
        """Print the event's line, if it has one, or move the bar."""
        if isinstance(event, StepEnd):
            self._move_bar(event)
        else:
            self._print(event)

    def stop(self) -> None:
        """Take the bar away, and give the cursor back: an error may end a run without an event."""
        self._bar.stop()

    def _print(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._terminal.print(shown(started_line(event), keep="\n"), markup=False)
            self._start_bar(event)
            return
        if isinstance(event, RunEnded):
            self._bar.stop()
        if isinstance(event, Evaluated) and event.name != PROBE:
            self._shown.evaluation = event.loss
        if isinstance(event, MemoryPeak):
            of = f" of {bytes_shown(event.planned_bytes)}" if event.planned_bytes else ""
            self._shown.memory = f" · {bytes_shown(event.bytes)}{of}"
        in_table = isinstance(self._bar, Cell) and self._bar.takes(event, self._shown.mean)
        if isinstance(event, Logged):
            self._shown.window = []
        text = "" if in_table else line(event)
        if text:
            self._terminal.print(shown(text), markup=False)

    def _start_bar(self, event: RunStarted) -> None:
        self._shown = Shown()
        if self._live and self._terminal.is_jupyter:
            self._bar = Cell(event, output())
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._terminal,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=event.steps, completed=event.first_step)
        self._bar.start()

    def _move_bar(self, event: StepEnd) -> None:
        told = self._shown.after(event) if self._live else ""
        self._bar.update(self._task, completed=event.step, description=told)


def started_line(event: RunStarted) -> str:
    """The run in two lines: data and effective batch; what trains, where, in which precision."""
    examples = "a stream" if event.examples is None else f"{event.examples:,} examples"
    processes = "process" if event.processes == 1 else "processes"
    share = 100 * event.trainable_parameters / max(event.parameters, 1)
    return (
        f"Training on {examples}, {event.examples_per_step} per step "
        f"({event.batch_size} x {event.accumulation} accumulated x {event.processes} {processes}): "
        f"{event.steps:,} steps, {event.epochs:g} epochs\n"
        f"{event.trainable_parameters:,} of {event.parameters:,} parameters train "
        f"({share:.2f}%) on {event.device} in {event.precision}, layout {event.layout}"
    )


def line(event: Event) -> str:
    """One plain line for an event; empty for those that are only drawn."""
    match event:
        case Notice():
            return f"note: {event.text}"
        case Logged():
            return (
                f"step {event.step:>6}  epoch {event.epoch:5.2f}  loss {event.loss:.4f}  "
                f"gradient norm {event.gradient_norm:.3g}  "
                f"learning rate {event.learning_rate:.2e}"
            )
        case StepSkipped() | OutOfMemory():
            return f"step {event.step:>6}  {_mishap(event)}"
        case Evaluated():
            return (
                f"step {event.step:>6}  epoch {event.epoch:5.2f}  {event.name} loss "
                f"{event.loss:.4f} nats per token, {event.examples:,} examples, "
                f"{event.seconds:.1f} s"
            )
        case Sampled():
            asked, answer = (" ".join(text.split()) for text in (event.prompt, event.answer))
            return f"step {event.step:>6}  > {asked[-_ASKED:]} -> {answer[:_ANSWERED]}"
        case Saved():
            return f"saved {event.path} ({event.bytes / 1e6:.1f} MB)"
        case RunEnded():
            restored = f"; best adapter restored: {event.restored}" if event.restored else ""
            return (
                f"{event.reason} after {event.step:,} steps in {event.seconds:.1f} s, "
                f"mean loss {event.loss:.4f}{restored}"
            )
        case _:
            return ""


def _mishap(event: StepSkipped | OutOfMemory) -> str:
    if isinstance(event, OutOfMemory):
        less, smaller = f"keeping less ({event.recompute})", f"{event.budget:,} tokens at a time"
        return (
            f"OUT OF MEMORY at {event.tokens:,} tokens of {event.rows} examples in one "
            f"{event.doing}; the same again with {less if event.recompute else smaller}: "
            f"{event.message}"
        )
    if event.overflow:
        return "NOT APPLIED: gradients overflowed float16; the scaler halves its scale"
    return (
        f"NOT APPLIED: loss {event.loss}, gradient norm {event.gradient_norm}; examples "
        f"{list(event.examples)}"
    )
