"""A run folder read back: its last run, each step once, settings, and what could not be read."""

import json
from pathlib import Path

import pytest

from lorafit.errors import OutputError
from lorafit.events import PROBE, Evaluated, Event, Notice, RunEnded, RunStarted, StepEnd
from lorafit.run.journal import Journal
from lorafit.run.record import read


def started(first_step: int = 0) -> RunStarted:
    return RunStarted(9, 4, 2, 2, 1, 100, first_step, 5.0, 1, 2, "cpu", "fp32", "packed")


def step(number: int, loss: float = 1.0) -> StepEnd:
    return StepEnd(number, number / 20, loss, 1.0, 1e-4, 100, 50, 0.5)


def reading(number: int, loss: float, name: str = "eval") -> Evaluated:
    return Evaluated(name, number, number / 20, loss, 90, 10, 1.0, "asked")


ENDED = RunEnded(100, 5.0, 1.0, 60.0, "finished")


def write(folder: Path, *events: Event) -> Path:
    journal = Journal(folder)
    for event in events:
        journal(event)
    journal.close()
    return folder


def test_the_last_run_counts_with_what_was_said_before_it(tmp_path: Path) -> None:
    first = (Notice("old"), started(), step(1, 9.0), ENDED)
    run = read(write(tmp_path, *first, Notice("new"), started(), step(1), step(2)))
    assert [notice.text for notice in run.of(Notice)] == ["new"] and run.earlier == 1
    assert [s.loss for s in run.steps] == [1.0, 1.0] and run.ended is None
    assert run.seconds_left == pytest.approx(98 * 0.5)


def test_steps_that_were_run_again_count_once(tmp_path: Path) -> None:
    before = (started(), step(1), step(2), step(3, 7.0), reading(3, 7.0))
    run = read(write(tmp_path, *before, started(2), step(3), reading(3, 1.5), ENDED))
    assert [s.loss for s in run.steps] == [1.0] * 3 and run.evaluation.losses == (1.5,)
    assert run.ended == ENDED and run.seconds_left is None


def test_training_loss_is_the_probes_else_that_of_the_steps_between(tmp_path: Path) -> None:
    events = [started(), reading(0, 3.0)]
    for at in (1, 2, 3, 4):
        events += [step(2 * at - 1, 3.0 - at), step(2 * at, 2.0 - at), reading(2 * at, 2.0)]
    assert read(write(tmp_path / "a", *events)).training.losses == (1.5, 0.5, -0.5, -1.5)
    probes = [reading(at, 1.0 / at, PROBE) for at in (2, 4)]
    assert read(write(tmp_path / "b", *events, *probes)).training.losses == (0.5, 0.25)


def test_settings_say_who_set_them(tmp_path: Path) -> None:
    write(tmp_path, started())
    (tmp_path / "config.yaml").write_text(
        "# Adapter\nlora_r: 8  # --lora-r\nlora_dropout: 0.1  # recipe\n\nmine: 1\n"
    )
    run = read(tmp_path)
    assert [(s.group, s.name, s.value, s.origin) for s in run.settings] == [
        ("Adapter", "lora_r", "8", "--lora-r"),
        ("Adapter", "lora_dropout", "0.1", "recipe"),
    ]
    assert run.setup.lora_r == 8 and run.settings[0].is_chosen and not run.settings[1].is_chosen
    assert run.left_out == ("1 lines of config.yaml left out: not as lorafit writes them",)


def test_a_checkpoint_says_where_it_ran(tmp_path: Path) -> None:
    write(tmp_path, started())
    (tmp_path / "checkpoint-7").mkdir()
    state = {"made_with": {"lora_r": 4, "machine.threads": 2, "versions.torch": "2"}}
    (tmp_path / "checkpoint-7" / "run_state.json").write_text(json.dumps(state))
    run = read(tmp_path)
    assert run.environment["threads"] == "2" and run.environment["torch"] == "2"
    assert [(s.name, s.value) for s in run.settings] == [("lora_r", "4")]
    (tmp_path / "checkpoint-7" / "run_state.json").write_text("{")
    assert read(tmp_path).left_out == ("checkpoint-7/run_state.json left out: it cannot be read",)


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run that can be read"):
        read(tmp_path)
