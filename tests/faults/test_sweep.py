"""A sample of `make faults`: few operations of each fault; the whole sweep takes half an hour."""

from collections.abc import Generator

import pytest

from tests.faults import shim, sweep

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def pool() -> Generator[sweep.Pool]:
    made = sweep.Pool(1)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["kill", "tear", "full", "error"])
def test_a_run_survives_a_fault(pool: sweep.Pool, name: str) -> None:
    rows = list(sweep.sweep(pool, only=f"python {name}", stride=60))
    assert rows and all(row.tried for row in rows)
    assert [failure for row in rows for failure in row.failures] == []
