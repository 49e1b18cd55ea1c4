"""Each answer and its stop token are supervised; what precedes them is what generation sees."""

from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lorafit.data import sandbox
from lorafit.data.formats import Message, Sample, sample
from lorafit.data.read import read_rows
from lorafit.data.shapes import shape_of
from lorafit.data.template import (
    Encoded,
    Encoder,
    Supervise,
    chat_template_of,
    prompt_ids,
    stop_ids,
)
from lorafit.errors import DataError, ModelError

TOKENIZERS = {
    "gpt2": "tokenizers/gpt2",
    "tinyllama": "tokenizers/tinyllama-chat",
    "qwen": "tokenizers/qwen2.5",
    "stories": "models/stories260K",
}
DATA = {
    "gsm8k/train.jsonl": {},
    "alpaca-demo/alpaca_en_demo.json": {},
    "alpaca-demo/alpaca_zh_demo.json": {},
    "banking77/train.csv": {"prompt_field": "text", "answer_field": "category"},
    "chat-demo/v1_sft_demo.jsonl": {},
    "chat-demo/glaive_toolcall_en_demo.json": {},
    "wikisql/train.jsonl": {},
}
USER, ANSWER = Message("user", "What is 2+2?"), Message("assistant", "4")


@pytest.fixture(scope="session")
def tokenizers(shared: Path) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(shared / path) for name, path in TOKENIZERS.items()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def fresh(shared: Path, name: str, **changes: object) -> Any:
    return AutoTokenizer.from_pretrained(shared / TOKENIZERS[name], **changes)


def refuse(error: DataError) -> None:
    raise error


def encoder_of(
    tokenizer: Any, *, is_chat: bool = True, supervise: Supervise = "answers"
) -> Encoder:
    """Kept with the tokenizer, as trying its template takes a process."""
    kept = vars(tokenizer).setdefault("encoders", {})
    key = str(tokenizer.chat_template), tokenizer.eos_token, is_chat, supervise
    if key not in kept:
        kept[key] = Encoder(tokenizer, is_chat=is_chat, supervise=supervise)
    return kept[key]


def encode_each(tokenizer: Any, what: Sample, supervise: Supervise = "answers") -> list[Encoded]:
    encoder = encoder_of(tokenizer, is_chat=bool(what.messages), supervise=supervise)
    return encoder.encode([what], found=refuse)


def encode(tokenizer: Any, what: Sample, supervise: Supervise = "answers") -> Encoded:
    (one,) = encode_each(tokenizer, what, supervise)
    return one


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def spans(encoded: Encoded) -> list[tuple[int, int]]:
    """Where each run of supervised tokens begins and ends."""
    found, start = [], None
    for index, label in enumerate([*encoded.labels, -100]):
        if label != -100 and start is None:
            start = index
        if label == -100 and start is not None:
            found.append((start, index))
            start = None
    return found


def chat(*messages: Message) -> Sample:
    return Sample("a.jsonl:7", messages=messages)


@pytest.mark.parametrize("file", DATA)
def test_supervised_tokens_of_real_rows_are_the_answers(
    shared: Path, tokenizer: Any, file: str
) -> None:
    rows = read_rows(shared / "data" / file)
    if "glaive" in file and "### Tools" not in chat_template_of(tokenizer):
        rows = [row for row in rows if row.fields["tools"] == "[]" or "qwen" in str(tokenizer)]
    rows = rows[:: max(1, len(rows) // 200)][:200]
    assert len(rows) >= 100
    shape = shape_of(rows[0], **DATA[file])
    encoder = encoder_of(tokenizer, is_chat=shape.is_chat)
    stop, wanted = encoder.stops[0], [sample(row, shape) for row in rows]
    made = encoder.encode(wanted, found=refuse)
    for what, encoded in zip(wanted, made, strict=True):
        assert encoded.source == what.source
        assert len(encoded.labels) == len(encoded.ids)
        assert all(label in (-100, i) for i, label in zip(encoded.ids, encoded.labels, strict=True))
        answers = [m for m in what.messages if m.is_answer] or [Message("assistant", what.text)]
        supervised = [decode(tokenizer, encoded.ids[a:b]) for a, b in spans(encoded)]
        for answer, learned in zip(answers, supervised, strict=True):
            if answer.calls:
                assert learned.endswith(decode(tokenizer, [stop]))
                assert all(f'"name": "{call["name"]}"' in learned for call in answer.calls)
            else:
                assert learned == answer.content + decode(tokenizer, [stop]), what.source


def asked(tokenizer: Any, what: Sample) -> list[tuple[int, list[int]]]:
    """For each answer, where it begins and what generation would be fed to get it."""
    starts = [start for start, _ in spans(encode(tokenizer, what))]
    turns = [n for n, message in enumerate(what.messages) if message.role == "assistant"]
    return [
        (start, prompt_ids(tokenizer, what.messages[:turn], is_chat=True))
        for start, turn in zip(starts, turns, strict=True)
    ]


special = ["<|im_end|>", "</s>", "<s>", "<|endoftext|>", "### User:\n", "<|assistant|>"]
piece = st.sampled_from(
    [" ", "\n", "\n\n", "  ", "a", "Hello", " world", "é", "👨‍👩‍👧", "中文"]
) | (st.sampled_from(special) | st.text(max_size=8))
text = st.lists(piece, max_size=6).map("".join).map(lambda t: normalize("NFC", t))
conversation = st.tuples(
    st.none() | text,
    st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(conversation)
def test_generated_conversations(
    tokenizers: dict[str, Any], made: tuple[str | None, list[tuple[str, str]]]
) -> None:
    system, pairs = made
    messages = [] if system is None else [Message("system", system)]
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    for name, tokenizer in tokenizers.items():
        try:
            encoded = encode(tokenizer, chat(*messages))
        except DataError as error:
            assert "merges the end of the prompt" in error.what  # noqa: PT017
            continue
        (start, prompt), *_ = asked(tokenizer, chat(*messages))
        assert encoded.ids[:start] == prompt
        found = spans(encoded)
        assert len(found) == len(pairs)
        stop = encoder_of(tokenizer).stops[0]
        for (start, end), (_, answer) in zip(found, pairs, strict=True):
            assert encoded.ids[end - 1] == stop
            if name in ("gpt2", "qwen"):  # SentencePiece's decoder drops and adds spaces
                whole = decode(tokenizer, encoded.ids[:end])
                supervised = decode(tokenizer, encoded.ids[start:end])
                assert whole.endswith(normalize("NFC", answer) + decode(tokenizer, [stop]))
                assert supervised == normalize("NFC", answer) + decode(tokenizer, [stop])


names = st.sampled_from(["f", "get_weather", "a.b", "<|im_end|>", '"', "é中"])
json_value = st.none() | st.booleans() | st.integers(-9, 9) | text | st.lists(text, max_size=2)
tool_call = st.fixed_dictionaries(
    {"name": names, "arguments": st.dictionaries(text, json_value, max_size=2)}
)
called = st.tuples(
    text,
    text | st.just(""),
    st.lists(tool_call, min_size=1, max_size=2),
    st.lists(text, max_size=2),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(called, min_size=1, max_size=2), text.filter(str.strip))
def test_generated_calls(tokenizers: dict[str, Any], rounds: list[Any], last: str) -> None:
    """Each call and answer, with its stop token, is supervised behind what generation is fed."""
    messages, tools = [], {}
    for question, said, calls, results in rounds:
        messages += [Message("user", question), Message("assistant", said, calls=tuple(calls))]
        messages += [Message("tool", result) for result in results]
        schemas = {call["name"]: {"name": call["name"], "parameters": {}} for call in calls}
        tools |= {name: {"type": "function", "function": made} for name, made in schemas.items()}
    messages += [Message("user", "And?"), Message("assistant", last)]
    what = Sample("a:1", messages=tuple(messages), tools=tuple(tools.values()))
    for name in ("gpt2", "qwen"):
        tokenizer = tokenizers[name]
        try:
            made = encode_each(tokenizer, what)
        except DataError as error:
            assert error.what.startswith("a:1: ")  # noqa: PT017
            continue
        stop = encoder_of(tokenizer).stops[0]
        found = [(encoded, span) for encoded in made for span in spans(encoded)]
        turns = [n for n, message in enumerate(messages) if message.is_answer]
        assert len(found) == len(turns)
        for (encoded, (start, end)), turn in zip(found, turns, strict=True):
            fed = prompt_ids(tokenizer, messages[:turn], is_chat=True, tools=what.tools)
            # later ones follow answers as they are generated, which may be tokenised apart
            assert encoded.ids[:start] == fed or (start, end) != spans(encoded)[0]
            assert encoded.ids[end - 1] == stop
            learned = decode(tokenizer, encoded.ids[start:end])
            assert normalize("NFC", messages[turn].content.strip()) in learned
            assert all(
                call["name"] in learned or '"' in call["name"] for call in messages[turn].calls
            )


@settings(max_examples=100, deadline=None)
@given(text, text.filter(str.strip))
def test_generated_completions(tokenizers: dict[str, Any], prompt: str, completion: str) -> None:
    for tokenizer in tokenizers.values():
        try:
            encoded = encode(tokenizer, Sample("a:1", prompt=prompt, completion=completion))
        except DataError as error:
            assert "merges the end of the prompt" in error.what  # noqa: PT017
            continue
        before = prompt_ids(tokenizer, prompt, is_chat=False)
        assert encoded.ids[: len(before)] == before
        assert encoded.labels == [-100] * len(before) + encoded.ids[len(before) :]
        assert encoded.ids[-1] == tokenizer.eos_token_id


def test_a_beginning_of_text_written_in_a_row_is_no_target(tokenizers: dict[str, Any]) -> None:
    encoded = encode(tokenizers["tinyllama"], Sample("a:1", prompt="", completion="<s>"))
    assert (encoded.ids, encoded.labels) == ([1, 2], [-100, 2])


def test_ids_are_those_of_the_tokenizers_own_chat(tokenizers: dict[str, Any]) -> None:
    turns = [{"role": message.role, "content": message.content} for message in (USER, ANSWER)]
    for name in ("qwen", "tinyllama"):
        tokenizer = tokenizers[name]
        theirs = tokenizer.apply_chat_template(turns, return_dict=False)
        assert encode(tokenizer, chat(USER, ANSWER)).ids == theirs
        theirs = tokenizer.apply_chat_template(
            turns[:1], return_dict=False, add_generation_prompt=True
        )
        assert prompt_ids(tokenizer, USER.content, is_chat=True) == theirs


def test_what_follows_a_stop_token_is_not_supervised(tokenizers: dict[str, Any]) -> None:
    encoded = encode(tokenizers["qwen"], chat(USER, ANSWER))
    assert encoded.labels[-1] == -100
    assert encoded.labels[-2] == tokenizers["qwen"].convert_tokens_to_ids("<|im_end|>")


def test_white_space_at_the_seam_does_not_change_what_generation_sees(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["qwen"]
    what = chat(USER, Message("assistant", "\n\n4"), USER, Message("assistant", "\n4"))
    encoded = encode(tokenizer, what)
    assert [decode(tokenizer, encoded.ids[a:b]) for a, b in spans(encoded)] == [
        "\n\n4<|im_end|>",
        "\n4<|im_end|>",
    ]
    start, prompt = asked(tokenizer, what)[0]
    assert encoded.ids[:start] == prompt
    # in one piece the newlines of header and answer are one token, which generation never sees
    joined = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in what.messages],
        return_dict=False,
    )
    assert joined[:start] != prompt


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_that_ends_with_a_space_adds_none(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    encoded = encode(tokenizer, Sample("a:1", prompt="2 + 2 = ", completion="4"))
    before = prompt_ids(tokenizer, "2 + 2 = ", is_chat=False)
    assert encoded.ids[: len(before)] == before
    eos = decode(tokenizer, [tokenizer.eos_token_id])
    assert decode(tokenizer, encoded.ids).endswith(f"2 + 2 = 4{eos}")


def test_prompts_completions_and_texts_open_and_end_as_the_tokenizer_does(
    tokenizers: dict[str, Any],
) -> None:
    tokenizer = tokenizers["tinyllama"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for what in (
        Sample("a:1", prompt="Question: ", completion="yes"),
        Sample("a:1", prompt="", completion="yes"),
        Sample("a:1", text="Once upon a time"),
        Sample("a:1", text="<s>Once upon a time</s>"),
    ):
        encoded = encode(tokenizer, what)
        assert (encoded.ids[0], encoded.ids[-1]) == (bos, eos)
        assert (encoded.ids.count(bos), encoded.ids.count(eos)) == (1, 1)
        assert encoded.labels[-1] == eos
    assert encode(tokenizers["gpt2"], Sample("a:1", text="Once")).ids == [7454, 50256]


def test_beginning_of_text_stands_once(shared: Path, tokenizers: dict[str, Any]) -> None:
    stories = tokenizers["stories"]  # adds BOS, brings no template: the plain one prints it
    assert encode(stories, chat(USER, ANSWER)).ids.count(stories.bos_token_id) == 1
    printing = fresh(shared, "tinyllama")
    printing.chat_template = "{{ bos_token }}" + printing.chat_template
    assert encode(printing, chat(USER, ANSWER)).ids.count(printing.bos_token_id) == 1


def test_the_plain_template(tokenizers: dict[str, Any]) -> None:
    system = Message("system", "Be short.")
    ids = encode(tokenizers["gpt2"], chat(system, USER, ANSWER, USER, ANSWER)).ids
    assert decode(tokenizers["gpt2"], ids) == (
        "### System:\nBe short.\n\n### User:\nWhat is 2+2?\n\n### Assistant:\n4<|endoftext|>"
        "\n\n### User:\nWhat is 2+2?\n\n### Assistant:\n4<|endoftext|>"
    )
    assert chat_template_of(tokenizers["stories"]).startswith("{{ bos_token }}")
    own = tokenizers["qwen"].chat_template
    assert chat_template_of(tokenizers["qwen"]) == own


def test_named_templates_give_their_default(shared: Path) -> None:
    tokenizer = fresh(shared, "qwen")
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ 'tools' }}"}
    assert chat_template_of(tokenizer) == own


def test_everything_is_supervised_when_asked(tokenizers: dict[str, Any]) -> None:
    encoded = encode(tokenizers["qwen"], chat(USER, ANSWER), "all")
    assert encoded.labels == encoded.ids


def learned(tokenizer: Any, what: Sample, supervise: Supervise = "answers") -> list[str]:
    """What is supervised, stretch by stretch."""
    encoded = encode(tokenizer, what, supervise)
    return [decode(tokenizer, encoded.ids[start:end]) for start, end in spans(encoded)]


def test_last_answers_turns_and_weights(tokenizers: dict[str, Any]) -> None:
    system, four = Message("system", "Be short."), Message("assistant", "four")
    what = chat(system, USER, ANSWER, USER, four)
    qwen = tokenizers["qwen"]
    assert learned(qwen, what) == ["4<|im_end|>", "four<|im_end|>"]
    assert learned(qwen, what, "last") == ["four<|im_end|>"]
    (turns,) = learned(qwen, what, "turns")
    assert turns.startswith("<|im_start|>user\nWhat") and turns.endswith("four<|im_end|>\n")
    unlearned = Message("assistant", "4", learned=False)
    assert learned(qwen, chat(USER, unlearned, USER, four)) == ["four<|im_end|>"]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = Message("assistant", "", calls=({"name": "add", "arguments": {"a": 2, "b": 2}},))


def test_calls_of_tools_are_learned_and_their_results_are_not(tokenizers: dict[str, Any]) -> None:
    what = Sample("a:1", messages=(USER, CALL, Message("tool", "four"), ANSWER), tools=(TOOL,))
    called, answered = learned(tokenizers["qwen"], what)
    assert called == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    )
    assert answered == "4<|im_end|>"
    called, answered = learned(tokenizers["gpt2"], what)
    assert called == '{"name": "add", "arguments": {"a": 2, "b": 2}}<|endoftext|>'
    ids = encode(tokenizers["gpt2"], what).ids
    assert decode(tokenizers["gpt2"], ids).startswith('### Tools:\n{"type": "function", "func')
    with pytest.raises(DataError, match=r"a:1: the chat template does not write the tools: 'add'"):
        encode(tokenizers["tinyllama"], what)


def test_rows_that_were_tokenised_before_keep_their_ids(tokenizers: dict[str, Any]) -> None:
    what = Sample("a:1", ids=(5, 6, 7), labels=(-100, 6, 7))
    encoded = encode(tokenizers["gpt2"], what)
    assert (encoded.ids, encoded.labels) == ([5, 6, 7], [-100, 6, 7])


def test_what_cannot_be_written_is_told_and_the_others_are_made(
    tokenizers: dict[str, Any],
) -> None:
    told: list[DataError] = []
    encoder = Encoder(tokenizers["qwen"], is_chat=True)
    samples = [chat(ANSWER, USER, ANSWER), chat(USER, ANSWER)]
    assert len(encoder.encode(samples, found=told.append)) == 1
    assert [error.what for error in told] == [
        "a.jsonl:7: this conversation begins with the assistant."
    ]


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        ("{{ ('x' * 3000000000) | length }}", "memory"),
        ("{% for i in range(99999) %}{{ 'xx' }}{% endfor %}", "wrote far more"),
    ],
)
def test_a_template_that_never_ends_is_refused(
    shared: Path, monkeypatch: pytest.MonkeyPatch, loop: str, said: str
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    tokenizer = fresh(shared, "gpt2")
    tokenizer.chat_template = (
        loop + "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(ModelError, match=f"chat template is refused: it .*{said}"):
        Encoder(tokenizer, is_chat=True)


def test_a_template_may_write_before_an_answer(shared: Path) -> None:
    tokenizer = fresh(shared, "qwen")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ("
        "'<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    encoded = encode(tokenizer, chat(USER, ANSWER))
    ((start, end),) = spans(encoded)
    assert decode(tokenizer, encoded.ids[start:end]) == "<think>\n\n</think>\n\n4<|im_end|>"
    # the same answer is written without that once others follow: one example for each
    what = chat(USER, ANSWER, USER, ANSWER)
    made = encode_each(tokenizer, what)
    for encoded, turn in zip(made, (1, 3), strict=True):
        ((start, end),) = spans(encoded)
        assert decode(tokenizer, encoded.ids[start:end]) == "<think>\n\n</think>\n\n4<|im_end|>"
        assert encoded.ids[:start] == prompt_ids(tokenizer, what.messages[:turn], is_chat=True)


def test_stop_ids(shared: Path, tokenizers: dict[str, Any]) -> None:
    assert stop_ids(tokenizers["gpt2"], is_chat=True) == (50256,)
    tokenizer = fresh(shared, "qwen", eos_token="<|endoftext|>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_ids(tokenizer, is_chat=True) == (end, eos)
    assert stop_ids(tokenizer, is_chat=False) == (eos,)
    assert encode(tokenizer, chat(USER, ANSWER)).labels[-2] == end


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            ModelError,
            "does not end an answer with a special token",
        ),
        ("{{ m", ModelError, "it cannot be read: unexpected end"),
        ("{{ raise_exception('never') }}", ModelError, "cannot write a question .*: never"),
        (
            "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one turn') }}"
            "{% endif %}{{ m.content + eos_token }}{% endfor %}",
            DataError,
            "a.jsonl:7: the chat template cannot write the turns user, assistant, user.*one turn",
        ),
        (
            "{% for m in messages %}{{ m.content[:7] + eos_token }}{% endfor %}",
            DataError,
            "a.jsonl:7: the chat template leaves out part of turn 1",
        ),
        (
            "{% for m in messages %}{{ m.content[:7] if m.role == 'assistant' else m.content }}"
            "{{ eos_token }}{% endfor %}",
            DataError,
            "a.jsonl:7: the chat template leaves out part of turn 4",
        ),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
            "{{ '<think>' if add_generation_prompt else '' }}",
            DataError,
            "a.jsonl:7: the chat template asks for turn 2 otherwise than it writes it",
        ),
    ],
)
def test_templates_that_cannot_teach_are_refused(
    shared: Path, template: str, error: type[Exception], message: str
) -> None:
    tokenizer = fresh(shared, "gpt2")
    tokenizer.chat_template = template
    with pytest.raises(error, match=message):
        encode(tokenizer, chat(USER, ANSWER, USER, Message("assistant", "It is four.")))


def test_what_has_no_end_or_beginning_is_refused(shared: Path) -> None:
    tokenizer = fresh(shared, "gpt2")
    with pytest.raises(DataError, match=r"a.jsonl:7: this conversation begins with the assistant"):
        encode(tokenizer, chat(ANSWER, USER, ANSWER))
    with pytest.raises(ModelError, match="trained on plain text"):
        prompt_ids(tokenizer, [USER], is_chat=False)
    tokenizer.eos_token = None
    for what in (chat(USER, ANSWER), Sample("a:1", text="Once")):
        with pytest.raises(ModelError, match="no end-of-text token"):
            encode(tokenizer, what)
