"""Is it learning, and since when does it memorise: one verdict in words from a run's readings.

Pure: series of numbers in, a sentence with its evidence and one suggestion out. Knows no file.

Evaluation loss that rises while training loss does not is memorising; the question is when a rise
is one. At each reading every stretch of at least four readings that ends there is tried, and the
steepest slope in units of its standard error is held against a boundary: a generalised likelihood
ratio over the unknown change point, for a slope (Krieger, Pollak and Yakir, Surveillance of a
simple linear regression, JASA 98, 2003; Lai, Sequential changepoint detection, JRSS B 57, 1995).
Looking again after each reading is part of that rule: `_boundary` was set by simulation
(`benchmarks/verdicts.py`) so that over a whole run of 60 readings of noise alone fewer than 5% are
ever called memorising, also where each reading keeps half of the last one's deviation, as plateaus
do. The noise is not assumed but taken from the series itself, and two more conditions do not depend
on it: the rise is worth a word, and it would be seen on other examples of the same source.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

Kind = Literal["still learning", "flat", "memorising", "unstable", "too few points to say"]

WORTH = 0.01
"""Nats per token, one percent of perplexity: less is no change."""
SURE = 0.15
"""Nats per token: after so much of a fall, so much of a rise at reading after reading needs no
estimate of the noise, for which there are too few readings at first."""
SWING = 0.2
"""Nats per token: readings that go up and down by more are no curve."""
FEWEST, ENOUGH = 4, 8
"""Readings below which nothing is said, and from which the noise can be estimated."""
_CONFIDENT = 3.0
"""Standard errors: a rise by so many would be seen on other examples too."""
_TWO, _LEARNS = 2.0, 2.5
_HIGH = 0.95
"""The share of what readings differ by from their neighbours, above which noise is read off."""
_LEAST = 4
"""Readings that a slope is drawn through: with fewer, none has a scatter to speak of."""


@dataclass(frozen=True, slots=True)
class Series:
    """The readings of one set of examples: `losses` in nats per supervised token, at `steps`.

    Attributes:
        nats: Of each reading, the summed nats of each example (or group of examples), always of the
            same ones; empty where they are not known.
        tokens: The supervised tokens of each of these.
    """

    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    nats: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def best(self) -> int:
        """The number of the lowest reading; of equal ones the first."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    def error(self, one: int, other: int) -> float:
        """The standard error of the difference between two readings, in nats per token: how much it
        would differ on other examples of the same source. 0 where `nats` are not known.

        The loss is a ratio of sums, so this is the linearised ratio estimator over examples paired
        by reading (Cochran, Sampling Techniques, 1977, section 6.4): the closed form of a paired
        bootstrap over examples.
        """
        count = len(self.tokens)
        if not self.nats or count < 2:
            return 0.0
        changes = [b - a for a, b in zip(self.nats[one], self.nats[other], strict=True)]
        total = sum(self.tokens)
        mean = sum(changes) / total
        squares = sum((c - mean * n) ** 2 for c, n in zip(changes, self.tokens, strict=True))
        return math.sqrt(squares * count / (count - 1)) / total

    def until(self, count: int) -> "Series":
        """The first `count` readings."""
        return Series(self.steps[:count], self.losses[:count], self.nats[:count], self.tokens)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a suggestion may follow from; None where it is not known."""

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    lora_dropout: float | None = None
    lora_r: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a run. `since` is a step, `best` the step of the lowest evaluation loss;
    None where there is none. `str()` gives it as one line."""

    kind: Kind
    since: int | None
    best: int | None
    evidence: str
    suggestion: str

    @property
    def headline(self) -> str:
        """ "memorising since step 180"."""
        return self.kind if self.since is None else f"{self.kind} since step {self.since:,}"

    def __str__(self) -> str:
        return "; ".join(filter(None, [f"{self.headline}: {self.evidence}", self.suggestion]))


def judge(
    evaluation: Series, training: Series, *, setup: Setup | None = None, skipped: int = 0
) -> Verdict:
    """The verdict on a run after these readings.

    Args:
        training: The same of training examples; best a fixed probe of them that is evaluated as the
            evaluation set is, else the mean training loss up to each reading.
        skipped: Steps that were not applied because their numbers were not finite.
    """
    setup = setup or Setup()
    readings, probes = _finite(evaluation), _finite(training)
    unstable = _unstable(evaluation, probes, skipped=skipped, setup=setup)
    if unstable:
        return unstable
    count = len(readings.losses)
    if not count:
        return Verdict(
            "too few points to say",
            None,
            None,
            "no evaluation loss has been read",
            "hold examples back: eval_share=0.1",
        )
    best = readings.best
    if _rises(readings) and _fell(probes, readings.steps[best]) is not False:
        return _memorising(readings, probes, setup=setup)
    if count >= FEWEST:
        return _settled(readings, probes, setup=setup)
    return _undecided(readings, f"{_readings(count)}, and {FEWEST} are the least")


# ---- noise and slopes --------------------------------------------------------------------------


def _finite(series: Series) -> Series:
    kept = [n for n, loss in enumerate(series.losses) if math.isfinite(loss)]
    nats = tuple(series.nats[n] for n in kept) if series.nats else ()
    steps, losses = (tuple(of[n] for n in kept) for of in (series.steps, series.losses))
    return Series(steps, losses, nats, series.tokens)  # type: ignore[arg-type]


def jitter(series: Series) -> float:
    """The standard deviation of a reading about the curve that the readings follow.

    From what each differs by from the line between its neighbours (Gasser, Sroka and
    Jennen-Steinmetz, Residual variance and residual pattern in nonlinear regression, Biometrika 73,
    1986). A curve that falls ever more slowly and then rises lies below such a line, so that only
    noise lies above it: the departure from the source is that what is above is read, near its
    largest, and the fall at the start counts for nothing. Neighbours are the nearest, the second
    and the third, as what drifts slowly hides from the nearest; the largest of the three stands.
    Never less than what examples explain.
    """
    found = [_explained(series), 1e-9]
    for lag in (1, 2, 3):
        above = sorted(_residuals(series, lag))
        if len(above) >= 2:
            high = above[math.ceil(_HIGH * len(above)) - 1]
            found.append(high / NormalDist().inv_cdf(_HIGH))
    return max(found)


def _residuals(series: Series, lag: int) -> list[float]:
    x, y = series.steps, series.losses
    made: list[float] = []
    for n in range(lag, len(y) - lag):
        after = (x[n] - x[n - lag]) / (x[n + lag] - x[n - lag])
        line = (1 - after) * y[n - lag] + after * y[n + lag]
        made.append((y[n] - line) / math.sqrt(1 + after**2 + (1 - after) ** 2))
    return made


def _explained(series: Series) -> float:
    """What of the last reading's noise its examples account for."""
    last = len(series.losses) - 1
    return series.error(last - 1, last) / math.sqrt(2) if last > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Line:
    """The least-squares line through a stretch of readings: its slope per step, the root of the sum
    of squared distances of their steps, and their scatter about it."""

    slope: float
    root: float
    scatter: float

    def error(self, noise: float) -> float:
        """The standard error of the slope, where a reading's noise is no less than `noise`."""
        return max(noise, self.scatter) / self.root


def _line(series: Series, first: int) -> _Line:
    """Through the readings from `first` on, three at least."""
    x, y = series.steps[first:], series.losses[first:]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((at - middle) ** 2 for at in x)
    slope = sum((at - middle) * (loss - level) for at, loss in zip(x, y, strict=True)) / spread
    left = ((b - level - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    return _Line(slope, math.sqrt(spread), math.sqrt(sum(left) / (len(x) - 2)))


def _steepest(series: Series) -> float:
    """The steepest rise of a stretch that ends at the last reading, in standard errors."""
    noise = jitter(series)
    lines = (_line(series, first) for first in range(len(series.losses) - _LEAST + 1))
    return max((line.slope / line.error(noise) for line in lines), default=0.0)


def _boundary(count: int) -> float:
    """The standard errors that a rise must have at the `count`th reading."""
    return 7 + 8 / (count - 4)


def _rises(series: Series) -> bool:
    """Whether the readings have turned upwards."""
    count, best = len(series.losses), series.best
    rise = series.losses[-1] - series.losses[best]
    if count - best < 3 or rise < max(WORTH, _CONFIDENT * series.error(best, count - 1)):
        return False
    if count < ENOUGH:
        after = series.losses[best:]
        fell = max(series.losses[: best + 1]) - series.losses[best]
        return min(rise, fell) >= SURE and all(a < b for a, b in pairwise(after))
    return _steepest(series) > _boundary(count)


def _fell(series: Series, since: int) -> bool | None:
    """Whether training loss is lower than at the step `since`; None where it was not read."""
    before = [n for n, step in enumerate(series.steps) if step <= since]
    if not before or before[-1] == len(series.steps) - 1:
        return None
    return series.losses[-1] < series.losses[before[-1]]


# ---- verdicts ----------------------------------------------------------------------------------


def _unstable(
    evaluation: Series, training: Series, *, skipped: int, setup: Setup
) -> Verdict | None:
    readings = _finite(evaluation)
    broken = [n for n, loss in enumerate(evaluation.losses) if not math.isfinite(loss)]
    best = readings.steps[readings.best] if readings.losses else None
    since: int | None = None
    if broken:
        since = evaluation.steps[broken[0]]
        why = f"evaluation loss is {evaluation.losses[broken[0]]}"
    elif skipped >= max(3, 0.02 * (setup.steps or 0)):
        why = f"{skipped:,} steps were not applied, as their numbers were not finite"
    elif len(training.losses) >= ENOUGH and _rises(training):
        low = training.best
        since = training.steps[low]
        why = (
            f"training loss itself rose from {training.losses[low]:.3f} to "
            f"{training.losses[-1]:.3f} nats per token"
        )
    elif _swings(readings) >= 3:
        why = (
            f"evaluation loss turned {_swings(readings)} times by more than {SWING} nats in the "
            f"last {min(ENOUGH, len(readings.losses))} readings"
        )
    else:
        return None
    return Verdict("unstable", since, best, why, _lower_rate(setup))


def _swings(series: Series) -> int:
    """How often the last readings turned, by so much each time that no noise of examples does."""
    last = series.losses[-ENOUGH:]
    moves = [b - a for a, b in pairwise(last) if abs(b - a) > SWING]
    return sum(a * b < 0 for a, b in pairwise(moves))


def _memorising(readings: Series, training: Series, *, setup: Setup) -> Verdict:
    best, last = readings.best, len(readings.losses) - 1
    step = readings.steps[best]
    rise = readings.losses[last] - readings.losses[best]
    error = readings.error(best, last)
    band = f" ± {_TWO * error:.3f}" if error else ""
    trained = _change(training, since=step)
    while_ = f" while training loss {trained}" if trained else ""
    evidence = (
        f"evaluation loss rose {rise:.3f}{band} nats per token (from {readings.losses[best]:.3f} "
        f"at step {step:,} to {readings.losses[last]:.3f}){while_}; "
        f"the best adapter is step {step:,}"
    )
    return Verdict("memorising", step, step, evidence, _less(setup, step))


def _change(series: Series, *, since: int) -> str:
    """ "fell 0.110", from the reading at or before the step `since` to the last."""
    before = [n for n, step in enumerate(series.steps) if step <= since]
    if not before or before[-1] == len(series.steps) - 1:
        return ""
    change = series.losses[-1] - series.losses[before[-1]]
    return f"{'fell' if change < 0 else 'rose'} {abs(change):.3f}"


def _settled(readings: Series, training: Series, *, setup: Setup) -> Verdict:
    """Flat, still learning, or neither shown, by the last third of the readings."""
    count, noise = len(readings.losses), jitter(readings)
    recent = count - max(FEWEST, math.ceil(count / 3))
    fall, error = _fall(readings, recent, noise=noise)
    fallen = max(readings.losses) - min(readings.losses)
    limit = min(max(WORTH, 0.02 * fallen), 3 * WORTH)
    best = readings.steps[readings.best]
    since = readings.steps[recent]
    told = f"evaluation loss fell {fall:.3f} ± {_TWO * error:.3f} nats per token"
    if fall + _TWO * error < limit and fall > -limit:
        first = _flat_from(readings, recent, limit=limit)
        level = sum(readings.losses[first:]) / (count - first)
        width = max(abs(loss - level) for loss in readings.losses[first:])
        evidence = (
            f"evaluation loss has stayed within {width:.3f} of {level:.3f} "
            f"nats per token for {_readings(count - first)}"
        )
        advice = _more(readings, training, setup=setup)
        return Verdict("flat", readings.steps[first], best, evidence, advice)
    if fall > _LEARNS * error:
        evidence = f"{told} over the last {_readings(count - recent)} (since step {since:,})"
        ended = setup.steps is not None and readings.steps[-1] >= setup.steps
        epochs = setup.epochs or 1
        longer = f"try more epochs: num_train_epochs={math.ceil(epochs * 1.5)}"
        return Verdict("still learning", None, best, evidence, longer if ended else "let it run")
    if fall < 0:
        told = f"evaluation loss rose {-fall:.3f} ± {_TWO * error:.3f} nats per token"
    return _undecided(
        readings, f"{told} over the last {_readings(count - recent)}: no more than their noise"
    )


def _fall(series: Series, first: int, *, noise: float) -> tuple[float, float]:
    """By how much a line through the readings from `first` on falls, and its standard error."""
    line, length = _line(series, first), series.steps[-1] - series.steps[first]
    return -line.slope * length, line.error(noise) * length


def _flat_from(series: Series, first: int, *, limit: float) -> int:
    """The first reading from which a line to the last one falls by no more than `limit`."""
    while first > 0 and abs(_fall(series, first - 1, noise=0.0)[0]) < limit:
        first -= 1
    return first


def _undecided(readings: Series, why: str) -> Verdict:
    steps = readings.steps
    between = max(1, (steps[-1] - steps[0]) // (2 * max(1, len(steps) - 1)))
    advice = f"wait, or read it more often: eval_strategy=steps, eval_steps={between}"
    if len(steps) >= ENOUGH:
        advice = "wait, or hold more examples back for evaluation"
    return Verdict("too few points to say", None, steps[readings.best], why, advice)


def _readings(count: int) -> str:
    return f"{count} reading{'s' if count != 1 else ''}"


# ---- suggestions: one, that follows from where it happened and how the run is set ----------------


def _less(setup: Setup, since: int) -> str:
    """Against memorising that began at the step `since`."""
    epochs = setup.epochs
    begun = since / setup.steps * epochs if setup.steps and epochs else None
    if begun is not None and epochs and begun >= 0.75 and epochs > 1.25 * begun:
        return f"try fewer epochs: num_train_epochs={max(1, round(begun))}"
    if begun is not None and begun < 0.75:
        return _lower_rate(setup)
    if setup.lora_dropout is not None and setup.lora_dropout < 0.05:
        return "try dropout: lora_dropout=0.1"
    if setup.weight_decay is not None and setup.weight_decay < 0.01:
        return "try more weight decay: weight_decay=0.1"
    if setup.lora_r is not None and setup.lora_r > 8:
        return f"try a lower rank: lora_r={setup.lora_r // 2}"
    if begun is not None:
        return "try more data: nothing in the settings is left to turn"
    return "try fewer epochs, a lower learning rate, or more weight decay"


def _lower_rate(setup: Setup) -> str:
    if not setup.learning_rate:
        return "try a lower learning rate"
    return f"try a lower learning rate: learning_rate={setup.learning_rate / 2:g}"


def _more(readings: Series, training: Series, *, setup: Setup) -> str:
    """Against a loss that no longer falls: the gap says what it lacks."""
    gap = readings.losses[-1] - training.losses[-1] if training.losses else 0.0
    if gap > SURE:
        return f"try more data: training loss is {gap:.2f} lower, so more steps only memorise"
    if setup.lora_r and setup.lora_r < 64:
        return f"try a higher rank: lora_r={setup.lora_r * 2}"
    if setup.learning_rate:
        return f"try a higher learning rate: learning_rate={setup.learning_rate * 2:g}"
    return "try a higher learning rate or rank"
