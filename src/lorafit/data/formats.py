"""Which shape the rows have, and each row as a sample: a conversation, a prompt and its
completion, or plain text.

Owns the fields that people give their rows. Knows neither files nor tokenizers: `read` gives it
rows, `template` makes token ids of its samples. What it does not understand in full (tools, turns
of a tool, weights of single turns) it refuses by name rather than leaving it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from lorafit.data.read import Row
from lorafit.errors import DataError

Kind = Literal["messages", "conversations", "instruction", "question", "completion", "text"]
Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SHAPES_READ = (
    "Rows may have: messages; conversations; instruction, input and output; question and answer; "
    "prompt and completion; or text. Other names: --prompt-field NAME --answer-field NAME."
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row asks to be learned: `messages`, or `prompt` and `completion`, or `text`.

    Attributes:
        source: The row's file and line.
        messages: A conversation with at least one answer; empty for the other two.
        prompt: Raw text that the completion follows directly, with nothing put between.
        completion: Raw text to be learned; empty where `text` is given.
        text: Plain text, learned whole.
    """

    source: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a data set's rows.

    Attributes:
        kind: Which of the six.
        fields: The fields that every row must have, the answer last.
    """

    kind: Kind
    fields: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether samples of this shape are conversations, written by the chat template."""
        return self.kind not in ("completion", "text")

    def __str__(self) -> str:
        return " -> ".join(self.fields)


_SHAPES = (
    Shape("messages", ("messages",)),
    Shape("conversations", ("conversations",)),
    Shape("instruction", ("instruction", "output")),
    Shape("question", ("question", "answer")),
    Shape("completion", ("prompt", "completion")),
    Shape("text", ("text",)),
)


def detect(
    rows: Sequence[Row], *, wanted: str = "auto", prompt_field: str = "", answer_field: str = ""
) -> Shape:
    """The one shape that all `rows` have.

    Args:
        rows: At least one.
        wanted: A kind of shape that they must have; "auto" for the first that fits.
        prompt_field: The field that holds the question, under the user's own name.
        answer_field: The field that holds the answer, likewise; either alone is enough where the
            other is called `question` or `answer`.

    Raises:
        DataError: the first row that has no known shape, or another than the rows before it.
    """
    if prompt_field or answer_field:
        shape = Shape("question", (prompt_field or "question", answer_field or "answer"))
    elif wanted != "auto":
        shape = next(shape for shape in _SHAPES if shape.kind == wanted)
    else:
        shape = _shape_of(rows[0])
    for row in rows:
        missing = [name for name in shape.fields if row.fields.get(name) is None]
        if missing:
            _refuse(
                row.source,
                f"this row has no {' and no '.join(map(repr, missing))}; it has: "
                f"{', '.join(row.fields) or 'nothing'}.",
                why=f"The rows are read as {shape}"
                + ("." if row is rows[0] else f", the shape of {rows[0].source}."),
                fix="All rows of a data set have one shape. " + _SHAPES_READ,
            )
    return shape


def _shape_of(row: Row) -> Shape:
    for shape in _SHAPES:
        if all(row.fields.get(name) is not None for name in shape.fields):
            return shape
    raise DataError(
        f"{row.source}: the shape of this row is not known; it has: "
        f"{', '.join(row.fields) or 'nothing'}.",
        why="Which part is the answer to be learned cannot be told.",
        fix=_SHAPES_READ,
    )


def sample(row: Row, shape: Shape) -> Sample:
    """The row as a sample.

    An instruction and its input, where there is one, become a user's message with an empty line
    between; a question and its answer a user's and an assistant's message.

    Raises:
        DataError: a field that is not text, an answer that is empty, a conversation without an
            answer, or a part that would have to be left out (tools, history, weights).
    """
    fields, place = row.fields, row.source
    if shape.kind in ("messages", "conversations"):
        return Sample(place, messages=_conversation(row, fields[shape.fields[0]]))
    answer = _answer(fields[shape.fields[-1]], shape.fields[-1], place=place)
    if shape.kind == "text":
        return Sample(place, text=answer)
    prompt = _text(fields[shape.fields[0]], shape.fields[0], place=place)
    if shape.kind == "completion":
        return Sample(place, prompt=prompt, completion=answer)
    system = ()
    if shape.kind == "instruction":
        _refuse_unread(fields, ("history",), place=place)
        prompt = "\n\n".join(
            filter(None, (prompt, _text(fields.get("input"), "input", place=place)))
        )
        system = _system(row)
    return Sample(place, messages=(*system, Message("user", prompt), Message("assistant", answer)))


def _conversation(row: Row, turns: Any) -> tuple[Message, ...]:
    _refuse_unread(row.fields, ("tools", "functions"), place=row.source)
    if not isinstance(turns, list | tuple):
        _refuse(row.source, f"a conversation must be a list of turns, not {turns!r:.40}.")
    messages = tuple(_message(turn, f"{row.source}: turn {n}") for n, turn in enumerate(turns, 1))
    if all(message.role != "assistant" for message in messages):
        _refuse(
            row.source,
            "this conversation has no answer: none of its turns is the assistant's.",
            why="Nothing of it would be learned.",
            fix="Add the assistant's turn, or remove the row.",
        )
    return (*_system(row), *messages)


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        _refuse(place, f"a turn must be an object with a role and its text, not {turn!r:.40}.")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        _refuse(
            place,
            f"the role {name!r} is not read.",
            why="A turn left out would change what its answers answer.",
            fix=f"Roles are: {', '.join(_ROLES)}.",
        )
    _refuse_unread(turn, ("tool_calls", "function_call"), place=place)
    for weight in ("weight", "loss_weight"):
        if turn.get(weight) not in (None, int(role == "assistant")):
            _refuse(
                place,
                f"{weight} is {turn[weight]!r} on a turn of the {role}.",
                why="Every answer is learned with weight 1 and nothing else is.",
                fix=f"Remove {weight}, or remove the row.",
            )
    text = _answer if role == "assistant" else _text
    return Message(role, text(turn.get("content", turn.get("value")), "content", place=place))


def _system(row: Row) -> tuple[Message, ...]:
    text = _text(row.fields.get("system"), "system", place=row.source)
    return (Message("system", text),) if text else ()


def _text(value: Any, name: str, *, place: str) -> str:
    """`value` if it is text, its parts joined if it is a list of text parts, "" if it is null."""
    if isinstance(value, list | tuple) and all(_is_text_part(part) for part in value):
        return "".join(part.get("text", part.get("value")) for part in value)
    if value is not None and not isinstance(value, str):
        _refuse(
            place,
            f"{name!r} holds {value!r:.60} where text is expected.",
            fix="Write it as a string; only text is learned.",
        )
    return value or ""


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text", part.get("value")), str)
    )


def _answer(value: Any, name: str, *, place: str) -> str:
    text = _text(value, name, place=place)
    if not text.strip():
        _refuse(
            place,
            f"{name!r} is empty, and it is what should be learned.",
            why="A model trained on empty answers learns to say nothing.",
            fix="Fill it in, or remove the row.",
        )
    return text


def _refuse_unread(fields: Mapping[str, Any], names: tuple[str, ...], *, place: str) -> None:
    for name in names:
        # exporters write "no tools" as an empty list, or as a string that holds one
        if fields.get(name) not in (None, "", "[]", [], (), {}):
            _refuse(
                place,
                f"{name!r} holds {fields[name]!r:.60}, which is not read.",
                why="Leaving it out would teach answers to something that was never asked.",
                fix=f"Remove the rows with {name!r}.",
            )


def _refuse(place: str, what: str, *, why: str = "", fix: str = _SHAPES_READ) -> NoReturn:
    raise DataError(f"{place}: {what}", why=why, fix=fix)
