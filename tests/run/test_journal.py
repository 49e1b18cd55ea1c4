"""The journal: one line an event, and one line a step however often a run is resumed."""

import errno
import json
import os
from pathlib import Path

import pytest

from lorafit.errors import OutputError
from lorafit.events import (
    DataAudited,
    Evaluated,
    Event,
    Logged,
    Notice,
    RunEnded,
    RunStarted,
    Saved,
    StepSkipped,
)
from lorafit.run.journal import Journal, read_events

STARTED = RunStarted(9, 4, 2, 2, 1, 9, 0, 1.0, 1, 2, "cpu", "fp32", "as_given")


def logged(step: int) -> Logged:
    return Logged(step, 0.5, 1.0, 2.0, 0.1)


def write(folder: Path, *events: Event, resumed: tuple[str, int] | None = None) -> int:
    """Write the events; the length of the journal then."""
    journal = Journal(folder, resumed=resumed and (folder / resumed[0], resumed[1]))
    for event in events:
        journal(event)
    length = journal.synced()
    journal.close()
    return length


def lines(folder: Path) -> list[tuple[str, int]]:
    read = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [(line["event"], line.get("step", -1)) for line in read]


def test_lines_are_json_and_flushed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    journal(StepSkipped(3, float("nan"), float("inf"), (4, 5)))
    journal(Notice("größer"))
    text = (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8")
    first, second = map(json.loads, text.splitlines())
    assert first == {
        "event": "StepSkipped",
        "step": 3,
        "loss": "nan",
        "gradient_norm": "inf",
        "examples": [4, 5],
        "overflow": False,
    }
    assert second == {"event": "Notice", "text": "größer"} and "größer" in text
    journal.close()


def test_a_fresh_run_appends(tmp_path: Path) -> None:
    write(tmp_path, STARTED, logged(1))
    write(tmp_path, STARTED, logged(1))
    assert [name for name, _ in lines(tmp_path)] == ["RunStarted", "Logged"] * 2


SAVED = Saved("elsewhere/checkpoint-2", 2, 9)


def test_resuming_forgets_what_came_after_the_save(tmp_path: Path) -> None:
    ended = RunEnded(3, 1.0, 1.0, 1.0, "interrupted")
    write(tmp_path, STARTED, logged(9))
    length = write(tmp_path, STARTED, logged(1), logged(2))
    write(tmp_path, SAVED, Notice("late"), logged(3), ended)
    write(tmp_path, logged(3), resumed=("checkpoint-2", length))
    assert lines(tmp_path) == [
        *[("RunStarted", -1), ("Logged", 9), ("RunStarted", -1)],
        *[("Logged", 1), ("Logged", 2), ("Saved", 2), ("Logged", 3)],
    ]


def test_without_the_line_of_the_save_its_length_decides(tmp_path: Path) -> None:
    length = write(tmp_path, STARTED, logged(1), logged(2))
    write(tmp_path, logged(3))
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "Saved", "pa')  # killed here
    write(tmp_path, logged(3), resumed=("checkpoint-2", length))
    assert lines(tmp_path) == [("RunStarted", -1), ("Logged", 1), ("Logged", 2), ("Logged", 3)]


def test_a_later_runs_lines_stay(tmp_path: Path) -> None:
    length = write(tmp_path, STARTED, logged(1), logged(2))
    write(tmp_path, SAVED, logged(3))
    write(tmp_path, STARTED, logged(7))
    write(tmp_path, logged(3), resumed=("checkpoint-2", length))
    assert [step for name, step in lines(tmp_path) if name == "Logged"] == [1, 2, 7, 3]


def test_a_line_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    write(tmp_path, STARTED)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "Log')
    write(tmp_path, logged(1))
    *_, torn, last = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert torn == '{"event": "Log' and json.loads(last)["step"] == 1


def test_another_folders_checkpoint_cuts_nothing(tmp_path: Path) -> None:
    length = write(tmp_path, STARTED)
    write(tmp_path, logged(1))
    write(tmp_path, logged(3), resumed=("other/checkpoint-2", length))
    assert [step for _, step in lines(tmp_path)] == [-1, 1, 3]


def test_resuming_into_a_new_folder_starts_a_journal(tmp_path: Path) -> None:
    write(tmp_path, logged(3), resumed=("checkpoint-2", 50))
    assert lines(tmp_path) == [("Logged", 3)]


def test_a_journal_that_cannot_be_synced_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"journal\.jsonl cannot be written"):
            journal.synced()
    journal.close()


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    told: list[Event] = [
        STARTED,
        Notice("größer"),
        DataAudited(("a",), (), (("x", True), ("y", False))),
        StepSkipped(3, float("inf"), 2.0, (4, 5)),
        Evaluated("eval", 3, 1.0, 2.5, 9, 3, 0.5, "asked", (1.0, 2.5), (4, 5)),
        RunEnded(3, 1.0, 1.0, 1.0, "finished"),
    ]
    write(tmp_path, *told)
    assert read_events(tmp_path / "journal.jsonl") == (told, [])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    good = {
        "event": "Evaluated",
        "name": "eval",
        "step": 1,
        "epoch": 1,
        "loss": "nan",
        "seconds": 1,
    }
    good |= {"supervised_tokens": 3, "examples": 3, "occasion": "asked", "from_a_later_version": 1}
    lines = [
        json.dumps(good),
        '{"event": "Dreamt", "step": 1}',
        '{"event": "StepEnd", "step": 1}',
        '{"event": "Notice", "text": 3}',
        '{"event": "Saved", "path": "x", "step": true, "bytes": 1}',
        "[1]",
        "",
        '{"event": "StepEnd", "st',
    ]
    file.write_bytes("\n".join(lines).encode() + b"\xff")
    events, left_out = read_events(file)
    assert [type(event).__name__ for event in events] == ["Evaluated"]
    said = " ".join(left_out)
    assert "unknown event 'Dreamt'" in said and "StepEnd without epoch" in said
    assert "Notice with a field" in said and "Saved with a field" in said and "3 lines" in said
    file.write_text("")
    assert read_events(file) == ([], ["the journal is empty"])
