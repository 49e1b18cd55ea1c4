"""The passes between matrix products: norms, rotary embedding, SwiGLU, LoRA's dropout.

Each is plain torch first, which any device and dtype can run (float64 for gradcheck) and which says
what is computed. On a CPU `native.cpp` does the same in one pass, on CUDA cuda.py does.
Nothing here knows autograd.
Shapes: `T` tokens, `D` hidden, `F` feed-forward, `H` heads, `E` head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorafit.kernels import cuda, native
from lorafit.kernels.products import Low
from lorafit.kernels.rooms import Room


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    room: Room | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich 2019) in the rounding order of transformers' Llama.

    Args:
        room: Where the rows are lent a place, if nobody keeps them.

    Returns:
        The normed rows in `dtype`, and 1 / rms of each row (float32, float64 for float64 rows).
    """
    y_TD = (
        room.lent("norm", x_TD.shape, dtype=dtype)
        if room
        else torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device)
    )
    call = native.function("rms_norm", x_TD, y_TD) if weight_D.dtype == x_TD.dtype else None
    if call:
        rstd_T = torch.empty(len(x_TD), dtype=torch.float32)
        call(x_TD, weight_D, y_TD, rstd_T, *x_TD.shape, eps)
        return y_TD, rstd_T
    return (cuda.rms_norm if cuda.runs(x_TD) else _rms_norm)(x_TD, weight_D, eps, dtype)


def _rms_norm(x_TD: Tensor, weight_D: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    eps, dtype = how
    wide_TD = x_TD.to(accumulating(x_TD.dtype))
    rstd_T = torch.rsqrt(wide_TD.square().mean(-1) + eps)
    return (weight_D * (wide_TD * rstd_T[:, None]).to(x_TD.dtype)).to(dtype), rstd_T


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, *, weight_D: Tensor, rstd_T: Tensor, residual_TD: Tensor | None
) -> Tensor:
    """The gradient of `rms_norm` with respect to its rows, plus `residual_TD`: dx in x's dtype.

    The weight is frozen and gets none.
    """
    call = native.function("rms_norm_backward", x_TD, dy_TD)
    if call and weight_D.dtype == x_TD.dtype:
        dx_TD = torch.empty_like(x_TD)
        call(dy_TD, x_TD, weight_D, rstd_T, residual_TD, dx_TD, *x_TD.shape)
        return dx_TD
    run = cuda.rms_norm_backward if cuda.runs(x_TD, dy_TD) else _rms_norm_backward
    return run(dy_TD, x_TD, weight_D, rstd_T, residual_TD)


def _rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, *others: Any) -> Tensor:
    weight_D, rstd_T, residual_TD = others
    wide = rstd_T.dtype
    scaled_TD = dy_TD.to(wide) * weight_D.to(wide)
    hat_TD = x_TD.to(wide) * rstd_T[:, None]
    along_T1 = (scaled_TD * hat_TD).mean(-1, keepdim=True)
    dx_TD = rstd_T[:, None] * (scaled_TD - hat_TD * along_T1)
    return (dx_TD if residual_TD is None else residual_TD.to(wide) + dx_TD).to(x_TD.dtype)


def rotate_(x_THE: Tensor, rotary: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of a row's leading heads, in place; halves are
    paired as in transformers.

    Args:
        x_THE: A view [T, H, E] of contiguous rows that may hold more than these heads.
        rotary: Cosines and sines, [T, E] each.
        inverse: Rotate back, which is the gradient too.
    """
    cosine_TE, sine_TE = rotary
    tokens, heads, width = x_THE.shape
    fits = x_THE.stride()[1:] == (width, 1) and cosine_TE.shape == (tokens, width)
    call = native.function("rotate", x_THE) if fits else None
    if call and cosine_TE.dtype == torch.float32:
        begin = torch.as_strided(x_THE, (1,), (1,))  # the rows are contiguous, the view is not
        sizes = (tokens, x_THE.stride(0), heads, width, int(inverse))
        call(begin, cosine_TE, sine_TE, *sizes)
        return x_THE
    if fits and cuda.runs(x_THE, cosine_TE):
        return cuda.rotate_(x_THE, cosine_TE, sine_TE, inverse)
    return x_THE.copy_(_rotated(x_THE, cosine_TE, sine_TE, inverse))


def _rotated(x_THE: Tensor, cosine_TE: Tensor, *others: Any) -> Tensor:
    sine_TE, inverse = others
    wide = accumulating(x_THE.dtype)
    cosine_T1E, sine_T1E = cosine_TE[:, None].to(wide), sine_TE[:, None].to(wide)
    low, high = x_THE.to(wide).chunk(2, dim=-1)
    turned_THE = torch.cat((-high, low), dim=-1) * (-sine_T1E if inverse else sine_T1E)
    return (torch.cat((low, high), dim=-1) * cosine_T1E + turned_THE).to(x_THE.dtype)


@dataclass(frozen=True)
class HeadNorms:
    """The norms of a row's heads (Qwen3's qk-norm) and what rotates them.

    Attributes:
        query_E, key_E: Weights.
        split: How many heads are q's; those after them are k's.
        rotary: Cosines and sines, [T, E] each.
    """

    query_E: Tensor
    key_E: Tensor
    split: int
    eps: float
    rotary: tuple[Tensor, Tensor]


def norm_heads(x_THE: Tensor, norms: HeadNorms) -> tuple[Tensor, Tensor]:
    """The heads of q and of k, which lie side by side in a view as `rotate_` takes, normed and
    rotated: two tensors of their own."""
    if cuda.runs(x_THE, norms.rotary[0]):
        return cuda.norm_heads(x_THE, norms)
    q, k = (
        rms_norm(rows, weight_E, eps=norms.eps, dtype=rows.dtype)[0].view(part.shape)
        for part, rows, weight_E in _heads_of(x_THE, norms)
    )
    return rotate_(q, norms.rotary), rotate_(k, norms.rotary)


def norm_heads_backward_(grad_THE: Tensor, x_THE: Tensor, *, norms: HeadNorms) -> None:
    """The gradient of what `norm_heads` made of `x_THE`, side by side, becomes that of its rows."""
    if cuda.runs(grad_THE, x_THE, norms.rotary[0]):
        cuda.norm_heads_backward_(grad_THE, x_THE, norms=norms)
        return
    rotate_(grad_THE, norms.rotary, inverse=True)
    raws = _heads_of(x_THE, norms)
    for (grad, grads, weight_E), (_, rows, _) in zip(_heads_of(grad_THE, norms), raws, strict=True):
        _, rstd = rms_norm(rows, weight_E, eps=norms.eps, dtype=rows.dtype)
        back = rms_norm_backward(grads, rows, weight_D=weight_E, rstd_T=rstd, residual_TD=None)
        grad.copy_(back.view(grad.shape))


def _heads_of(x_THE: Tensor, norms: HeadNorms) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of q and of k: their heads, these as rows that lie end to end, and the norm's weight."""
    parts = x_THE[:, : norms.split], x_THE[:, norms.split :]
    for part, weight_E in zip(parts, (norms.query_E, norms.key_E), strict=True):
        yield part, part.reshape(-1, part.shape[2]).contiguous(), weight_E


def adds_low(x_TD: Tensor) -> bool:
    """Whether `swiglu` of such rows is faster where it adds what is `Low` itself."""
    return cuda.runs(x_TD) and x_TD.dtype != torch.float32


def swiglu(both_T2F: Tensor, room: Room | None = None, *, low: Low | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of gate and up lying side by side: [T, F].

    Args:
        room: As for `rms_norm`.
        low: Still to be added to gate and up.
    """
    call = native.function("swiglu", both_T2F) if low is None else None
    if call:
        sizes = len(both_T2F), both_T2F.shape[1] // 2
        h_TF = (
            room.lent("swiglu", sizes, dtype=both_T2F.dtype) if room else both_T2F.new_empty(sizes)
        )
        call(both_T2F, h_TF, *h_TF.shape)
        return h_TF
    if cuda.runs(both_T2F):
        return cuda.swiglu(both_T2F, low)
    gate_TF, up_TF = _added(both_T2F, low).chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


def swiglu_backward_(
    both_T2F: Tensor, dh_TF: Tensor, *, low: Low | None = None, low_dh: Low | None = None
) -> Tensor:
    """`swiglu` anew; `both_T2F` becomes the gradients of gate and up.

    Args:
        low, low_dh: Still to be added to gate and up, and to `dh_TF`.
    """
    call = native.function("swiglu_backward", both_T2F) if low is None is low_dh else None
    if call:
        h_TF = torch.empty_like(dh_TF)
        call(both_T2F, dh_TF, h_TF, *h_TF.shape)
        return h_TF
    if cuda.runs(both_T2F, dh_TF):
        return cuda.swiglu_backward_(both_T2F, dh_TF, low=low, low_dh=low_dh)
    whole_T2F, dh_TF = _added(both_T2F, low), _added(dh_TF, low_dh)
    gate_TF, up_TF = whole_T2F.to(accumulating(both_T2F.dtype)).chunk(2, dim=-1)
    sigmoid_TF = gate_TF.sigmoid()
    silu_TF = gate_TF * sigmoid_TF
    h_TF = (silu_TF.to(both_T2F.dtype) * up_TF).to(dh_TF.dtype)
    dgate_TF = dh_TF * up_TF * sigmoid_TF * (1 + gate_TF - silu_TF)
    both_T2F.copy_(torch.cat((dgate_TF, dh_TF * silu_TF), dim=-1))
    return h_TF


def _added(x_TD: Tensor, low: Low | None) -> Tensor:
    return x_TD if low is None else torch.addmm(x_TD, low[0], low[1].T)


def dropped(x_TD: Tensor, counters: tuple[Tensor, Tensor], *, share: float) -> Tensor:
    """Dropout whose mask is a function of counters: `x` times 1 / (1 - share), or 0.

    Element d of a token is dropped where a hash of (key, position x D + d) falls below `share`, so
    that the mask does not depend on what else lies beside the token. The hash is a 32-bit mixer
    ("lowbias32", Wellons 2018) over a Weyl sequence; draws of neighbouring elements are
    uncorrelated to the precision that tests can see (tests/kernels/test_elementwise.py).

    Args:
        counters: The key of each token's document, layer and module, and its position; int64 [T].
        share: Probability of dropping, in [0, 1).
    """
    keys_T, places_T = counters
    threshold, scale = min(int(share * 2**32), 2**32 - 1), 1 / (1 - share)
    call = native.function("dropout", x_TD)
    if call:
        y_TD = torch.empty_like(x_TD)
        call(x_TD, y_TD, keys_T, places_T, *x_TD.shape, threshold, scale)
        return y_TD
    run = cuda.dropped if cuda.runs(x_TD) else _dropped
    return run(x_TD, keys_T, places_T, threshold, scale)


def _dropped(x_TD: Tensor, keys_T: Tensor, *others: Any) -> Tensor:
    places_T, threshold, scale = others
    width = x_TD.shape[1]
    index_TD = places_T[:, None] * width + torch.arange(width, device=x_TD.device)
    z_TD = _low(_low(index_TD) * 0x9E3779B9) ^ _low(keys_T)[:, None]
    z_TD = _low((z_TD ^ (z_TD >> 16)) * 0x7FEB352D)
    z_TD = _low((z_TD ^ (z_TD >> 15)) * 0x846CA68B)
    z_TD = z_TD ^ (z_TD >> 16)
    return torch.where(z_TD >= threshold, x_TD * scale, 0.0).to(x_TD.dtype)


def _low(value: Tensor) -> Tensor:
    """The low 32 bits: int64 arithmetic wraps modulo 2^64, which keeps them right."""
    return value & 0xFFFFFFFF


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over values of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32
