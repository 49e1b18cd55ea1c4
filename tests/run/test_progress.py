"""The running numbers: read late, averaged over the window, honest about what was skipped."""

import math

import pytest
import torch

from lorafit.engine.step import StepResult
from lorafit.events import StepEnd, StepSkipped
from lorafit.run.progress import PENDING, Done, Progress, TooManySkipped


def done(step: int, loss: float = 1.0, *, applied: bool = True) -> Done:
    tensors = torch.tensor(loss), torch.tensor(2.0), torch.tensor(applied)
    return Done(step, step / 4, StepResult(*tensors, 0.1, 10, 12, 5), (step, step + 1), 0.5)


def test_numbers_wait_until_asked_for_or_overdue() -> None:
    progress = Progress(limit=3)
    for step in range(1, PENDING):
        progress.add(done(step))
        assert progress.overdue() == []
    progress.add(done(PENDING))
    events = progress.overdue()
    assert [event.step for event in events if isinstance(event, StepEnd)] == list(range(1, 9))
    assert events[0] == StepEnd(1, 0.25, 1.0, 2.0, 0.1, 10, 5, 0.5)
    assert progress.read() == []
    assert (progress.tokens, progress.positions) == (80, 96)


def test_a_window_is_a_mean_and_closes() -> None:
    progress = Progress(limit=3)
    assert progress.logged() is None
    for step, loss in ((1, 1.0), (2, 3.0)):
        progress.add(done(step, loss))
    progress.read()
    logged = progress.logged()
    assert logged is not None and (logged.step, logged.loss) == (2, 2.0)
    assert progress.logged() is None
    assert progress.mean_loss == 2.0


def test_what_was_skipped_is_named_and_not_averaged_away() -> None:
    progress = Progress(limit=2)
    for step, loss in ((1, 1.0), (2, math.nan), (3, 1.0), (4, math.nan)):
        progress.add(done(step, loss, applied=not math.isnan(loss)))
    skipped = [event for event in progress.read() if isinstance(event, StepSkipped)]
    assert [(event.step, event.examples) for event in skipped] == [(2, (2, 3)), (4, (4, 5))]
    logged = progress.logged()
    assert logged is not None and math.isnan(logged.loss)


def test_a_row_of_them_is_an_end() -> None:
    progress = Progress(limit=2)
    for step in (1, 2, 3):
        progress.add(done(step, math.nan, applied=step == 1))
    with pytest.raises(TooManySkipped, match=r"2 steps in a row, up to step 3.*\[3, 4\]") as raised:
        progress.read()
    names = [type(event).__name__ for event in raised.value.events]
    assert names == ["StepEnd", "StepEnd", "StepSkipped", "StepEnd", "StepSkipped"]


def test_a_scaler_may_settle_but_not_a_loss() -> None:
    """Overflowing gradients of a finite loss are the scale's; a loss that is none is nobody's."""
    progress = Progress(limit=3, settling=16)
    for step in range(1, 19):
        progress.add(done(step, applied=False))
    assert sum(isinstance(event, StepSkipped) for event in progress.read()) == 18
    assert (progress.overflows_in_a_row, progress.skipped_in_a_row) == (16, 2)
    progress.add(done(19, applied=False))
    with pytest.raises(TooManySkipped, match="3 steps in a row, up to step 19"):
        progress.read()
    progress = Progress(limit=3, settling=16)
    for step in range(1, 4):
        progress.add(done(step, math.nan, applied=False))
    with pytest.raises(TooManySkipped, match="up to step 3"):
        progress.read()
    progress.add(done(4))
    progress.read()
    assert progress.overflows_in_a_row == progress.skipped_in_a_row == 0


def test_sums_go_on() -> None:
    progress, again = Progress(limit=3), Progress(limit=3)
    for step in (1, 2):
        progress.add(done(step, step, applied=step == 1))
    progress.read()
    again.resume(progress.sums(), step=2)
    for one in (progress, again):
        one.add(done(3, 6.0))
        one.read()
    assert again.logged() == progress.logged()
    assert again.mean_loss == progress.mean_loss == 3.0
    assert (again.tokens, again.positions, again.first_step) == (30, 36, 2)
