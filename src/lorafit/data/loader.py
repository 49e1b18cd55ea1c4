"""The order of examples, and the batches of each optimiser step. Knows no model and no loss.

Order is a pure function of (seed, epoch), the one that transformers' Trainer with accelerate
draws; position is two integers, epoch and step within it, so that resuming skips by arithmetic.
Streams have no positions: they are skipped by reading. No global random state is touched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lorafit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The collated batches of one step, and which examples they hold (empty for a stream)."""

    batches: list[Any]
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Batches:
    """How rows become steps: `size` rows a batch, `per_step` batches a step (an epoch's last may
    have fewer); `drop_last` leaves out an epoch's last batch where it is short."""

    size: int
    per_step: int = 1
    drop_last: bool = False


@dataclass(frozen=True)
class Workers:
    """How batches are fetched: torch's DataLoader arguments of the same names."""

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int | None = None
    persistent: bool = False


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


class Loader:
    """The steps of a training set, epoch by epoch.

    Args:
        dataset: Map-style (`__len__`, `__getitem__`), or iterable (a stream).
        collate: A list of rows -> a batch.
        ordering: epoch -> the order of a map-style set.
        seed: Where worker processes' random states come from, with the epoch.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        *,
        batches: Batches,
        ordering: Callable[[int], Iterable[int]],
        workers: Workers | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset, self.collate = dataset, collate
        self.batch_size, self.drop_last = batches.size, batches.drop_last
        self.batches_per_step = batches.per_step
        self.ordering, self.seed = ordering, seed
        self.workers = workers or Workers()
        self.is_stream = isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized)
        self._generator = torch.Generator()
        self._wanted: list[list[int]] = []
        self._torch: DataLoader[Any] | None = None

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of one epoch; None for a stream."""
        if self.is_stream:
            return None
        rows = len(self.dataset)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of one epoch; None for a stream."""
        batches = self.batches_per_epoch
        return None if batches is None else -(-batches // self.batches_per_step)

    def steps(self, epoch: int, *, skip: int = 0) -> Iterator[StepBatches]:
        """The steps of `epoch` after the first `skip`.

        Raises:
            ConfigError: a stream gave nothing in `epoch`.
        """
        begun = self._stream if self.is_stream else self._indexed
        batches, indexes = begun(epoch, skip * self.batches_per_step)
        while step := list(islice(batches, self.batches_per_step)):
            rows = chain.from_iterable(islice(indexes, self.batches_per_step))
            yield StepBatches(step, tuple(rows))

    def _indexed(self, epoch: int, skip: int) -> tuple[Iterator[Any], Iterator[list[int]]]:
        """The batches after the first `skip`, and the rows of each."""
        rows = list(self.ordering(epoch))
        cuts = range(0, len(rows), self.batch_size)
        wanted = [rows[start : start + self.batch_size] for start in cuts]
        wanted = wanted[skip : self.batches_per_epoch]
        return self._batches(epoch, wanted), iter(wanted)

    def _stream(self, epoch: int, skip: int) -> tuple[Iterator[Any], Iterator[list[int]]]:
        """The same of a stream, whose rows have no number."""
        if isinstance(self.dataset, _KnowsEpochs):
            self.dataset.set_epoch(epoch)
        batches = self._batches(epoch, [])
        skipped = sum(1 for _ in islice(batches, skip))
        first = list(islice(batches, 1))
        if not (first or skipped):
            raise ConfigError(
                f"The data set is a stream, and gave no row in epoch {epoch}.",
                why="It would be read for ever and never give a step.",
                fix="Make its __iter__ start afresh each time (an exhausted generator does not).",
            )
        return chain(first, batches), iter(())

    def _batches(self, epoch: int, wanted: list[list[int]]) -> Iterator[Any]:
        if self._torch is None:
            sampling: dict[str, Any] = (
                {"batch_size": self.batch_size, "drop_last": self.drop_last}
                if self.is_stream
                else {"batch_sampler": self._wanted}
            )
            self._torch = DataLoader(
                self.dataset,
                collate_fn=self.collate,
                num_workers=self.workers.num_workers,
                pin_memory=self.workers.pin_memory,
                prefetch_factor=self.workers.prefetch_factor,
                persistent_workers=self.workers.persistent,
                generator=self._generator,
                **sampling,
            )
        # workers' seeds come from here, not from the process's random state
        self._generator.manual_seed(self.seed + epoch)
        self._wanted[:] = wanted
        return iter(self._torch)


def in_order(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    workers: Workers | None = None,
) -> Iterable[Any]:
    """The collated batches of `dataset` from first to last, for evaluation."""
    loader = Loader(
        dataset,
        collate,
        batches=Batches(batch_size),
        ordering=lambda _: range(len(dataset)),
        workers=workers,
    )
    return (batch for step in loader.steps(0) for batch in step.batches)


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


def keeping(
    names: Sequence[str], collate: Callable[[list[Any]], Any]
) -> Callable[[list[Any]], Any]:
    """`collate` after dropping from each row what the model's forward does not take.

    Rows that are not dicts, and rows of which nothing would be left, go through untouched.
    """
    kept = frozenset(names)

    def collated(rows: list[Any]) -> Any:
        if all(isinstance(row, dict) and kept & row.keys() for row in rows):
            rows = [{name: row[name] for name in row if name in kept} for row in rows]
        return collate(rows)

    return collated
