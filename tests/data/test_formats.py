"""Each shape becomes the right sample; whatever would be lost in silence is refused by name."""

from typing import Any

import pytest

from lorafit.data.formats import Message, Sample, Shape, detect, sample
from lorafit.data.read import Row
from lorafit.errors import DataError

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello")


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(each, f"a.jsonl:{line}") for line, each in enumerate(fields, start=1)]


def turns(*pairs: tuple[str, object], **extra: object) -> list[dict[str, object]]:
    return [{"role": role, "content": content} | extra for role, content in pairs]


@pytest.mark.parametrize(
    ("fields", "shape", "expected"),
    [
        (
            {"messages": turns(("user", "Hi"), ("assistant", "Hello"))},
            "messages",
            (USER, ANSWER),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": [{"type": "text", "text": "H"}] * 2},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "value": "Hello"}],
                        "loss_weight": 1.0,
                        "tool_calls": None,
                    },
                ],
                "tools": "[]",
            },
            "messages",
            (Message("system", "Be kind."), Message("user", "HH"), ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "system": "Be kind.",
            },
            "conversations",
            (Message("system", "Be kind."), USER, ANSWER),
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Hello", "history": []},
            "instruction -> output",
            (USER, ANSWER),
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "Hello"},
            "instruction -> output",
            (Message("user", "Add\n\n1 2"), ANSWER),
        ),
        ({"question": "Hi", "answer": "Hello", "id": 3}, "question -> answer", (USER, ANSWER)),
    ],
)
def test_chat_shapes(fields: dict[str, Any], shape: str, expected: tuple[Message, ...]) -> None:
    (row,) = rows(fields)
    found = detect([row])
    assert (str(found), found.is_chat) == (shape, True)
    assert sample(row, found) == Sample("a.jsonl:1", messages=expected)


def test_raw_shapes() -> None:
    (row,) = rows({"prompt": "2+2=", "completion": "4"})
    assert not detect([row]).is_chat
    assert sample(row, detect([row])) == Sample("a.jsonl:1", prompt="2+2=", completion="4")
    (row,) = rows({"text": "Once."})
    assert not detect([row]).is_chat
    assert sample(row, detect([row])) == Sample("a.jsonl:1", text="Once.")


def test_fields_under_the_users_own_names() -> None:
    (row,) = rows({"text": "Hi", "category": "Hello", "answer": "no"})
    shape = detect([row], prompt_field="text", answer_field="category")
    assert shape == Shape("question", ("text", "category"))
    assert sample(row, shape).messages == (USER, ANSWER)
    assert detect([row], prompt_field="text").fields == ("text", "answer")


def test_all_rows_are_looked_at() -> None:
    question, text = {"question": "Hi", "answer": "Hello"}, {"text": "Once."}
    with pytest.raises(DataError, match=r"a.jsonl:3: this row has no 'question' .* has: text"):
        detect(rows(question, question, text))
    with pytest.raises(DataError, match=r"a.jsonl:2: this row has no 'answer'; it has: question"):
        detect(rows(question, {"question": "Hi", "answer": None}))
    with pytest.raises(DataError, match=r"a.jsonl:1: this row has no 'intent'; it has: text"):
        detect(rows(text), prompt_field="text", answer_field="intent")
    with pytest.raises(DataError, match=r"a.jsonl:1: the shape .* not known; it has: frage, antw"):
        detect(rows({"frage": "Hi", "antwort": "Hello"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "Hi", "answer": " \n"}, "'answer' is empty"),
        ({"question": "Hi", "answer": 42}, "'answer' holds 42 where text"),
        ({"question": ["Hi"], "answer": "Hello"}, r"'question' holds \['Hi'\] where text"),
        ({"prompt": "Hi", "completion": ""}, "'completion' is empty"),
        ({"text": ""}, "'text' is empty"),
        ({"messages": "Hi"}, "a conversation must be a list of turns"),
        ({"messages": []}, "this conversation has no answer"),
        ({"messages": ["Hi"]}, "turn 1: a turn must be an object"),
        ({"messages": turns(("user", "Hi"))}, "this conversation has no answer"),
        ({"messages": turns(("user", "Hi"), ("assistant", ""))}, "turn 2: 'content' is empty"),
        ({"messages": turns(("user", "Hi"), ("assistant", None))}, "turn 2: 'content' is empty"),
        ({"messages": turns(("user", "Hi"), ("robot", "Hello"))}, "turn 2: the role 'robot'"),
        ({"conversations": [{"from": "observation", "value": "1"}]}, "turn 1: the role 'observ"),
        ({"messages": turns(("assistant", "Hello"), weight=0)}, "turn 1: weight is 0"),
        ({"messages": turns(("user", "Hello"), loss_weight=1)}, "turn 1: loss_weight is 1"),
        ({"messages": turns(("assistant", "a"), tool_calls=[{"id": 1}])}, "'tool_calls' holds"),
        ({"messages": turns(("assistant", "a")), "tools": [{"name": "f"}]}, "'tools' holds"),
        ({"messages": turns(("assistant", [{"type": "image", "url": "a"}]))}, "'content' holds"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' holds"),
    ],
)
def test_nothing_is_left_out_in_silence(fields: dict[str, Any], message: str) -> None:
    (row,) = rows(fields)
    with pytest.raises(DataError, match=rf"^a.jsonl:1: (.*: )?{message}"):
        sample(row, detect([row]))
