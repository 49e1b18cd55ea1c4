"""The MLP half of a layer as one autograd node: x + down(silu(gate(norm(x))) * up(norm(x))).

Kept for backward: x, gate and up (and x·A, which is small). Made again: the norm, and the product
of silu(gate) and up. With `keeps=False` gate and up are made again too. Derivation, with
n = norm(x), h = silu(g) u, s = sigmoid(g):

    dh = dy Wd       dg = dh u s (1 + g (1 - s))       du = dh silu(g)
    dn = dg Wg + du Wu (+ LoRA's parts, kernels/lora.py)       dx = dy + norm'(dn)

Shapes: `T` tokens, `D` hidden, `F` feed-forward, `R` ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.kernels import elementwise, lora
from lorafit.kernels.lora import Below, Counters, Joined, Layers
from lorafit.kernels.products import Low
from lorafit.kernels.rooms import Room

MOST_RANKS = 128
"""Numbers of x·A up to which a pass over elements adds x·A·B: it reads B anew for each block."""


@dataclass(frozen=True)
class MlpHalf:
    """The frozen part; gate and up lie side by side."""

    norm_D: Tensor
    eps: float
    gate_up: Layers
    down: Layers


def mlp_half(
    x_TD: Tensor,
    half: MlpHalf,
    *,
    counters: Counters | None,
    dtype: torch.dtype,
    factors: tuple[Tensor | None, ...],
    keeps: bool = True,
    room: Room | None = None,
) -> Tensor:
    """[T, D] in x's dtype.

    Args:
        counters: Of LoRA's dropout; None where nothing is dropped.
        dtype: Of the matrix products.
        factors: A and B of gate, up and down in turn; None where there is no adapter.
        keeps: Whether gate and up are kept for backward.
        room: Where forward writes, on a CPU.
    """
    made = _Node.apply(x_TD, half, counters, dtype, keeps, room, *factors)
    assert isinstance(made, Tensor)
    return made


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        half: MlpHalf,
        counters: Counters | None,
        dtype: torch.dtype,
        keeps: bool,
        room: Room | None,
        *factors: Tensor | None,
    ) -> Tensor:
        joined = lora.join(half.gate_up, factors[:4]), lora.join(half.down, factors[4:])
        n_TD, _ = elementwise.rms_norm(x_TD, half.norm_D, eps=half.eps, dtype=dtype, room=room)
        size = len(x_TD), sum(half.gate_up.widths)
        both_T2F = room and room.kept("both", size, dtype=dtype, until_backward=keeps)
        both_T2F, xa_TR = _gate_and_up(
            n_TD, half, joined=joined[0], counters=counters, into_T2F=both_T2F
        )
        h_TF = elementwise.swiglu(both_T2F, room, low=_low(xa_TR, joined[0]))
        y_TD, xa_down_TR = lora.onto(
            x_TD, h_TF, layers=half.down, joined=joined[1], counters=counters,
            into_TD=room and room.given(x_TD.shape, dtype=x_TD.dtype),
        )  # fmt: skip
        ctx.how = half, counters, dtype, joined, room
        ctx.save_for_backward(x_TD, xa_down_TR, *((both_T2F, xa_TR) if keeps else (None, None)))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        half, counters, dtype, (joined, joined_down), room = ctx.how
        if room:
            room.check()
        x_TD, xa_down_TR, both_T2F, xa_TR = ctx.saved_tensors
        residual_TD = dys[0].contiguous()
        dy_TD = residual_TD.to(dtype)
        n_TD, rstd_T = elementwise.rms_norm(x_TD, half.norm_D, eps=half.eps, dtype=dtype)
        if both_T2F is None:
            both_T2F, xa_TR = _gate_and_up(n_TD, half, joined=joined, counters=counters)
        late = _adds_late(dy_TD, joined_down) and not (counters and half.down.drops)
        dh_TF, dxa_TR = lora.backward_rows(
            dy_TD, half.down, joined=joined_down, counters=counters, adds=not late
        )
        assert dh_TF is not None
        low_dh = None
        if late and dxa_TR is not None and joined_down is not None:
            low_dh = dxa_TR, joined_down.a_RD.T
        h_TF = elementwise.swiglu_backward_(both_T2F, dh_TF, low=_low(xa_TR, joined), low_dh=low_dh)
        # from here on `both_T2F` are gradients
        grads_down = lora.backward_factors(
            dy_TD, h_TF, layers=half.down,
            inner=(xa_down_TR, dxa_TR), joined=joined_down, counters=counters,
        )  # fmt: skip
        below = Below(x_TD, half.norm_D, rstd_T, residual_TD) if ctx.needs_input_grad[0] else None
        dx_TD, grads = lora.backward_to_norm(
            both_T2F, n_TD, layers=half.gate_up,
            xa_TR=xa_TR, joined=joined, counters=counters, below=below,
        )  # fmt: skip
        return (dx_TD, None, None, None, None, None, *grads, *grads_down)


def _gate_and_up(
    n_TD: Tensor,
    half: MlpHalf,
    *,
    joined: Joined | None,
    counters: Counters | None,
    into_T2F: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Both [T, 2F], to which `_low` is still to be added, and x·A."""
    late = _adds_late(n_TD, joined)
    return lora.forward(
        n_TD, half.gate_up, joined=joined, counters=counters, adds=not late, out_TO=into_T2F
    )


def _low(xa_TR: Tensor | None, joined: Joined | None) -> Low | None:
    if joined is None or xa_TR is None or not _adds_late(xa_TR, joined):
        return None
    return xa_TR, joined.b_OR


def _adds_late(x_TD: Tensor, joined: Joined | None) -> bool:
    """Whether what adapters add is left to the pass over elements: one of the rows less."""
    return joined is not None and sum(joined.ranks) <= MOST_RANKS and elementwise.adds_low(x_TD)
