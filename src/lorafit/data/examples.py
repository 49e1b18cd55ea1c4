"""Samples -> examples of bounded length, and what was lost on the way, counted.

Owns `Example`, the truncation policy and the split kept back for evaluation. Knows neither files
nor templates nor tensors. An example without a supervised token is an error here, because a silent
zero is the worst failure: the loss looks fine and nothing is learned.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal

from lorafit.data.formats import Sample
from lorafit.data.parse import Faults
from lorafit.data.shapes import IGNORE
from lorafit.data.template import Encoded, Encoder
from lorafit.errors import ConfigError, DataError

Truncation = Literal["cut_tail", "cut_prompt", "drop", "error"]

SampleOf = Callable[[Any], Sample]
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What a function makes of each item, in order: `map`, or the same by several processes."""

_CHUNK = 250
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
        later = self.labels[1:]
        return len(later) - later.count(IGNORE)


@dataclass
class Report:
    """What became of the rows, counted while they are read.

    Attributes:
        rows: Rows that came in, those that were skipped not counted.
        cut: Those cut to the longest length allowed.
        dropped: Those left out for being longer.
        lost_stop: Cut rows of which an answer lost its end, stop token included.
        lost_answer: Cut rows of which a whole answer, or its beginning, was lost.
        unrolled: Conversations that became an example for each answer.
        double_begin: Examples that begin with two beginning-of-text tokens.
        examples, tokens, supervised: What came out; the last are those that carry loss.
    """

    rows: int = 0
    cut: int = 0
    dropped: int = 0
    lost_stop: int = 0
    lost_answer: int = 0
    unrolled: int = 0
    double_begin: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0

    def add(self, other: "Report") -> None:
        """Count what the other counted."""
        for name, count in vars(other).items():
            vars(self)[name] += count

    def __str__(self) -> str:
        counts = {
            "cut": self.cut,
            "lost their stop token": self.lost_stop,
            "lost an answer": self.lost_answer,
            "dropped for their length": self.dropped,
            "became one example for each answer, as the chat template rewrites them": self.unrolled,
        }
        losses = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join([f"{self.rows:,} rows", *losses])


@dataclass(frozen=True, slots=True)
class Policy:
    """How long an example may be, and what becomes of a longer row.

    Attributes:
        max_length: Tokens of the longest example; None for no limit.
        truncation: "cut_tail" keeps a longer row's beginning; "cut_prompt" cuts its head, as far as
            the last answer if need be, and only then its tail; "drop" leaves it out; "error"
            refuses it.
    """

    max_length: int | None = None
    truncation: Truncation = "cut_tail"


def build(
    rows: Iterable[Any],
    encoder: Encoder,
    *,
    sample_of: SampleOf,
    policy: Policy,
    faults: Faults,
    report: Report,
    spread: Spread = map,
) -> Iterator[Example]:
    """The rows as examples, some hundred at a time; `report` is complete once they are read.

    Args:
        sample_of: What a row asks to be learned.
        spread: How the work is shared out; rows and examples are pickled if it is.

    Raises:
        DataError: a row cannot be written, is too long under "error", or has no supervised token;
            unless `faults` skips such rows. None is left, in any case.
    """
    work = partial(_part, encoder=encoder, sample_of=sample_of, policy=policy)
    bos, silent = encoder.tokenizer.bos_token_id, list[str]()
    for counted, met, fields in spread(work, _chunks(rows, faults)):
        report.add(counted)
        faults.add(met)
        for example in (Example(*each) for each in fields):
            supervised = example.supervised
            if not supervised and not faults.skip:
                silent.append(example.source)
                continue
            if not supervised:
                faults.found(DataError(f"{example.source}: no token of this row is supervised."))
                continue
            report.double_begin += bos is not None and example.ids[:2] == [bos, bos]
            report.examples += 1
            report.tokens += len(example.ids)
            report.supervised += supervised
            yield example
    _check_heard(report, silent)


def _chunks(rows: Iterable[Any], faults: Faults) -> Iterator[tuple[list[Any], Faults]]:
    """Some rows at a time, and the faults that were met in reading them: these count in their turn,
    for rows are read while those in front of them are still under way."""
    waiting, is_more = iter(rows), True
    while is_more:
        count, named = faults.count, len(faults.named)
        chunk = list(islice(waiting, _CHUNK))
        met = Faults(faults.skip, faults.count - count, faults.named[named:])
        faults.count, faults.named = count, faults.named[:named]
        is_more = len(chunk) == _CHUNK
        yield chunk, met


def _part(
    chunk: tuple[list[Any], Faults], *, encoder: Encoder, sample_of: SampleOf, policy: Policy
) -> tuple[Report, Faults, list[tuple[list[int], list[int], str]]]:
    """What became of these rows; the examples as plain fields, which travel nine times as fast."""
    (rows, faults), samples, bos = chunk, list[Sample](), encoder.tokenizer.bos_token_id
    for row in rows:
        try:
            samples.append(sample_of(row))
        except DataError as error:
            faults.found(error)
    report, unrolled = Report(len(samples)), encoder.unrolled
    made = [
        _fitted(encoded, policy=policy, bos=bos, faults=faults, report=report)
        for encoded in encoder.encode(samples, found=faults.found)
    ]
    report.unrolled = encoder.unrolled - unrolled
    return report, faults, [(each.ids, each.labels, each.source) for each in made if each]


def _check_heard(report: Report, silent: Sequence[str]) -> None:
    if report.examples and not silent:
        return
    named = ", ".join(silent[:_NAMED_ROWS]) + (", ..." if len(silent) > _NAMED_ROWS else "")
    raise DataError(
        f"{len(silent)} of {report.rows} rows have no supervised token: {named}"
        if silent
        else "No row is left to train on.",
        why="Nothing would be learned from them, and the loss would not show it.",
        fix="Raise --max-length, choose --truncation cut_prompt or drop, or leave them out: "
        "--skip-bad-rows.",
    )


def _fitted(
    encoded: Encoded, *, policy: Policy, bos: int | None, faults: Faults, report: Report
) -> Example | None:
    """The example within the longest length allowed; None where it is left out."""
    example = Example(encoded.ids, encoded.labels, encoded.source)
    limit = policy.max_length
    if limit is None or len(example.ids) <= limit:
        return example
    if policy.truncation == "error":
        faults.found(_too_long(example, limit))
        return None
    if policy.truncation == "drop":
        report.dropped += 1
        return None
    # a beginning-of-text token stays first wherever the rest is cut
    kept = int(example.ids[0] == bos)
    first, last = _window(example, limit, kept=kept, truncation=policy.truncation)
    answers = _answers(example)
    report.cut += 1
    report.lost_answer += any(kept <= start < first or start >= last for start, _ in answers)
    report.lost_stop += any(start < last < end for start, end in answers)
    return _cut(example, (first, last), kept=kept)


def _too_long(example: Example, max_length: int) -> DataError:
    return DataError(
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


def held_out(count: int, *, share: float, seed: int) -> list[int]:
    """The numbers, in order, of those of `count` rows that are kept back for evaluation.

    A random sample that depends on `seed` and `count` alone: at least 1 row, at most 1,000, which
    is precise enough.

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
    if count < 2:
        raise DataError(
            f"{count} {'row' if count == 1 else 'rows'} cannot be split into training and "
            "evaluation.",
            fix="Give at least 2 rows, evaluation data of its own, or hold nothing back: "
            "--eval-share 0 --eval-strategy no",
        )
    kept = min(max(1, round(count * share)), _MOST_EVALUATION_ROWS, count - 1)
    return sorted(random.Random(seed).sample(range(count), kept))
