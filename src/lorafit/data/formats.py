"""A row of a known shape -> a sample: a conversation, a prompt and its completion, plain text, or
token ids.

Owns what the fields of a row may hold. Knows neither files nor tokenizers: `shapes` says which
fields there are, `template` makes token ids of samples. What it does not understand in full it
refuses by name rather than leaving it out.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafit.data.parse import value_of
from lorafit.data.read import Row
from lorafit.data.shapes import IGNORE, MASKS, THINKING, WEIGHTS, Shape, check, check_raw, refuse

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
_UNREADABLE = ("image", "images", "video", "videos", "audio", "audios")
_DEEPEST = 100


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
        return _tokens(fields, first, place=place)
    if shape.kind in ("messages", "conversations"):
        return _chat(row, _turns(first, place))
    if shape.kind == "completion":
        check_raw(row, shape)
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
        refuse(
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
        refuse(
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
        refuse(
            place,
            f"{name!r} holds {fields[name]!r:.60}, and only text is learned.",
            why="The model would learn to answer about what it was never shown.",
            fix="Remove the field where the answers do not depend on it, or the row.",
        )


def _turns(turns: Any, place: str) -> tuple[Message, ...]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # csv has no other way
        turns = value_of(turns, place)
    if not isinstance(turns, list | tuple):
        refuse(place, f"a conversation must be a list of turns, not {turns!r:.40}.")
    return tuple(_message(turn, f"{place}: turn {n}") for n, turn in enumerate(turns, 1))


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        refuse(place, f"a turn must be an object with a role and its text, not {turn!r:.40}.")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        refuse(
            place,
            f"the role {name!r} is not read.",
            why="A turn left out would change what its answers answer.",
            fix=f"Roles are: {', '.join(_ROLES)}.",
        )
    _check_readable(turn, place)
    content = turn.get("content", turn.get("value"))
    if content is None and role in ("system", "user"):
        refuse(
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
    thinking = next((name for name in THINKING if turn.get(name)), THINKING[0])
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
    name = next((name for name in WEIGHTS if turn.get(name) is not None), None)
    if name is None:
        return True
    if turn[name] not in (0, 1) or (turn[name] and role != "assistant"):
        refuse(
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
        refuse(
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
        refuse(place, f"'tools' must be a list of JSON schemas, not {tools!r:.60}.")
    made = tuple(t if "function" in t else {"type": "function", "function": t} for t in listed)
    inner = [tool["function"] for tool in made]
    nameless = [t for t in inner if not (isinstance(t, Mapping) and isinstance(t.get("name"), str))]
    if nameless:
        refuse(place, f"a tool has no name: {nameless[0]!r:.60}.")
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
            refuse(place, "a tool or its call is nested too deep.", fix="Remove the row.")
    return value


def _history(pairs: Any, place: str) -> tuple[Message, ...]:
    turns: list[Message] = []
    for pair in _parsed(pairs or [], place):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            refuse(place, f"'history' must hold pairs of question and answer, not {pair!r:.60}.")
        turns.append(Message("user", _text(pair[0], "history", place=place)))
        turns.append(Message("assistant", _answer(pair[1], "history", place=place)))
    return tuple(turns)


def _tokens(fields: Mapping[str, Any], given: Any, *, place: str) -> Sample:
    """Ids as they stand, but for what the attention mask hides; learned are those of the labels or
    of a mask that says so, without either all."""
    ids = _numbers(given, "input_ids", place=place)
    count = len(ids)
    labels, mask = ids, (1,) * count
    chosen = next((name for name in MASKS if fields.get(name) is not None), "")
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
        refuse(
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
        refuse(place, f"{name!r} holds {value!r:.60} where a list of whole numbers is expected.")
    return tuple(value)


def _text(value: Any, name: str, *, place: str) -> str:
    """`value` if it is text, its parts joined if it is a list of text parts, "" if it is null."""
    if isinstance(value, list | tuple) and all(_is_text_part(part) for part in value):
        return "".join(part.get("text", part.get("value")) for part in value)
    if value is not None and not isinstance(value, str):
        refuse(
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
        refuse(
            place,
            f"{name!r} is empty, and it is what should be learned.",
            why="A model trained on empty answers learns to say nothing.",
            fix="Fill it in, or remove the row.",
        )
    return text
