"""The data report: what was read, cut and lost, what is learned, and what of it would hurt.

Owns the counts and their judgement. Looks at finished examples alone, so that it holds for every
shape; changes nothing and prints nothing. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lorafit.data.cache import Chosen, Stored
from lorafit.data.sets import Read, Sets
from lorafit.data.shapes import IGNORE
from lorafit.data.tokenizer import Tokenizer, decode

_BINS, _SHOWN, _NAMED = 24, 400, 5
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples; `counts` are examples in equal steps from 0 to the longest."""

    shortest: int
    median: int
    most: int
    longest: int
    counts: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"min {self.shortest:,}  median {self.median:,}  95% {self.most:,}  "
            f"max {self.longest:,}  {self.histogram}"
        )

    @property
    def histogram(self) -> str:
        """One character for each step, higher for more examples; any example shows."""
        top = max(self.counts)
        return "".join(_BLOCKS[-(-count * 8 // top)] for count in self.counts)


@dataclass(frozen=True)
class Side:
    """Training or evaluation examples in numbers.

    Attributes:
        without_stop: Learned stretches that do not end with a token at which generation stops.
        repeated: Examples that are an exact copy of an earlier one.
        padding: The part of a padded batch that would be padding, in random order.
    """

    examples: int
    tokens: int
    supervised: int
    lengths: Lengths
    without_stop: int
    repeated: int
    padding: float


@dataclass(frozen=True)
class Audit:
    """The whole report.

    Attributes:
        sources: What became of each source's rows, a line each.
        shared: Evaluation examples that are trained on too.
        same_prompt: Evaluation examples whose prompt is trained on, with whatever answer.
        shown: One example in pieces: its text, and whether it is learned.
        shown_source: Where it comes from.
        harms: What would hurt, each with what to do.
        remarks: What is worth knowing.
    """

    shape: str
    sources: tuple[str, ...]
    train: Side
    evaluation: Side | None
    shared: int
    same_prompt: int
    shown: tuple[tuple[str, bool], ...]
    shown_source: str
    harms: tuple[str, ...]
    remarks: tuple[str, ...]

    def summary(self) -> list[str]:
        """The report in a few lines, for the beginning of a run."""
        sides = [("train", self.train), ("evaluation", self.evaluation)]
        return [
            *self.sources,
            *(
                f"{name}: {side.examples:,} examples ({self.shape}), {side.lengths.shortest:,} to "
                f"{side.lengths.longest:,} tokens, {side.supervised / side.tokens:.0%} learned"
                for name, side in sides
                if side
            ),
            *(f"would hurt: {harm}" for harm in self.harms),
            *self.remarks,
        ]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


def audit(sets: Sets, tokenizer: Tokenizer, *, batch_size: int) -> Audit:
    """The report on the sets of a run.

    Args:
        batch_size: Examples of a padded batch, for the padding it would hold.
    """
    train = _side(sets.train, stops=sets.stops, batch_size=batch_size)
    held = sets.evaluation
    evaluation = None if held is None else _side(held, stops=sets.stops, batch_size=batch_size)
    shared = _in_both(sets, "wholes")
    same_prompt = _in_both(sets, "prompts") if sets.shape.kind != "text" else 0
    shown, source = _shown(sets.train, tokenizer)
    return Audit(
        str(sets.shape),
        tuple(_source_line(one) for one in sets.reads),
        train,
        evaluation,
        shared,
        same_prompt,
        shown,
        source,
        harms=tuple(_harms(sets, [train, *([evaluation] if evaluation else [])], shared=shared)),
        remarks=tuple(_remarks(sets, train, same_prompt=same_prompt - shared)),
    )


def _side(chosen: Chosen, *, stops: Sequence[int], batch_size: int) -> Side:
    lengths = chosen.lengths
    supervised = sum(int(stored.supervised[numbers].sum()) for stored, numbers in chosen.parts)
    wholes = np.concatenate([stored.wholes[numbers] for stored, numbers in chosen.parts])
    return Side(
        len(chosen),
        int(lengths.sum()),
        supervised,
        _lengths(lengths),
        sum(int(_without_stop(s, stops)[numbers].sum()) for s, numbers in chosen.parts),
        len(wholes) - len(np.unique(wholes)),
        _padding(lengths, batch_size),
    )


def _lengths(lengths: np.ndarray) -> Lengths:
    longest = int(lengths.max())
    counts = np.bincount(((lengths - 1) * _BINS // longest).astype(int), minlength=_BINS)
    middle, most = np.quantile(lengths, [0.5, 0.95], method="higher")
    return Lengths(
        int(lengths.min()), int(middle), int(most), longest, tuple(int(n) for n in counts)
    )


def _without_stop(stored: Stored, stops: Sequence[int]) -> np.ndarray:
    """For each example, its learned stretches that end without a stop token."""
    ids, learned, ends = stored.tokens
    starts = np.concatenate(([0], ends[:-1]))
    found = np.empty(len(stored), np.int64)
    for some, part in stored.blocks():
        following = np.append(learned[part][1:], 0)
        following[ends[some] - 1 - part.start] = 0
        silent = (learned[part] == 1) & (following == 0) & ~np.isin(ids[part], stops)
        found[some] = np.add.reduceat(silent, starts[some] - part.start, dtype=np.int64)
    return found


def _padding(lengths: np.ndarray, batch_size: int) -> float:
    shuffled = np.random.default_rng(0).permutation(lengths)
    padded = np.append(shuffled, [0] * (-len(shuffled) % batch_size)).reshape(-1, batch_size)
    filled = int((padded.max(axis=1) * (padded > 0).sum(axis=1)).sum())
    return 1 - int(lengths.sum()) / filled


def _in_both(sets: Sets, name: str) -> int:
    """Evaluation examples of which the hash of that name occurs in training."""
    if sets.evaluation is None:
        return 0
    train, held = (
        np.concatenate([vars(stored)[name][numbers] for stored, numbers in chosen.parts])
        for chosen in (sets.train, sets.evaluation)
    )
    return int(np.isin(held, train).sum())


def _shown(chosen: Chosen, tokenizer: Tokenizer) -> tuple[tuple[tuple[str, bool], ...], str]:
    """The first example that is not long, in pieces."""
    stored, numbers = chosen.parts[0]
    short = [int(number) for number in numbers[:1000] if stored.lengths[number] <= _SHOWN]
    number = short[0] if short else int(numbers[0])
    example = stored[number]
    said = pieces(example["input_ids"], example["labels"], tokenizer=tokenizer)
    return said, stored.sources()[number]


def pieces(
    ids: Sequence[int], labels: Sequence[int], *, tokenizer: Tokenizer
) -> tuple[tuple[str, bool], ...]:
    """An example as text, in stretches that are learned or not."""
    pairs = zip(ids, labels, strict=True)
    return tuple(
        (decode(tokenizer, [token for token, _ in run]), is_learned)
        for is_learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    )


def _source_line(one: Read) -> str:
    count, named = one.skipped
    skipped = f"; {count:,} skipped: {'; '.join(named[:_NAMED])}" if count else ""
    return f"{one.source.label}: {one.report}{skipped}"


def _harms(sets: Sets, sides: Sequence[Side], *, shared: int) -> list[str]:
    reports = [one.report for one in sets.reads]
    unstopped = sum(side.without_stop for side in sides)
    cut = "raise --max-length, or choose --truncation cut_prompt or drop"
    counted = {
        f"rows lost an answer to --max-length: {cut}": sum(r.lost_answer for r in reports),
        f"learned stretches do not end with a stop token, so the model may not learn to stop: {cut}"
        if any(report.cut for report in reports)
        else "learned stretches do not end with a stop token, so the model may not learn to "
        "stop: end them with the tokenizer's end-of-text token": unstopped,
        "examples begin with two beginning-of-text tokens: take it out of the rows or of the "
        "template": sum(report.double_begin for report in reports),
        "evaluation examples are trained on too, so that the evaluation loss flatters: remove "
        "them from one side": shared,
    }
    return [f"{count:,} {what}" for what, count in counted.items() if count]


def _remarks(sets: Sets, train: Side, *, same_prompt: int) -> list[str]:
    counted = {
        "training examples are exact copies of earlier ones": train.repeated,
        "evaluation prompts are trained on with another answer": same_prompt,
        "rows were skipped": sum(one.skipped[0] for one in sets.reads),
        "rows were dropped for their length": sum(one.report.dropped for one in sets.reads),
    }
    remarks = [f"{count:,} {what}" for what, count in counted.items() if count > 0]
    if unread := list(dict.fromkeys(name for one in sets.reads for name in one.unread)):
        remarks.append(f"not read, nor learned: {', '.join(unread)}")
    return [
        *remarks, f"padded batches would be {train.padding:.0%} padding", *sets.notes,
    ]  # fmt: skip
