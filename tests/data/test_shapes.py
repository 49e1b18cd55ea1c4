"""A shape is found in the first row and asked of all others; what comes near one is helped on."""

from typing import Any

import pytest

from lorafit.data.formats import Message, Sample, sample
from lorafit.data.read import Row
from lorafit.data.shapes import IGNORE, check, shape_of, unread
from lorafit.errors import DataError
from lorafit.kernels import cross_entropy

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello")


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(each, f"a.jsonl:{line}") for line, each in enumerate(fields, start=1)]


def turns(*pairs: tuple[str, object], **extra: object) -> list[dict[str, object]]:
    return [{"role": role, "content": content} | extra for role, content in pairs]


def test_every_row_has_the_shape_of_the_first() -> None:
    first, second = rows({"question": "Hi", "answer": "Hello"}, {"text": "Once."})
    shape = shape_of(first)
    check(first, shape)
    with pytest.raises(DataError, match=r"a.jsonl:2: this row has no 'question' .* has: text"):
        sample(second, shape)
    (half,) = rows({"question": "Hi", "answer": None})
    with pytest.raises(DataError, match=r"the shape of a.jsonl:1") as raised:
        check(Row(half.fields, "a.jsonl:9"), shape)
    assert "a.jsonl:9: this row has no 'answer'; it has: question" in raised.value.what
    with pytest.raises(DataError, match=r"a.jsonl:2: this row has no 'intent'; it has: text"):
        shape_of(second, prompt_field="text", answer_field="intent")
    (other,) = rows({"frage": "Hi", "antwort": "Hello"})
    with pytest.raises(DataError, match=r"a.jsonl:1: the shape .* not known; it has: frage, antw"):
        shape_of(other)
    with pytest.raises(DataError, match=r"has no 'messages'; it has: frage"):
        shape_of(other, wanted="messages")


def test_one_field_under_the_users_own_name() -> None:
    (row,) = rows({"content": "Once.", "dialogue": turns(("user", "Hi"), ("assistant", "Hello"))})
    assert sample(row, shape_of(row, wanted="text", answer_field="content")).text == "Once."
    shape = shape_of(row, wanted="messages", answer_field="dialogue")
    assert shape.is_chat and sample(row, shape).messages == (USER, ANSWER)
    (row,) = rows({"a": "2+2=", "b": "4"})
    shape = shape_of(row, wanted="completion", prompt_field="a", answer_field="b")
    assert sample(row, shape) == Sample("a.jsonl:1", prompt="2+2=", completion="4")


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({"Question": "Hi", " Answer": "a"}, "--prompt-field Question --answer-field ' Answer'"),
        ({"Text": "Hi"}, "--shape text --answer-field Text"),
        ({"talk": turns(("user", "Hi"))}, "--shape messages --answer-field talk"),
        ({"data": [{"question": "Hi", "answer": "Hello"}]}, "jq -c '.data[]'"),
        ({"question": ["Hi"], "answer": ["Hello"]}, "pandas.read_json"),
        ({"question": {"0": "Hi"}, "answer": {"0": "Hello"}}, "pandas.read_json"),
    ],
)
def test_what_nearly_is_a_known_shape_comes_with_what_to_type(
    fields: dict[str, Any], fix: str
) -> None:
    with pytest.raises(DataError) as raised:
        shape_of(*rows(fields))
    assert fix in raised.value.fix


def test_fields_that_are_not_read_are_known() -> None:
    said = [*turns(("user", "Hi")), *turns(("assistant", "Hello"), training=False, id="7")]
    (row,) = rows({"messages": said, "url": "x", "tools": [], "empty": "", "system": "S"})
    assert unread(row, shape_of(row)) == ["url", "training (of a turn)"]
    (row,) = rows({"text": "Once.", "title": "One"})
    assert unread(row, shape_of(row)) == ["title"]


def test_what_is_not_learned_is_marked_as_the_kernels_mark_it() -> None:
    assert IGNORE == cross_entropy.IGNORE
