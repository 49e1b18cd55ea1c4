"""The range test on curves whose truth is known: suggestions where there is one, silence else."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from lorafit.run import rates

LOW, HIGH, STEPS = 1e-6, 1.0, 100


def descent(stiffest: float, *, noise: float, seed: int = 0) -> Callable[[float], float]:
    """Steps of gradient descent on a quadratic of 20 curvatures up to `stiffest`: beyond a rate of
    2 / stiffest it diverges. Losses from 3 down, plus noise."""
    curvatures = [stiffest * 0.6**number for number in range(20)]
    weights, drawn = [math.sqrt(0.1 / c) for c in curvatures], random.Random(seed)

    def step(rate: float) -> float:
        loss = 1 + sum(c * w * w for c, w in zip(curvatures, weights, strict=True))
        weights[:] = [w * (1 - rate * c) for c, w in zip(curvatures, weights, strict=True)]
        return loss + drawn.gauss(0, noise)

    return step


def test_rates_rise_by_the_same_multiple() -> None:
    made = rates.rising(1e-4, 1e-1, steps=4)
    assert made == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("stiffest", [1e2, 1e4])
def test_the_suggestion_lies_below_where_it_diverges(
    stiffest: float, noise: float, seed: int
) -> None:
    curve = rates.sweep(
        descent(stiffest, noise=noise, seed=seed), rates.rising(LOW, HIGH, steps=STEPS)
    )
    assert len(curve.rates) < STEPS, "it stops where it diverges"
    assert curve.rate is not None, curve.said
    edge = 2 / stiffest
    assert edge / 50 < curve.rate < edge
    assert curve.steepest is not None and curve.lowest is not None
    assert curve.rate == min(curve.steepest, curve.lowest / 10)
    assert "Smith" in curve.said or "fastai" in curve.said


def read(losses: list[float]) -> rates.Curve:
    return rates.read(rates.rising(LOW, HIGH, steps=len(losses)), losses)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_a_flat_curve_says_nothing(seed: int, noise: float) -> None:
    drawn = random.Random(seed)
    curve = read([2.5 + drawn.gauss(0, noise) for _ in range(STEPS)])
    assert curve.rate is None and curve.said.startswith("cannot say: ")


def test_a_curve_that_drowns_in_noise_says_nothing() -> None:
    step = descent(1e2, noise=10.0)
    curve = rates.sweep(lambda rate: abs(step(rate)) + 20, rates.rising(LOW, 1e-2, steps=STEPS))
    assert curve.rate is None


def test_a_curve_that_only_rises_says_nothing() -> None:
    curve = read([2 + number**2 / 1e4 for number in range(STEPS)])
    assert curve.rate is None and "no more than its noise" in curve.said


def test_a_run_that_diverges_at_once_asks_for_lower_rates() -> None:
    curve = rates.sweep(descent(1e6, noise=0.01), rates.rising(1e-5, HIGH, steps=STEPS))
    assert curve.rate is None and "begin with a lower rate" in curve.said


def test_a_curve_that_never_turns_asks_for_higher_rates() -> None:
    curve = rates.sweep(descent(1e-1, noise=0.0), rates.rising(LOW, 1e-1, steps=STEPS))
    assert curve.rate is None and "end with a higher rate" in curve.said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_end_it(bad: float) -> None:
    taken: list[float] = []

    def step(rate: float) -> float:
        taken.append(rate)
        return bad if len(taken) > 40 else 3 - len(taken) / 40

    curve = rates.sweep(step, rates.rising(LOW, HIGH, steps=STEPS))
    assert len(taken) == 41 and len(curve.smoothed) == 40


def test_smoothing_lags_behind_nothing() -> None:
    """A mean that decays would show a straight fall later than it is."""
    curve = read([3 - number / 50 for number in range(STEPS)])
    assert curve.smoothed == pytest.approx(curve.losses)


def test_the_table_shows_the_curve_in_text() -> None:
    curve = rates.sweep(descent(1e3, noise=0.01), rates.rising(LOW, HIGH, steps=STEPS))
    head, *lines = replace(curve, given=2e-4).table()
    assert head.split() == ["rate", "loss"] and len(lines) == 12
    shown = [line.split()[:2] for line in lines]
    assert [float(rate) for rate, _ in shown] == sorted(float(rate) for rate, _ in shown)
    assert float(shown[0][0]) == LOW
    lowest = min(lines, key=lambda line: float(line.split()[1]))
    assert min(line.index("*") for line in lines) == lowest.index("*")
    (told,) = [line for line in lines if f"suggested: {curve.rate:.1e}" in line]
    assert curve.rate and 0.3 < float(told.split()[0]) / curve.rate < 3
    assert sum("set: 2.0e-04" in line for line in lines) == 1
    assert rates.read([0.1, 0.2], [1.0, math.nan]).table() == []


def test_what_is_kept_of_a_curve_is_json() -> None:
    kept = rates.read([0.1, 0.2], [1.0, math.inf]).as_dict()
    assert kept["losses"] == [1.0, None] and json.dumps(kept, allow_nan=False)
