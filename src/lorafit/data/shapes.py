"""Which shape the rows of a data set have: found in the first, asked of all others.

Owns the fields by which shapes are known, whatever their owner calls them, and what is said where
none fits. What the fields hold is for `formats`.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from lorafit.data.read import Row
from lorafit.errors import DataError, nearest

IGNORE = -100
"""The label of a token that is not learned; the kernels', without torch."""

Kind = Literal[
    "messages", "conversations", "instruction", "question", "completion", "text", "tokens"
]
WEIGHTS = ("weight", "loss_weight", "train")
THINKING = ("reasoning_content", "reasoning", "thinking")
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
_OF_A_TURN = (
    *("role", "from", "content", "value", "name", "id", "tool_call_id", "tool_calls"),
    *("function_call", *WEIGHTS, *THINKING),
)
SHAPES_READ = (
    "Rows may have: messages; conversations; instruction, input and output; question and answer; "
    "prompt and completion; text; or input_ids and labels. Other names: --prompt-field NAME "
    "--answer-field NAME, or for one field --shape text (messages, ...) --answer-field NAME."
)


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
        shapes = [_under(wanted, prompt_field=prompt_field, answer_field=answer_field)]
    fitting = [shape for shape in shapes if not _missing(row, shape)]
    _check_is_row(row, is_known=bool(fitting))
    if not fitting and len(shapes) == 1:
        check(row, shapes[0])
    if not fitting:
        refuse(
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


def _under(wanted: str, *, prompt_field: str, answer_field: str) -> Shape:
    """The wanted shape, a question's by default, under the user's names."""
    kind = "question" if wanted == "auto" else wanted
    usual = next(shape for shape in _SHAPES if shape.kind == kind)
    if len(usual.fields) == 1:
        return Shape(usual.kind, (answer_field or prompt_field,))
    return Shape(usual.kind, (prompt_field or usual.fields[0], answer_field or usual.fields[-1]))


def _extras(shape: Shape, *, is_named: bool) -> tuple[str, ...]:
    if shape.kind == "tokens":
        return ("labels", "attention_mask", *MASKS)
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
        refuse(
            row.source,
            f"this is no row, but an object of columns: {', '.join(row.fields)}.",
            why="A row is one example, each of its fields a value.",
            fix="Turn it round: python -c \"import pandas; pandas.read_json('FILE').to_json("
            "'rows.jsonl', orient='records', lines=True)\"",
        )
    held = [name for name, value in row.fields.items() if _first_keys(value) - {"role", "from"}]
    if not is_known and held and not any(map(_is_turns, values)):
        refuse(
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
    return SHAPES_READ


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
    refuse(
        row.source,
        f"this row has no {' and no '.join(map(repr, missing))}; it has: "
        f"{', '.join(here) or 'nothing'}.{nearest(missing[0], here)}",
        why=f"The rows are read as {shape}"
        + (f", the shape of {shape.source}." if shape.source not in ("", row.source) else "."),
        fix="All rows of a data set have one shape. " + SHAPES_READ,
    )


def check_raw(row: Row, shape: Shape) -> None:
    """Nothing, if prompt and completion are both text, or turns, as in the first row.

    Raises:
        DataError: they are not.
    """
    if _is_raw(row, shape) == shape.has_turns:
        kinds = ("turns", "text") if shape.has_turns else ("text", "turns")
        refuse(
            row.source,
            f"this row's prompt and completion are {kinds[1]}, those of {shape.source} {kinds[0]}.",
            why="Turns are written by the chat template, and text as it stands.",
            fix="All rows of a data set have one shape.",
        )


def _present(row: Row) -> list[str]:
    return [name for name, value in row.fields.items() if value is not None]


def _missing(row: Row, shape: Shape) -> list[str]:
    return [name for name in shape.fields if row.fields.get(name) is None]


def refuse(place: str, what: str, *, why: str = "", fix: str = SHAPES_READ) -> NoReturn:
    """Raise the error about a row, or a turn of it, that stands at `place`."""
    raise DataError(f"{place}: {what}", why=why, fix=fix)
