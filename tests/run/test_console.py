"""What a person sees: every event's line, and a bar that moves where it can."""

import io

import pytest
from rich.console import Console as Terminal

from lorafit.events import (
    Evaluated,
    Event,
    Logged,
    MemoryPeak,
    Notice,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepEnd,
    StepSkipped,
)
from lorafit.run import console as room
from lorafit.run.console import Console, Shown, counting, sparkline

STARTED = RunStarted(1200, 16, 4, 4, 1, 75, 5, 1.0, 100, 10_000, "cpu", "fp32", "as_given")
STEP = StepEnd(6, 0.5, 1.25, 2.0, 0.1, 100, 50, 0.5)
ENDED = RunEnded(75, 1.0, 1.2, 9.0, "finished", "out/checkpoint-9")


def shown(*events: Event, live: bool = False, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        live=live, terminal=Terminal(file=file, force_terminal=terminal, width=200, highlight=False)
    )
    for event in events:
        console(event)
    return file.getvalue()


def test_the_effective_batch_comes_first() -> None:
    text = shown(STARTED)
    assert "1,200 examples, 16 per step (4 x 4 accumulated x 1 process): 75 steps" in text
    assert "100 of 10,000 parameters train (1.00%) on cpu in fp32" in text


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Notice("a [bold]line[/bold]"), ["note: a [bold]line[/bold]"]),
        (Logged(6, 0.5, 1.25, 2.0, 1e-4), ["step      6", "loss 1.2500", "1.00e-04"]),
        (StepSkipped(6, float("nan"), 2.0, (4, 5)), ["NOT APPLIED", "loss nan", "[4, 5]"]),
        (StepSkipped(6, 2.5, float("inf"), (4,), overflow=True), ["NOT APPLIED", "halves its"]),
        (Evaluated("eval", 6, 0.5, 1.5, 9, 1000, 2.0, "asked"), ["eval loss 1.5000", "1,000"]),
        (Saved("out/x", 6, 2_500_000), ["saved out/x (2.5 MB)"]),
        (
            Sampled(6, "system\n\nHow many?\n", "Two.\x1b[2J\nOr three."),
            ["step      6  > system How many? -> Two.\\x1b[2J Or three."],
        ),
        (ENDED, ["finished after 75 steps", "best adapter restored: out/checkpoint-9"]),
    ],
)
def test_lines(event: Event, words: list[str]) -> None:
    text = shown(event)
    assert text.count("\n") == 1 and all(word in text for word in words)


def test_a_step_is_drawn_not_printed() -> None:
    assert shown(STEP) == "" == shown(STEP, live=True)
    assert "6/75" not in shown(STARTED, STEP, ENDED)
    assert "6/75" not in shown(STARTED, STEP, ENDED, terminal=True)
    live = shown(STARTED, STEP, ENDED, live=True, terminal=True)
    assert "6/75" in live and "loss 1.2500 (mean 1.2500)" in live and "200 tokens/s" in live
    peak = MemoryPeak(5, 1_500_000_000, 2_000_000_000)
    live = shown(STARTED, peak, STEP, ENDED, live=True, terminal=True)
    assert "tokens/s · 1.50 GB of 2.00 GB" in live


@pytest.mark.parametrize(
    ("live", "total", "seen"),
    [(True, 4_000, "1,000 of 4,000 rows"), (True, None, "1,000 rows"), (False, 4_000, "")],
)
def test_rows_are_counted_where_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, live: bool, total: int | None, seen: str
) -> None:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=live, width=200, highlight=False)
    monkeypatch.setattr(room, "Terminal", lambda: terminal)
    with counting("rows") as moved:
        moved(1_000, total)
    assert seen in file.getvalue() if seen else not file.getvalue()


def test_the_bar_says_what_matters() -> None:
    shown_, told = Shown(), ""
    for number in range(1, 61):
        told = shown_.after(StepEnd(number, 0.5, 3 - number / 30, 2.0, 1e-4, 100, 50, 0.5))
    assert "loss 1.0000 (mean 1.5" in told and "lr 1.0e-04 · norm 2 · 200 tokens/s" in told
    assert told.startswith("█") and "▁ loss" in told and "eval" not in told
    shown_.evaluation = 1.25
    nan = shown_.after(StepEnd(61, 0.5, float("nan"), 2.0, 1e-4, 100, 50, 0.5))
    assert "loss nan (mean 1.5" in nan and "eval 1.2500" in nan


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█" and len(sparkline([1.0] * 99)) == 16
