"""The learning-rate range test: rates that rise from step to step, and what their losses say.

Smith 2017 ("Cyclical Learning Rates for Training Neural Networks"), with fastai's two readings of
the curve: the rate at which the loss falls fastest, and a tenth of the one at which it is lowest.
The lower of the two is suggested. Departures: smoothing is by straight lines fitted in windows,
which lag behind nothing and tell how sure they are, and a curve that shows no more than noise gives
no suggestion. Knows neither models nor torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

CUT = 4.0
"""Diverged: so many times the lowest smoothed loss (fastai's)."""

_DECAY = 0.9
_SURE = 3.0
_PART = 8
"""Standard errors that are no noise; windows that a curve has, at least."""
_LINES, _COLUMNS = 12, 40
"""Of the table."""


@dataclass(frozen=True)
class Curve:
    """What a range test found.

    Attributes:
        rates, losses: Of each step that was taken, the diverging ones included.
        smoothed: The losses up to divergence, smoothed.
        rate: The suggestion; None where the curve does not allow one.
        said: A line: the rule, or why there is no suggestion.
        steepest, lowest: The rates at which the loss fell fastest, and was lowest; None unknown.
        given: The rate that the run is set to; None: nobody has said.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...] = ()
    rate: float | None = None
    said: str = ""
    steepest: float | None = None
    lowest: float | None = None
    given: float | None = None

    def table(self) -> list[str]:
        """The smoothed curve in some lines of text: rates, losses, and where each lies between the
        lowest and the highest; what is suggested and what is given stand at the nearest rate."""
        if not self.smoothed:
            return []
        logs = [math.log(rate) for rate in self.rates[: len(self.smoothed)]]
        points = min(_LINES, len(logs))
        chosen = [round(n * (len(logs) - 1) / (points - 1)) for n in range(points)]
        low, high = min(self.smoothed), max(self.smoothed)
        notes: dict[int, str] = {}
        for name, rate in (("suggested", self.rate), ("set", self.given)):
            if rate:
                aim = math.log(rate)
                _, near = min((abs(logs[n] - aim), n) for n in chosen)
                notes[near] = f"{notes.get(near, '')}  <- {name}: {rate:.1e}"
        made = [f"{'rate':>8}{'loss':>9}"]
        for at in chosen:
            loss = self.smoothed[at]
            place = round(_COLUMNS * (loss - low) / (high - low)) if high > low else 0
            made.append(f"{self.rates[at]:>8.1e}{loss:>9.4f}  {' ' * place}*{notes.get(at, '')}")
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a loss that is no number is None."""
        kept = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {**asdict(self), "losses": kept}


def rising(low: float, high: float, *, steps: int) -> list[float]:
    """`steps` rates from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def sweep(step: Callable[[float], float], rates: Iterable[float]) -> Curve:
    """Take a step at each of `rates` in turn until the loss diverges, and read the curve.

    Args:
        step: Trains one step at that rate; the loss before its update.
    """
    taken: list[float] = []
    losses: list[float] = []
    for rate in rates:
        taken.append(rate)
        losses.append(step(rate))
        if _kept(losses) < len(losses):
            break
    return read(taken, losses)


def read(rates: Sequence[float], losses: Sequence[float]) -> Curve:
    """The suggestion that a finished curve allows."""
    kept = _kept(losses)
    shown = Curve(tuple(rates), tuple(losses))
    width = max(5, kept // _PART)
    if kept < 3 * width:
        return _silent(shown, f"it diverged after {kept} steps: begin with a lower rate")
    lines = _fitted([math.log(rate) for rate in rates[:kept]], losses[:kept], width=width)
    values = [line.value for line in lines]
    lowest = values.index(min(values))
    noise = median(line.error for line in lines)
    smoothed = Curve(shown.rates, shown.losses, tuple(values))
    if values[0] - values[lowest] < _SURE * noise:
        return _silent(smoothed, f"the loss fell by no more than its noise of {noise:.2g} nats")
    falling = [line.slope for line in lines[: lowest + 1]]
    steepest = falling.index(min(falling))
    if falling[steepest] > -_SURE * lines[steepest].slope_error:
        return _silent(smoothed, "nowhere does the loss fall faster than its noise")
    if steepest >= kept - width:
        return _silent(smoothed, "the loss falls ever faster: end with a higher rate")
    fastest, least = rates[steepest], rates[lowest]
    ends = kept == len(losses) and lowest >= kept - width
    tenth = math.inf if ends else least / 10
    rule = (
        f"the loss falls fastest at {fastest:.1e} (Smith 2017)"
        if fastest <= tenth
        else f"a tenth of {least:.1e}, where the loss is lowest (fastai's rule)"
    )
    return Curve(
        smoothed.rates, smoothed.losses, smoothed.smoothed, min(fastest, tenth),
        rule, fastest, None if ends else least,
    )  # fmt: skip


def _silent(curve: Curve, why: str) -> Curve:
    return Curve(curve.rates, curve.losses, curve.smoothed, None, f"cannot say: {why}")


def _kept(losses: Sequence[float]) -> int:
    """How many come before the first that is not finite, or at which a running mean of them is
    `CUT` times the lowest it was."""
    finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    sums = accumulate(losses[:finite], lambda s, x: _DECAY * s + (1 - _DECAY) * x, initial=0.0)
    best = math.inf
    for number, total in enumerate(sums):
        if not number:
            continue
        mean = total / (1 - _DECAY**number)  # a mean from the first on, as Adam's
        if mean > CUT * best or losses[number - 1] > 2 * CUT * best:
            return number - 1
        best = min(best, mean)
    return finite


@dataclass(frozen=True)
class _Line:
    """A straight line fitted around a step: its value and slope there, and their errors."""

    value: float
    error: float
    slope: float
    slope_error: float


def _fitted(xs: Sequence[float], ys: Sequence[float], *, width: int) -> list[_Line]:
    """By least squares, in a window of `2 * width + 1` steps around each; fewer at the ends."""
    made: list[_Line] = []
    for at in range(len(xs)):
        window = range(max(0, at - width), min(len(xs), at + width + 1))
        middle = sum(xs[n] for n in window) / len(window)
        mean = sum(ys[n] for n in window) / len(window)
        spread = sum((xs[n] - middle) ** 2 for n in window)
        slope = sum((xs[n] - middle) * (ys[n] - mean) for n in window) / spread
        rest = sum((ys[n] - mean - slope * (xs[n] - middle)) ** 2 for n in window)
        variance = rest / (len(window) - 2)
        value = mean + slope * (xs[at] - middle)
        error = math.sqrt(variance * (1 / len(window) + (xs[at] - middle) ** 2 / spread))
        made.append(_Line(value, error, slope, math.sqrt(variance / spread)))
    return made
