"""The running numbers of a run: results still on the device, the log's window, steps not applied.

Reads the device only when asked (`read`), so that no step waits for another's numbers. Knows
neither engine internals nor files; decides nothing but that too many bad steps in a row are an end.
"""

import math
from dataclasses import dataclass, field

from lorafit.engine.step import StepResult
from lorafit.errors import NonFiniteError
from lorafit.events import Event, Logged, StepEnd, StepSkipped

PENDING = 8
"""Steps whose numbers may stay unread before the host looks."""
_SUMS = (
    *("tokens", "positions", "total_loss", "window_loss", "logged_at", "skipped_in_a_row"),
    "overflows_in_a_row",
)


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose numbers are still on the device. `examples`: see `StepSkipped`."""

    step: int
    epoch: float
    result: StepResult
    examples: tuple[int, ...]
    seconds: float

    def read(self) -> StepEnd:
        """Its numbers; waits for the device."""
        r = self.result
        loss, norm = float(r.loss), float(r.gradient_norm)
        counts = (r.tokens, r.supervised, self.seconds)
        return StepEnd(self.step, self.epoch, loss, norm, r.learning_rate, *counts)


@dataclass
class Progress:
    """What `Logged`, the final loss and a resumed run are computed from.

    Attributes:
        limit: So many steps in a row that are not applied are the end.
        settling: Besides these, so many whose loss is finite: a gradient scaler halves its scale
            at each.
    """

    limit: int
    settling: int = 0
    first_step: int = 0
    tokens: int = 0
    positions: int = 0
    total_loss: float = 0.0
    window_loss: float = 0.0
    logged_at: int = 0
    skipped_in_a_row: int = 0
    overflows_in_a_row: int = 0
    _last: StepEnd | None = None
    _unread: list[Done] = field(default_factory=list)

    def add(self, done: Done) -> None:
        """Remember one step, whose numbers are read later."""
        self._unread.append(done)
        self.tokens += done.result.tokens
        self.positions += done.result.positions

    def overdue(self) -> list[Event]:
        """`read()`, once so many wait that the host should look; nothing until then."""
        return self.read() if len(self._unread) >= PENDING else []

    def read(self) -> list[Event]:
        """The events of the steps not yet read; waits for the device.

        Raises:
            NonFiniteError: `limit` steps in a row had a loss or gradient that was not finite; the
                events read so far are in its `events`.
        """
        events: list[Event] = []
        unread, self._unread = self._unread, []
        for done in unread:
            end = done.read()
            events.append(end)
            self._last = end
            self.window_loss += end.loss
            self.total_loss += end.loss
            if bool(done.result.applied):
                self.skipped_in_a_row = self.overflows_in_a_row = 0
            else:
                events.append(self._skipped(done, end, so_far=events))
        return events

    def _skipped(self, done: Done, end: StepEnd, *, so_far: list[Event]) -> StepSkipped:
        overflow = math.isfinite(end.loss) and self.settling > 0
        if overflow and self.overflows_in_a_row < self.settling:
            self.overflows_in_a_row += 1
        else:
            self.skipped_in_a_row += 1
        event = StepSkipped(done.step, end.loss, end.gradient_norm, done.examples, overflow)
        if self.skipped_in_a_row >= self.limit:
            raise TooManySkipped(event, self.limit, events=[*so_far, event])
        return event

    def logged(self) -> Logged | None:
        """The window's mean loss with the last step's numbers; closes the window. None if empty."""
        if self._last is None or self._last.step == self.logged_at:
            return None
        last, mean = self._last, self.window_loss / (self._last.step - self.logged_at)
        self.window_loss, self.logged_at = 0.0, last.step
        return Logged(last.step, last.epoch, mean, last.gradient_norm, last.learning_rate)

    @property
    def mean_loss(self) -> float:
        """The mean loss of all steps of the run whose numbers were read."""
        steps = self._last.step if self._last else self.first_step
        return self.total_loss / steps if steps else 0.0

    def sums(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {name: vars(self)[name] for name in _SUMS}

    def resume(self, sums: dict[str, float], *, step: int) -> None:
        """Go on from what `sums` gave, after `step` steps."""
        self.first_step = step
        vars(self).update({name: sums[name] for name in _SUMS})


class Ended(NonFiniteError):
    """Numbers that are not finite end the run; `events` holds what had been read by then."""

    events: tuple[Event, ...] = ()


class BadWeights(Ended):
    """A trained weight is not finite, so that nothing of the model is worth keeping."""

    def __init__(self, names: str) -> None:
        super().__init__(
            f"Trained weights are not finite: {names}.",
            why="An adapter with one answers nothing, so it is not saved; what was saved before "
            "is whole.",
            fix="Resume from the last checkpoint with a lower learning_rate, or load the base in "
            "float32.",
        )


class TooManySkipped(Ended):
    """`limit` steps in a row were not applied."""

    def __init__(self, last: StepSkipped, limit: int, *, events: list[Event]) -> None:
        super().__init__(
            f"Loss or gradients were not finite in {limit} steps in a row, up to step "
            f"{last.step} (loss {last.loss}, gradient norm {last.gradient_norm}, examples "
            f"{list(last.examples)}).",
            why="None of these steps was applied; going on would only repeat them.",
            fix="Look at those examples, lower learning_rate, or load the base in float32.",
        )
        self.events = tuple(events)
