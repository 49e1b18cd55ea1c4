"""Matrix products of rows with frozen weights, and of rows with rows.

Where the CPU multiplies pairs of bf16, products.cpp does them, in bf16 and in float32. torch's own
libraries there compile and keep a product for each number of rows (bf16), use half of the width of
a processor that is not Intel's (float32), and add an adapter's part in a pass of its own. Elsewhere
torch does them; a CPU with matrix tiles (AMX) is left to it, as it uses them.
Knows no autograd. Shapes: `T` rows, `D` in, `O` out, `R` ranks, `M` and `N` any two.
"""

from functools import cache

import torch
from torch import Tensor

from lorafit.kernels import native
from lorafit.kernels.native import Call

Low = tuple[Tensor, Tensor]
"""What an adapter adds to rows, as two factors: x·A [T, R] and B [O, R]."""

ROWS = 32
"""What rows of 16 bits are filled up to where oneDNN multiplies them: it compiles a product anew
for each number of rows, in 0.3 to 0.8 ms and as many MB, and keeps a thousand of them."""

_MOST_RANKS = {torch.bfloat16: 128, torch.float32: 64}
"""What products.cpp adds in the same pass."""


def linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    *,
    bias_O: Tensor | None = None,
    low: Low | None = None,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
) -> Tensor:
    """x W' + bias + low + residual: [T, O], all of one dtype, to which our own sum is rounded once.

    Args:
        low: x·A and B.
        out_TO: Where it is written, if anywhere; contiguous.
    """
    if out_TO is None:
        out_TO = x_TD.new_empty(len(x_TD), len(weight_OD))
    call = _own("linear", x_TD, weight_OD=weight_OD, low=low)
    if call:
        xa_TR, b_OR = low or (None, None)
        given = (x_TD, weight_OD, xa_TR, b_OR, bias_O, residual_TO, out_TO)
        call(*given, *out_TO.shape, x_TD.shape[1], 0 if b_OR is None else b_OR.shape[1])
        return out_TO
    if bias_O is None:
        torch.mm(x_TD, weight_OD.T, out=out_TO)
    else:
        torch.addmm(bias_O, x_TD, weight_OD.T, out=out_TO)
    if low is not None:
        out_TO.addmm_(low[0], low[1].T)
    return out_TO if residual_TO is None else out_TO.add_(residual_TO)


def linear_backward(
    dy_TO: Tensor, weight_OD: Tensor, *, low: Low | None = None, out_TD: Tensor | None = None
) -> Tensor:
    """dy W + low: [T, D].

    Args:
        low: dx·A [T, R], and A as it lies, [R, D].
        out_TD: As in `linear`.
    """
    if out_TD is None:
        out_TD = dy_TO.new_empty(len(dy_TO), weight_OD.shape[1])
    call = _own("linear_backward", dy_TO, weight_OD=weight_OD, low=low)
    if call:
        dxa_TR, a_RD = low or (None, None)
        ranks = 0 if a_RD is None else len(a_RD)
        call(dy_TO, weight_OD, dxa_TR, a_RD, out_TD, *out_TD.shape, dy_TO.shape[1], ranks)
        return out_TD
    torch.mm(dy_TO, weight_OD, out=out_TD)
    return out_TD if low is None else out_TD.addmm_(*low)


def over_rows(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """left' right: [M, N], a sum over rows; not rounded to 16 bits where that can be left out."""
    if is_own(left_TM, left_TM.dtype):
        if left_TM.shape[1] > right_TN.shape[1]:  # the narrower one is turned
            return _over_rows(right_TN, left_TM).T.contiguous()
        return _over_rows(left_TM, right_TN)
    if left_TM.is_cuda and left_TM.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_TM.T, right_TN, out_dtype=torch.float32)
    return left_TM.T @ right_TN


def _over_rows(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    rows, ranks = left_TM.shape
    columns, row = right_TN.shape[1], right_TN.stride(0)
    pairs = rows % 2 if left_TM.dtype == torch.bfloat16 else 0
    left_MT = left_TM.new_zeros(ranks, rows + pairs)
    left_MT[:, :rows] = left_TM.T
    out_MN = torch.empty(ranks, columns, dtype=torch.float32)
    call = native.function("over_rows", left_TM)
    assert call and right_TN.stride(1) == 1
    call(left_MT, right_TN.data_ptr(), out_MN, ranks, columns, rows, row)
    return out_MN


def spare(x_TD: Tensor, dtype: torch.dtype) -> int:
    """How many rows are missing to a number that products of `dtype` are compiled for."""
    compiled = x_TD.is_cpu and dtype.itemsize == 2 and not is_own(x_TD, dtype)
    return -len(x_TD) % ROWS if compiled else 0


def is_own(x_TD: Tensor, dtype: torch.dtype) -> bool:
    """Whether products.cpp multiplies such rows in `dtype`."""
    return x_TD.is_cpu and _is_own(dtype)


@cache
def _is_own(dtype: torch.dtype) -> bool:
    has_tiles = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return not has_tiles and native.function("linear", torch.empty(0, dtype=dtype)) is not None


def _own(name: str, x_TD: Tensor, *, weight_OD: Tensor, low: Low | None) -> Call | None:
    if not (is_own(x_TD, x_TD.dtype) and weight_OD.is_contiguous()):
        return None
    ranks = 0 if low is None else low[0].shape[1]
    odd = x_TD.dtype == torch.bfloat16 and (x_TD.shape[1] % 2 or ranks % 2)
    return None if odd or ranks > _MOST_RANKS[x_TD.dtype] else native.function(name, x_TD)
