"""The embedded data: enough rows, none shared between the splits, and a criterion that can fail."""

import sysconfig
from pathlib import Path

import pytest
from tests.first_sentence import OPENERS, begins_like_a_docstring

from lorafit.data.docstrings import (
    QuestionAnswer,
    definitions,
    is_held_out,
    pairs,
    sources,
)
from lorafit.errors import DataError

Splits = tuple[list[QuestionAnswer], list[QuestionAnswer]]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return pairs()


def test_every_supported_python_carries_enough_rows(splits: Splits) -> None:
    train, evaluation = splits
    assert (len(train), len(evaluation)) == (500, 100)


def test_no_answer_occurs_twice_and_no_module_stands_on_both_sides(splits: Splits) -> None:
    train, evaluation = splits
    rows = train + evaluation
    assert len({row.answer for row in rows}) == len({row.question for row in rows}) == 600
    assert not any(is_held_out(row.module) for row in train)
    assert all(is_held_out(row.module) for row in evaluation)


def test_no_evaluation_answer_stands_in_a_source_that_training_reads(splits: Splits) -> None:
    for module, file in sources():
        if not is_held_out(module):
            text = " ".join(file.read_text("utf-8", "replace").split())
            assert not [row for row in splits[1] if row.answer in text]


def test_rows_are_named_sentences_that_stand_where_they_say(splits: Splits) -> None:
    files: dict[str, list[Path]] = {}
    for module, file in sources():
        files.setdefault(module, []).append(file)
    for row in splits[0][:50] + splits[1]:
        assert row.question.startswith(f"What does {row.module}.")
        assert 20 <= len(row.answer) <= 160 and row.answer.endswith(".")
        named = row.question.removesuffix(" do?").rpartition(".")[2]
        texts = [file.read_text(encoding="utf-8").split("\n") for file in files[row.module]]
        assert any(named in "".join(text[row.line - 1 : row.line]) for text in texts)


def test_the_order_is_the_same_each_time_and_not_the_alphabets(splits: Splits) -> None:
    assert pairs() == splits
    names = [row.question for row in splits[0]]
    assert names != sorted(names)


def test_definitions_are_the_public_ones_that_are_documented(tmp_path: Path) -> None:
    file = tmp_path / "box.py"
    file.write_text(
        'class Box(list):\n    """Holds e.g. things.  And more."""\n'
        '    def put(self, x=1):\n        """Put\n        it in.\n\n        Later."""\n'
        '    def _hidden(self):\n        """Unseen."""\n    def bare(self): pass\n'
        'if True:\n    def late():\n        """No sentence"""\n'
    )
    found = {one.name: one for one in definitions("box", file)}
    assert set(found) == {"box.Box", "box.Box.put", "box.late"}
    assert found["box.Box"].first_sentence == "Holds e.g. things."
    assert found["box.Box.put"].first_sentence == "Put it in."
    assert (found["box.Box.put"].signature, found["box.Box.put"].line) == ("(self, x=1)", 3)
    assert found["box.late"].first_sentence == ""


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Return the size of the terminal window.", True),
        ("Return True if the path exists.", True),
        ("A ZipFile subclass that writes.", True),
        ("return the size.", False),
        (" Return the size.", False),
        ("Return", False),
        ("Return\nthe size", False),
        ("Create(the, size)", False),
        ("Handler = the size", False),
        ("Purple the size of it.", False),
        ("class Handler(Base):", False),
        ("", False),
    ],
)
def test_the_criterion_accepts_sentences_and_refuses_code(text: str, verdict: bool) -> None:
    assert begins_like_a_docstring(text) is verdict


def test_most_documented_sentences_pass_the_criterion(splits: Splits) -> None:
    passing = sum(begins_like_a_docstring(row.answer) for row in splits[0])
    assert passing >= 0.7 * len(splits[0])
    assert all(word.isalpha() and word[0].isupper() for word in OPENERS)


def test_a_python_without_its_sources_is_refused_in_three_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError) as refusal:
        pairs()
    assert str(tmp_path) in refusal.value.what and refusal.value.why and refusal.value.fix
