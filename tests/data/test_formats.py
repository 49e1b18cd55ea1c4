"""Each shape becomes the right sample; whatever would be lost in silence is refused by name."""

import json
from typing import Any

import pytest

from lorafit.data.formats import Message, Sample, sample
from lorafit.data.read import Row
from lorafit.data.shapes import shape_of
from lorafit.errors import DataError

DEEP = json.loads('[{"name": "f", "a": ' + "[" * 101 + "]" * 101 + "}]")
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
    found = shape_of(row)
    assert (str(found), found.is_chat) == (shape, True)
    assert sample(row, found) == Sample("a.jsonl:1", messages=expected)


def test_raw_shapes() -> None:
    (row,) = rows({"prompt": "2+2=", "completion": "4"})
    assert not shape_of(row).is_chat
    assert sample(row, shape_of(row)) == Sample("a.jsonl:1", prompt="2+2=", completion="4")
    (row,) = rows({"text": "Once."})
    assert not shape_of(row).is_chat
    assert sample(row, shape_of(row)) == Sample("a.jsonl:1", text="Once.")


def test_fields_under_the_users_own_names() -> None:
    (row,) = rows({"text": "Hi", "category": "Hello", "answer": "no"})
    shape = shape_of(row, prompt_field="text", answer_field="category")
    assert (shape.kind, shape.fields) == ("question", ("text", "category"))
    assert shape.source == "a.jsonl:1"
    assert sample(row, shape).messages == (USER, ANSWER)
    assert shape_of(row, prompt_field="text").fields == ("text", "answer")


def test_more_names_for_questions_and_answers() -> None:
    for fields in (
        {"instruction": "Hi", "response": "Hello", "context": ""},
        {"prompt": "Hi", "response": "Hello"},
        {"query": "Hi", "response": "Hello"},
        {"question": "Hi", "response": "Hello"},
        {"input": "Hi", "output": "Hello"},
        {"prompt": turns(("user", "Hi")), "completion": turns(("assistant", "Hello"))},
    ):
        (row,) = rows(fields)
        assert sample(row, shape_of(row)).messages == (USER, ANSWER), fields
    (row,) = rows({"instruction": "Hi", "response": "Hello", "context": "there"})
    assert sample(row, shape_of(row)).messages[0] == Message("user", "Hi\n\nthere")


def test_history_comes_first_and_a_prompts_answers_are_not_learned() -> None:
    (row,) = rows({"instruction": "a", "output": "Hello", "history": [["Hi", "b"]]})
    asked = (USER, Message("assistant", "b"), Message("user", "a"), ANSWER)
    assert sample(row, shape_of(row)).messages == asked
    prompt = turns(("user", "Hi"), ("assistant", "b"), ("user", "a"))
    (row,) = rows({"prompt": prompt, "completion": turns(("assistant", "Hello"))})
    made = sample(row, shape_of(row)).messages
    assert [message.learned for message in made if message.is_answer] == [False, True]


def test_tools_and_their_calls() -> None:
    bare = {"name": "add", "parameters": {}}
    wrapped = {"type": "function", "function": bare}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "Hello"},
    ]
    glaive = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2", "name": "add"},
        {"from": "gpt", "value": "Hello"},
    ]
    expected = (
        Message("system", "Be kind."),
        USER,
        Message("assistant", "", calls=({"name": "add", "arguments": {"a": 1}},)),
        Message("tool", "2", name="add"),
        ANSWER,
    )
    for fields in (
        {"messages": openai, "tools": [wrapped]},
        {"conversations": glaive, "tools": json.dumps([bare])},
        {"messages": openai, "functions": [bare]},
    ):
        (row,) = rows(fields)
        made = sample(row, shape_of(row))
        assert (made.messages, made.tools) == (expected, (wrapped,))
    assert expected[2].as_dict()["tool_calls"][0]["function"]["name"] == "add"


def test_names_and_habits_of_others() -> None:
    for fields in (
        {"messages": json.dumps(turns(("user", "Hi"), ("assistant", "Hello")))},  # of a csv
        {"messages": turns((" User", "Hi"), ("AI", "Hello"))},
        {"messages": turns(("user", [{"type": "input_text", "text": "Hi"}]), ("bot", "Hello"))},
        {"prompt": turns(("user", "Hi")), "completion": "Hello"},
        {"prompt": "Hi", "completion": turns(("assistant", "Hello"))[0]},
    ):
        (row,) = rows(fields)
        assert shape_of(row).is_chat
        assert sample(row, shape_of(row)).messages == (USER, ANSWER), fields
    (row,) = rows({"instruction": "Hi", "output": "Hello", "history": "[]", "system_prompt": "S"})
    assert sample(row, shape_of(row)).messages == (Message("system", "S"), USER, ANSWER)
    (row,) = rows({"question": "Hi", "context": "there", "answer": "Hello"})
    assert sample(row, shape_of(row)).messages[0].content == "Hi\n\nthere"
    shape = shape_of(row, prompt_field="question")  # columns that the user names are all there is
    assert sample(row, shape).messages == (USER, ANSWER)
    for name in ("reasoning_content", "reasoning", "thinking"):
        (row,) = rows({"messages": [*turns(("user", "Hi")), *turns(("ai", "a"), **{name: "b"})]})
        assert sample(row, shape_of(row)).messages[1].thinking == "b"
    for call in ({"name": "f", "parameters": {}}, {"name": "f", "arguments": " "}):
        (row,) = rows({"messages": [*turns(("user", "Hi")), *turns(("ai", ""), tool_calls=[call])]})
        assert sample(row, shape_of(row)).messages[1].calls == ({"name": "f", "arguments": {}},)
    said = turns(
        ("user", "Hi"), ("tool_call", '{"name": "f"}'), ("tool_response", "2"), ("ai", "a")
    )
    (row,) = rows({"messages": said})
    assert [m.role for m in sample(row, shape_of(row)).messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip


def test_turns_and_raw_text_are_not_mixed() -> None:
    raw, turned = rows(
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": turns(("user", "Hi")), "completion": turns(("assistant", "Hello"))},
    )
    with pytest.raises(DataError, match=r"a.jsonl:2: .* are turns, those of a.jsonl:1 text"):
        sample(turned, shape_of(raw))
    with pytest.raises(DataError, match=r"a.jsonl:1: .* are text, those of a.jsonl:2 turns"):
        sample(raw, shape_of(turned))
    assert str(shape_of(turned)) == "prompt -> completion (turns)"


def test_weights_choose_which_answers_are_learned() -> None:
    said = [*turns(("user", "Hi"), weight=0), *turns(("assistant", "a"), train=False)]
    (row,) = rows({"messages": [*said, *turns(("user", "Hi")), *turns(("assistant", "Hello"))]})
    made = sample(row, shape_of(row)).messages
    assert [message.learned for message in made if message.is_answer] == [False, True]


def test_rows_that_were_tokenised_before() -> None:
    (row,) = rows({"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]})
    shape = shape_of(row)
    assert not shape.is_chat
    assert sample(row, shape) == Sample("a.jsonl:1", ids=(5, 6, 7), labels=(5, 6, 7))
    (row,) = rows({"input_ids": [5, 6], "labels": [-100, 6]})
    assert sample(row, shape).labels == (-100, 6)
    for name in ("assistant_masks", "completion_mask", "loss_mask"):
        (row,) = rows({"input_ids": [5, 6], name: [0, 1]})
        assert sample(row, shape_of(row)).labels == (-100, 6)


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
        ({"conversations": [{"from": "observation", "value": "1"}]}, "this conversation has no"),
        ({"messages": turns(("assistant", "Hello"), weight=0)}, "this conversation has no answer"),
        ({"messages": turns(("assistant", "Hello"), weight=0.5)}, "turn 1: weight is 0.5"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids go with 1 labels"),
        ({"input_ids": [1, 2], "labels": [2, 2]}, "2 input_ids go with 2 labels"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "2 input_ids go with 1 labels"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1, 1]}, "2 input_ids go with 3 labels"),
        ({"input_ids": []}, r"'input_ids' holds \[\] where a list of whole numbers"),
        ({"question": " ", "answer": "a"}, "'question' is empty, and its answer answers nothing"),
        ({"instruction": "", "input": None, "output": "a"}, "'instruction' is empty"),
        ({"messages": [{"role": "user", "text": "Hi"}]}, "turn 1: .*has no content; it has: role"),
        ({"messages": turns(("system", None), ("ai", "a"))}, "turn 1: this turn of the system has"),
        ({"messages": turns(("ai", "a")), "images": ["a.png"]}, "'images' holds"),
        ({"messages": turns(("ai", "a"), audio={"id": 1})}, "turn 1: 'audio' holds"),
        ({"messages": turns(("ai", "a")), "tools": '[{"n": NaN}]'}, ".*is not JSON: NaN is not"),
        ({"messages": turns(("ai", "a")), "tools": '[{"n": 1, "n": 2}]'}, ".*'n' stands twice"),
        ({"messages": turns(("ai", "a")), "tools": "[" * 99_999}, ".*is not JSON: nested too deep"),
        ({"messages": turns(("ai", "a")), "tools": DEEP}, "a tool or its call is nested too deep"),
        ({"input_ids": "1 2"}, "'input_ids' holds '1 2' where a list of whole numbers"),
        ({"messages": turns(("user", "Hello"), loss_weight=1)}, "turn 1: loss_weight is 1"),
        (
            {"messages": turns(("assistant", "a"), tool_calls=[{"id": 1}])},
            "a call of a tool must have a name",
        ),
        ({"messages": turns(("assistant", "a")), "tools": [{"n": "f"}]}, "a tool has no name"),
        ({"messages": turns(("assistant", "a")), "tools": "{"}, r"'\{' is not JSON"),
        ({"messages": turns(("assistant", [{"type": "image", "url": "a"}]))}, "'content' holds"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must hold pairs"),
    ],
)
def test_nothing_is_left_out_in_silence(fields: dict[str, Any], message: str) -> None:
    (row,) = rows(fields)
    with pytest.raises(DataError, match=rf"^a.jsonl:1: (.*: )?{message}"):
        sample(row, shape_of(row))
