"""The running numbers of a run: results still on the device, the log's window, steps not applied.

Reads the device only when asked (`read`), so that no step waits for another's numbers. Knows
neither engine internals nor files; decides nothing but that too many bad steps in a row are an end.
"""

from dataclasses import dataclass, field

from lorafit.engine.step import StepResult
from lorafit.errors import NonFiniteError
from lorafit.events import Event, Logged, StepEnd, StepSkipped

PENDING = 8
"""Steps whose numbers may stay unread before the host looks."""


@dataclass(frozen=True, slots=True)
class _Unread:
    step: int
    epoch: float
    result: StepResult
    examples: tuple[int, ...]
    seconds: float


@dataclass
class Progress:
    """What `Logged`, the final loss and a resumed run are computed from."""

    limit: int
    first_step: int = 0
    tokens: int = 0
    total_loss: float = 0.0
    window_loss: float = 0.0
    window_steps: int = 0
    steps: int = 0
    skipped_in_a_row: int = 0
    _last: StepEnd | None = None
    _unread: list[_Unread] = field(default_factory=list)

    def add(
        self,
        result: StepResult,
        *,
        step: int,
        epoch: float,
        examples: tuple[int, ...],
        seconds: float,
    ) -> bool:
        """Remember one step; whether it is time to `read`."""
        self._unread.append(_Unread(step, epoch, result, examples, seconds))
        self.tokens += result.tokens
        return len(self._unread) >= PENDING

    def read(self) -> list[Event]:
        """The events of the steps not yet read; waits for the device.

        Raises:
            NonFiniteError: `limit` steps in a row had a loss or gradient that was not finite; the
                events read so far are in its `events`.
        """
        events: list[Event] = []
        unread, self._unread = self._unread, []
        for done in unread:
            end = _step_end(done)
            events.append(end)
            self._count(end)
            if bool(done.result.applied):
                self.skipped_in_a_row = 0
                continue
            skipped = StepSkipped(done.step, end.loss, end.gradient_norm, done.examples)
            events.append(skipped)
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.limit:
                raise TooManySkipped(skipped, self.limit, events=events)
        return events

    def _count(self, end: StepEnd) -> None:
        self._last = end
        self.steps += 1
        self.window_steps += 1
        self.window_loss += end.loss
        self.total_loss += end.loss

    def logged(self) -> Logged | None:
        """The window's mean loss with the last step's numbers; closes the window. None if empty."""
        if not self.window_steps or self._last is None:
            return None
        last, mean = self._last, self.window_loss / self.window_steps
        self.window_loss, self.window_steps = 0.0, 0
        return Logged(last.step, last.epoch, mean, last.gradient_norm, last.learning_rate)

    @property
    def mean_loss(self) -> float:
        """The mean loss of all steps of this call to `train`."""
        return self.total_loss / self.steps if self.steps else 0.0

    def sums(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        names = ("tokens", "total_loss", "window_loss", "window_steps", "skipped_in_a_row")
        return {**{name: vars(self)[name] for name in names}, "steps": self.steps}

    def resume(self, sums: dict[str, float], *, step: int) -> None:
        """Go on from what `sums` gave, after `step` steps."""
        self.first_step = step
        self.tokens, self.steps = int(sums["tokens"]), int(sums["steps"])
        self.total_loss, self.window_loss = sums["total_loss"], sums["window_loss"]
        self.window_steps = int(sums["window_steps"])
        self.skipped_in_a_row = int(sums["skipped_in_a_row"])


def _step_end(done: _Unread) -> StepEnd:
    return StepEnd(
        step=done.step,
        epoch=done.epoch,
        loss=float(done.result.loss),
        gradient_norm=float(done.result.gradient_norm),
        learning_rate=done.result.learning_rate,
        tokens=done.result.tokens,
        supervised_tokens=done.result.supervised,
        seconds=done.seconds,
    )


class TooManySkipped(NonFiniteError):
    """`limit` steps in a row were not applied; `events` holds what had been read by then."""

    def __init__(self, last: StepSkipped, limit: int, *, events: list[Event]) -> None:
        super().__init__(
            f"Loss or gradients were not finite in {limit} steps in a row, up to step "
            f"{last.step} (loss {last.loss}, gradient norm {last.gradient_norm}, examples "
            f"{list(last.examples)}).",
            why="None of these steps was applied; going on would only repeat them.",
            fix="Look at those examples, lower learning_rate, or load the base in float32.",
        )
        self.events = events
