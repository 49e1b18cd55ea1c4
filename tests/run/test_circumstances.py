"""Rows are told from other rows without reading them all."""

import random
from typing import Any

import numpy
import pytest
import torch

from lorafit.run.circumstances import flat, of_machine, of_rows, of_versions


class Counting(torch.utils.data.Dataset[Any]):
    """A lazy set that counts what is read of it."""

    def __init__(self, rows: int) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return {"input_ids": [index, 1], "labels": torch.tensor([index, 2])}


def test_a_few_rows_are_read_of_however_many() -> None:
    rows = Counting(10**9)
    assert of_rows(rows) == of_rows(Counting(10**9)) and rows.read == 32
    assert of_rows(rows)["rows"] == 10**9


@pytest.mark.parametrize(
    "other",
    [
        [{"input_ids": [1, 2]}], [{"input_ids": [1, 2]}, {"input_ids": [3, 5]}],
        [{"input_ids": [3, 4]}, {"input_ids": [1, 2]}], [{"ids": [1, 2]}, {"ids": [3, 4]}],
        [{"input_ids": [1, 2]}, {"input_ids": ["3", 4]}],
    ],
)  # fmt: skip
def test_other_rows_are_others(other: list[Any]) -> None:
    one = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    assert of_rows(one) != of_rows(other)
    arrays = [{"input_ids": numpy.array(row["input_ids"])} for row in one]
    assert (
        of_rows(one)["rows"] == 2
        and of_rows(arrays)["examples"] == of_rows(list(arrays))["examples"]
    )


def test_rows_that_differ_each_time_are_not_told() -> None:
    class Drawn(Counting):
        def __getitem__(self, index: int) -> Any:
            return [random.random()]

    class Broken(Counting):
        def __getitem__(self, index: int) -> Any:
            raise OSError

    assert of_rows(Drawn(5)) == {"rows": 5, "examples": None} == of_rows(Broken(5))
    assert of_rows(iter([1])) == {"rows": None, "examples": None} == of_rows(None)
    assert of_rows([]) == of_rows([])


def test_machine_and_versions_are_plain() -> None:
    facts = flat({"machine": of_machine(torch.device("cpu")), "versions": of_versions()})
    assert facts["versions.torch"] == str(torch.__version__)
    assert facts["machine.threads"] == torch.get_num_threads() and facts["machine.device"] == "cpu"
    assert all(isinstance(value, str | int) for value in facts.values())
