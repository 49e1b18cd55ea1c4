"""Examples of bounded length; nothing that is lost on the way goes uncounted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorafit.data import examples
from lorafit.data.examples import Example, Policy, Report, Truncation, held_out
from lorafit.data.formats import Message, Sample
from lorafit.data.parse import Faults
from lorafit.data.template import Encoder, Supervise
from lorafit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers/tinyllama-chat")


@dataclass
class Built:
    """The examples, what became of the rows, and what was skipped."""

    examples: list[Example]
    report: Report
    faults: Faults


def build(
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: Truncation = "cut_tail",
    supervise: Supervise = "answers",
    skip: bool = False,
) -> Built:
    is_chat = any(sample.messages for sample in samples)
    kept = vars(tokenizer).setdefault("encoders", {})  # trying the template takes a process
    if (is_chat, supervise) not in kept:
        kept[is_chat, supervise] = Encoder(tokenizer, is_chat=is_chat, supervise=supervise)
    encoder = kept[is_chat, supervise]
    built = Built([], Report(), Faults(skip=skip))
    policy = Policy(max_length, truncation)
    built.examples += examples.build(
        samples,
        encoder,
        sample_of=lambda sample: sample,
        policy=policy,
        faults=built.faults,
        report=built.report,
    )
    return built


def completion(prompt: int, answer: int, line: int = 1) -> Sample:
    """BOS, `prompt` tokens, `answer` tokens and EOS."""
    return Sample(f"a.jsonl:{line}", prompt=" a" * prompt, completion=" b" * answer)


def chat(*pairs: tuple[str, str]) -> Sample:
    turns = [m for q, a in pairs for m in (Message("user", q), Message("assistant", a))]
    return Sample("a.jsonl:1", messages=tuple(turns))


def words(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


def test_what_fits_is_whole(tokenizer: Any) -> None:
    built = build([completion(3, 2, 4), completion(1, 1, 9)], tokenizer, max_length=7)
    assert [example.source for example in built.examples] == ["a.jsonl:4", "a.jsonl:9"]
    assert [len(example.ids) for example in built.examples] == [7, 4]
    assert [example.supervised for example in built.examples] == [3, 2]
    report = built.report
    assert (report.rows, report.cut, report.tokens, report.supervised) == (2, 0, 11, 5)
    assert str(report) == "2 rows"


@pytest.mark.parametrize(
    ("truncation", "max_length", "ids", "supervised", "lost"),
    [
        ("cut_tail", 8, "<s> a a a a b b b", 3, (1, 0)),
        ("cut_tail", 6, "<s> a a a a b", 1, (1, 0)),
        ("cut_prompt", 8, "<s> a a a b b b</s>", 4, (0, 0)),
        ("cut_prompt", 6, "<s> a b b b</s>", 4, (0, 0)),
        ("cut_prompt", 4, "<s> a b b", 2, (1, 0)),
    ],
)
def test_long_rows_are_cut_as_asked(
    tokenizer: Any,
    truncation: Truncation,
    max_length: int,
    ids: str,
    supervised: int,
    lost: tuple[int, int],
) -> None:
    built = build([completion(4, 3)], tokenizer, max_length=max_length, truncation=truncation)
    (example,) = built.examples
    assert len(example.ids) == len(example.labels) == max_length
    assert tokenizer.decode(example.ids) == ids
    assert example.supervised == supervised
    assert (built.report.lost_stop, built.report.lost_answer) == lost


def test_cutting_a_conversations_head_leaves_no_answer_without_its_beginning(
    tokenizer: Any,
) -> None:
    what = chat(("one", "first answer here"), ("two", "second"))
    whole = len(build([what], tokenizer).examples[0].ids)
    for length in range(whole - 1, 8, -1):
        (example,) = (
            built := build([what], tokenizer, max_length=length, truncation="cut_prompt")
        ).examples
        answers = words(tokenizer, example.labels)
        assert answers in ("first answer here</s>second</s>", "second</s>")
        assert built.report.lost_answer == (answers == "second</s>")
    assert built.report.lost_answer == 1


def test_a_text_cut_short_lost_its_end_and_nothing_else(tokenizer: Any) -> None:
    text = Sample("a.jsonl:1", text=" b" * 9)
    for supervise in ("answers", "all"):
        for truncation in ("cut_tail", "cut_prompt"):
            built = build(
                [text], tokenizer, max_length=5, truncation=truncation, supervise=supervise
            )
            assert tokenizer.decode(built.examples[0].ids) == "<s> b b b b"
            assert str(built.report) == "1 rows, 1 cut, 1 lost their stop token"
            assert built.report.supervised == 4


def test_cutting_the_tail_counts_the_answers_that_are_gone(tokenizer: Any) -> None:
    what = chat(("one", "first"), ("two", "second"))
    whole = build([what], tokenizer).examples[0]
    built = build([what], tokenizer, max_length=len(whole.ids) - 4)
    assert words(tokenizer, built.examples[0].labels) == "first</s>"
    assert str(built.report) == "1 rows, 1 cut, 1 lost an answer"


def test_long_rows_are_dropped_or_refused_as_asked(tokenizer: Any) -> None:
    samples = [completion(2, 2), completion(9, 2, 2)]
    built = build(samples, tokenizer, max_length=8, truncation="drop")
    assert [example.source for example in built.examples] == ["a.jsonl:1"]
    assert str(built.report) == "2 rows, 1 dropped for their length"
    with pytest.raises(DataError, match=r"a.jsonl:2: this row has 13 tokens, the limit is 8"):
        build(samples, tokenizer, max_length=8, truncation="error")


def test_rows_without_a_supervised_token_are_an_error(tokenizer: Any) -> None:
    samples = [completion(2, 2), *(completion(9, 2, line) for line in range(2, 9))]
    with pytest.raises(DataError, match=r"7 of 8 rows .*: a.jsonl:2, .*, a.jsonl:6, \.\.\."):
        build(samples, tokenizer, max_length=6)
    # one supervised token that stands first is none: nothing comes before it to predict it from
    with pytest.raises(DataError, match="1 of 1 rows have no supervised token"):
        build([Sample("a:1", text="b")], tokenizer, max_length=1)
    with pytest.raises(DataError, match="No row is left"):
        build([completion(9, 2)], tokenizer, max_length=8, truncation="drop")
    with pytest.raises(DataError, match="No row is left"):
        build([], tokenizer)


def test_rows_that_cannot_be_used_are_skipped_and_counted_when_asked(tokenizer: Any) -> None:
    samples = [completion(2, 2), completion(9, 2, 2), chat(("one", "two"))]
    built = build(samples[:2], tokenizer, max_length=6, skip=True)
    assert len(built.examples) == 1 and built.faults.count == 1
    assert built.faults.named == ["a.jsonl:2: no token of this row is supervised."]
    built = build(samples[:2], tokenizer, max_length=8, truncation="error", skip=True)
    assert len(built.examples) == 1 and "13 tokens, the limit is 8" in built.faults.named[0]


@pytest.mark.parametrize(
    ("count", "share", "held"), [(100, 0.1, 10), (2, 0.01, 1), (3, 0.99, 2), (50_000, 0.1, 1_000)]
)
def test_evaluation_rows_are_held_back(count: int, share: float, held: int) -> None:
    rows = held_out(count, share=share, seed=3)
    assert len(rows) == len(set(rows)) == held and rows == sorted(rows)
    assert rows[0] >= 0 and rows[-1] < count
    assert rows == held_out(count, share=share, seed=3)


def test_the_seed_chooses_the_evaluation_rows() -> None:
    assert held_out(100, share=0.1, seed=1) != held_out(100, share=0.1, seed=2)


def test_splits_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="1 row cannot be split"):
        held_out(1, share=0.5, seed=0)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="not between 0 and 1"):
            held_out(2, share=share, seed=0)
