"""The passes between matrix products for CUDA, in Triton: each row is read once.

What each computes, and in which rounding order, stands in elementwise.py and cross_entropy.py in
plain torch; the names are the same. Only tensors whose rows are contiguous come here. `available`
says where these may be used: not without Triton, and not with `LORAFIT_TRITON=0`.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TILE = 2048
"""Elements a program works on at a time, more where a row is wider."""


@cache
def available() -> bool:
    """Whether Triton is here and wanted."""
    return os.environ.get("LORAFIT_TRITON") != "0" and find_spec("triton") is not None


def runs(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on CUDA, in 16 or 32 bits."""
    return all(x.is_cuda and x.dtype != torch.float64 for x in tensors) and available()


@cache
def _kernels() -> Any:
    from lorafit.kernels import triton_source

    return triton_source


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _rows(x_TD: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and tile of a kernel that works on whole rows."""
    width = _power(x_TD.shape[1])
    rows = max(1, TILE // width)
    return (-(-len(x_TD) // rows),), {"ROWS": rows, "WIDTH": width}


def _tiles(x_TF: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    tile = min(1024, _power(x_TF.shape[1]))
    return (len(x_TF), -(-x_TF.shape[1] // tile)), {"TILE": tile}


def rms_norm(x_TD: Tensor, weight_D: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """See elementwise.py."""
    eps, dtype = how
    y_TD = torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device)
    rstd_T = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    grid, tile = _rows(x_TD)
    _kernels().rms_norm[grid](x_TD, weight_D, y_TD, rstd_T, *x_TD.shape, eps, **tile)
    return y_TD, rstd_T


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    weight_D, rstd_T, residual_TD = others
    dx_TD, adds = torch.empty_like(x_TD), residual_TD is not None
    given = (dy_TD, x_TD, weight_D, rstd_T, residual_TD if adds else dy_TD, dx_TD)
    grid, tile = _rows(x_TD)
    _kernels().rms_norm_backward[grid](*given, *x_TD.shape, ADDS=adds, **tile)
    return dx_TD


def rotate_(x_THE: Tensor, cosine_TE: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    sine_TE, inverse = others
    sizes, tile = _of_heads(x_THE)
    sign = -1.0 if inverse else 1.0
    _kernels().rotate[len(x_THE),](x_THE, cosine_TE, sine_TE, x_THE.stride(0), *sizes, sign, **tile)
    return x_THE


def norm_heads(x_THE: Tensor, norms: Any) -> tuple[Tensor, Tensor]:
    """See elementwise.py."""
    y_THE = torch.empty(x_THE.shape, dtype=x_THE.dtype, device=x_THE.device)
    sizes, tile = _of_heads(x_THE)
    _kernels().norm_heads[len(x_THE),](
        x_THE, y_THE, norms.query_E, norms.key_E, *norms.rotary,
        x_THE.stride(0), norms.split, *sizes, norms.eps, **tile,
    )  # fmt: skip
    return y_THE[:, : norms.split], y_THE[:, norms.split :]


def norm_heads_backward_(grad_THE: Tensor, x_THE: Tensor, *, norms: Any) -> None:
    """See elementwise.py."""
    strides, (sizes, tile) = (grad_THE.stride(0), x_THE.stride(0)), _of_heads(x_THE)
    _kernels().norm_heads_backward[len(x_THE),](
        grad_THE, x_THE, norms.query_E, norms.key_E, *norms.rotary,
        *strides, norms.split, *sizes, norms.eps, **tile,
    )  # fmt: skip


def _of_heads(x_THE: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    heads, half = x_THE.shape[1], x_THE.shape[2] // 2
    return (heads, half), {"HEADS": _power(heads), "HALF": _power(half)}


def swiglu(both_T2F: Tensor, low: Any) -> Tensor:
    """See elementwise.py."""
    rows, width = len(both_T2F), both_T2F.shape[1] // 2
    h_TF = both_T2F.new_empty(rows, width)
    (added, ranks), (grid, tile) = _low(low, both_T2F), _blocks(h_TF)
    _kernels().swiglu[grid](both_T2F, h_TF, *added, rows, width, *ranks, RANKS=_width(low), **tile)
    return h_TF


def swiglu_backward_(both_T2F: Tensor, dh_TF: Tensor, *, low: Any, low_dh: Any) -> Tensor:
    """See elementwise.py."""
    h_TF = torch.empty_like(dh_TF)
    (added, ranks), (added_dh, ranks_dh) = _low(low, both_T2F), _low(low_dh, both_T2F)
    grid, tile = _blocks(h_TF)
    _kernels().swiglu_backward[grid](
        both_T2F, dh_TF, h_TF, *added, *added_dh, *h_TF.shape, *ranks, *ranks_dh,
        RANKS=_width(low), RANKS_DOWN=_width(low_dh), **tile,
    )  # fmt: skip
    return h_TF


_ROWS, _COLUMNS, _PROGRAMS = 32, 64, 1024


def _blocks(h_TF: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the tile: so many columns of some rows, several times one below the other, as
    what is added to them is read once; fewer times where there would be too few programs."""
    rows, columns = -(-len(h_TF) // _ROWS), -(-h_TF.shape[1] // _COLUMNS)
    steps = min(8, _power(rows * columns // _PROGRAMS))
    return (-(-rows // steps), columns), {"ROWS": _ROWS, "TILE": _COLUMNS, "STEPS": steps}


def _low(low: Any, instead: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int]]:
    """What is added, and its ranks, and how far a column and a rank lie apart."""
    if low is None:
        return (instead, instead), (0, 0, 0)
    return tuple(low), (low[0].shape[1], *low[1].stride())


def _width(low: Any) -> int:
    return 0 if low is None else max(16, _power(low[0].shape[1]))


def dropped(x_TD: Tensor, keys_T: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    places_T, threshold, scale = others
    y_TD = torch.empty_like(x_TD)
    grid, tile = _tiles(x_TD)
    _kernels().dropped[grid](x_TD, y_TD, keys_T, places_T, x_TD.shape[1], threshold, scale, **tile)
    return y_TD


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, *how: float) -> Tensor:
    """Nats of each row [N]; the logits become the gradient of their sum, times a `lift`."""
    smoothing, softcap, lift = how
    nats_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    width = logits_NV.shape[1]
    tile = {"CAPPED": bool(softcap), "TILE": min(4096, _power(width)), "num_warps": 8}
    _kernels().cross_entropy[len(logits_NV),](
        logits_NV, targets_N, nats_N, width, smoothing, softcap or 1.0, lift, **tile
    )  # fmt: skip
    return nats_N
