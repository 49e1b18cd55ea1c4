"""The attention half of a decoder layer as one autograd node: x + O(attention(rope(QKV(norm(x))))).

Kept for backward: x, the heads q, k, v, attention's output and its log sums (and x·A, which is
small). Made again: the norm, and q and k after a norm of their own (Qwen3). Rotation is undone, not
remembered. With `keeps=False` q, k and v are made again too. Derivation, with n = norm(x):

    do = dy Wo  ->  dq, dk, dv by attention.backward  ->  rotated back  ->  norms of heads back
    dn = dq Wq + dk Wk + dv Wv (+ LoRA's parts, kernels/lora.py)     dx = dy + norm'(dn)

Shapes: `T` tokens, `D` hidden, `O` q, k, v side by side, `H` query heads, `G` key heads, `E` head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.kernels import attention, elementwise, lora
from lorafit.kernels.attention import Documents, Look
from lorafit.kernels.elementwise import HeadNorms
from lorafit.kernels.lora import Below, Counters, Joined, Layers
from lorafit.kernels.rooms import Room


@dataclass(frozen=True)
class Around:
    """What a layer finds in a micro-batch; but for `room` all layers find the same.

    Attributes:
        documents: Where documents lie.
        rotary: Cosines and sines, [T, E] each, float32 (float64 for gradcheck).
        counters: Of LoRA's dropout; None where nothing is dropped.
        dtype: Of the matrix products.
        room: Where forward writes, on a CPU.
    """

    documents: Documents
    rotary: tuple[Tensor, Tensor]
    counters: Counters | None
    dtype: torch.dtype
    room: Room | None = None


@dataclass(frozen=True)
class AttentionHalf:
    """The frozen part. `head_norms`: weights of the norms on q and k, each [E], where there are."""

    norm_D: Tensor
    eps: float
    qkv: Layers
    out: Layers
    heads: int
    groups: int
    look: Look
    head_norms: tuple[Tensor, Tensor] | None = None


class _Made(NamedTuple):
    """q, k, v [T, O] as attention takes them, or before the norms of heads; x·A of QKV."""

    qkv_TO: Tensor
    xa_TR: Tensor | None


def attention_half(
    x_TD: Tensor,
    half: AttentionHalf,
    *,
    around: Around,
    factors: tuple[Tensor | None, ...],
    keeps: bool = True,
) -> Tensor:
    """[T, D] in x's dtype.

    Args:
        factors: A and B of q, k, v and o in turn; None where there is no adapter.
        keeps: Whether q, k and v are kept for backward.
    """
    made = _Node.apply(x_TD, half, around, keeps, *factors)
    assert isinstance(made, Tensor)
    return made


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        half: AttentionHalf,
        around: Around,
        keeps: bool,
        *factors: Tensor | None,
    ) -> Tensor:
        joined = lora.join(half.qkv, factors[:6]), lora.join(half.out, factors[6:])
        room = around.room
        n_TD, _ = elementwise.rms_norm(
            x_TD, half.norm_D, eps=half.eps, dtype=around.dtype, room=room
        )
        size = len(x_TD), sum(half.qkv.widths)
        qkv_TO = room and room.kept("qkv", size, dtype=around.dtype, until_backward=keeps)
        made = _project(n_TD, half, around=around, joined=joined[0], into_TO=qkv_TO)
        heads = _heads(made.qkv_TO, half, around=around)
        out_THE, lse = attention.forward(
            heads, documents=around.documents, look=half.look, room=room
        )
        y_TD, xa_TR = lora.onto(
            x_TD, out_THE.flatten(1), layers=half.out, joined=joined[1], counters=around.counters,
            into_TD=room and room.kept("middle", x_TD.shape, dtype=x_TD.dtype),
        )  # fmt: skip
        ctx.how = half, around, joined
        ctx.save_for_backward(x_TD, out_THE, lse, xa_TR, *(made if keeps else (None, None)))
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        half, around, (joined, joined_out) = ctx.how
        x_TD, out_THE, lse, xa_out_TR, qkv_TO, xa_TR = ctx.saved_tensors
        counters = around.counters
        if around.room:
            around.room.check()
        residual_TD = dys[0].contiguous()
        dy_TD = residual_TD.to(around.dtype)
        dout_TO, dxa_TR = lora.backward_rows(dy_TD, half.out, joined=joined_out, counters=counters)
        grads_out = lora.backward_factors(
            dy_TD, out_THE.flatten(1), layers=half.out,
            inner=(xa_out_TR, dxa_TR), joined=joined_out, counters=counters,
        )  # fmt: skip
        n_TD, rstd_T = elementwise.rms_norm(x_TD, half.norm_D, eps=half.eps, dtype=around.dtype)
        if qkv_TO is None:
            qkv_TO, xa_TR = _project(n_TD, half, around=around, joined=joined)
        assert dout_TO is not None
        kept = (*_heads(qkv_TO, half, around=around), out_THE, lse)
        dqkv_TO = _attention_back(
            dout_TO.view_as(out_THE), kept, half=half, qkv_TO=qkv_TO, around=around
        )
        below = Below(x_TD, half.norm_D, rstd_T, residual_TD) if ctx.needs_input_grad[0] else None
        dx_TD, grads = lora.backward_to_norm(
            dqkv_TO, n_TD, layers=half.qkv,
            xa_TR=xa_TR, joined=joined, counters=counters, below=below,
        )  # fmt: skip
        return (dx_TD, None, None, None, *grads, *grads_out)


def _project(
    n_TD: Tensor,
    half: AttentionHalf,
    *,
    around: Around,
    joined: Joined | None,
    into_TO: Tensor | None = None,
) -> _Made:
    """q, k, v side by side; rotated already where heads have no norms, as nothing else is kept."""
    qkv_TO, xa_TR = lora.forward(
        n_TD, half.qkv, joined=joined, counters=around.counters, out_TO=into_TO
    )
    if half.head_norms is None:
        elementwise.rotate_(_rotated_part(qkv_TO, half), around.rotary)
    return _Made(qkv_TO, xa_TR)


def _rotated_part(qkv_TO: Tensor, half: AttentionHalf) -> Tensor:
    """The view [T, heads, E] of q and k, which lie side by side."""
    all_THE = qkv_TO.view(len(qkv_TO), half.heads + 2 * half.groups, -1)
    return all_THE[:, : half.heads + half.groups]


def _split(qkv_TO: Tensor, half: AttentionHalf) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, heads, E] of q, k and v."""
    heads, groups = half.heads, half.groups
    all_THE = qkv_TO.view(len(qkv_TO), heads + 2 * groups, -1)
    q, k, v = all_THE.split((heads, groups, groups), dim=1)
    return q, k, v


def _heads(qkv_TO: Tensor, half: AttentionHalf, *, around: Around) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention takes them: normed, where heads have norms, and rotated."""
    q, k, v = _split(qkv_TO, half)
    norms = _head_norms(half, around)
    if norms is None:
        return q, k, v
    return *elementwise.norm_heads(_rotated_part(qkv_TO, half), norms), v


def _attention_back(
    dout_THE: Tensor,
    kept: tuple[Tensor, ...],
    *,
    half: AttentionHalf,
    qkv_TO: Tensor,
    around: Around,
) -> Tensor:
    """The gradient of q, k and v side by side, as QKV gave them: [T, O]."""
    dqkv_TO = torch.empty_like(qkv_TO)
    grads = _split(dqkv_TO, half)
    attention.backward(dout_THE, kept, grads=grads, documents=around.documents, look=half.look)
    grad_THE, norms = _rotated_part(dqkv_TO, half), _head_norms(half, around)
    if norms is None:
        elementwise.rotate_(grad_THE, around.rotary, inverse=True)
    else:
        elementwise.norm_heads_backward_(grad_THE, _rotated_part(qkv_TO, half), norms=norms)
    return dqkv_TO


def _head_norms(half: AttentionHalf, around: Around) -> HeadNorms | None:
    if half.head_norms is None:
        return None
    return HeadNorms(*half.head_norms, half.heads, half.eps, around.rotary)
