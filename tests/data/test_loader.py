"""Order and position: the order transformers' Trainer draws, and O(1) resuming."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, IterableDataset

from lorafit.data.loader import (
    EpochLoader,
    Loader,
    Order,
    Workers,
    keeping,
    lengths_of,
    make_loader,
    order,
    order_by_length,
    prepared,
    rows_of,
)
from lorafit.errors import ConfigError


def batches(rows: int, *, drop_last: bool = False, workers: Workers | None = None) -> EpochLoader:
    ordered = Order(rows, lambda epoch: order(rows, seed=7, epoch=epoch))
    return make_loader(
        list(range(rows)), list, size=2, sampler=ordered, drop_last=drop_last, workers=workers
    )


def loader(rows: int, *, drop_last: bool = False, workers: Workers | None = None) -> Loader:
    return Loader(batches(rows, drop_last=drop_last, workers=workers), size=9, per_step=3)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_order_is_accelerates(epoch: int) -> None:
    sampler = SeedableRandomSampler(range(31), generator=torch.Generator(), data_seed=7)
    sampler.set_epoch(epoch)
    assert order(31, seed=7, epoch=epoch) == list(sampler)


def test_steps_cover_an_epoch_once_and_the_last_is_short() -> None:
    steps = list(loader(16).epoch(0))
    assert [len(step.batches) for step in steps] == [3, 3, 2]
    assert [row for step in steps for batch in step.batches for row in batch] == order(
        16, seed=7, epoch=0
    )
    assert [row for step in steps for row in step.examples] == order(16, seed=7, epoch=0)


def test_drop_last_drops_a_short_batch_only() -> None:
    assert sum(s.rows for s in loader(15, drop_last=True).epoch(0)) == 14
    assert loader(15, drop_last=True).steps_per_epoch == 3
    assert loader(15).batches_per_epoch == 8


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_skipping_is_the_rest_of_the_same_epoch(skip: int) -> None:
    whole = list(loader(16).epoch(2))
    assert list(loader(16).epoch(2, skip=6 * skip)) == whole[skip:]


def test_rows_are_skipped_whatever_the_batches_were() -> None:
    expected = order(16, seed=7, epoch=2)[5:]
    resumed = list(loader(16).epoch(2, skip=5))
    assert [row for step in resumed for batch in step.batches for row in batch] == expected
    assert [row for step in resumed for row in step.examples] == expected
    assert sum(step.rows for step in resumed) == 11


def test_a_loader_iterated_by_hand_goes_on_to_the_next_epoch() -> None:
    made = batches(9)
    seen = [[row for batch in made for row in batch] for _ in range(3)]
    assert seen == [order(9, seed=7, epoch=epoch) for epoch in range(3)]
    assert len(made) == 5 and rows_of(made) == 9


def test_a_loader_of_the_users_own_is_read_literally() -> None:
    given = [[1, 2], [3], [4, 5]]
    own = Loader(given, size=2, per_step=2)
    assert own.steps_per_epoch == 2 and own.order is None
    assert [s.batches for s in own.epoch(0)] == [[[1, 2], [3]], [[4, 5]]]
    assert [s.batches for s in own.epoch(0, skip=3)] == [[[4, 5]]]


def test_a_shuffling_loader_that_is_prepared_has_our_order() -> None:
    own = DataLoader(list(range(9)), batch_size=2, shuffle=True, collate_fn=list)
    made = prepared(own, seed=7)
    assert [row for batch in made for row in batch] == order(9, seed=7, epoch=0)
    still = DataLoader(list(range(9)), batch_size=2, collate_fn=list)
    assert prepared(still, seed=7) is still and prepared("else", seed=7) == "else"


def test_an_epoch_draws_one_number_as_torchs_loader_does() -> None:
    torch.manual_seed(1)
    list(loader(16).epoch(0))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.get_rng_state())


def test_workers_give_the_same_batches() -> None:
    alone = [s.batches for epoch in (0, 1) for s in loader(9).epoch(epoch)]
    many = loader(9, workers=Workers(num_workers=2, persistent_workers=True))
    assert [s.batches for epoch in (0, 1) for s in many.epoch(epoch)] == alone


class Stream(IterableDataset[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + 7))


def test_streams_are_skipped_by_reading() -> None:
    stream = Loader(make_loader(Stream(), list, size=2), size=9, per_step=2)
    assert stream.steps_per_epoch is None and stream.size == 2
    whole = [[[100, 101], [102, 103]], [[104, 105], [106]]]
    assert [step.batches for step in stream.epoch(1)] == whole
    assert [step.batches for step in stream.epoch(1, skip=4)] == whole[1:]


def test_order_by_length_is_a_permutation_with_the_longest_first() -> None:
    lengths = [(13 * i) % 97 + 1 for i in range(500)]
    chosen = order_by_length(lengths, group=8, seed=1, epoch=0)
    assert sorted(chosen) == list(range(500))
    assert lengths[chosen[0]] == max(lengths)
    assert chosen != order_by_length(lengths, group=8, seed=1, epoch=1)
    padded = sum(8 * max(lengths[i] for i in chosen[s : s + 8]) for s in range(0, 496, 8))
    assert padded < 1.15 * sum(lengths)


def test_lengths_come_from_the_column_or_the_ids() -> None:
    assert lengths_of([{"length": 4, "input_ids": [1]}, {"input_ids": [1, 2]}], "length") == [4, 2]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="row 0 has neither"):
        lengths_of([{"text": "a"}], "length")  # type: ignore[arg-type]


def test_keeping_drops_columns_of_dicts_only() -> None:
    collate = keeping(["a"], list)
    assert collate([{"a": 1, "b": 2}]) == [{"a": 1}]
    assert collate([{"b": 2}]) == [{"b": 2}]
    assert collate([(1, 2)]) == [(1, 2)]
