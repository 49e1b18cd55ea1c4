"""The passes between matrix products for CUDA, in Triton: each row is read once.

What each computes, and in which rounding order, stands in elementwise.py and cross_entropy.py in
plain torch; the names are the same. Only tensors whose rows are contiguous come here. `available`
says where these may be used: not without Triton, and not with `LORAFIT_TRITON=0`.
"""

# Triton's kernels are its own language in Python's syntax, and it may not be installed.
# pyright: basic, reportIndexIssue=false, reportMissingImports=false

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


if available():
    import triton
    import triton.language as tl

    @triton.jit
    def _rms_norm(
        x, weight, y, rstd, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):  # fmt: skip
        row, at = _tile(ROWS, WIDTH)
        inside = (row < rows) & (at < width)
        wide = tl.load(x + row * width + at, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
        normed = (wide * scale[:, None]).to(x.dtype.element_ty).to(tl.float32)
        normed *= tl.load(weight + at, at < width, 0.0).to(tl.float32)
        if weight.dtype == x.dtype:
            normed = normed.to(x.dtype.element_ty)
        tl.store(y + row * width + at, normed, inside)
        first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(rstd + first, scale, first < rows)

    @triton.jit
    def _rms_norm_backward(
        dy, x, weight, rstd, residual, dx, rows, width,
        ADDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        row, at = _tile(ROWS, WIDTH)
        inside = (row < rows) & (at < width)
        scale = tl.load(rstd + row, row < rows, 0.0)
        scaled = tl.load(dy + row * width + at, inside, 0.0).to(tl.float32)
        scaled *= tl.load(weight + at, at < width, 0.0).to(tl.float32)
        hat = tl.load(x + row * width + at, inside, 0.0).to(tl.float32) * scale
        along = tl.sum(scaled * hat, 1) / width
        made = scale * (scaled - hat * along[:, None])
        if ADDS:
            made += tl.load(residual + row * width + at, inside, 0.0).to(tl.float32)
        tl.store(dx + row * width + at, made, inside)

    @triton.jit
    def _tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return row[:, None], tl.arange(0, WIDTH)[None, :]

    @triton.jit
    def _rotate(
        x, cosine, sine, stride, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (at < half)
        low_at = x + token * stride + head * half * 2 + at
        low = tl.load(low_at, inside, 0.0).to(tl.float32)
        high = tl.load(low_at + half, inside, 0.0).to(tl.float32)
        turn = token * half * 2 + at
        cosine_low = tl.load(cosine + turn, at < half, 0.0)
        cosine_high = tl.load(cosine + turn + half, at < half, 0.0)
        sine_low = tl.load(sine + turn, at < half, 0.0) * sign
        sine_high = tl.load(sine + turn + half, at < half, 0.0) * sign
        tl.store(low_at, low * cosine_low - high * sine_low, inside)
        tl.store(low_at + half, high * cosine_high + low * sine_high, inside)

    @triton.jit
    def _swiglu(both, h, width, TILE: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
        gate = tl.load(both + row * width * 2 + at, at < width, 0.0).to(tl.float32)
        up = tl.load(both + row * width * 2 + width + at, at < width, 0.0).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(h.dtype.element_ty).to(tl.float32)
        tl.store(h + row * width + at, silu * up, at < width)

    @triton.jit
    def _swiglu_backward(both, dh, h, width, TILE: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
        gate_at = both + row * width * 2 + at
        gate = tl.load(gate_at, at < width, 0.0).to(tl.float32)
        up = tl.load(gate_at + width, at < width, 0.0).to(tl.float32)
        grad = tl.load(dh + row * width + at, at < width, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(
            h + row * width + at, silu.to(both.dtype.element_ty).to(tl.float32) * up, at < width
        )
        tl.store(gate_at, grad * up * sigmoid * (1.0 + gate - silu), at < width)
        tl.store(gate_at + width, grad * silu, at < width)

    @triton.jit
    def _dropped(x, y, keys, places, width, threshold, scale, TILE: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
        index = (tl.load(places + row) * width + at).to(tl.uint32)
        z = (index * 0x9E3779B9).to(tl.uint32) ^ tl.load(keys + row).to(tl.uint32)
        z = ((z ^ (z >> 16)) * 0x7FEB352D).to(tl.uint32)
        z = ((z ^ (z >> 15)) * 0x846CA68B).to(tl.uint32)
        z = z ^ (z >> 16)
        value = tl.load(x + row * width + at, at < width, 0.0).to(tl.float32) * scale
        tl.store(
            y + row * width + at, tl.where(z.to(tl.int64) >= threshold, value, 0.0), at < width
        )

    @triton.jit
    def _cross_entropy(
        logits, targets, nats, width, smoothing, softcap, lift,
        CAPPED: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        base, target = logits + row * width, tl.load(targets + row)
        highest = tl.full((), float("-inf"), tl.float32)
        total, summed, hit = 0.0, 0.0, 0.0
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            z = _capped(tl.load(base + at, at < width, float("-inf")), softcap, CAPPED)
            z = tl.where(at < width, z, float("-inf"))
            higher = tl.maximum(highest, tl.max(z, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
            summed += tl.sum(tl.where(at < width, z, 0.0), 0)
            hit += tl.sum(tl.where(at == target, z, 0.0), 0)
            highest = higher
        logarithm = highest + tl.log(total)
        value = logarithm - (1.0 - smoothing) * hit - smoothing / width * summed
        known = (target >= 0) & (target < width)  # of any other the loss is not a number
        tl.store(nats + row, tl.where(known, value, float("nan")))
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            z = _capped(tl.load(base + at, at < width, 0.0), softcap, CAPPED)
            grad = tl.exp(z - logarithm) - smoothing / width
            grad -= tl.where(at == target, 1.0 - smoothing, 0.0)
            if CAPPED:
                grad *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(base + at, grad * lift, at < width)

    @triton.jit
    def _capped(value, softcap, CAPPED: tl.constexpr):
        wide = value.to(tl.float32)
        if CAPPED:  # tanh
            wide = softcap * (2.0 * tl.sigmoid(2.0 * wide / softcap) - 1.0)
        return wide


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
    _rms_norm[grid](x_TD, weight_D, y_TD, rstd_T, *x_TD.shape, eps, **tile)
    return y_TD, rstd_T


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    weight_D, rstd_T, residual_TD = others
    dx_TD, adds = torch.empty_like(x_TD), residual_TD is not None
    given = (dy_TD, x_TD, weight_D, rstd_T, residual_TD if adds else dy_TD, dx_TD)
    grid, tile = _rows(x_TD)
    _rms_norm_backward[grid](*given, *x_TD.shape, ADDS=adds, **tile)
    return dx_TD


def rotate_(x_THE: Tensor, cosine_TE: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    sine_TE, inverse = others
    tokens, heads, width = x_THE.shape
    sizes = (x_THE.stride(0), heads, width // 2, -1.0 if inverse else 1.0)
    tile = {"HEADS": _power(heads), "HALF": _power(width // 2)}
    _rotate[tokens,](x_THE, cosine_TE, sine_TE, *sizes, **tile)
    return x_THE


def swiglu(both_T2F: Tensor) -> Tensor:
    """See elementwise.py."""
    h_TF = both_T2F.new_empty(len(both_T2F), both_T2F.shape[1] // 2)
    grid, tile = _tiles(h_TF)
    _swiglu[grid](both_T2F, h_TF, h_TF.shape[1], **tile)
    return h_TF


def swiglu_backward_(both_T2F: Tensor, dh_TF: Tensor) -> Tensor:
    """See elementwise.py."""
    h_TF = torch.empty_like(dh_TF)
    grid, tile = _tiles(h_TF)
    _swiglu_backward[grid](both_T2F, dh_TF, h_TF, h_TF.shape[1], **tile)
    return h_TF


def dropped(x_TD: Tensor, keys_T: Tensor, *others: Any) -> Tensor:
    """See elementwise.py."""
    places_T, threshold, scale = others
    y_TD = torch.empty_like(x_TD)
    grid, tile = _tiles(x_TD)
    _dropped[grid](x_TD, y_TD, keys_T, places_T, x_TD.shape[1], threshold, scale, **tile)
    return y_TD


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, *how: float) -> Tensor:
    """Nats of each row [N]; the logits become the gradient of their sum, times a `lift`."""
    smoothing, softcap, lift = how
    nats_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    width = logits_NV.shape[1]
    tile = {"CAPPED": bool(softcap), "TILE": min(4096, _power(width)), "num_warps": 8}
    _cross_entropy[len(logits_NV),](
        logits_NV, targets_N, nats_N, width, smoothing, softcap or 1.0, lift, **tile
    )  # fmt: skip
    return nats_N
