"""The order of examples, and the batches of each optimiser step. Knows no model and no loss.

Order is a pure function of (seed, epoch), the one that transformers' Trainer with accelerate
draws; position is two integers, epoch and rows of it, so that resuming skips by arithmetic.
Streams and loaders of the user's own have no order that is known: they are skipped by reading.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from lorafit.errors import ConfigError

Collate = Callable[[list[Any]], Any]
"""A list of rows -> a batch."""


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The collated batches of one step; how many rows they hold, and which (empty where unknown).

    `rows` is exact where `examples` are known, else the nominal size of the batches.
    """

    batches: list[Any]
    rows: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Workers:
    """How batches are fetched: torch's DataLoader arguments of the same names."""

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    worker_init_fn: Callable[[int], None] | None = None


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int) -> object: ...


def order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count): exactly `randperm` under a generator seeded seed + epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).tolist()


def order_by_length(lengths: Sequence[int], *, group: int, seed: int, epoch: int) -> list[int]:
    """Random order in which examples of similar length meet (transformers' `group_by_length`).

    Shuffled, cut into stretches of 50 groups (fewer for small sets), each sorted from long to
    short; the longest example comes first so that too little memory shows at once. Departs from
    transformers in that the shuffle is `order`'s.

    Args:
        lengths: Tokens of each example.
        group: Examples of one optimiser step.
    """
    shuffled = order(len(lengths), seed=seed, epoch=epoch)
    stretch = group * max(1, min(len(lengths) // (group * 4), 50))
    stretches = [
        sorted(shuffled[start : start + stretch], key=lambda index: -lengths[index])
        for start in range(0, len(shuffled), stretch)
    ]
    longest = max(range(len(stretches)), key=lambda number: lengths[stretches[number][0]])
    stretches[0][0], stretches[longest][0] = stretches[longest][0], stretches[0][0]
    return [index for part in stretches for index in part]


class Order:
    """The rows of a map-style set in the order of an epoch: a sampler for torch's DataLoader.

    Each iteration is an epoch, and the next one the next, unless `set_epoch` says otherwise.

    Args:
        rows: How many the set has.
        ordering: epoch -> their order.

    Attributes:
        skip: Rows at the beginning of the epoch that are left out, once.
    """

    def __init__(self, rows: int, ordering: Callable[[int], Sequence[int]]) -> None:
        self.rows, self.ordering = rows, ordering
        self.epoch = self.skip = 0
        self._known: tuple[int, Sequence[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin at `epoch`."""
        self.epoch, self.skip = epoch, 0

    def of_epoch(self) -> Iterator[int]:
        """The rows that the next iteration gives."""
        if self._known is None or self._known[0] != self.epoch:
            self._known = self.epoch, self.ordering(self.epoch)
        return islice(self._known[1], self.skip, None)

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        rows = self.of_epoch()
        self.set_epoch(self.epoch + 1)
        return rows


class EpochLoader(DataLoader[Any]):
    """torch's DataLoader that knows epochs. Each iteration draws one number from the process's
    random state, for its workers: as in transformers, so that dropout meets the same numbers."""

    def set_epoch(self, epoch: int) -> None:
        """Begin at `epoch`: the sampler, and a stream that has epochs."""
        for part in (self.sampler, self.dataset):
            if isinstance(part, _KnowsEpochs):
                part.set_epoch(epoch)


def make_loader(
    dataset: Any,
    collate: Collate,
    *,
    size: int,
    sampler: Any = None,
    drop_last: bool = False,
    workers: Workers | None = None,
    seed: int = 0,
) -> EpochLoader:
    """A loader of batches of `size` rows.

    Args:
        sampler: Row numbers in order; not looked at for a stream.
        seed: Of the order where `sampler` is torch's own RandomSampler.
    """
    workers = workers or Workers()
    return EpochLoader(
        dataset,
        batch_size=size,
        sampler=None if is_stream(dataset) else seeded(sampler, seed=seed),
        collate_fn=collate,
        drop_last=drop_last,
        **vars(workers),
    )


def seeded(sampler: Any, *, seed: int) -> Any:
    """`sampler`, or our order in place of torch's RandomSampler without a generator of its own,
    which would draw from the process's random state. accelerate replaces it in the same way."""
    if type(sampler) is not RandomSampler or sampler.generator or sampler.replacement:
        return sampler
    count = sampler.num_samples
    return Order(count, lambda epoch: order(count, seed=seed, epoch=epoch))


def prepared(given: Any, *, seed: int) -> Any:
    """`given`; a plain DataLoader that shuffles is made again, with our order (see `seeded`)."""
    if type(given) is not DataLoader or given.batch_size is None:
        return given
    sampler = seeded(given.sampler, seed=seed)
    if sampler is given.sampler:
        return given
    return make_loader(
        given.dataset,
        given.collate_fn,
        size=given.batch_size,
        sampler=sampler,
        drop_last=given.drop_last,
        workers=Workers(**{name: vars(given)[name] for name in vars(Workers())}),
        seed=seed,
    )


def is_stream(dataset: Any) -> bool:
    """Whether a set is read from its beginning, without row numbers."""
    return isinstance(dataset, IterableDataset) or length_of(dataset) is None


def length_of(given: Any) -> int | None:
    """`len(given)`; None where it has none."""
    try:
        return len(given)
    except TypeError:
        return None


def rows_of(batches: Any) -> int | None:
    """The rows of a DataLoader's set; None where it has no length, or `batches` is none."""
    return length_of(batches.dataset) if isinstance(batches, DataLoader) else None


class Loader:
    """The steps of a training set, epoch by epoch.

    Args:
        batches: A DataLoader, or anything that gives an epoch's batches each time it is iterated.
        size: Rows of a batch, where `batches` does not say.
        per_step: Batches of a step; an epoch's last may have fewer.
    """

    def __init__(self, batches: Iterable[Any], *, size: int, per_step: int) -> None:
        self.batches, self.per_step = batches, per_step
        self.size, self.order = size, None
        if isinstance(batches, DataLoader):
            self.size = batches.batch_size or size
            sampler: Any = batches.sampler
            self.order = sampler if isinstance(sampler, Order) else None

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of one epoch; None for a stream."""
        return length_of(self.batches)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of one epoch; None for a stream."""
        batches = self.batches_per_epoch
        return None if batches is None else -(-batches // self.per_step)

    def epoch(
        self, epoch: int, *, skip: int = 0, moved: Callable[[int, int], None] = lambda _, __: None
    ) -> Iterator[StepBatches]:
        """The steps of `epoch` after its first `skip` rows, which are read and left out where the
        order is not known; then a batch that begins before row `skip` counts as read.

        Args:
            moved: Told how many batches were read and left out, and of how many.
        """
        if isinstance(self.batches, _KnowsEpochs):
            self.batches.set_epoch(epoch)
        if self.order is not None:
            self.order.skip = skip
            rows = self.order.of_epoch()
            return self._steps(iter(self.batches), rows)
        batches, left_out = iter(self.batches), -(-skip // self.size)
        for done, _ in enumerate(islice(batches, left_out), 1):
            moved(done, left_out)
        return self._steps(batches, iter(()))

    def _steps(self, batches: Iterator[Any], order: Iterator[int]) -> Iterator[StepBatches]:
        while step := list(islice(batches, self.per_step)):
            examples = tuple(islice(order, self.size * len(step)))
            yield StepBatches(step, len(examples) or self.size * len(step), examples)


def lengths_of(dataset: Dataset[Any], column: str) -> list[int]:
    """Tokens of each row: its `column` where it has one, else the length of its input ids.

    Raises:
        ConfigError: a row has neither.
    """
    lengths: list[int] = []
    for index in range(len(dataset)):  # type: ignore[arg-type]
        row: Any = dataset[index]
        if column not in row and "input_ids" not in row:
            raise ConfigError(
                f"train_sampling_strategy='group_by_length': row {index} has neither "
                f"{column!r} nor 'input_ids'.",
                why="Rows are grouped by their number of tokens.",
                fix=f"Add a {column!r} column, or write train_sampling_strategy='random'.",
            )
        lengths.append(int(row[column]) if column in row else len(row["input_ids"]))
    return lengths


def keeping(names: Sequence[str], collate: Collate) -> Collate:
    """`collate` after dropping from each row what the model's forward does not take.

    Rows that are not dicts, and rows of which nothing would be left, go through untouched.
    """
    kept = frozenset(names)

    def collated(rows: list[Any]) -> Any:
        if all(isinstance(row, dict) and kept & row.keys() for row in rows):
            rows = [{name: row[name] for name in row if name in kept} for row in rows]
        return collate(rows)

    return collated
