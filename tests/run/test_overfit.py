"""The verdict: words from readings, on curves with known turns, on noise, and on examples' nats."""

import math
import random
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import stdev
from types import ModuleType

import pytest

from lorafit.run.overfit import Series, Setup, Verdict, judge

TURNS = (3.0, 2.0, 1.6, 1.4, 1.3, 1.25, 1.22, 1.20, 1.21, 1.22, 1.25, 1.29, 1.34, 1.4, 1.46)
FALLS = (3.0, 1.9, 1.5, 1.3, 1.15, 1.05, 0.95, 0.87, 0.8, 0.73, 0.67, 0.6, 0.55, 0.5, 0.45)
SETUP = Setup(steps=300, epochs=6, learning_rate=2e-4, weight_decay=0, lora_dropout=0, lora_r=16)


def series(*losses: float) -> Series:
    return Series(tuple(range(0, 20 * len(losses), 20)), losses)


def said(evaluation: tuple[float, ...], training: tuple[float, ...], **more: int) -> Verdict:
    return judge(series(*evaluation), series(*training), setup=SETUP, **more)


def test_a_turn_is_named_with_its_evidence() -> None:
    verdict = said(TURNS, FALLS)
    assert (verdict.kind, verdict.since, verdict.best) == ("memorising", 140, 140)
    assert verdict.headline == "memorising since step 140"
    assert "evaluation loss rose 0.260" in verdict.evidence
    assert "while training loss fell 0.420; the best adapter is step 140" in verdict.evidence
    assert verdict.suggestion == "try fewer epochs: num_train_epochs=3"
    assert str(verdict) == f"{verdict.headline}: {verdict.evidence}; {verdict.suggestion}"


def test_before_the_turn_it_is_learning() -> None:
    kinds = [said(TURNS[:n], FALLS[:n]).kind for n in range(1, len(TURNS) + 1)]
    assert kinds[:3] == ["too few points to say"] * 3
    assert kinds[3:8] == ["still learning"] * 5
    first = kinds.index("memorising")
    assert 9 < first <= 12 and set(kinds[first:]) == {"memorising"}


def test_four_readings_and_a_wide_margin_are_enough() -> None:
    verdict = said((3.0, 2.0, 2.1, 2.4), (2.9, 1.6, 1.1, 0.7))
    assert (verdict.kind, verdict.since) == ("memorising", 20)
    assert said((3.0, 2.0, 2.02, 2.04), (2.9, 1.6, 1.1, 0.7)).kind != "memorising"


def test_a_rise_of_both_losses_is_unstable() -> None:
    up = [0.01 * n**2 for n in range(1, 8)]
    both = said((*TURNS[:8], *(1.2 + by for by in up)), (*FALLS[:8], *(0.87 + by for by in up)))
    assert both.kind == "unstable" and "training loss itself rose" in both.evidence
    assert both.suggestion == "try a lower learning rate: learning_rate=0.0001"


@pytest.mark.parametrize(
    ("evaluation", "skipped", "words"),
    [
        ((3.0, 2.0, math.nan, 1.5), 0, "evaluation loss is nan"),
        ((3.0, 2.0, math.inf), 0, "evaluation loss is inf"),
        ((3.0, 2.0, 1.5, 1.2), 9, "9 steps were not applied"),
        ((3.0, 2.0, 2.6, 1.9, 2.5, 1.8, 2.4, 1.9), 0, "turned 6 times"),
    ],
)
def test_unstable(evaluation: tuple[float, ...], skipped: int, words: str) -> None:
    verdict = said(evaluation, FALLS[: len(evaluation)], skipped=skipped)
    assert verdict.kind == "unstable" and words in verdict.evidence


def test_flat_since_the_fall_ended() -> None:
    flat = (3.0, 2.0, 1.5, 1.25, *(1.2 + 0.001 * (-1) ** n for n in range(10)))
    near = said(flat, (3.0, 1.9, 1.5, 1.25, *[1.15] * 10))
    assert near.kind == "flat" and near.since in (60, 80)
    assert near.suggestion == "try a higher rank: lora_r=32"
    assert said(flat, (3.0, 1.9, 1.5, 1.25, *[0.8] * 10)).suggestion.startswith("try more data")


def test_a_run_that_ends_while_it_learns_is_too_short() -> None:
    whole = Setup(steps=140, epochs=3)
    verdict = judge(series(*FALLS[:8]), series(*FALLS[:8]), setup=whole)
    assert (verdict.kind, verdict.suggestion) == (
        "still learning",
        "try more epochs: num_train_epochs=5",
    )


def test_nothing_is_said_of_nothing() -> None:
    verdict = judge(Series(), Series())
    assert verdict.kind == "too few points to say" and verdict.best is None
    assert "no evaluation loss" in str(verdict)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(steps=600, epochs=2, learning_rate=1e-3), "learning_rate=0.0005"),
        (Setup(steps=300, epochs=2), "num_train_epochs=1"),
        (Setup(steps=150, epochs=2, lora_dropout=0.0), "lora_dropout=0.1"),
        (Setup(steps=150, epochs=2, lora_dropout=0.1, weight_decay=0.0), "weight_decay=0.1"),
        (Setup(steps=150, epochs=2, lora_dropout=0.1, lora_r=32), "lora_r=16"),
        (Setup(steps=150, epochs=2), "more data"),
        (Setup(), "fewer epochs, a lower learning rate, or more weight decay"),
    ],
)
def test_one_suggestion_follows(setup: Setup, words: str) -> None:
    verdict = judge(series(*TURNS), series(*FALLS), setup=setup)
    assert verdict.kind == "memorising" and words in verdict.suggestion


# ---- the noise of examples ---------------------------------------------------------------------


def noisy(count: int, *, rise: float, spread: float) -> Series:
    """Two readings of `count` examples whose losses rose by `rise` on average."""
    draw = random.Random(0)
    tokens = tuple(draw.randint(5, 60) for _ in range(count))
    before = tuple(n * draw.gauss(2.0, 0.5) for n in tokens)
    after = tuple(b + n * draw.gauss(rise, spread) for b, n in zip(before, tokens, strict=True))
    total = sum(tokens)
    return Series((0, 20), (sum(before) / total, sum(after) / total), (before, after), tokens)


def test_the_error_of_a_difference_is_that_of_a_paired_bootstrap() -> None:
    readings = noisy(80, rise=0.05, spread=0.3)
    draw, drawn = random.Random(1), []
    first, second = readings.nats
    for _ in range(4000):
        chosen = draw.choices(range(80), k=80)
        nats = sum(second[n] - first[n] for n in chosen)
        drawn.append(nats / sum(readings.tokens[n] for n in chosen))
    assert readings.error(0, 1) == pytest.approx(stdev(drawn), rel=0.06)
    assert series(1.0, 2.0).error(0, 1) == 0.0


def test_a_rise_that_few_examples_make_is_not_one() -> None:
    steps, tokens = tuple(range(0, 300, 20)), (10,) * 50
    even = tuple(tuple(10 * loss for _ in tokens) for loss in TURNS)
    # the same losses, but all that rises after the best reading is one example
    one = tuple(
        tuple(10 * min(loss, 1.2) + (500 * max(0, loss - 1.2) if n == 0 and at > 7 else 0)
              for n in range(50))
        if at > 7 else tuple(10 * loss for _ in tokens)
        for at, loss in enumerate(TURNS)
    )  # fmt: skip
    assert judge(Series(steps, TURNS, even, tokens), series(*FALLS)).kind == "memorising"
    assert judge(Series(steps, TURNS, one, tokens), series(*FALLS)).kind != "memorising"


# ---- known change points (benchmarks/verdicts.py has the whole table) --------------------------


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "verdicts.py"
    spec = spec_from_file_location("verdicts", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("curve", ["flat", "settling", "falling"])
def test_noise_alone_rarely_alarms(simulation: ModuleType, curve: str) -> None:
    draw, alarms = random.Random(7), 0
    for _ in range(60):
        told = simulation.judged(
            getattr(simulation, curve), 20, deviation=0.01, kept=0.5, draw=draw
        )
        alarms += simulation.alarmed(told) is not None
    assert alarms <= 3


def test_a_turn_is_found_within_a_few_readings(simulation: ModuleType) -> None:
    draw, late = random.Random(7), []
    for _ in range(20):
        curve = simulation.turning(10, 0.03)
        told = simulation.judged(curve, 22, deviation=0.005, kept=0.0, draw=draw)
        late.append((simulation.alarmed(told) or 99) - 10)
    assert 3 <= sorted(late)[len(late) // 2] <= 5 and max(late) <= 8
