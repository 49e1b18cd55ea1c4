"""Samples -> token ids and labels, and the prompt that generation feeds: one function for both.

Owns where an answer begins and ends, found by rendering a conversation up to each answer and past
it, never by looking for marker strings or for a padding id. Knows nothing of files, lengths or
batches. Tokenizers come in from outside; this file names only what it asks of them.

The rule at every seam between prompt and answer: **the ids before the answer are exactly those that
generation will be fed**. Where the tokenizer would merge the prompt's end with the answer's
beginning ("\\n" + "\\n\\n", or a prompt that ends with a space), the two are tokenised apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn, Protocol

from jinja2 import TemplateError

from lorafit.data.formats import Message, Sample
from lorafit.errors import DataError, ModelError
from lorafit.kernels.cross_entropy import IGNORE

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n\\n' }}"
    "{{ '### ' + message.role.capitalize() + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '\\n\\n### Assistant:\\n' if add_generation_prompt else '' }}"
)
"""The chat template of a tokenizer that brings none::

    ### User:
    What is 2 + 2?

    ### Assistant:
    4<end of text>

A system message stands first as `### System:`. An answer ends with the tokenizer's own end-of-text
token; the empty line before the next turn belongs to that turn, so nothing follows an answer."""

Supervise = Literal["answers", "all"]


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers' does."""

    @property
    def bos_token_id(self) -> int | None:
        """What it puts before a text, if anything."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """What ends a text."""
        ...

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """jinja source, or several by name, of which "default" is used."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that stand for themselves, each with whether it is `special`."""
        ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, Any]:
        """`input_ids`: a list of ids for each text."""
        ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """The text of the ids."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any:
        """The conversation as text."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and labels of the same length: the id where it is supervised, -100 elsewhere."""

    ids: list[int]
    labels: list[int]


def chat_template_of(tokenizer: Tokenizer) -> str:
    """The template conversations are written with; store it with the adapter.

    The tokenizer's own, else PLAIN_TEMPLATE, which begins with the beginning-of-text token where
    this tokenizer begins its texts with it.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or ("{{ bos_token }}" if _opening(tokenizer) else "") + PLAIN_TEMPLATE


def stop_ids(tokenizer: Tokenizer, *, is_chat: bool) -> tuple[int, ...]:
    """The ids at which generation must stop; the first is the one that trained answers end with.

    For a chat that is the token which the template writes after an answer, found by rendering a
    probe conversation; end-of-text follows where it is another.

    Raises:
        ModelError: no end-of-text token, or a template that ends answers with mere text.
    """
    eos = _eos(tokenizer)
    if not is_chat:
        return (eos,)
    question, answer = Message("user", "Where?"), Message("assistant", "There")
    written = _render(tokenizer, (question, answer))
    # content comes last but for the ending; what a template writes before it (<think>) is no end
    (ending,) = _tokenise(tokenizer, [written.rpartition(answer.content)[2]])
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
    tokenizer: Tokenizer, prompt: str | Sequence[Message], *, is_chat: bool
) -> list[int]:
    """What generation feeds the model: to the last id what training put before the answer.

    Args:
        prompt: A conversation so far, or a text: for a chat, the user's message.
        is_chat: Whether the model was trained on conversations (`Shape.is_chat`).
    """
    if is_chat:
        messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return _tokenise(tokenizer, [_render(tokenizer, messages, asks=True)])[0]
    if not isinstance(prompt, str):
        raise ModelError(
            "A conversation was given to a model that was trained on plain text.",
            fix="Give the prompt as one text.",
        )
    return _opened(tokenizer, _tokenise(tokenizer, [prompt])[0])


def encode(
    tokenizer: Tokenizer,
    sample: Sample,
    *,
    supervise: Supervise = "answers",
    stop: int | None = None,
) -> Encoded:
    """The sample's ids, and as labels those of its answers, each up to and with its stop token.

    A conversation is written by the chat template alone: no beginning-of-text is added to what the
    template prints, and what it prints after a stop token ("\\n") is not supervised. A prompt and
    completion are [BOS if the tokenizer adds one] + prompt + completion + EOS; a text is
    [BOS] + text + EOS, all of it supervised.

    Args:
        supervise: "answers", or "all" for every token.
        stop: `stop_ids(...)[0]`, where the caller has it already.

    Raises:
        DataError: the template refuses the conversation, rewrites an earlier turn when a later one
            follows, or leaves out part of an answer.
        ModelError: the tokenizer has no end to its texts or answers.
    """
    if sample.messages:
        stop = stop_ids(tokenizer, is_chat=True)[0] if stop is None else stop
        ids, spans = _encode_chat(tokenizer, sample, stop=stop)
    else:
        text = sample.prompt + sample.completion + sample.text
        ids, (start,) = _tokenise_at(
            tokenizer, text, cuts=[len(sample.prompt)], place=sample.source
        )
        opened = _opened(tokenizer, ids)
        # a beginning-of-text is never a target, not even one that the row's own text wrote
        start = max(start + len(opened) - len(ids), len(_opening(tokenizer)))
        eos = _eos(tokenizer)
        ids = opened if opened[-1:] == [eos] else [*opened, eos]
        spans = [(start, len(ids))]
    if supervise == "all":
        return Encoded(ids, list(ids))
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Encoded(ids, labels)


def _encode_chat(
    tokenizer: Tokenizer, sample: Sample, *, stop: int
) -> tuple[list[int], list[tuple[int, int]]]:
    messages, place = sample.messages, sample.source
    if messages[0].role == "assistant":
        raise DataError(
            f"{place}: this conversation begins with the assistant.",
            why="What its first answer answers is not there, and generation never begins so.",
            fix="Add the user's turn, or remove the answer.",
        )
    whole = _render(tokenizer, messages, place=place)
    cuts, answers = [], []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        head = _render(tokenizer, messages[:index], asks=True, place=place)
        upto = messages[: index + 1]
        upto = whole if upto == messages else _render(tokenizer, upto, place=place)
        answer = upto[len(head) :]
        if not (upto.startswith(head) and whole.startswith(upto)):
            _refuse(place, f"the chat template rewrites turn {index + 1} when others follow it.")
        if message.content.strip() not in answer:
            _refuse(place, f"the chat template leaves out part of turn {index + 1}.")
        cuts.append(len(head))
        answers.append(answer)
    ids, starts = _tokenise_at(tokenizer, whole, cuts=cuts, place=place)
    spans = []
    for start, answer in zip(starts, _tokenise(tokenizer, answers), strict=True):
        # the answer's own text may hold the stop token too: its last one is the template's
        end = start
        for _ in range(answer.count(stop)):
            end = ids.index(stop, end) + 1
        if end == start:
            _refuse(place, "the chat template does not end each answer with its stop token.")
        spans.append((start, end))
    return ids, spans


def _refuse(place: str, what: str) -> NoReturn:
    raise DataError(
        f"{place}: {what}",
        why="What would be learned is not what the model will be asked to continue.",
        fix="Split the conversation into one row per answer, or give the tokenizer a chat_template "
        "that writes each turn as it stands.",
    )


def _tokenise_at(
    tokenizer: Tokenizer, text: str, *, cuts: Sequence[int], place: str
) -> tuple[list[int], list[int]]:
    """The ids of `text`, and where in them each of the `cuts` (characters) lies.

    In one piece where the ids of each head `text[:cut]` begin those of the whole; else piece by
    piece, each piece tokenised as what follows the ids so far.
    """
    ids, *heads = _tokenise(tokenizer, [text, *(text[:cut] for cut in cuts)])
    if all(ids[: len(head)] == head for head in heads):
        return ids, [len(head) for head in heads]
    ids, starts = heads[0], []
    for cut, end in pairwise([*cuts, len(text)]):
        starts.append(len(ids))
        ids = _continued(tokenizer, ids, piece=text[cut:end], text=text[:end], place=place)
    return ids, starts


def _continued(
    tokenizer: Tokenizer, ids: list[int], *, piece: str, text: str, place: str
) -> list[int]:
    """`ids` and those of `piece`, which together read as `text`.

    A tokenizer that puts a space before every text (SentencePiece's) would put one between; behind
    a newline, taken away again, it does not.
    """
    expected = _decode(tokenizer, _tokenise(tokenizer, [text])[0])
    for anchor in ("", "\n"):
        before, after = _tokenise(tokenizer, [anchor, anchor + piece])
        joined = ids + after[len(before) :]
        if after[: len(before)] == before and _decode(tokenizer, joined) == expected:
            return joined
    raise DataError(
        f"{place}: the tokenizer merges the end of the prompt with {piece[:20]!r}.",
        why="Generation is fed the prompt alone, and would be asked for something never trained.",
        fix="Remove white space from the end of the prompt and the beginning of the answer.",
    )


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, asks: bool = False, place: str = ""
) -> str:
    try:
        return tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=chat_template_of(tokenizer),
            tokenize=False,
            add_generation_prompt=asks,
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"{place or 'chat'}: the chat template cannot write the turns {roles}: {error}",
            fix="Give turns in an order that the model knows, or another chat_template.",
        ) from error


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: what is longer than the model's window is examples.build's to report
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end-of-text token (eos_token).",
            why="The tuned model could not learn to stop.",
            fix="Set tokenizer.eos_token to a token of its vocabulary that never occurs in text.",
        )
    return tokenizer.eos_token_id


def _opening(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer begins its texts with it, else []."""
    ids = tokenizer(["x"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def _opened(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    opening = _opening(tokenizer)
    return ids if opening and ids[:1] == opening else opening + ids
