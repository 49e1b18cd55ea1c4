"""Which shape the rows have, and each row as a sample: a conversation, a prompt and its
completion, plain text, or token ids.

Owns the fields that people give their rows. Knows neither files nor tokenizers: `read` gives it
rows, `template` makes token ids of its samples. What it does not understand in full it refuses by
name rather than leaving it out.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from lorafit.data.parse import value_of
from lorafit.data.read import Row
from lorafit.errors import DataError, nearest
from lorafit.kernels.cross_entropy import IGNORE

Kind = Literal[
    "messages", "conversations", "instruction", "question", "completion", "text", "tokens"
]
Role = Literal["system", "user", "assistant", "tool"]

_CALLS = ("function_call", "tool_call")
_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", *_CALLS), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response"), "tool"
    ),
}
_WEIGHTS = ("weight", "loss_weight", "train")
_THINKING = ("reasoning_content", "reasoning", "thinking")
_OF_A_TURN = (
    *("role", "from", "content", "value", "name", "id", "tool_call_id", "tool_calls"),
    *("function_call", *_WEIGHTS, *_THINKING),
)
_DEEPEST = 100
_UNREADABLE = ("image", "images", "video", "videos", "audio", "audios")
_MASKS = ("assistant_masks", "completion_mask", "loss_mask")
_SHAPES_READ = (
    "Rows may have: messages; conversations; instruction, input and output; question and answer; "
    "prompt and completion; text; or input_ids and labels. Other names: --prompt-field NAME "
    "--answer-field NAME, or for one field --shape text (messages, ...) --answer-field NAME."
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
        has_turns: Whether a prompt and its completion are turns of a conversation, not raw text.
        extras: Fields that are read where a row has them.
    """

    kind: Kind
    fields: tuple[str, ...]
    source: str = ""
    has_turns: bool = False
    extras: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether samples of this shape are conversations, written by the chat template."""
        return self.has_turns or self.kind not in ("completion", "text", "tokens")

    def __str__(self) -> str:
        return " -> ".join(self.fields) + (" (turns)" if self.has_turns else "")


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
            other is called `question` or `answer`. For a kind that has one field, that field.

    Raises:
        DataError: the row has no known shape, or lacks a field of the wanted one.
    """
    shapes = [shape for shape in _SHAPES if wanted in ("auto", shape.kind)]
    is_named = bool(prompt_field or answer_field)
    if is_named:
        shapes = [_under(wanted, prompt_field, answer_field)]
    fitting = [shape for shape in shapes if not _missing(row, shape)]
    _check_is_row(row, is_known=bool(fitting))
    if not fitting and len(shapes) == 1:
        check(row, shapes[0])
    if not fitting:
        _refuse(
            row.source,
            f"the shape of this row is not known; it has: {', '.join(_present(row)) or 'nothing'}.",
            why="Which part is the answer to be learned cannot be told.",
            fix=_closest(row, shapes),
        )
    shape = fitting[0]
    has_turns = shape.kind == "completion" and not _is_raw(row, shape)
    return replace(
        shape, source=row.source, has_turns=has_turns, extras=_extras(shape, is_named=is_named)
    )


def _under(wanted: str, prompt_field: str, answer_field: str) -> Shape:
    """The wanted shape, a question's by default, under the user's names."""
    kind = "question" if wanted == "auto" else wanted
    usual = next(shape for shape in _SHAPES if shape.kind == kind)
    if len(usual.fields) == 1:
        return Shape(usual.kind, (answer_field or prompt_field,))
    return Shape(usual.kind, (prompt_field or usual.fields[0], answer_field or usual.fields[-1]))


def _extras(shape: Shape, *, is_named: bool) -> tuple[str, ...]:
    if shape.kind == "tokens":
        return ("labels", "attention_mask", *_MASKS)
    if shape.kind == "text":
        return ()
    # beside columns that the user named, one called context is a column like any other
    more = ("input", "context") if shape.kind in ("question", "instruction") else ()
    known = ("system", "system_prompt", "history", *(() if is_named else more))
    return (*(name for name in known if name not in shape.fields), "tools", "functions")


def _is_raw(row: Row, shape: Shape) -> bool:
    return all(isinstance(row.fields[name], str) for name in shape.fields)


def _check_is_row(row: Row, *, is_known: bool) -> None:
    """Nothing, unless this is one object that holds all rows: by columns, or under a name."""
    values = list(row.fields.values())
    columns = [
        value
        for value in values
        if (isinstance(value, list) and value and isinstance(value[0], str))
        or (isinstance(value, Mapping) and "0" in value)
    ]
    if len(values) > 1 and len(columns) == len(values):
        _refuse(
            row.source,
            f"this is no row, but an object of columns: {', '.join(row.fields)}.",
            why="A row is one example, each of its fields a value.",
            fix="Turn it round: python -c \"import pandas; pandas.read_json('FILE').to_json("
            "'rows.jsonl', orient='records', lines=True)\"",
        )
    held = [name for name, value in row.fields.items() if _first_keys(value) - {"role", "from"}]
    if not is_known and held and not any(map(_is_turns, values)):
        _refuse(
            row.source,
            f"this is no row, but an object that holds rows under {held[0]!r}.",
            why="Of several lists in a file, which are the rows cannot be told.",
            fix=f"Take them out: jq -c '.{held[0]}[]' FILE > rows.jsonl",
        )


def _first_keys(value: Any) -> set[Any]:
    """The keys of a list's first object; none where it is no list of objects."""
    first = value[0] if isinstance(value, list) and value else None
    return set(first) if isinstance(first, Mapping) else set()


def _is_turns(value: Any) -> bool:
    return bool(_first_keys(value) & {"role", "from"})


def _closest(row: Row, shapes: Sequence[Shape]) -> str:
    """What to type: where case and spaces alone are between the row and a shape, its fields."""
    turns = [name for name, value in row.fields.items() if _is_turns(value)]
    if len(turns) == 1:
        return f"Type: --shape messages --answer-field {shlex.quote(turns[0])}"
    written = {name.strip().lower(): shlex.quote(name) for name in _present(row)}
    for shape in shapes:
        if all(name in written for name in shape.fields):
            *prompt, answer = (written[name] for name in shape.fields)
            asked = f"--prompt-field {prompt[0]}" if prompt else f"--shape {shape.kind}"
            return f"Type: {asked} --answer-field {answer}"
    return _SHAPES_READ


def unread(row: Row, shape: Shape) -> list[str]:
    """The fields of `row`, and the keys of its turns, that hold something and are not read."""
    fields = {name for name, value in row.fields.items() if value not in (None, "", [], {})}
    turns = row.fields[shape.fields[-1]] if shape.is_chat else None
    keys = {
        f"{name} (of a turn)"
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, Mapping)
        for name, value in turn.items()
        if name not in _OF_A_TURN and value not in (None, "", [], {})
    }
    return sorted(fields - {*shape.fields, *shape.extras}) + sorted(keys)


def check(row: Row, shape: Shape) -> None:
    """Nothing, if `row` has the fields of `shape`.

    Raises:
        DataError: it lacks one.
    """
    missing = _missing(row, shape)
    if not missing:
        return
    here = _present(row)
    _refuse(
        row.source,
        f"this row has no {' and no '.join(map(repr, missing))}; it has: "
        f"{', '.join(here) or 'nothing'}.{nearest(missing[0], here)}",
        why=f"The rows are read as {shape}"
        + (f", the shape of {shape.source}." if shape.source not in ("", row.source) else "."),
        fix="All rows of a data set have one shape. " + _SHAPES_READ,
    )


def _check_raw(row: Row, shape: Shape) -> None:
    if _is_raw(row, shape) == shape.has_turns:
        kinds = ("turns", "text") if shape.has_turns else ("text", "turns")
        _refuse(
            row.source,
            f"this row's prompt and completion are {kinds[1]}, those of {shape.source} {kinds[0]}.",
            why="Turns are written by the chat template, and text as it stands.",
            fix="All rows of a data set have one shape.",
        )


def _present(row: Row) -> list[str]:
    return [name for name, value in row.fields.items() if value is not None]


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
        return _tokens(fields, first, place)
    if shape.kind in ("messages", "conversations"):
        return _chat(row, _turns(first, place))
    if shape.kind == "completion":
        _check_raw(row, shape)
    if shape.has_turns:
        asked, answered = _side(first, "user", place=place), _side(last, "assistant", place=place)
        return _chat(row, (*(_asked(turn) for turn in asked), *answered))
    answer = _answer(last, shape.fields[-1], place=place)
    if shape.kind == "text":
        return Sample(place, text=answer)
    prompt = _text(first, shape.fields[0], place=place)
    if shape.kind == "completion":
        return Sample(place, prompt=prompt, completion=answer)
    extra = next((name for name in ("input", "context") if fields.get(name)), "")
    if extra in shape.extras:
        prompt = "\n\n".join(filter(None, (prompt, _text(fields[extra], extra, place=place))))
    if not prompt.strip():
        _refuse(
            place,
            f"{shape.fields[0]!r} is empty, and its answer answers nothing.",
            why="The model would learn to say it whatever it is asked.",
            fix="Fill it in, or leave such rows out: --skip-bad-rows. Text without a question: "
            f"--shape text --answer-field {shlex.quote(shape.fields[-1])}",
        )
    turns = Message("user", prompt), Message("assistant", answer)
    return _chat(row, (*_history(fields.get("history"), place), *turns))


def _side(value: Any, role: Role, *, place: str) -> tuple[Message, ...]:
    """A prompt or completion among turns: turns, one turn, or what the user or assistant says."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    return _turns([value] if isinstance(value, Mapping) else value, place)


def _chat(row: Row, turns: Sequence[Message]) -> Sample:
    _check_readable(row.fields, row.source)
    name = "system" if row.fields.get("system") else "system_prompt"
    system = _text(row.fields.get(name), name, place=row.source)
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


def _check_readable(fields: Mapping[str, Any], place: str) -> None:
    if name := next((name for name in _UNREADABLE if fields.get(name)), ""):
        _refuse(
            place,
            f"{name!r} holds {fields[name]!r:.60}, and only text is learned.",
            why="The model would learn to answer about what it was never shown.",
            fix="Remove the field where the answers do not depend on it, or the row.",
        )


def _turns(turns: Any, place: str) -> tuple[Message, ...]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # csv has no other way
        turns = value_of(turns, place)
    if not isinstance(turns, list | tuple):
        _refuse(place, f"a conversation must be a list of turns, not {turns!r:.40}.")
    return tuple(_message(turn, f"{place}: turn {n}") for n, turn in enumerate(turns, 1))


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        _refuse(place, f"a turn must be an object with a role and its text, not {turn!r:.40}.")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        _refuse(
            place,
            f"the role {name!r} is not read.",
            why="A turn left out would change what its answers answer.",
            fix=f"Roles are: {', '.join(_ROLES)}.",
        )
    _check_readable(turn, place)
    content = turn.get("content", turn.get("value"))
    if content is None and role in ("system", "user"):
        _refuse(
            place,
            f"this turn of the {role} has no content; it has: {', '.join(turn)}.",
            why="What is answered there would be left out.",
            fix='Write {"role": "user", "content": "..."}, or remove the turn.',
        )
    calls = turn.get("tool_calls") or [turn[key] for key in ("function_call",) if turn.get(key)]
    if name in _CALLS:
        content, calls = None, _parsed(content, place)
        calls = calls if isinstance(calls, list) else [calls]
    learned = _learned(turn, role, place=place)
    thinking = next((name for name in _THINKING if turn.get(name)), _THINKING[0])
    called = tuple(_call(call, place) for call in calls)
    needs_words = role == "assistant" and learned and not called
    return Message(
        role,
        (_answer if needs_words else _text)(content, "content", place=place),
        calls=called,
        thinking=_text(turn.get(thinking), thinking, place=place),
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
    arguments = inner.get("arguments", inner.get("parameters"))
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    return {"name": inner["name"], "arguments": _parsed(arguments, place)}


def _tools(tools: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    listed = _parsed(tools, place)
    if not isinstance(listed, list | tuple) or not all(isinstance(t, Mapping) for t in listed):
        _refuse(place, f"'tools' must be a list of JSON schemas, not {tools!r:.60}.")
    made = tuple(t if "function" in t else {"type": "function", "function": t} for t in listed)
    inner = [tool["function"] for tool in made]
    nameless = [t for t in inner if not (isinstance(t, Mapping) and isinstance(t.get("name"), str))]
    if nameless:
        _refuse(place, f"a tool has no name: {nameless[0]!r:.60}.")
    return made


def _parsed(value: Any, place: str) -> Any:
    value = value_of(value, place) if isinstance(value, str) else value
    inside, depth = [value], 0
    while inside := [
        part
        for outer in inside
        if isinstance(outer, Mapping | list | tuple)
        for part in (outer.values() if isinstance(outer, Mapping) else outer)
    ]:
        depth += 1
        if depth > _DEEPEST:
            _refuse(place, "a tool or its call is nested too deep.", fix="Remove the row.")
    return value


def _history(pairs: Any, place: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    for pair in _parsed(pairs or [], place):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            _refuse(place, f"'history' must hold pairs of question and answer, not {pair!r:.60}.")
        turns.append(Message("user", _text(pair[0], "history", place=place)))
        turns.append(Message("assistant", _answer(pair[1], "history", place=place)))
    return tuple(turns)


def _tokens(fields: Mapping[str, Any], given: Any, place: str) -> Sample:
    """Ids as they stand, but for what the attention mask hides; learned are those of the labels or
    of a mask that says so, without either all."""
    ids = _numbers(given, "input_ids", place=place)
    count = len(ids)
    labels, mask = ids, (1,) * count
    chosen = next((name for name in _MASKS if fields.get(name) is not None), "")
    if fields.get("labels") is not None:
        labels = _numbers(fields["labels"], "labels", place=place)
    elif chosen:
        kept = _numbers(fields[chosen], chosen, place=place)
        labels = tuple(x if y else IGNORE for x, y in zip(ids, kept, strict=False))
        labels += (IGNORE,) * (len(kept) - count)
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
    if not isinstance(value, list | tuple) or not all(type(part) is int for part in value or [""]):
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
        and part.get("type") in ("text", "input_text", "output_text")
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
