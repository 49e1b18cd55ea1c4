"""Samples -> token ids and labels, and the prompt that generation feeds: one room for both.

Owns where an answer begins and ends, found by rendering a conversation up to each answer and past
it, never by looking for marker strings or for a padding id. Knows nothing of files, lengths or
batches.

The rule at every seam between prompt and answer: **the ids before the answer are exactly those that
generation will be fed**, up to an example's first answer. A later one follows the answers before it
as they were generated, ids for ids and stop token included; a history that is tokenised whole may
merge otherwise where an earlier answer begins. Where the tokenizer would merge the prompt's end
with the answer's beginning ("\\n" + "\\n\\n", or a prompt that ends with a space), the two are
tokenised apart. Where a template rewrites an answer once others follow it (Qwen3 takes its thinking
out), no single text holds both what is learned and what is asked later: each answer becomes an
example of its own.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError

from lorafit.data import sandbox
from lorafit.data.formats import Message, Sample
from lorafit.data.shapes import IGNORE
from lorafit.data.tokenizer import Tokenizer, check_ids, decode, eos_of, opened, opening, tokenise
from lorafit.errors import DataError, ModelError

PLAIN_TEMPLATE = (
    "{% if tools %}### Tools:{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n\\n' }}"
    "{{ '### ' + message.role.capitalize() + ':\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ ('\\n' if message.content or not loop.first else '') + (call.function | tojson) }}"
    "{% endfor %}"
    "{{ eos_token if message.role == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '\\n\\n### Assistant:\\n' if add_generation_prompt else '' }}"
)
"""The chat template of a tokenizer that brings none::

    ### User:
    What is 2 + 2?

    ### Assistant:
    4<end of text>

A system message stands first as `### System:`; tools before it as `### Tools:`, a JSON schema to
a line; a call is a line of JSON in the assistant's turn and its result a turn `### Tool:`. An
answer ends with the tokenizer's own end-of-text token; the empty line before the next turn belongs
to that turn, so nothing follows an answer."""

Supervise = Literal["answers", "last", "turns", "all"]
"""Which tokens are learned: the assistant's answers; the last of them alone; every turn after the
system's; all of the text."""

_GENERATION_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
_LONG_TAIL, _MANY_TAILS = 64, 10_000


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and labels of the same length: the id where it is supervised, -100 elsewhere."""

    ids: list[int]
    labels: list[int]
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Written:
    """A sample as text. `answers` are characters: where generation takes over, and behind the stop
    token; `learned_from` is where everything is supervised from, None for the answers alone. Where
    it `is_raw` the text's own beginning and end are still to be put around it."""

    source: str
    text: str
    answers: tuple[tuple[int, int], ...] = ()
    learned_from: int | None = None
    is_raw: bool = False

    @property
    def cuts(self) -> list[int]:
        """Every character at which a token must begin."""
        first = [] if self.learned_from is None else [self.learned_from]
        return first + [cut for answer in self.answers for cut in answer]


def chat_template_of(tokenizer: Tokenizer, *, tools: bool = False) -> str:
    """The template conversations are written with; store it with the adapter.

    The tokenizer's own, else PLAIN_TEMPLATE, which begins with the beginning-of-text token where
    this tokenizer begins its texts with it.

    Args:
        tools: Whether it is for conversations with tools, where there are several.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = (tools and own.get("tool_use")) or own.get("default")
    return own or ("{{ bos_token }}" if opening(tokenizer) else "") + PLAIN_TEMPLATE


def stop_ids(tokenizer: Tokenizer, *, is_chat: bool) -> tuple[int, ...]:
    """The ids at which generation must stop; the first is the one that trained answers end with.

    For a chat that is the token which the template writes after an answer, found by rendering a
    probe conversation; end-of-text follows where it is another.

    Raises:
        ModelError: no end-of-text token, or a template that ends answers with mere text.
    """
    eos = eos_of(tokenizer)
    if not is_chat:
        return (eos,)
    question, answer = Message("user", "Where?"), Message("assistant", "There")
    _try_out(tokenizer, [((question, answer), ())])
    try:
        written = _render(tokenizer, (question, answer))
    except DataError as error:
        raise ModelError(
            f"The tokenizer's chat template cannot write a question and its answer: "
            f"{error.__cause__}",
            why="It is broken, or made for another version of transformers.",
            fix="Mend chat_template in the base's tokenizer_config.json or chat_template.jinja; "
            "without one lorafit's plain template is used.",
        ) from error
    # content comes last but for the ending; what a template writes before it (<think>) is no end
    (ending,) = tokenise(tokenizer, [written.rpartition(answer.content)[2]])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    stop = next((token for token in ending if token in special | {eos}), None)
    if stop is None:
        raise ModelError(
            "The tokenizer's chat template does not end an answer with a special token.",
            why="The tuned model could not learn to stop.",
            fix="Write {{ eos_token }} after the assistant's content in its chat_template, or set "
            "tokenizer.chat_template = None to use lorafit's plain one.",
        )
    return tuple(dict.fromkeys((stop, eos)))


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    is_chat: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """What generation feeds the model: to the last id what training put before the answer, where
    no other answer stands before that one.

    Args:
        prompt: A conversation so far, or a text: for a chat, the user's message.
        is_chat: Whether the model was trained on conversations (`Shape.is_chat`).
        tools: What may be called in this conversation, as JSON schemas.
    """
    if is_chat:
        messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return tokenise(tokenizer, [_render(tokenizer, messages, tools=tools, asks=True)])[0]
    if not isinstance(prompt, str):
        raise ModelError(
            "A conversation was given to a model that was trained on plain text.",
            fix="Give the prompt as one text.",
        )
    return opened(tokenizer, tokenise(tokenizer, [prompt])[0])


def try_prompts(tokenizer: Tokenizer, prompts: Iterable[str]) -> None:
    """The template on each user's message in a child process. Raises ModelError as `Encoder`."""
    _try_out(tokenizer, [((Message("user", prompt),), ()) for prompt in prompts])


class Encoder:
    """Samples of one shape -> ids and labels, many at a time.

    A conversation is written by the chat template alone: no beginning-of-text is added to what the
    template prints, and what it prints after a stop token ("\\n") is not supervised. A prompt and
    completion are [BOS if the tokenizer adds one] + prompt + completion + EOS; a text is
    [BOS] + text + EOS, all of it supervised. Rows that were tokenised before keep their ids.

    Attributes:
        stops: `stop_ids` of the tokenizer; answers end with the first.
        unrolled: Conversations that became several examples, as the template rewrites answers.

    Raises:
        ModelError: the tokenizer has no end to its texts or answers, or its template takes more
            time or memory than rendering may.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, is_chat: bool, supervise: Supervise = "answers"
    ) -> None:
        self.tokenizer, self.supervise = tokenizer, supervise
        self.stops = stop_ids(tokenizer, is_chat=is_chat)
        self.unrolled = 0
        self._stop_text = decode(tokenizer, [self.stops[0]])
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._tails: dict[tuple[int, str], list[int]] = {}
        self._tried: set[frozenset[Any]] = set()

    def encode(
        self, samples: Iterable[Sample], *, found: Callable[[DataError], None]
    ) -> list[Encoded]:
        """The samples' examples, in order: one each, or one for each answer.

        Args:
            found: Told of each sample that cannot be written or cut; that one is left out.
        """
        samples = list(samples)
        self._try_out(samples)
        ready: list[Encoded | _Written] = []
        for sample in samples:
            try:
                ready += self._written(sample)
            except DataError as error:
                found(error)
        texts = [one for one in ready if isinstance(one, _Written)]
        encoded = iter(self._encode(texts))
        made: list[Encoded] = []
        for one in ready:
            outcome = next(encoded) if isinstance(one, _Written) else one
            if isinstance(outcome, DataError):
                found(outcome)
            else:
                made.append(outcome)
        return made

    # ---- samples -> text -----------------------------------------------------------------------

    def _try_out(self, samples: Sequence[Sample]) -> None:
        """The template on one conversation of each kind not yet met, in a child process."""
        fresh: dict[frozenset[Any], Sample] = {}
        for sample in samples:
            if sample.messages:
                kinds = {(message.role, bool(message.calls)) for message in sample.messages}
                fresh.setdefault(frozenset([*kinds, bool(sample.tools)]), sample)
        conversations = [
            (sample.messages, sample.tools)
            for kind, sample in fresh.items()
            if kind not in self._tried
        ]
        self._tried |= fresh.keys()
        if conversations:
            _try_out(self.tokenizer, conversations)

    def _written(self, sample: Sample) -> list[Encoded] | list[_Written]:
        if sample.ids:
            check_ids(self.tokenizer, sample.ids, place=sample.source)
            return [Encoded(list(sample.ids), list(sample.labels), sample.source)]
        if sample.messages:
            return self._written_chat(sample)
        text = sample.prompt + sample.completion + sample.text
        begin = len(sample.prompt)
        return [_Written(sample.source, text, ((begin, len(text)),), is_raw=True)]

    def _written_chat(self, sample: Sample) -> list[_Written]:
        messages, place = sample.messages, sample.source
        first = next(n for n, message in enumerate(messages) if message.role != "system")
        if messages[first].is_answer:
            raise DataError(
                f"{place}: this conversation begins with the assistant.",
                why="What its first answer answers is not there, and generation never begins so.",
                fix="Add the user's turn, or remove the answer.",
            )
        whole = _render(self.tokenizer, messages, tools=sample.tools, place=place)
        _check_written(sample, whole)
        learned = [n for n, message in enumerate(messages) if message.is_answer and message.learned]
        learned = learned[-1:] if self.supervise == "last" else learned
        answers = [self._answer(sample, turn, whole=whole) for turn in learned]
        if self.supervise in ("turns", "all"):
            return [
                _Written(place, whole, learned_from=self._beginning(sample, first, whole=whole))
            ]
        if all(whole.startswith(upto) for upto, _ in answers):
            return [_Written(place, whole, tuple(span for _, span in answers))]
        self.unrolled += 1
        return [_Written(place, upto, (span,)) for upto, span in answers]

    def _answer(self, sample: Sample, turn: int, *, whole: str) -> tuple[str, tuple[int, int]]:
        """The conversation up to an answer and with it, and where in it the answer stands."""
        messages, place, tools = sample.messages, sample.source, sample.tools
        head = _render(self.tokenizer, messages[:turn], tools=tools, asks=True, place=place)
        upto = whole
        if turn + 1 < len(messages):
            upto = _render(self.tokenizer, messages[: turn + 1], tools=tools, place=place)
        if not upto.startswith(head):
            _refuse(
                place, f"the chat template asks for turn {turn + 1} otherwise than it writes it."
            )
        answer, message = upto[len(head) :], messages[turn]
        own = [message.content.strip(), message.thinking.strip()]
        parts = [*own, *(call["name"] for call in message.calls)]
        if lost := next((part for part in parts if part not in answer), ""):
            _refuse(place, f"the chat template leaves out part of turn {turn + 1}: {lost!r:.60}.")
        # the answer's own text may hold the stop token too: the template's comes after those
        own += [json.dumps(call, ensure_ascii=False) for call in message.calls]
        before = 1 + sum(part.count(self._stop_text) for part in own)
        pieces = answer.split(self._stop_text)
        if len(pieces) <= before:
            _refuse(place, "the chat template does not end each answer with its stop token.")
        end = len(self._stop_text.join([*pieces[:before], ""]))
        return upto, (len(head), len(head) + end)

    def _beginning(self, sample: Sample, first: int, *, whole: str) -> int:
        """Where the turns after the system's begin; 0 to learn all, or where it cannot be told."""
        if self.supervise == "all" or not first:
            return 0
        try:
            system = _render(self.tokenizer, sample.messages[:first], tools=sample.tools)
        except DataError:  # this template writes no system message alone
            return 0
        return len(system) if whole.startswith(system) else 0

    # ---- text -> ids ---------------------------------------------------------------------------

    def _encode(self, texts: Sequence[_Written]) -> Iterable[Encoded | DataError]:
        if not texts:
            return
        made = self.tokenizer([one.text for one in texts], add_special_tokens=False, verbose=False)
        ids, views = made["input_ids"], made.encodings or [None] * len(texts)
        found = [
            [self._proven(cut, one.text, ids=ids[n], view=views[n]) for cut in one.cuts]
            for n, one in enumerate(texts)
        ]
        self._prove_by_heads(texts, ids, found=found)
        for one, whole, cuts in zip(texts, ids, found, strict=True):
            try:
                yield self._labelled(one, whole, found=cuts)
            except DataError as error:
                yield error

    def _proven(self, cut: int, text: str, *, ids: list[int], view: Any) -> int | None:
        """The token at which character `cut` begins, if the ids before it are sure to be those of
        `text[:cut]` alone; else None.

        A tokenizer splits its text at added tokens before all else. So what comes up to the last
        of them is tokenised as if it stood alone, and the few characters from there to the cut are
        tokenised behind that token and compared.
        """
        if cut in (0, len(text)):
            return 0 if cut == 0 else len(ids)
        at = view.char_to_token(cut) if view else None
        if at is None or view.token_to_chars(at)[0] != cut:
            return None
        last = next((n for n in range(at - 1, -1, -1) if ids[n] in self._added), None)
        if last is None:
            return None
        tail = text[view.token_to_chars(last)[1] : cut]
        if len(tail) > _LONG_TAIL:
            return None
        return at if self._after(ids[last], tail) == ids[last + 1 : at] else None

    def _after(self, token: int, tail: str) -> list[int]:
        """The ids of `tail` behind an added token."""
        if len(self._tails) > _MANY_TAILS:
            self._tails.clear()
        if (token, tail) not in self._tails:
            mark = decode(self.tokenizer, [token])
            self._tails[token, tail] = tokenise(self.tokenizer, [mark + tail])[0][1:]
        return self._tails[token, tail]

    def _prove_by_heads(
        self, texts: Sequence[_Written], ids: Sequence[list[int]], *, found: list[list[int | None]]
    ) -> None:
        """Fill in the cuts of which `text[:cut]`, tokenised alone, gives the whole's first ids."""
        asked = [
            (n, m, one.text[:cut])
            for n, one in enumerate(texts)
            for m, cut in enumerate(one.cuts)
            if found[n][m] is None
        ]
        heads = tokenise(self.tokenizer, [head for _, _, head in asked]) if asked else []
        for (n, m, _), head in zip(asked, heads, strict=True):
            if ids[n][: len(head)] == head:
                found[n][m] = len(head)

    def _labelled(self, one: _Written, ids: list[int], *, found: Sequence[int | None]) -> Encoded:
        cuts = [cut for cut in found if cut is not None]
        if len(cuts) < len(found):
            ids, cuts = _tokenise_apart(self.tokenizer, one.text, cuts=one.cuts, place=one.source)
        if one.is_raw:
            return self._closed(one, ids, start=cuts[0])
        spans = list(pairwise([*cuts, len(ids)]))[::2]
        if one.learned_from is None and any(ids[end - 1] != self.stops[0] for _, end in spans):
            _refuse(one.source, "the chat template does not end each answer with its stop token.")
        return Encoded(ids, _learned(ids, spans), one.source)

    def _closed(self, one: _Written, ids: list[int], *, start: int) -> Encoded:
        """Raw text with the tokenizer's own beginning and its end, learned from `start`."""
        whole, first = opened(self.tokenizer, ids), opening(self.tokenizer)
        # a beginning-of-text is never a target, not even one that the row's own text wrote
        start = max(start + len(whole) - len(ids), len(first))
        eos = self.stops[0]
        ids = whole if whole[-1:] == [eos] else [*whole, eos]
        start = 0 if self.supervise == "all" else start
        return Encoded(ids, _learned(ids, [(start, len(ids))]), one.source)


def _learned(ids: list[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _check_written(sample: Sample, whole: str) -> None:
    """Nothing, if the template has written every tool and every turn that is no answer."""
    names = [tool["function"]["name"] for tool in sample.tools]
    missing = [name for name in names if name not in whole]
    if missing:
        raise DataError(
            f"{sample.source}: the chat template does not write the tools: {missing[0]!r}.",
            why="The model would learn to call what it was never told of.",
            fix="Take a base whose template writes tools, or leave such rows out: --skip-bad-rows.",
        )
    for number, message in enumerate(sample.messages, 1):
        content = message.content.strip()
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]
        if not message.is_answer and content not in whole and as_json not in whole:
            _refuse(sample.source, f"the chat template leaves out part of turn {number}.")


def _refuse(place: str, what: str) -> NoReturn:
    raise DataError(
        f"{place}: {what}",
        why="What would be learned is not what the model will be asked to continue.",
        fix="Split the conversation into one row per answer, or give the tokenizer a chat_template "
        "that writes each turn as it stands.",
    )


def _tokenise_apart(
    tokenizer: Tokenizer, text: str, *, cuts: Sequence[int], place: str
) -> tuple[list[int], list[int]]:
    """The ids of `text`, piece by piece, each tokenised as what follows the ids so far; and where
    in them each of the `cuts` (characters) lies."""
    ids, starts = tokenise(tokenizer, [text[: cuts[0]]])[0], []
    for cut, end in pairwise([*cuts, len(text)]):
        starts.append(len(ids))
        if end > cut:
            ids = _continued(tokenizer, ids, piece=text[cut:end], text=text[:end], place=place)
    return ids, starts


def _continued(
    tokenizer: Tokenizer, ids: list[int], *, piece: str, text: str, place: str
) -> list[int]:
    """`ids` and those of `piece`, which together read as `text`.

    A tokenizer that puts a space before every text (SentencePiece's) would put one between; behind
    a newline, taken away again, it does not.
    """
    expected = decode(tokenizer, tokenise(tokenizer, [text])[0])
    for anchor in ("", "\n"):
        before, after = tokenise(tokenizer, [anchor, anchor + piece])
        joined = ids + after[len(before) :]
        if after[: len(before)] == before and decode(tokenizer, joined) == expected:
            return joined
    raise DataError(
        f"{place}: the tokenizer merges the end of the prompt with {piece[:20]!r}.",
        why="Generation is fed the prompt alone, and would be asked for something never trained.",
        fix="Remove white space from the end of the prompt and the beginning of the answer.",
    )


def _try_out(
    tokenizer: Tokenizer,
    conversations: Iterable[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]],
) -> None:
    given = [
        {
            **tokenizer.special_tokens_map,
            "messages": [message.as_dict() for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        for messages, tools in conversations
    ]
    template = _GENERATION_TAG.sub("", chat_template_of(tokenizer, tools=bool(given[0]["tools"])))
    try:
        sandbox.try_out(template, given)
    except sandbox.Breach as breach:
        raise ModelError(
            f"The chat template is refused: {breach}.",
            why="It is a programme that came with the model, and writes one short conversation.",
            fix="Take the base from its author's own page, or give its tokenizer another "
            "chat_template.",
        ) from breach


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    asks: bool = False,
    place: str = "",
) -> str:
    try:
        return tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=list(tools) or None,
            chat_template=chat_template_of(tokenizer, tools=bool(tools)),
            tokenize=False,
            add_generation_prompt=asks,
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"{place or 'chat'}: the chat template cannot write the turns {roles}: {error}",
            fix="Give turns in an order that the model knows, or another chat_template.",
        ) from error
