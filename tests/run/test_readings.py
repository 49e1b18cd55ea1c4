"""Readings keep to their share of a run's time by being fewer; first and last are always taken."""

import itertools

import pytest

from lorafit.engine.evaluation import SHARE
from lorafit.run import readings
from lorafit.run.readings import LEAST, Cost


def taken(
    monkeypatch: pytest.MonkeyPatch, *, step: float, reading: float
) -> tuple[list[int], float]:
    """The steps, of 1,000, at which one is taken of those due every fifty, and their share of the
    time, where a step and a reading take so many seconds."""
    cost, read = Cost(1000), list[int]()
    clock = 0.0
    monkeypatch.setattr(readings.time, "monotonic", lambda: clock)
    for at in range(1001):
        if at % 50 == 0 and cost.allows(at):
            clock += reading
            cost.add(at, reading)
            read.append(at)
        clock += step
    return read, cost.spent / clock


def test_what_was_planned_is_read_where_it_is_as_cheap_as_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert taken(monkeypatch, step=1, reading=2)[0] == list(range(0, 1001, 50))


@pytest.mark.parametrize("reading", [3.0, 5.0, 10.0])
def test_gaps_widen_evenly_where_readings_are_dear(
    reading: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, share = taken(monkeypatch, step=1, reading=reading)
    assert read[0] == 0 and read[-1] == 1000 and len(read) >= 4
    assert share <= SHARE * 1.1
    gaps = [b - a for a, b in itertools.pairwise(read)]
    assert max(gaps) <= 3 * min(gaps)


def test_one_that_takes_half_the_run_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, step=1, reading=500)[0] == [0, 1000]


def test_short_runs_are_read_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(taken(monkeypatch, step=0.001, reading=LEAST / 30)[0]) == 21
