"""What is drawn of a run, as plain numbers: lines, marks, the noise band, the table behind each.

Owns which quantity is shown how; knows neither page nor plotting library.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.events import MemoryPeak
from lorafit.run import overfit
from lorafit.run.overfit import Series
from lorafit.run.rates import Curve
from lorafit.run.record import Record

_POINTS, _ROWS = 750, 60
"""Points of a line, and rows of the table behind it, at most: what is more is averaged."""
_NEAR = 0.1
"""Of its fall from the first reading to the lowest, above which evaluation loss is drawn alone."""

Values = list[float | None]


@dataclass(frozen=True)
class Line:
    """What is drawn as one line: `values` at `steps`, or at what else the figure's axis says, in a
    colour of the style sheet."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    look: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Figure:
    """A plot, the sentence below it and the table behind it. `marks` are steps with a label, and
    stretches that begin with one; `band` the steps, low and high edges of a noise band. `axis` is
    what lies along it, `log` and `log_axis` that it is by decades, up and along."""

    id: str
    title: str
    unit: str
    lines: Sequence[Line]
    told: str = ""
    tall: bool = False
    zero: bool = False
    log: bool = False
    axis: str = "step"
    log_axis: bool = False
    marks: Sequence[dict[str, Any]] = ()
    band: tuple[Sequence[int], Sequence[float], Sequence[float]] | None = None

    @property
    def columns(self) -> list[str]:
        """Of the table, after the first, the axis."""
        return [line.label for line in self.lines]

    @property
    def rows(self) -> list[list[str]]:
        """The table's; thinned out evenly where there are many."""
        steps, columns = self._joined()
        every = max(1, math.ceil(len(steps) / _ROWS))
        told = [n for n in range(len(steps)) if n % every == 0 or n == len(steps) - 1]
        sparse = {line.label: set(line.steps) for line in self.lines if len(line.steps) <= _ROWS}
        shown = sorted({*told, *(n for n, s in enumerate(steps) if _holds(sparse, s))})
        return [
            [_at(steps[n]), *("" if c[n] is None else f"{c[n]:.5g}" for c in columns)]
            for n in shown
        ]

    def _joined(self) -> tuple[list[float], list[Values]]:
        steps = sorted({step for line in self.lines for step in line.steps})
        return steps, [_spread(steps, line.steps, values=line.values) for line in self.lines]

    def as_told(self) -> dict[str, Any]:
        """For the script: plain JSON."""
        steps, columns = self._joined()
        series = [
            {"label": line.label, "colour": line.colour, "values": values, **line.look}
            for line, values in zip(self.lines, columns, strict=True)
        ]
        band = None
        if self.band:
            at, low, high = self.band
            band = {"low": _spread(steps, at, values=low), "high": _spread(steps, at, values=high)}
        named = ("id", "title", "unit", "tall", "zero", "log", "axis", "log_axis")
        told = {name: vars(self)[name] for name in named}
        return {**told, "marks": list(self.marks), "x": steps, "series": series, "band": band}


def _at(step: float) -> str:
    return f"{step:,}" if isinstance(step, int) else f"{step:.2e}"


def _holds(sparse: dict[str, set[float]], step: float) -> bool:
    return any(step in steps for steps in sparse.values())


def _spread(steps: Sequence[float], own: Sequence[float], *, values: Sequence[float]) -> Values:
    """`values` at its `own` steps among all `steps`; None elsewhere, and for what is not finite."""
    known = dict(zip(own, values, strict=True))
    found = (known.get(step) for step in steps)
    return [value if value is not None and math.isfinite(value) else None for value in found]


# ---- what is drawn -----------------------------------------------------------------------------


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `_POINTS` points, each the mean of so many steps, at the last of them."""
    every = max(1, math.ceil(len(steps) / _POINTS))
    groups = range(0, len(steps), every)
    means = [sum(values[n : n + every]) / len(values[n : n + every]) for n in groups]
    return [steps[min(n + every, len(steps)) - 1] for n in groups], means


def _smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """The mean of each with its neighbours to either side, so that it does not lag behind, those
    that are not finite left out; and over how many."""
    reach = max(2, len(values) // 60)
    sums, counts = [0.0], [0]
    for value in values:
        is_finite = math.isfinite(value)
        sums.append(sums[-1] + (value if is_finite else 0.0))
        counts.append(counts[-1] + is_finite)
    made: list[float] = []
    for n in range(len(values)):
        low, high = max(0, n - reach), min(len(values), n + reach + 1)
        count = counts[high] - counts[low]
        made.append((sums[high] - sums[low]) / count if count else math.nan)
    return made, 2 * reach + 1


def of_run(run: Record) -> list[Figure]:
    """What there is to draw of one run, the losses first."""
    steps = [s.step for s in run.steps]
    made = [_losses(run)] if run.steps or run.evaluation.steps else []
    made += _closer(run)
    told = _said_of_thinning(len(steps))

    def drawn(
        name: str, title: str, *, unit: str, values: Sequence[float], zero: bool = False
    ) -> Figure:
        line = Line(title.lower(), *_thinned(steps, values), colour=name)
        return Figure(name, title, unit, [line], told=told, zero=zero)

    if steps:
        speeds = [s.tokens / max(s.seconds, 1e-9) for s in run.steps]
        smooth, span = _smoothed(speeds)
        rates, norms = [s.learning_rate for s in run.steps], [s.gradient_norm for s in run.steps]
        made += [
            drawn("lr", "Learning rate", unit="per step", values=rates),
            drawn("norm", "Gradient norm", unit="before clipping", values=norms, zero=True),
            drawn(
                "speed", f"Speed, mean of {span} steps", unit="tokens/s", values=smooth, zero=True
            ),
        ]
    peaks = run.of(MemoryPeak)
    if peaks:
        at = [p.step for p in peaks]
        lines = [Line("peak", at, [p.bytes / 1e9 for p in peaks], "memory")]
        planned = [p.planned_bytes / 1e9 for p in peaks]
        if any(planned):
            lines.append(Line("planned", at, planned, "soft", {"dash": [6, 4]}))
        made.append(Figure("memory", "Memory", "GB", lines, zero=True))
    return made


def _said_of_thinning(count: int) -> str:
    every = math.ceil(count / _POINTS)
    return f"Each point is the mean of {every} steps." if every > 1 else ""


def _losses(run: Record) -> Figure:
    lines: list[Line] = []
    if run.steps:
        raw = [s.loss for s in run.steps]
        smooth, span = _smoothed(raw)
        steps = [s.step for s in run.steps]
        lines = [
            Line("each step", *_thinned(steps, raw), "step", {"width": 1}),
            Line(f"training, mean of {span}", *_thinned(steps, smooth), "smooth", {"width": 2}),
        ]
    for series, label, colour, dash in (
        (run.probe, "training examples, evaluated", "probe", [6, 3]),
        (run.evaluation, "evaluation", "eval", None),
    ):
        if series.steps:
            look = {"points": True, "width": 2, **({"dash": dash} if dash else {})}
            lines.append(Line(label, series.steps, series.losses, colour, look))
    band, said = _band(run.evaluation)
    return Figure(
        "loss",
        "Loss",
        "nats per token",
        lines,
        told=" ".join(filter(None, [said, _said_of_thinning(len(run.steps))])),
        tall=True,
        marks=_marks(run),
        band=band,
    )


def _closer(run: Record) -> list[Figure]:
    """The evaluation loss without its first fall, beside which nothing later can be seen."""
    whole = run.evaluation
    if run.verdict.best is None:
        return []
    low = min(loss for loss in whole.losses if math.isfinite(loss))
    first = next(
        n
        for n, loss in enumerate(whole.losses)
        if loss - low < _NEAR * (whole.losses[0] - low) or n == whole.best
    )
    late = Series(whole.steps[first:], whole.losses[first:], whole.nats[first:], whole.tokens)
    if first == 0 or len(late.steps) < overfit.FEWEST:
        return []
    band, said = _band(whole)
    if band:
        band = (band[0][first:], band[1][first:], band[2][first:])
    look = {"points": True, "width": 2}
    line = Line("evaluation", late.steps, late.losses, "eval", look)
    title = f"Evaluation loss from step {late.steps[0]:,} on"
    return [
        Figure(
            "closer",
            title,
            "nats per token",
            [line],
            told=said,
            tall=True,
            marks=_marks(run),
            band=band,
        )
    ]


def _band(series: Series) -> tuple[tuple[list[int], list[float], list[float]] | None, str]:
    """Two standard errors to either side of each reading, and what they are of."""
    kept = [n for n, loss in enumerate(series.losses) if math.isfinite(loss)]
    if len(kept) < 2:
        return None, ""
    best = series.best
    if series.nats:
        errors = [series.error(best, n) for n in kept]
        said = "Band: two standard errors of the difference from the best reading, over examples."
    elif len(kept) >= overfit.ENOUGH:
        errors = [overfit.jitter(series)] * len(kept)
        said = "Band: two standard deviations of the readings about their curve."
    else:
        return None, ""
    at = [series.steps[n] for n in kept]
    low = [series.losses[n] - 2 * e for n, e in zip(kept, errors, strict=True)]
    return (at, low, [series.losses[n] + 2 * e for n, e in zip(kept, errors, strict=True)]), said


def _marks(run: Record) -> list[dict[str, Any]]:
    verdict = run.verdict
    if verdict.best is None:
        return []
    if verdict.kind == "memorising":
        last = run.evaluation.steps[-1]
        return [
            {"from": verdict.best, "to": last, "label": f"best {verdict.best:,}, then memorising"}
        ]
    return [{"from": verdict.best, "to": None, "label": f"best {verdict.best:,}"}]


# ---- a range test ------------------------------------------------------------------------------


def of_rates(curve: Curve) -> Figure:
    """The loss of each step of a range test by its learning rate, up to where it diverged."""
    shown = len(curve.smoothed) or len(curve.losses)
    at = curve.rates[:shown]
    lines = [Line("each step", at, curve.losses[:shown], "step", {"width": 1})]
    if curve.smoothed:
        lines.append(Line("smoothed", at, curve.smoothed, "smooth", {"width": 2}))
    named = (("set", curve.given), ("suggested", curve.rate))
    gone = len(curve.losses) - shown
    return Figure(
        "rates",
        "Loss by learning rate",
        "nats per token",
        lines,
        told=f"{shown} steps, each at a higher rate than the one before"
        f"{', then it diverged' if gone else ''}: {curve.said}.",
        tall=True,
        axis="learning rate",
        log_axis=True,
        marks=[{"from": rate, "label": f"{name} {rate:.1e}"} for name, rate in named if rate],
    )


# ---- several runs ------------------------------------------------------------------------------


def of_runs(runs: Sequence[Record]) -> list[Figure]:
    """The same quantity of every run in one plot."""
    names = [run.folder.resolve().name for run in runs]

    def over(what: str, series: Callable[[Record], tuple[Sequence[int], Sequence[float]]],
             *, points: bool = False) -> list[Line]:  # fmt: skip
        lines = [
            Line(f"{name}: {what}", *series(run), f"run-{n % 6}", {"points": points, "width": 2})
            for n, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
        return [line for line in lines if line.steps]

    def smooth(run: Record) -> tuple[Sequence[int], Sequence[float]]:
        return _thinned([s.step for s in run.steps], _smoothed([s.loss for s in run.steps])[0])

    def rate(run: Record) -> tuple[Sequence[int], Sequence[float]]:
        return _thinned([s.step for s in run.steps], [s.learning_rate for s in run.steps])

    evaluated = over(
        "evaluation", lambda run: (run.evaluation.steps, run.evaluation.losses), points=True
    )
    made = [
        Figure("eval", "Evaluation loss", "nats per token", evaluated, tall=True),
        Figure(
            "train",
            "Training loss, smoothed",
            "nats per token",
            over("training", smooth),
            tall=True,
        ),
        Figure("lr", "Learning rate", "per step", over("rate", rate)),
    ]
    return [figure for figure in made if figure.lines]
