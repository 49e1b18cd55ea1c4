"""What a run folder tells: its last run, its settings, where it ran, and the verdict.

Reads what lorafit wrote there and changes nothing; whatever cannot be read is left out and named.
Draws nothing. Knows no torch.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from lorafit.errors import OutputError
from lorafit.events import (
    PROBE,
    DataAudited,
    Evaluated,
    Event,
    MemoryPeak,
    Notice,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepEnd,
    StepSkipped,
)
from lorafit.run import overfit, store
from lorafit.run.journal import read_events
from lorafit.run.overfit import Series, Setup, Verdict

_Kind = TypeVar("_Kind")
_SETTING = re.compile(r"(\w+): (.*)  # (.*)")
_STATE = "run_state.json"


@dataclass(frozen=True, slots=True)
class Setting:
    """One knob as config.yaml has it; `origin` is who set it, empty where that was not kept."""

    group: str
    name: str
    value: str
    origin: str

    @property
    def is_chosen(self) -> bool:
        """Whether somebody wrote it."""
        return self.origin not in ("default", "recipe", "follows from others", "")


@dataclass(frozen=True)
class Record:
    """The last run of a folder.

    Attributes:
        events: Those of that run, with what was said before its first step; of steps that were run
            again after an interruption, the last.
        settings: In the order of config.yaml.
        environment: What it ran on and with, by name.
        left_out: A line for everything that could not be read.
        earlier: Runs that the journal holds besides.
    """

    folder: Path
    events: tuple[Event, ...]
    settings: tuple[Setting, ...]
    environment: Mapping[str, str]
    left_out: tuple[str, ...]
    earlier: int

    def of(self, kind: type[_Kind]) -> tuple[_Kind, ...]:
        """Its events of one kind, in order."""
        return tuple(event for event in self.events if isinstance(event, kind))

    @property
    def started(self) -> RunStarted | None:
        """How it began; of a resumed run, how it last went on."""
        return (self.of(RunStarted) or (None,))[-1]

    @property
    def ended(self) -> RunEnded | None:
        """How it ended; None while it runs, or where it was killed."""
        last = [event for event in self.events if isinstance(event, RunStarted | RunEnded)]
        return last[-1] if last and isinstance(last[-1], RunEnded) else None

    @cached_property
    def steps(self) -> tuple[StepEnd, ...]:
        """Its steps, in order, each once."""
        return tuple(sorted({s.step: s for s in self.of(StepEnd)}.values(), key=lambda s: s.step))

    @property
    def last_step(self) -> int:
        """The last step of which anything is known."""
        return max([0, *(s.step for s in self.steps), *(e.step for e in self.of(Evaluated))])

    @cached_property
    def readings(self) -> dict[str, tuple[Evaluated, ...]]:
        """Evaluations by name, in order, the last at each step."""
        named: dict[str, dict[int, Evaluated]] = {}
        for event in self.of(Evaluated):
            named.setdefault(event.name, {})[event.step] = event
        return {n: tuple(by[step] for step in sorted(by)) for n, by in named.items()}

    @property
    def evaluation_name(self) -> str:
        """The name of the evaluation set that the verdict is about; empty where there is none."""
        names = [name for name in self.readings if name.startswith("eval")]
        return "eval" if "eval" in names else min(names, default="")

    @cached_property
    def evaluation(self) -> Series:
        """The readings of the evaluation set."""
        return _series(self.readings.get(self.evaluation_name, ()))

    @cached_property
    def probe(self) -> Series:
        """The readings of the fixed training examples; empty where none were taken."""
        return _series(self.readings.get(PROBE, ()))

    @property
    def training(self) -> Series:
        """Training loss where the evaluation loss was read: the probe's; without one the mean over
        the supervised tokens of the steps since the reading before."""
        if len(self.probe.steps) > 1:
            return self.probe
        found: dict[int, float] = {}
        before = 0
        for at in self.evaluation.steps:
            between = [s for s in self.steps if before < s.step <= at]
            tokens = sum(s.supervised_tokens for s in between)
            if tokens:
                found[at] = sum(s.loss * s.supervised_tokens for s in between) / tokens
            before = at
        return Series(tuple(found), tuple(found.values()))

    @property
    def setup(self) -> Setup:
        """What suggestions follow from."""
        started = self.started
        value = {setting.name: setting.value for setting in self.settings}
        rank = _number(value.get("lora_r"))
        return Setup(
            steps=started.steps if started else None,
            epochs=started.epochs if started else None,
            learning_rate=_number(value.get("learning_rate")),
            weight_decay=_number(value.get("weight_decay")),
            lora_dropout=_number(value.get("lora_dropout")),
            lora_r=None if rank is None else int(rank),
        )

    @cached_property
    def verdict(self) -> Verdict:
        """What to think of it."""
        skipped = len(self.of(StepSkipped))
        return overfit.judge(self.evaluation, self.training, setup=self.setup, skipped=skipped)

    def memorises(self, patience: int) -> bool:
        """Whether the verdict was memorising at each of the last `patience` readings."""
        late = self.evaluation.steps[-patience:]
        return len(late) == patience and all(
            self._until(step).verdict.kind == "memorising" for step in late
        )

    def _until(self, step: int) -> "Record":
        return replace(self, events=tuple(e for e in self.events if not _is_after(e, step)))

    @property
    def seconds(self) -> float:
        """Spent in steps and evaluations."""
        return sum(s.seconds for s in self.steps) + sum(e.seconds for e in self.of(Evaluated))

    @property
    def seconds_left(self) -> float | None:
        """To the last step at the pace of late, evaluations included; None once it has ended, or
        before a step is known."""
        if self.ended or not self.steps or not self.started:
            return None
        pace = median(s.seconds for s in self.steps[-50:])
        share = self.seconds / max(sum(s.seconds for s in self.steps), 1e-9)
        return max(0, self.started.steps - self.last_step) * pace * share

    @property
    def tokens_per_second(self) -> float | None:
        """Of the last fifty steps."""
        late = self.steps[-50:]
        return sum(s.tokens for s in late) / max(sum(s.seconds for s in late), 1e-9) or None

    @property
    def checkpoints(self) -> tuple[tuple[int, str, int], ...]:
        """(step, name, bytes) of those that are there."""
        found = store.checkpoints(self.folder)
        return tuple((step, path.name, store.bytes_of(path)) for step, path in found)

    @property
    def best_adapter(self) -> str:
        """The name of the checkpoint of the lowest evaluation loss, if it is there."""
        return next((name for step, name, _ in self.checkpoints if step == self.verdict.best), "")


def read(folder: Path) -> Record:
    """What `folder` tells of its last run.

    Raises:
        OutputError: it holds no journal, or one that the system does not let us read.
    """
    try:
        events, left_out = read_events(folder / store.JOURNAL)
    except OSError as error:
        raise OutputError(
            f"{folder} holds no run that can be read: {store.JOURNAL}: {error.strerror}.",
            why="A report is made of what a run has written there, and of nothing else.",
            fix="Name the output folder of a run: lorafit report FOLDER",
        ) from error
    last, earlier = _last_run(events)
    state, unread = _state(folder)
    settings, misread = _settings(folder, state)
    return Record(
        folder=folder,
        events=tuple(last),
        settings=settings,
        environment=_environment(state, last),
        left_out=(*left_out, *unread, *misread),
        earlier=earlier,
    )


def _last_run(events: Sequence[Event]) -> tuple[list[Event], int]:
    """The events of the last run, and how many began before it."""
    begun = [
        n
        for n, event in enumerate(events)
        if isinstance(event, RunStarted) and not event.first_step
    ]
    first = begun[-1] if begun else 0
    while first and isinstance(events[first - 1], Notice | DataAudited):
        first -= 1
    kept: list[Event] = []
    for event in events[first:]:
        if isinstance(event, RunStarted) and event.first_step:
            kept = [e for e in kept if not _is_after(e, event.first_step)]
        kept.append(event)
    return kept, max(0, len(begun) - 1)


def _is_after(event: Event, step: int) -> bool:
    """Whether it tells of a step that a run resumed at `step` runs again."""
    told = isinstance(event, StepEnd | StepSkipped | Evaluated | Sampled | MemoryPeak | Saved)
    return told and event.step > step


def _series(readings: Iterable[Evaluated]) -> Series:
    given = tuple(readings)
    steps, losses = tuple(e.step for e in given), tuple(e.loss for e in given)
    tokens = given[0].tokens if given else ()
    if tokens and all(e.tokens == tokens and len(e.nats) == len(tokens) for e in given):
        return Series(steps, losses, tuple(e.nats for e in given), tokens)
    return Series(steps, losses)


def _state(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """What the newest checkpoint was made with; and a line where that cannot be read."""
    for _, path in reversed(store.checkpoints(folder)):
        file = path / _STATE
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8"))["made_with"]), []
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                return {}, [f"{path.name}/{_STATE} left out: it cannot be read"]
    return {}, []


def _settings(folder: Path, state: Mapping[str, Any]) -> tuple[tuple[Setting, ...], list[str]]:
    """What config.yaml says; without one, what a checkpoint kept, where nobody says who set it."""
    file = folder / store.SETTINGS
    if not file.is_file():
        kept = [(n, str(v)) for n, v in state.items() if "." not in n]
        return tuple(Setting("Settings", name, value, "") for name, value in kept), []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return (), [f"{store.SETTINGS} left out: it cannot be read"]
    found: list[Setting] = []
    strange, group = 0, ""
    for line in lines:
        knob = _SETTING.fullmatch(line)
        if knob:
            found.append(Setting(group, *knob.groups()))
        elif line.startswith("# "):
            group = line[2:]
        else:
            strange += bool(line.strip())
    missed = f"{strange} lines of {store.SETTINGS} left out: not as lorafit writes them"
    return tuple(found), [missed] * bool(strange)


def _environment(state: Mapping[str, Any], events: Sequence[Event]) -> dict[str, str]:
    """Machine and versions that a checkpoint kept, and what the run said of itself."""
    started = [event for event in events if isinstance(event, RunStarted)]
    said: dict[str, str] = {}
    if started:
        run = started[-1]
        said = {"device": run.device, "precision": run.precision, "layout": run.layout}
    kept = {
        name.partition(".")[2]: str(value)
        for name, value in state.items()
        if name.startswith(("machine.", "versions."))
    }
    return {**said, **kept}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
