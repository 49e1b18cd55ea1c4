"""Which shape the rows have, and each row as a sample: a conversation, a prompt and its
completion, plain text, or token ids.

Owns the fields that people give their rows. Knows neither files nor tokenizers: `read` gives it
rows, `template` makes token ids of its samples. What it does not understand in full it refuses by
name rather than leaving it out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from lorafit.data.read import Row
from lorafit.errors import DataError, nearest
from lorafit.kernels.cross_entropy import IGNORE

Kind = Literal[
    "messages", "conversations", "instruction", "question", "completion", "text", "tokens"
]
Role = Literal["system", "user", "assistant", "tool"]

_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
_WEIGHTS = ("weight", "loss_weight", "train")
_SHAPES_READ = (
    "Rows may have: messages; conversations; instruction, input and output; question and answer; "
    "prompt and completion; text; or input_ids and labels. Other names: --prompt-field NAME "
    "--answer-field NAME."
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        calls: Calls of tools, each {"name": ..., "arguments": {...}}.
        thinking: What an assistant thought before answering (`reasoning_content`).
        name: The tool whose result this is, where the row says so.
        learned: Whether an answer is to be learned; no other turn is.
    """

    role: Role
    content: str
    calls: tuple[Mapping[str, Any], ...] = ()
    thinking: str = ""
    name: str = ""
    learned: bool = True

    @property
    def is_answer(self) -> bool:
        """Whether the assistant says it."""
        return self.role == "assistant"

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            made["tool_calls"] = [{"type": "function", "function": call} for call in self.calls]
        if self.thinking:
            made["reasoning_content"] = self.thinking
        return made | ({"name": self.name} if self.name else {})


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row asks to be learned: `messages`, or `prompt` and `completion`, or `text`, or `ids`.

    Attributes:
        source: The row's file and line.
        messages: A conversation with at least one answer; empty for the others.
        tools: What the assistant may call, as JSON schemas ({"type": "function", ...}).
        prompt: Raw text that the completion follows directly, with nothing put between.
        completion: Raw text to be learned; empty where `text` is given.
        text: Plain text, learned whole.
        ids: Token ids of a row that was tokenised before.
        labels: Theirs: the id where it is learned, -100 elsewhere.
    """

    source: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a data set's rows.

    Attributes:
        kind: Which of the seven.
        fields: The fields that every row must have, the answer last.
        source: The row that it was found in.
    """

    kind: Kind
    fields: tuple[str, ...]
    source: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether samples of this shape are conversations, written by the chat template."""
        return self.kind not in ("completion", "text", "tokens")

    def __str__(self) -> str:
        return " -> ".join(self.fields)


_SHAPES = (
    Shape("messages", ("messages",)),
    Shape("conversations", ("conversations",)),
    Shape("instruction", ("instruction", "output")),
    Shape("instruction", ("instruction", "response")),
    Shape("question", ("question", "answer")),
    Shape("completion", ("prompt", "completion")),
    Shape("question", ("prompt", "response")),
    Shape("question", ("query", "response")),
    Shape("question", ("question", "response")),
    Shape("question", ("input", "output")),
    Shape("tokens", ("input_ids",)),
    Shape("text", ("text",)),
)


def shape_of(
    row: Row, *, wanted: str = "auto", prompt_field: str = "", answer_field: str = ""
) -> Shape:
    """The shape of a data set, found in its first row.

    Args:
        wanted: A kind of shape that it must have; "auto" for the first that fits.
        prompt_field: The field that holds the question, under the user's own name.
        answer_field: The field that holds the answer, likewise; either alone is enough where the
            other is called `question` or `answer`.

    Raises:
        DataError: the row has no known shape, or lacks a field of the wanted one.
    """
    if prompt_field or answer_field:
        shapes = [Shape("question", (prompt_field or "question", answer_field or "answer"))]
    else:
        shapes = [shape for shape in _SHAPES if wanted in ("auto", shape.kind)]
    fitting = [shape for shape in shapes if not _missing(row, shape)]
    if not fitting and len(shapes) == 1:
        check(row, shapes[0])
    if not fitting:
        _refuse(
            row.source,
            f"the shape of this row is not known; it has: {', '.join(row.fields) or 'nothing'}.",
            why="Which part is the answer to be learned cannot be told.",
        )
    return Shape(fitting[0].kind, fitting[0].fields, row.source)


def check(row: Row, shape: Shape) -> None:
    """Nothing, if `row` has the fields of `shape`.

    Raises:
        DataError: it lacks one.
    """
    missing = _missing(row, shape)
    if not missing:
        return
    here = list(row.fields)
    _refuse(
        row.source,
        f"this row has no {' and no '.join(map(repr, missing))}; it has: "
        f"{', '.join(here) or 'nothing'}.{nearest(missing[0], here)}",
        why=f"The rows are read as {shape}"
        + (f", the shape of {shape.source}." if shape.source not in ("", row.source) else "."),
        fix="All rows of a data set have one shape. " + _SHAPES_READ,
    )


def _missing(row: Row, shape: Shape) -> list[str]:
    return [name for name in shape.fields if row.fields.get(name) is None]


def sample(row: Row, shape: Shape) -> Sample:
    """The row as a sample.

    An instruction and its input (or context), where there is one, become a user's message with an
    empty line between; a question and its answer a user's and an assistant's message; what stands
    in `history` (pairs of question and answer) and `system` comes before them. A developer's turn
    is a system's. Prompts and completions may be text or messages.

    Raises:
        DataError: a field is missing or holds something else, an answer is empty, a conversation
            has no answer.
    """
    check(row, shape)
    fields, place = row.fields, row.source
    first, last = fields[shape.fields[0]], fields[shape.fields[-1]]
    if shape.kind == "tokens":
        return _tokens(fields, place)
    if shape.kind in ("messages", "conversations"):
        return _chat(row, _turns(first, place))
    if shape.kind == "completion" and not isinstance(last, str) and isinstance(first, list):
        asked, answered = _turns(first, place), _turns(last, place)
        return _chat(row, (*(_asked(turn) for turn in asked), *answered))
    answer = _answer(last, shape.fields[-1], place=place)
    if shape.kind == "text":
        return Sample(place, text=answer)
    prompt = _text(first, shape.fields[0], place=place)
    if shape.kind == "completion":
        return Sample(place, prompt=prompt, completion=answer)
    if shape.kind == "instruction":
        extra = "input" if fields.get("input") is not None else "context"
        prompt = "\n\n".join(filter(None, (prompt, _text(fields.get(extra), extra, place=place))))
    asked, answered = Message("user", prompt), Message("assistant", answer)
    return _chat(row, (*_history(fields.get("history"), place), asked, answered))


def _chat(row: Row, turns: Sequence[Message]) -> Sample:
    system = _text(row.fields.get("system"), "system", place=row.source)
    messages = (*([Message("system", system)] if system else []), *turns)
    if not any(message.is_answer and message.learned for message in messages):
        _refuse(
            row.source,
            "this conversation has no answer to learn: none of its turns is the assistant's, or "
            "all have weight 0.",
            why="Nothing of it would be learned.",
            fix="Add the assistant's turn, or remove the row.",
        )
    tools = row.fields.get("tools") or row.fields.get("functions") or ()
    return Sample(row.source, messages=messages, tools=_tools(tools, row.source))


def _turns(turns: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple):
        _refuse(place, f"a conversation must be a list of turns, not {turns!r:.40}.")
    return tuple(_message(turn, f"{place}: turn {n}") for n, turn in enumerate(turns, 1))


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
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or [turn[key] for key in ("function_call",) if turn.get(key)]
    if name == "function_call":
        content, calls = None, _parsed(content, place)
        calls = calls if isinstance(calls, list) else [calls]
    learned = _learned(turn, role, place=place)
    called = tuple(_call(call, place) for call in calls)
    needs_words = role == "assistant" and learned and not called
    return Message(
        role,
        (_answer if needs_words else _text)(content, "content", place=place),
        calls=called,
        thinking=_text(turn.get("reasoning_content"), "reasoning_content", place=place),
        name=str(turn.get("name") or ""),
        learned=learned,
    )


def _learned(turn: Mapping[str, Any], role: Role, *, place: str) -> bool:
    """Whether the turn's weight, if it has one, lets an answer be learned."""
    name = next((name for name in _WEIGHTS if turn.get(name) is not None), None)
    if name is None:
        return True
    if turn[name] not in (0, 1) or (turn[name] and role != "assistant"):
        _refuse(
            place,
            f"{name} is {turn[name]!r} on a turn of the {role}.",
            why="An answer is learned (1) or not (0), and only answers are.",
            fix=f"Write 0 or 1 on the assistant's turns and 0 on others; or leave {name} out.",
        )
    return turn[name] == 1 or role != "assistant"


def _asked(turn: Message) -> Message:
    """A turn of a prompt, whose answers were given and are not learned."""
    return replace(turn, learned=not turn.is_answer)


def _call(call: Any, place: str) -> Mapping[str, Any]:
    """A call as {"name", "arguments"}; OpenAI's arguments are a text that holds JSON."""
    inner = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        _refuse(
            place,
            f"a call of a tool must have a name and arguments, not {call!r:.60}.",
            fix='Write {"name": "search", "arguments": {"query": "..."}}.',
        )
    arguments = inner.get("arguments")
    parsed = _parsed(arguments, place) if isinstance(arguments, str) else arguments
    return {"name": inner["name"], "arguments": {} if parsed is None else parsed}


def _tools(tools: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    listed = _parsed(tools, place) if isinstance(tools, str) else tools
    if not isinstance(listed, list | tuple) or not all(isinstance(t, Mapping) for t in listed):
        _refuse(place, f"'tools' must be a list of JSON schemas, not {tools!r:.60}.")
    made = tuple(t if "function" in t else {"type": "function", "function": t} for t in listed)
    inner = [tool["function"] for tool in made]
    nameless = [t for t in inner if not (isinstance(t, Mapping) and isinstance(t.get("name"), str))]
    if nameless:
        _refuse(place, f"a tool has no name: {nameless[0]!r:.60}.")
    return made


def _parsed(text: Any, place: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{place}: {text!r:.60} is not JSON: {error}",
            why="Tools and their calls are written as JSON.",
            fix="Correct it, or remove the row.",
        ) from error


def _history(pairs: Any, place: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    for pair in pairs or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            _refuse(place, f"'history' must hold pairs of question and answer, not {pair!r:.60}.")
        turns.append(Message("user", _text(pair[0], "history", place=place)))
        turns.append(Message("assistant", _answer(pair[1], "history", place=place)))
    return tuple(turns)


def _tokens(fields: Mapping[str, Any], place: str) -> Sample:
    """Ids as they stand, but for what the attention mask hides; without labels all are learned."""
    ids = _numbers(fields["input_ids"], "input_ids", place=place)
    count = len(ids)
    labels, mask = ids, (1,) * count
    if fields.get("labels") is not None:
        labels = _numbers(fields["labels"], "labels", place=place)
    if fields.get("attention_mask") is not None:
        mask = _numbers(fields["attention_mask"], "attention_mask", place=place)
    pairs = zip(ids, labels, strict=False)
    if not len(labels) == len(mask) == count or any(y not in (IGNORE, x) for x, y in pairs):
        _refuse(
            place,
            f"{count} input_ids go with {len(labels)} labels and a mask of {len(mask)}, or a "
            "label is neither its token nor -100.",
            why="A label stands for its own token; the loss shifts them.",
            fix="Give as many labels as input_ids, unshifted; or leave them out.",
        )
    kept = [n for n, seen in enumerate(mask) if seen]
    return Sample(place, ids=tuple(ids[n] for n in kept), labels=tuple(labels[n] for n in kept))


def _numbers(value: Any, name: str, *, place: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(part) is int for part in value):
        _refuse(place, f"{name!r} holds {value!r:.60} where a list of whole numbers is expected.")
    return tuple(value)


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


def _refuse(place: str, what: str, *, why: str = "", fix: str = _SHAPES_READ) -> NoReturn:
    raise DataError(f"{place}: {what}", why=why, fix=fix)
