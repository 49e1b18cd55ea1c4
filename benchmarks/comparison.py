"""Runs -> numbers -> a table. Owns what each column means; starts nothing.

Tokens are those of the examples: padding never counts. The first steps (`warm_up`) are left out
of the rate, and so is everything before them; what they cost stands in columns of its own. Memory
is the process's highest resident set (or the GPU allocator's), children excluded.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from contenders import Contender
from examples import Examples
from measure import Run, threads

MB = 1e6


@dataclass(frozen=True)
class Reading:
    """The numbers of one run.

    Attributes:
        trained, supervised: Tokens per second over the steps after the warm-up.
        peak: Bytes. above_weights: less the base's weights. working: less, too, what the process
            held when its libraries were imported (0 where the peer did not say).
        first_step: Seconds from the process's start to the end of its first step.
        warm_up: Seconds that the first step took beyond what its tokens take later.
        loss: Nats per supervised token of the first step. examples: those of that step.
    """

    trained: float
    supervised: float
    peak: int
    above_weights: int
    working: int
    first_step: float
    warm_up: float
    loss: float | None
    examples: list[int]
    losses: dict[int, float]


def read(run: Run, examples: Examples, *, weights: int, warm_up: int = 1) -> Reading | None:
    """The numbers of a run, or None if it ended before a step could be timed.

    Args:
        weights: Bytes of the base.
        warm_up: Steps at the start that are not timed.
    """
    ends = [event["at"] for event in run.of("step")]
    if len(ends) <= warm_up:
        return None
    order = run.of("done")[0]["order"] if run.of("done") else _order(run)
    tokens = [sum(examples.lengths[number] for number in step) for step in order[: len(ends)]]
    targets = [sum(examples.supervised[number] for number in step) for step in order[: len(ends)]]
    taken = ends[-1] - ends[warm_up - 1]
    rate = sum(tokens[warm_up:]) / taken
    begins = run.of("loaded")[0]["at"]
    gpu = run.job.device == "cuda"
    peak = max(event.get("device_peak", 0) if gpu else event["peak"] for event in run.events)
    held = 0 if gpu else run.of("imported")[0]["now"]
    return Reading(
        trained=rate, supervised=sum(targets[warm_up:]) / taken, peak=peak,
        above_weights=peak - weights, working=peak - weights - held, first_step=ends[0] - run.began,
        warm_up=ends[0] - begins - tokens[0] / rate, loss=run.losses.get(1),
        examples=order[0], losses=run.losses,
    )  # fmt: skip


def _order(run: Run) -> list[list[int]]:
    """Of a run that was stopped: known if the order is the file's, else as if it were."""
    each = run.job.batch * run.job.accumulation
    flat = [number for part in run.job.sequential() for number in part]
    return [flat[start : start + each] for start in range(0, len(flat), each)]


@dataclass
class Row:
    """A contender on a set of examples, and its readings."""

    data: str
    contender: Contender
    readings: list[Reading] = field(default_factory=list)
    error: str = ""
    floor: float = 0.0  # tokens per second that shares are read against
    reference: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def middle(self, what: Callable[[Reading], float]) -> float:
        """The median over the rounds."""
        return median(what(reading) for reading in self.readings)

    def cells(self) -> list[str]:
        """The row as the table shows it."""
        if not self.readings:
            return [self.contender.name, self.error or "not run"]
        rates = [reading.trained for reading in self.readings]
        loss, off = self.readings[0].loss, "-"
        if loss is not None and self.reference is not None:
            off = f"{loss - self.reference:+.1e}"
        low, high = (_number(extreme(rates)) for extreme in (min, max))
        return [
            self.contender.name,
            _number(self.middle(lambda r: r.trained)),
            f"{low}-{high}",
            _number(self.middle(lambda r: r.supervised)),
            f"{self.middle(lambda r: r.trained) / self.floor:.0%}" if self.floor else "-",
            f"{self.middle(lambda r: r.peak) / MB:,.0f}",
            f"{self.middle(lambda r: r.above_weights) / MB:,.0f}",
            f"{self.middle(lambda r: r.working) / MB:,.0f}",
            f"{self.middle(lambda r: r.first_step):.1f}",
            f"{max(0.0, self.middle(lambda r: r.warm_up)):.1f}",
            off,
            self.error,
        ]

    def record(self) -> dict[str, Any]:
        """All of it, for the JSON file."""
        return asdict(self) | {"name": self.contender.name}


HEADER = (
    "tokens/s", "min-max", "supervised/s", "of floor", "peak MB", "- weights", "- libraries",
    "1st step s", "warm-up s", "loss off by", "",
)  # fmt: skip


def table(title: str, rows: list[Row], header: tuple[str, ...] = HEADER) -> str:
    """Columns side by side; a row without readings keeps its reason."""
    lines = [(title, *header), *(tuple(row.cells()) for row in rows)]
    full = [line for line in lines if len(line) > 2]
    widths = [max(len(line[column]) for line in full) for column in range(len(header) + 1)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{line[0]:<{widths[0]}}  {line[1]}"
        if len(line) == 2
        else "  ".join(
            f"{cell:<{width}}" if column in (0, len(header)) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def machine() -> dict[str, Any]:
    """What it ran on, and when."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()]
    told = {line[0].strip(): line[1].strip() for line in fields if len(line) == 2}
    flags = told.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{told.get('model name', platform.processor())}, family {told.get('cpu family')}, "
        f"model {told.get('model')}",
        "instructions": [flag for flag in wanted if flag in flags],
        "threads": threads(),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def write(out: Path, told: dict[str, Any], rows: list[Row], tables: list[str]) -> None:
    """`out`.json with everything, `out`.txt for people."""
    out.parent.mkdir(parents=True, exist_ok=True)
    versions: dict[str, dict[str, str]] = {}
    for row in rows:
        versions.setdefault(row.contender.peer, {}).update(row.versions)
    everything = told | {"versions": versions, "rows": [row.record() for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    head = [f"{name}: {_words(value)}" for name, value in told.items()]
    peers = [f"{peer}: {_words(found)}" for peer, found in versions.items() if found]
    text = "\n".join([*head, *peers, "", "\n\n".join(tables)])
    out.with_suffix(".txt").write_text(text + "\n")


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
