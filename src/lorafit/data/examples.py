"""Samples -> examples of bounded length, and what was lost on the way, counted.

Owns `Example`, the truncation policy and the split kept back for evaluation. Knows neither files
nor templates nor tensors. An example without a supervised token is an error here, because a silent
zero is the worst failure: the loss looks fine and nothing is learned.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NoReturn, TypeVar

from lorafit.data.formats import Sample
from lorafit.data.template import Supervise, Tokenizer, encode, stop_ids
from lorafit.errors import ConfigError, DataError
from lorafit.kernels.cross_entropy import IGNORE

Truncation = Literal["cut_tail", "cut_prompt", "drop", "error"]

_T = TypeVar("_T")
_MOST_EVALUATION_ROWS = 1_000
_NAMED_ROWS = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One document to learn from.

    Attributes:
        ids: Token ids.
        labels: Of the same length, unshifted as transformers wants them; -100 where unsupervised.
        source: The row's file and line.
    """

    ids: list[int]
    labels: list[int]
    source: str

    @property
    def supervised(self) -> int:
        """Tokens that carry loss; the first never does, as nothing comes before it."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the rows.

    Attributes:
        rows: Rows that came in.
        cut: Those cut to the longest length allowed.
        dropped: Those left out for being longer.
        lost_stop: Cut rows of which an answer lost its end, stop token included.
        lost_answer: Cut rows of which a whole answer, or its beginning, was lost.
        tokens: Tokens of all examples.
        supervised: Those of them that carry loss.
    """

    rows: int = 0
    cut: int = 0
    dropped: int = 0
    lost_stop: int = 0
    lost_answer: int = 0
    tokens: int = 0
    supervised: int = 0

    def __str__(self) -> str:
        counts = {
            "cut": self.cut,
            "lost their stop token": self.lost_stop,
            "lost an answer": self.lost_answer,
            "dropped for their length": self.dropped,
        }
        losses = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join([f"{self.rows:,} rows", *losses])


@dataclass(frozen=True, slots=True)
class Built:
    """The examples, in the order of their rows, and the report on them."""

    examples: list[Example]
    report: Report


def build(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    truncation: Truncation = "cut_tail",
    supervise: Supervise = "answers",
) -> Built:
    """The samples as examples of at most `max_length` tokens.

    Args:
        max_length: Tokens of the longest example; None for no limit.
        truncation: What becomes of a longer row. "cut_tail" keeps its beginning; "cut_prompt" cuts
            its head, as far as the last answer if need be, and only then its tail; "drop" leaves
            it out; "error" refuses it.
        supervise: "answers", or "all" for every token.

    Raises:
        DataError: a row without a supervised token, none left, or one too long under "error".
    """
    is_chat = any(sample.messages for sample in samples)
    stop = stop_ids(tokenizer, is_chat=is_chat)[0]
    examples: list[Example] = []
    cut, dropped, lost_stop, lost_answer = 0, 0, 0, 0
    for sample in samples:
        encoded = encode(tokenizer, sample, supervise=supervise, stop=stop)
        example = Example(encoded.ids, encoded.labels, sample.source)
        if max_length is not None and len(example.ids) > max_length:
            if truncation == "error":
                _refuse_long(example, max_length)
            if truncation == "drop":
                dropped += 1
                continue
            # a beginning-of-text token stays first wherever the rest is cut
            kept = int(example.ids[0] == tokenizer.bos_token_id)
            first, last = _window(example, max_length, kept=kept, truncation=truncation)
            answers = _answers(example)
            cut += 1
            lost = [kept <= start < first or start >= last for start, _ in answers]
            lost_answer += any(lost)
            lost_stop += any(start < last < end for start, end in answers)
            example = _cut(example, (first, last), kept=kept)
        examples.append(example)
    supervised = _supervised(examples)
    tokens = sum(len(example.ids) for example in examples)
    report = Report(
        len(samples), cut, dropped, lost_stop, lost_answer, tokens=tokens, supervised=supervised
    )
    return Built(examples, report)


def _supervised(examples: Sequence[Example]) -> int:
    counts = [example.supervised for example in examples]
    silent = [e.source for e, count in zip(examples, counts, strict=True) if not count]
    if silent or not counts:
        named = ", ".join(silent[:_NAMED_ROWS]) + (", ..." if len(silent) > _NAMED_ROWS else "")
        raise DataError(
            f"{len(silent)} of {len(counts)} rows have no supervised token: {named}"
            if counts
            else "No row is left to train on.",
            why="Nothing would be learned from them, and the loss would not show it.",
            fix="Raise --max-length, choose --truncation cut_prompt or drop, or remove the rows.",
        )
    return sum(counts)


def _refuse_long(example: Example, max_length: int) -> NoReturn:
    raise DataError(
        f"{example.source}: this row has {len(example.ids):,} tokens, the limit is {max_length:,}.",
        why="What is cut off is not learned.",
        fix="Raise --max-length, or choose --truncation cut_tail, cut_prompt or drop.",
    )


def _answers(example: Example) -> list[tuple[int, int]]:
    """Where each run of supervised tokens begins and ends."""
    answers, end = [], 0
    for is_answer, run in groupby(label != IGNORE for label in example.labels):
        start, end = end, end + len(list(run))
        if is_answer:
            answers.append((start, end))
    return answers


def _window(
    example: Example, max_length: int, *, kept: int, truncation: Truncation
) -> tuple[int, int]:
    """First and last (excluded) of the tokens to keep after the `kept` at the front."""
    if truncation == "cut_tail":
        return kept, max_length
    excess = len(example.ids) - max_length
    answer = _answers(example)[-1][0]
    # one token stays before the answer, or its first would never be a target
    first = kept + max(0, min(excess, answer - 1 - kept))
    return first, first + max_length - kept


def _cut(example: Example, window: tuple[int, int], *, kept: int) -> Example:
    first, last = window
    labels = example.labels[first:last]
    if first > kept and example.labels[first - 1] != IGNORE:
        # the rest of an answer whose beginning is gone would be learned out of nothing
        rest = next((n for n, label in enumerate(labels) if label == IGNORE), len(labels))
        labels[:rest] = [IGNORE] * rest
    ids = example.ids[:kept] + example.ids[first:last]
    return Example(ids, [IGNORE] * kept + labels, example.source)


def hold_out(rows: Sequence[_T], *, share: float, seed: int) -> tuple[list[_T], list[_T]]:
    """The rows to train on and those kept back for evaluation, each in their own order.

    The rows kept back are a random sample that depends on `seed` and the number of rows alone: at
    least 1, at most 1,000, which is precise enough.

    Args:
        share: How much to keep back, between 0 and 1.

    Raises:
        ConfigError: a share that is not between 0 and 1.
        DataError: fewer than 2 rows.
    """
    if not 0 < share < 1:
        raise ConfigError(
            f"An evaluation share of {share} is not between 0 and 1.", fix="0.1 keeps a tenth back."
        )
    if len(rows) < 2:
        raise DataError(
            f"{len(rows)} rows cannot be split into training and evaluation.",
            fix="Give at least 2 rows, or evaluation data of its own.",
        )
    count = min(max(1, round(len(rows) * share)), _MOST_EVALUATION_ROWS, len(rows) - 1)
    held = frozenset(random.Random(seed).sample(range(len(rows)), count))
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]
