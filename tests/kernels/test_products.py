"""Products of rows: ours against float64, each row against itself alone, and who multiplies."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.kernels import native, products

BOTH = [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
SIZES = [
    (48, 16, 2),
    (576, 576, 16),
    (100, 34, 6),
    (1000, 1600, 48),
    (16, 3072, 32),
    (193, 770, 64),
]
"""O, D and R: whole tiles and odd rests, one block of depth and several."""


def drawn(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float32).to(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["ours", "torch's"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, whichever this machine takes."""
    if request.param == "ours" and not products.is_own(torch.empty(0), torch.float32):
        pytest.skip("products.cpp has no instructions here, or no compiler")
    if request.param == "torch's":
        monkeypatch.setattr(products, "_is_own", lambda dtype: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("rows", [1, 5, 64, 203, 1100])
@pytest.mark.parametrize("size", SIZES)
def test_all_that_is_added_up(
    way: str, size: tuple[int, int, int], rows: int, dtype: torch.dtype
) -> None:
    columns, depth, ranks = size
    x_TD, weight_OD = drawn(rows, depth, dtype=dtype), drawn(columns, depth, dtype=dtype)
    low = drawn(rows, ranks, dtype=dtype), drawn(columns, ranks, dtype=dtype)
    bias_O, residual_TO = drawn(columns, dtype=dtype), drawn(rows, columns, dtype=dtype)
    exact = x_TD.double() @ weight_OD.double().T
    assert error(products.linear(x_TD, weight_OD), exact) < ERROR[dtype]
    out_TO = torch.full((rows, columns), torch.nan, dtype=dtype)
    made = products.linear(
        x_TD, weight_OD, bias_O=bias_O, low=low, residual_TO=residual_TO, out_TO=out_TO
    )
    assert made is out_TO
    exact = exact + low[0].double() @ low[1].double().T + bias_O.double() + residual_TO.double()
    assert error(made, exact) < (1 if way == "ours" else 2) * ERROR[dtype]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("rows", [1, 64, 203])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_rows(
    way: str, size: tuple[int, int, int], rows: int, dtype: torch.dtype
) -> None:
    columns, depth, ranks = size
    dy_TO, weight_OD = drawn(rows, depth, dtype=dtype), drawn(depth, columns, dtype=dtype)
    low = drawn(rows, ranks, dtype=dtype), drawn(ranks, columns, dtype=dtype)
    made = products.linear_backward(dy_TO, weight_OD, low=low)
    exact = dy_TO.double() @ weight_OD.double() + low[0].double() @ low[1].double()
    assert error(made, exact) < 2 * ERROR[dtype]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("rows", [1, 2, 203, 1100])
@pytest.mark.parametrize("widths", [(16, 576), (576, 16), (48, 100), (5, 5)])
def test_sums_over_rows(way: str, widths: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    left, right = (drawn(rows, width + 32, dtype=dtype)[:, 8 : 8 + width] for width in widths)
    made = products.over_rows(left, right)
    assert made.shape == widths and made.is_contiguous()
    exact = left.double().T @ right.double()
    assert error(made, exact) < (1e-6 if way == "ours" else ERROR[dtype])


@pytest.mark.parametrize("dtype", BOTH)
def test_a_row_is_the_same_to_the_bit_beside_any_others(dtype: torch.dtype) -> None:
    """What the law asks of layouts is exact here: no other row, no number of threads is seen."""
    if not products.is_own(torch.empty(0), dtype):
        pytest.skip("products.cpp has no instructions here, or no compiler")
    torch.manual_seed(0)
    x_TD, weight_OD = drawn(1500, 600, dtype=dtype), drawn(200, 600, dtype=dtype)
    low = drawn(1500, 16, dtype=dtype), drawn(200, 16, dtype=dtype)
    whole = products.linear(x_TD, weight_OD, low=low)
    back = products.linear_backward(
        x_TD, weight_OD.T.contiguous(), low=(low[0], low[1].T.contiguous())
    )
    for start, stop in ((0, 1), (3, 70), (1000, 1500)):
        part = x_TD[start:stop].clone(), (low[0][start:stop].clone(), low[1])
        assert torch.equal(products.linear(part[0], weight_OD, low=part[1]), whole[start:stop])
        turned = products.linear_backward(
            part[0], weight_OD.T.contiguous(), low=(part[1][0], low[1].T.contiguous())
        )
        assert torch.equal(turned, back[start:stop])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(products.linear(x_TD, weight_OD, low=low), whole)
        assert error(back, whole.double()) < 2 * ERROR[dtype]
    finally:
        torch.set_num_threads(threads)


def test_nothing_adds_up_to_nothing(way: str) -> None:
    assert products.linear(torch.ones(0, 8), torch.ones(5, 8)).shape == (0, 5)
    assert products.linear(torch.ones(5, 8), torch.ones(0, 8)).shape == (5, 0)
    none = products.linear_backward(torch.ones(5, 0), torch.ones(0, 8))
    assert torch.equal(none, torch.zeros(5, 8))
    assert products.over_rows(torch.ones(5, 0), torch.ones(5, 8)).shape == (0, 8)
    assert torch.equal(products.over_rows(torch.ones(0, 3), torch.ones(0, 5)), torch.zeros(3, 5))


def test_what_is_not_a_number_stays_in_its_row(way: str) -> None:
    x_TD, weight_OD = torch.ones(9, 32), torch.ones(50, 32)
    x_TD[4, 7] = torch.nan
    made = products.linear(x_TD, weight_OD)
    assert made[4].isnan().all() and not made[torch.arange(9) != 4].isnan().any()


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, where the processor has matrix tiles, where nothing was compiled, for other dtypes and
    for what is not contiguous; then rows of 16 bits are filled up."""
    rows, half = torch.ones(33, 8), torch.ones(33, 8, dtype=torch.bfloat16)
    assert not products.is_own(rows, torch.float64)
    given: list[Any] = []
    monkeypatch.setattr(products, "_is_own", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(native, "function", lambda *asked: lambda *values: given.append(asked[0]))
    products.linear(rows, torch.ones(4, 8))
    products.linear(rows, torch.ones(8, 4).T)
    products.linear(half[:, :7].contiguous(), torch.ones(4, 7, dtype=torch.bfloat16))
    products.linear(rows, torch.ones(4, 8), low=(torch.ones(33, 65), torch.ones(4, 65)))
    assert given == ["linear"] and products.spare(rows, torch.bfloat16) == 0
    monkeypatch.setattr(products, "_is_own", lambda dtype: False)
    assert products.spare(rows, torch.bfloat16) == 31 and products.spare(rows, torch.float32) == 0


def test_tiles_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    decides = products._is_own  # pyright: ignore[reportPrivateUsage]
    decides.cache_clear()
    try:
        assert not products.is_own(torch.empty(0), torch.bfloat16)
    finally:
        decides.cache_clear()
