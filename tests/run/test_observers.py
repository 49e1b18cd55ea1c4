"""Observers are told in order; a journal is one of them for a while."""

import json
from pathlib import Path

import pytest

from lorafit.events import Event, Notice
from lorafit.run.journal import Journal
from lorafit.run.observers import Observers


def test_each_is_told_each_event_in_order() -> None:
    told: list[tuple[str, Event]] = []
    observers = Observers([lambda e: told.append(("a", e)), lambda e: told.append(("b", e))])
    one, two = Notice("1"), Notice("2")
    observers.tell(one, two)
    assert told == [("a", one), ("b", one), ("a", two), ("b", two)]
    observers.say("", "3")
    assert told[4:] == [("a", Notice("3")), ("b", Notice("3"))]


def test_a_journal_is_closed_after_its_run(tmp_path: Path) -> None:
    observers, journal = Observers(), Journal(tmp_path)
    with pytest.raises(KeyError), observers.writing(journal):  # noqa: PT012
        observers.say("inside")
        raise KeyError
    observers.say("outside")
    assert observers == []
    (line,) = journal.path.read_text().splitlines()
    assert json.loads(line)["text"] == "inside"
