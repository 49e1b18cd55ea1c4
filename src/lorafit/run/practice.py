"""What a practice run found, and whether the full run should be started. Pure: no torch, no files.

Owns the verdicts: does the loss fall beyond noise, does every adapter tensor learn, does it fit,
how long will it take. The rehearsal measures, this judges; the command line and the page show it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any, Literal

from lorafit.amounts import duration, shown
from lorafit.events import Event, OutOfMemory
from lorafit.run.rates import Curve

Mark = Literal["good", "note", "stop"]
PRACTICE, PRACTICE_PAGE = "practice.json", "practice.html"
"""What was found, beside the run's other files, for programmes and for people."""
SURE = 2.0
"""Standard errors beyond which a change is taken for one."""
WIDE = 1.96
"""Standard deviations to either side of a forecast: 95% of normal errors."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried. `stop`: the full run should not be started like this."""

    title: str
    mark: Mark
    said: str
    advice: str = ""


@dataclass(frozen=True)
class Change:
    """Nats per supervised token on held-out rows, before and after; `error` is the standard error
    of their difference."""

    before: float
    after: float
    error: float
    rows: int

    @property
    def fell(self) -> bool:
        """Whether the loss fell beyond noise."""
        return self.before - self.after > SURE * self.error

    @property
    def rose(self) -> bool:
        """Whether it rose beyond noise, or is no number any more."""
        return not self.after - self.before <= SURE * self.error


def change(before: Sequence[float], after: Sequence[float], *, supervised: Sequence[int]) -> Change:
    """The change of the loss over the same rows.

    Args:
        before: Nats of each row, summed over its supervised tokens.
        after: The same, later.
        supervised: Supervised tokens of each row.

    The loss is a ratio of sums, so its difference's variance is that of a ratio estimator
    (Cochran 1977, eq. 6.13): rows that lost or won more than the mean for their length.
    """
    total, rows = sum(supervised), len(supervised)
    mean = (sum(after) - sum(before)) / max(total, 1)
    spread = [a - b - mean * n for b, a, n in zip(before, after, supervised, strict=True)]
    variance = sum(x * x for x in spread) * rows / max(rows - 1, 1)
    error = math.sqrt(variance) / max(total, 1)
    return Change(sum(before) / max(total, 1), sum(after) / max(total, 1), error, rows)


def learning(measured: Change, curve: Sequence[float]) -> Finding:
    """Whether it learns: held-out rows before and after, and the loss of each step."""
    steps = f"{len(curve)} steps: {curve[0]:.3f} to {curve[-1]:.3f} nats per token" if curve else ""
    held = (
        f"on {measured.rows} held-out rows {measured.before:.3f} before, {measured.after:.3f} "
        f"after, give or take {SURE * measured.error:.3f}"
    )
    said = f"{steps}; {held}"
    if not all(map(math.isfinite, curve)) or not math.isfinite(measured.after):
        return Finding("loss", "stop", f"The loss is not a number any more. {said}", _LOWER)
    if measured.rose:
        return Finding("loss", "stop", f"The loss rises. {said}", _LOWER)
    if measured.fell:
        return Finding("loss", "good", f"The loss falls beyond noise. {said}")
    return Finding("loss", "note", f"No change beyond noise. {said}", _FLAT)


_LOWER = "Lower --learning-rate, to a tenth at first."
_FLAT = "So few steps may not show it; try a higher --learning-rate before committing to hours."


@dataclass(frozen=True)
class Forecast:
    """Seconds of the full run, between `low` and `high` with 95%; NaN where no step was taken."""

    seconds: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.seconds):
            return "a time that is not known"
        return f"{duration(self.seconds)} ({duration(self.low)} to {duration(self.high)})"


def forecast(steps: Sequence[tuple[int, float]], *, steps_to_come: int, besides: float) -> Forecast:
    """The time of a run, from steps that were practised.

    Args:
        steps: Tokens and seconds of each; the first is left out where there are more, as it
            compiles and warms up.
        besides: Seconds of the evaluations, measured.

    The interval has two parts: how a step's seconds for each token vary, and how well the tokens
    of so many steps tell the mean of all. It knows nothing of other work that comes later.
    """
    seen = list(steps[1:] if len(steps) > 2 else steps)
    if not seen:
        return Forecast(math.nan, math.nan, math.nan)
    tokens = [float(count) for count, _ in seen]
    rates = [seconds / max(count, 1) for count, seconds in seen]
    rate, mean = sum(s for _, s in seen) / max(sum(tokens), 1.0), fmean(tokens)
    of_rate = _spread(rates) * math.sqrt(1 / len(seen) + 1 / max(steps_to_come, 1))
    of_mean = _spread(tokens) * math.sqrt(1 / len(seen) + 1 / max(steps_to_come, 1))
    seconds, width = steps_to_come * mean * rate, WIDE * math.hypot(of_rate, of_mean)
    low, high = max(0.0, seconds * (1 - width)), seconds * (1 + width)
    return Forecast(seconds + besides, low + besides, high + besides)


def _spread(values: Sequence[float]) -> float:
    """Their standard deviation over their mean; of a single one a fifth is assumed."""
    return stdev(values) / max(fmean(values), 1e-12) if len(values) > 1 else 0.2


def forecast_kept(written: str, seconds: float) -> str:
    """One line that holds the forecast of a practice.json against what the run took; empty where
    there is none in it."""
    try:
        expected = Forecast(**json.loads(written)["time"])
        inside = expected.low <= seconds <= expected.high
    except (ValueError, KeyError, TypeError):
        return ""
    verdict = "as forecast" if inside else "outside what was forecast"
    return f"The practice run forecast {expected}; it took {duration(seconds)}, {verdict}."


def labels(learned: int, tokens: int) -> Finding:
    """Whether there is something to learn: `learned` of a step's `tokens` carry loss."""
    said = f"{learned:,} of {tokens:,} tokens of a step carry loss ({learned / max(tokens, 1):.0%})"
    if not learned:
        return Finding(
            "labels",
            "stop",
            f"Nothing is learned: {said}.",
            "Every label is -100: look at what the collator or the template masks.",
        )
    few = 100 * learned < tokens
    return Finding("labels", "note" if few else "good", f"{said}.", _FEW if few else "")


_FEW = "Mark the answers as what is learned, or look at the example above."


def gradients(norms: Mapping[str, float], *, unmoved: int) -> Finding:
    """Whether a gradient reaches every trained tensor.

    Args:
        norms: By name, of one step after training.
        unmoved: Tensors of the adapter that no step has changed.
    """
    silent = [name for name, norm in norms.items() if not norm > 0]
    if not silent:
        middle = median(norms.values())
        said = f"All {len(norms)} trained tensors receive a gradient (median norm {middle:.1e})."
        return Finding("gradients", "good", said)
    named = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
    # a router may leave an expert out of one step; what no step has changed is out of reach
    return Finding(
        "gradients",
        "stop" if unmoved else "note",
        f"{len(silent)} of {len(norms)} trained tensors receive none: {named}; {unmoved} were "
        "changed by no step.",
        "The loss does not depend on them: adapt other modules (--lora-target-modules all-linear).",
    )


def layouts(difference: float, *, rounded: bool, divides: bool) -> Finding:
    """Whether a step's gradient is that of one batch, however it is laid out; `difference` is the
    largest of a tensor's, relative by norm."""
    if not divides:
        return Finding(
            "accumulation",
            "note",
            "The loss is not a sum over tokens, so that micro-batches weigh equally, as they do in "
            "transformers' Trainer.",
        )
    allowed = 5e-2 if rounded else 1e-4
    said = f"gradients differ by {difference:.1e} between padded batches and what is run"
    if difference <= allowed:
        return Finding("accumulation", "good", f"Layout does not change the step: {said}.")
    return Finding(
        "accumulation",
        "stop",
        f"Layout changes the step: {said}.",
        "The model sees its padding: check the collator's attention_mask, or write "
        "layout='as_given'.",
    )


def padding(tokens: int, learned: int) -> Finding:
    """Whether padding carries loss: `learned` of its `tokens` do."""
    if learned:
        return Finding(
            "padding",
            "stop",
            f"{learned} of {tokens} tokens of padding carry loss.",
            "Let the collator label padding -100.",
        )
    said = f"No padding carries loss ({tokens} tokens of it in a step's batches)."
    return Finding("padding", "good", said)


def resuming(difference: float, *, killed: bool) -> Finding:
    """Whether a resumed run ends with the adapter of one that was not interrupted."""
    how = (
        "A process of its own was killed while it trained, and resumed"
        if killed
        else "Adapter, optimiser and random state were overwritten with noise and read back"
    )
    if difference == 0:
        return Finding("resuming", "good", f"{how}: the adapter is the same, bit for bit.")
    said = f"{how}: the adapter differs by {difference:.1e} of its norm"
    if difference < 1e-3:
        return Finding("resuming", "good", f"{said}, which is rounding.")
    return Finding(
        "resuming",
        "stop",
        f"{said}.",
        "Something in the data or the model draws what no checkpoint keeps; set it from the seed.",
    )


def loading(difference: float, *, fresh: bool) -> Finding:
    """Whether the saved adapter gives the logits that it had."""
    where = "over a second copy of the base" if fresh else "over this base (in process)"
    said = f"Saved and loaded {where}: logits differ by {difference:.1e} of the largest"
    if difference < 1e-4:
        return Finding("loading", "good", f"{said}.")
    mark: Mark = "note" if difference < 5e-2 else "stop"
    return Finding("loading", mark, f"{said}.", "The base in memory is not the one on disk.")


def longest(tokens: int, peak: int | None, *, planned: int) -> Finding:
    """The largest micro-batch that the run can meet, which fits.

    Args:
        peak: Bytes that it took above what was held before; None where the system does not say.
        planned: Bytes of the whole run at its peak; 0: unknown.
    """
    took = f", takes {shown(peak)} more" if peak is not None else ""
    plan = f"; {shown(planned)} are planned for the whole run" if planned else ""
    return Finding("longest", "good", f"The largest part of a step, {tokens:,} tokens{took}{plan}.")


def cut_off(tokens: int, message: str) -> Finding:
    """The largest micro-batch does not fit."""
    return Finding(
        "longest",
        "stop",
        f"The largest part of a step, {tokens:,} tokens, does not fit: {message}",
        f"Cut examples (--max-length {tokens // 2}), take --quantize nf4 or a smaller base; "
        "lorafit plan says what each takes.",
    )


def memory(peak: int, events: Sequence[Event]) -> Finding:
    """What the steps took at most, in bytes, and whether they had to be made smaller."""
    short = [event for event in events if isinstance(event, OutOfMemory)]
    said = f"The peak of the practised steps was {shown(peak)}."
    if not short:
        return Finding("memory", "good", said)
    return Finding(
        "memory",
        "note",
        f"{said} Memory ran out {len(short)} times; {short[-1].budget:,} tokens at a time fit.",
        f"--token-budget {short[-1].budget} saves the attempts.",
    )


def stopping(answers: int, learned: int, *, stopped: bool | None, text: str) -> Finding:
    """Whether answers are taught to stop, and whether a generated one does.

    Args:
        learned: Of the `answers` looked at, those that end with a learned stop token.
        stopped: Whether the generated answer ended by itself; None where none was generated.
    """
    taught = f"{learned} of {answers} answers end with a learned stop token"
    if not learned and answers:
        return Finding(
            "stopping",
            "stop",
            f"No answer teaches the model to stop: {taught}.",
            "Let the end-of-text token carry loss: a padding token of its own, or lorafit's "
            "collator, which never masks it.",
        )
    if stopped is None:
        return Finding("stopping", "note", f"{taught}; nothing was generated.")
    said = f"{taught}; a generated answer {'stops' if stopped else 'does not stop'} by itself"
    cut = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return Finding("stopping", "good" if stopped else "note", f"{said}: {cut!r}")


_SHOWN = 120
"""Characters of an answer."""


COSTLY = 0.1
"""Nats per token that quantising may cost before it is remarked on: a perplexity a tenth higher."""


def quantising(kind: str, nats: float | None, *, said: str) -> Finding:
    """What it costs that the base is quantised.

    Args:
        kind: nf4 or int8.
        nats: Per token; None: not measured.
        said: A line about it.
    """
    if nats is None:
        return Finding("quantising", "note", f"What {kind} costs was not measured: {said}.")
    if nats <= COSTLY:
        return Finding("quantising", "good", f"{kind}: {said}.")
    less = "" if kind == "int8" else "--quantize int8 loses less; "
    advice = f"Training makes up for some of it. {less}without --quantize nothing is lost."
    return Finding("quantising", "note", f"{kind}: {said}.", advice)


RATES = "learning rate"
"""The title of what its range test found."""
NEAR = 3.0
"""Times below the suggested learning rate that are near enough: it is no finer than that."""


def rates(curve: Curve) -> Finding:
    """What the range test of the learning rate says of the one that the run is set to. Good from
    about the suggestion up to where the loss was lowest: the suggestion is a careful one, and whole
    runs may do better above it (docs/practice.md)."""
    given = curve.given
    beside = f"The run is set to {given:.1e}" if given is not None else "The run has its own"
    if curve.rate is None:
        return Finding(RATES, "note", f"{beside}; the range test {curve.said}.")
    most = max(curve.lowest or 0.0, curve.rate)
    rises = f"; beyond {curve.lowest:.1e} it rises" if curve.lowest else ""
    said = f"{beside}; {curve.rate:.1e} is suggested: {curve.said}{rises}."
    if given and curve.rate / NEAR <= given <= most * (1 if curve.lowest else NEAR):
        return Finding(RATES, "good", said)
    more = f", or up to {most:.1e}" if given is not None and given < curve.rate < most else ""
    advice = f"To take the suggestion: --learning-rate {curve.rate:.1e}{more}"
    return Finding(RATES, "note", said, advice)


def rates_not_tried(why: str, advice: str = "") -> Finding:
    """There was no range test, or it came to no end."""
    return Finding(RATES, "note", f"The range test was not made: {why}", advice)


@dataclass(frozen=True)
class Practice:
    """The whole practice run.

    Attributes:
        findings: In the order in which they are shown.
        pieces: One example in pieces: text, and whether it is learned.
        curve: The loss of each step, nats per supervised token.
        change: The same on held-out rows, before and after; None where training came to no end.
        time: Of the full run.
        disk: Bytes of the full run at most.
        facts: What was practised on: steps, rows and the like, for people.
        rates: The range test of the learning rate; None where it was not asked for.
    """

    findings: tuple[Finding, ...]
    pieces: tuple[tuple[str, bool], ...]
    curve: tuple[float, ...]
    time: Forecast
    disk: int
    facts: tuple[str, ...] = ()
    change: Change | None = None
    rates: Curve | None = None

    @property
    def go(self) -> bool:
        """Whether the full run should be started."""
        return all(finding.mark != "stop" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In one line."""
        stops = [finding.title for finding in self.findings if finding.mark == "stop"]
        if stops:
            return f"Do not start the full run yet: {', '.join(stops)}."
        return f"Go: the full run takes about {self.time}."

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for practice.json."""
        tried = self.rates.as_dict() if self.rates else None
        return {**asdict(self), "rates": tried, "go": self.go, "verdict": self.verdict}
