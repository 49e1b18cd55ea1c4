"""Examples on disk are those that were written, and are made again only when something changed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data import cache
from lorafit.data.cache import Chosen, Stored, kept, store
from lorafit.data.examples import Example
from lorafit.errors import DataError

ONE = Example([1, 2, 3, 2], [-100, -100, 3, 2], "a.jsonl:1")
TWO = Example([1, 9], [-100, 9], "a.jsonl:2")
HALVES = [Example([1, 4], [-100, 4], "b.jsonl:7"), Example([1, 5], [-100, 5], "b.jsonl:7")]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def write(folder: Path, *examples: Example) -> Stored:
    store(folder, examples, about=lambda: {"note": "é"})
    return Stored(folder)


def fields(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.ids, "labels": example.labels}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1)))
def test_what_was_stored_is_read(
    tmp_path_factory: pytest.TempPathFactory, made: list[list[tuple[int, bool]]]
) -> None:
    examples = [
        Example([i for i, _ in row], [i if y else -100 for i, y in row], f"a:{n}")
        for n, row in enumerate([*made, [(1, True)]])
    ]
    stored = write(tmp_path_factory.mktemp("set") / "x", *examples)
    assert [stored[n] for n in range(len(stored))] == [fields(each) for each in examples]
    assert stored.lengths.tolist() == [len(each.ids) for each in examples]
    for count in (3, 50_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "_BLOCK", count)
            assert stored.supervised.tolist() == [each.supervised for each in examples]
    assert stored.sources() == [each.source for each in examples]


def test_rows_and_hashes(tmp_path: Path) -> None:
    stored = write(tmp_path / "x", ONE, *HALVES, TWO, Example(ONE.ids, [-100, 2, 3, 2], "c:1"))
    assert stored.rows.tolist() == [0, 1, 1, 2, 3]
    assert stored.about["note"] == "é"
    assert stored.wholes[0] == stored.wholes[4] and len(set(stored.wholes.tolist())) == 4
    assert stored.prompts[1] == stored.prompts[2] == stored.prompts[3] != stored.prompts[0]


def test_examples_are_chosen_across_sets(tmp_path: Path) -> None:
    first, second = write(tmp_path / "x", ONE, TWO), write(tmp_path / "y", *HALVES)
    chosen = Chosen([(first, np.array([1])), (second, np.array([1, 0, 1]))])
    assert [chosen[n]["input_ids"] for n in range(len(chosen))] == [[1, 9], [1, 5], [1, 4], [1, 5]]
    for index in (-1, 4):
        with pytest.raises(IndexError):
            chosen[index]


def test_a_set_that_could_not_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield ONE
        raise DataError("row 2")

    with pytest.raises(DataError):
        store(tmp_path / "x", broken(), about=dict)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def making(*examples: Example) -> tuple[Callable[[Path], None], list[Path]]:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        store(folder, examples, about=dict)

    return make, made


def test_a_set_is_made_once_and_again_when_its_key_changes() -> None:
    make, made = making(ONE)
    key = {"the data": "a", "the tokenizer": "b"}
    assert kept("set", key, make=make)[1] == ""
    again, note = kept("set", key, make=make)
    assert "found again" in note and len(made) == 1 and again[0] == fields(ONE)
    _, note = kept("set", key | {"the tokenizer": "c"}, make=make)
    assert (note, len(made)) == ("examples made again: the tokenizer changed", 2)
    kept("other", key, make=make)
    assert len(made) == 3


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_set_is_made_again(damage: str) -> None:
    make, made = making(ONE, TWO)
    kept("set", {"a": "b"}, make=make)
    file = made[0] / "ids.i4"
    file.write_bytes(b"") if damage == "cut" else file.unlink()
    stored, note = kept("set", {"a": "b"}, make=make)
    assert "damaged" in note and stored[1] == fields(TWO) and len(made) == 2


def test_the_oldest_versions_go() -> None:
    make, made = making(ONE)
    for number in range(7):
        kept("set", {"a": str(number)}, make=make)
    assert sum(folder.exists() for folder in made) == 4 and made[-1].exists()


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="LORAFIT_CACHE=/elsewhere"):
        kept("set", {"a": "b"}, make=making(ONE)[0])


def test_where_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAFIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.root() == Path("/somewhere/lorafit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root() == Path.home() / ".cache" / "lorafit"


def test_the_key_is_beside_the_set() -> None:
    make, made = making(ONE)
    kept("set", {"a": "b"}, make=make)
    assert json.loads((made[0] / "key.json").read_text()) == {"a": "b"}
