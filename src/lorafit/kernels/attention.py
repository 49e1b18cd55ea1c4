"""Causal attention over documents lying end to end: none sees another.

`forward` keeps the output and one number a query (the log of its sum of exponentials); `backward`
computes the probabilities again from it (Dao et al. 2022, FlashAttention), so that nothing of size
T x T is kept. Where products are our own (products.py), attention.cpp does all of it. Others take
document by document and block by block of queries in batched matrix products with one fused softmax
pass between them, or torch's flash kernel where there is no compiler. CUDA takes all documents at
once: short ones tile by tile (tiles.py), long ones in one call of torch's variable-length flash
attention.

`attend` is the same as one autograd node, for models that run their own forward.
Shapes: `T` tokens, `H` query heads, `G` key heads, `E` head width, `L` tokens of a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.kernels import native, tiles
from lorafit.kernels.elementwise import accumulating
from lorafit.kernels.products import is_own
from lorafit.kernels.rooms import Room

BLOCK = 256
"""Queries of one block: of a long document's scores little more than the half that counts is made,
and those of 9 heads against 2,048 keys are 9 MB in bf16."""


@dataclass(frozen=True)
class Documents:
    """Where documents lie in T tokens, and how a query looks back.

    Attributes:
        lengths: Tokens of each, in order; they add up to T.
        starts: On the device, int32 [documents + 1], 0 first: what CUDA's kernel reads. None on
            the CPU.
        bound: No document is longer, where `starts` alone says how long they are; 0: see `lengths`.
        tiles: On the device, int32 [N, 3]: what tiles.py reads. None where its way is not taken.
    """

    lengths: tuple[int, ...]
    starts: Tensor | None = None
    bound: int = 0
    tiles: Tensor | None = None

    @staticmethod
    def on(device: torch.device, lengths: Sequence[int]) -> "Documents":
        """Documents of these lengths, for tensors on `device`."""
        if device.type != "cuda":
            return Documents(tuple(lengths))
        table = tiles.table(lengths).to(device, non_blocking=True) if tiles.wins(lengths) else None
        begins = Documents(tuple(lengths)).begins.to(device, non_blocking=True)
        return Documents(tuple(lengths), begins, tiles=table)

    @cached_property
    def begins(self) -> Tensor:
        """Where each begins, and the end: int32 [documents + 1] on the CPU."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest, or a bound."""
        return self.bound or max(self.lengths)

    def spans(self) -> Iterator[slice]:
        """The tokens of each."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length


@dataclass(frozen=True)
class Look:
    """How scores are made: q k^T times `scale`, of the last `window` keys (0: all)."""

    scale: float
    window: int = 0


Heads = tuple[Tensor, Tensor, Tensor]
"""q [T, H, E], k and v [T, G, E]."""


def reference(qkv: Heads, *, documents: Documents, look: Look) -> Tensor:
    """The same in plain lines and float64: [T, H, E]."""
    outputs = []
    for span in documents.spans():
        q, k, v = (x[span].double().transpose(0, 1) for x in qkv)
        k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * look.scale
        at = torch.arange(q.shape[1])
        behind = at[:, None] - at
        unseen = (behind < 0) | ((behind >= look.window) & bool(look.window))
        outputs.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def forward(
    qkv: Heads, *, documents: Documents, look: Look, room: Room | None = None
) -> tuple[Tensor, Tensor]:
    """Attention's output [T, H, E], contiguous, and what `backward` needs of it besides: the log
    sums, H floats a token (float32; float64 for float64).

    Args:
        room: Where both are kept, on a CPU.
    """
    q_THE, k_TGE, v_TGE = qkv
    if _runs_on_cudas_kernel(q_THE):
        table = _table(q_THE, documents)
        if table is not None:
            return tiles.forward(qkv, table, scale=look.scale, window=look.window)
        return _flash(qkv, documents=documents, look=look)
    size, sums = q_THE.shape, accumulating(q_THE.dtype)
    if room:
        out_THE = room.kept("attended", size, dtype=q_THE.dtype)
        lse = room.kept("lse", size[:2], dtype=sums).flatten()
    else:
        out_THE, lse = q_THE.new_empty(size), q_THE.new_empty(size[:2].numel(), dtype=sums)
    if _is_own(qkv):
        _forward_own(qkv, (out_THE, lse), documents=documents, look=look)
        return out_THE, lse
    flash = _prefers_flash(q_THE, look)
    for span in documents.spans():
        part = _forward_flash if flash else _forward_document
        kept = lse[span.start * q_THE.shape[1] : span.stop * q_THE.shape[1]]
        part((q_THE[span], k_TGE[span], v_TGE[span]), (out_THE[span], kept), look=look)
    return out_THE, lse


def backward(
    dout_THE: Tensor,
    kept: tuple[Tensor, ...],
    *,
    grads: tuple[Tensor, Tensor, Tensor],
    documents: Documents,
    look: Look,
) -> None:
    """Writes the gradients of q [T, H, E], k and v [T, G, E].

    Args:
        kept: q, k, v, and both that `forward` returned.
        grads: Where to write them; views of wider rows will do.
    """
    q_THE, k_TGE, v_TGE, out_THE, lse = kept
    if _runs_on_cudas_kernel(q_THE):
        table = _table(q_THE, documents)
        if table is not None:
            tiles.backward(
                dout_THE, kept, grads=grads, tiles_N3=table, scale=look.scale, window=look.window
            )
            return
        made = _flash_backward(dout_THE, kept, documents=documents, look=look)
        for grad, computed in zip(grads, made, strict=True):
            grad.copy_(computed)
        return
    if _is_own((q_THE, k_TGE, v_TGE)):
        _backward_own(dout_THE, kept, grads=grads, documents=documents, look=look)
        return
    flash = _prefers_flash(q_THE, look)
    for span in documents.spans():
        part = _backward_flash if flash else _backward_document
        sums = lse[span.start * q_THE.shape[1] : span.stop * q_THE.shape[1]]
        given = (dout_THE[span], q_THE[span], k_TGE[span], v_TGE[span], out_THE[span], sums)
        part(given, tuple(grad[span] for grad in grads), look=look)


# ---- the CPU, in attention.cpp -------------------------------------------------------------------


def _is_own(qkv: Heads) -> bool:
    """Whether attention.cpp computes heads that lie so."""
    q_THE = qkv[0]
    width = q_THE.shape[2]
    beside = all(x.stride()[1:] == (width, 1) for x in qkv)
    return beside and width % 16 == 0 and is_own(q_THE, q_THE.dtype)


def _sizes(qkv: Heads, *, documents: Documents, look: Look) -> tuple[int | float, ...]:
    _, heads, width = qkv[0].shape
    return len(documents.lengths), heads, qkv[1].shape[1], width, look.window, look.scale


def _forward_own(
    qkv: Heads, into: tuple[Tensor, Tensor], *, documents: Documents, look: Look
) -> None:
    call = native.function("attention", qkv[0])
    assert call
    rows = [x.stride(0) for x in qkv]
    at = [x.data_ptr() for x in qkv]  # the heads of a token lie end to end, tokens need not
    sizes = _sizes(qkv, documents=documents, look=look)
    call(*at, *into, documents.begins, *rows, *sizes)


def _backward_own(
    dout_THE: Tensor,
    kept: tuple[Tensor, ...],
    *,
    grads: Heads,
    documents: Documents,
    look: Look,
) -> None:
    *qkv, _, lse = kept
    heads = qkv[0], qkv[1], qkv[2]
    call = native.function("attention_backward", qkv[0])
    assert call
    at, into = ([x.data_ptr() for x in part] for part in (heads, grads))
    rows = [x.stride(0) for x in (*heads, *grads)]
    sizes = _sizes(heads, documents=documents, look=look)
    call(dout_THE.contiguous(), *at, lse, *into, documents.begins, *rows, *sizes)


# ---- the CPU, in batched products ----------------------------------------------------------------


def _grouped(x_LHE: Tensor, groups: int) -> Tensor:
    """[G, H/G x L, E]: the queries of the heads that share a key head, one after the other."""
    length, heads, width = x_LHE.shape
    split = x_LHE.reshape(length, groups, heads // groups, width)
    return split.permute(1, 2, 0, 3).reshape(groups, -1, width)


def _ungrouped(x_GRE: Tensor, into_LHE: Tensor) -> None:
    length, heads, width = into_LHE.shape
    groups = len(x_GRE)
    split = x_GRE.view(groups, heads // groups, length, width).permute(2, 0, 1, 3)
    into_LHE.view(length, groups, heads // groups, width).copy_(split)


def _blocks(length: int) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, and how many keys they see: those up to their own end."""
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        yield slice(start, end), end


def _forward_document(qkv: Heads, into: tuple[Tensor, Tensor], *, look: Look) -> None:
    out_LHE, lse = into
    q_LHE, k_LGE, v_LGE = qkv
    heads, groups = q_LHE.shape[1], k_LGE.shape[1]
    k_GLE, v_GLE = k_LGE.transpose(0, 1).contiguous(), v_LGE.transpose(0, 1).contiguous()
    for block, keys in _blocks(len(q_LHE)):
        q_GRE = _grouped(q_LHE[block], groups)
        scores_GRL = torch.bmm(q_GRE, k_GLE[:, :keys].transpose(1, 2))
        sums = lse[block.start * heads : block.stop * heads]
        _softmax_(scores_GRL, sums, first=block.start, look=look)
        _ungrouped(torch.bmm(scores_GRL, v_GLE[:, :keys]), out_LHE[block])


def _backward_document(given: tuple[Tensor, ...], grads: tuple[Tensor, ...], *, look: Look) -> None:
    dout_LHE, q_LHE, k_LGE, v_LGE, _, lse = given
    dq_LHE, dk_LGE, dv_LGE = grads
    heads, groups = q_LHE.shape[1], k_LGE.shape[1]
    k_GLE, v_GLE = k_LGE.transpose(0, 1).contiguous(), v_LGE.transpose(0, 1).contiguous()
    several = len(q_LHE) > BLOCK
    # blocks are summed in float32; one alone needs no sum
    sums = accumulating(k_GLE.dtype) if several else k_GLE.dtype
    dk_GLE, dv_GLE = (torch.zeros_like(k_GLE, dtype=sums) for _ in range(2))
    for block, keys in _blocks(len(q_LHE)):
        q_GRE, dout_GRE = _grouped(q_LHE[block], groups), _grouped(dout_LHE[block], groups)
        scores_GRL = torch.bmm(q_GRE, k_GLE[:, :keys].transpose(1, 2))
        grads_GRL = torch.bmm(dout_GRE, v_GLE[:, :keys].transpose(1, 2))
        kept = lse[block.start * heads : block.stop * heads]
        _softmax_backward_(scores_GRL, grads_GRL, lse=kept, first=block.start, look=look)
        dv_GLE[:, :keys] += torch.bmm(scores_GRL.transpose(1, 2), dout_GRE)
        dk_GLE[:, :keys] += torch.bmm(grads_GRL.transpose(1, 2), q_GRE)
        _ungrouped(torch.bmm(grads_GRL, k_GLE[:, :keys]), dq_LHE[block])
    dk_LGE.copy_(dk_GLE.transpose(0, 1))
    dv_LGE.copy_(dv_GLE.transpose(0, 1))


def _softmax_(scores_GRL: Tensor, lse: Tensor, *, first: int, look: Look) -> None:
    """Scores -> probabilities in place; `lse` is filled. `first`: the block's first query."""
    groups, rows, keys = scores_GRL.shape
    queries = keys - first
    call = native.function("softmax", scores_GRL)
    if call:
        call(
            scores_GRL, lse, groups * rows, keys, queries, first, look.window, look.scale
        )  # fmt: skip
        return
    wide_GRL = _masked(scores_GRL, first=first, look=look)
    lse.copy_(wide_GRL.logsumexp(-1).flatten())
    scores_GRL.copy_((wide_GRL - lse.view(groups, rows, 1)).exp())


def _softmax_backward_(
    scores_GRL: Tensor, grads_GRL: Tensor, *, lse: Tensor, first: int, look: Look
) -> None:
    """Scores -> probabilities, and their gradients -> the scores' gradients; both in place."""
    groups, rows, keys = scores_GRL.shape
    call = native.function("softmax_backward", scores_GRL)
    if call:
        queries = keys - first
        sizes = (groups * rows, keys, queries, first, look.window)
        call(scores_GRL, grads_GRL, lse, *sizes, look.scale)
        return
    wide_GRL = _masked(scores_GRL, first=first, look=look)
    probabilities_GRL = (wide_GRL - lse.view(groups, rows, 1)).exp()
    along_GR1 = (probabilities_GRL * grads_GRL).sum(-1, keepdim=True)
    scores_GRL.copy_(probabilities_GRL)
    grads_GRL.copy_(probabilities_GRL * (grads_GRL - along_GR1) * look.scale)


def _masked(scores_GRL: Tensor, *, first: int, look: Look) -> Tensor:
    """Scaled scores, -inf where a key is not seen."""
    rows, keys = scores_GRL.shape[1:]
    queries = keys - first
    home = scores_GRL.device
    at_R1 = (torch.arange(rows, device=home) % queries + first)[:, None]
    behind_RL = at_R1 - torch.arange(keys, device=home)
    unseen_RL = (behind_RL < 0) | ((behind_RL >= look.window) & bool(look.window))
    wide_GRL = scores_GRL.to(accumulating(scores_GRL.dtype)) * look.scale
    return wide_GRL.masked_fill(unseen_RL, -torch.inf)


# ---- the CPU without a compiler: torch's own flash kernel ----------------------------------------


def _prefers_flash(q_THE: Tensor, look: Look) -> bool:
    """Whether torch's kernel is the faster: in float32, where products are what costs and it leaves
    out half of them, and where the softmax would be many passes. It knows no window."""
    if look.window or q_THE.dtype == torch.float64 or q_THE.device.type != "cpu":
        return False
    return q_THE.dtype == torch.float32 or native.function("softmax", q_THE) is None


def _batched(x_LHE: Tensor) -> Tensor:
    return x_LHE.transpose(0, 1)[None]


def _forward_flash(qkv: Heads, into: tuple[Tensor, Tensor], *, look: Look) -> None:
    out_LHE, lse = into
    q, k, v = map(_batched, qkv)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=look.scale
    )
    out_LHE.copy_(out[0].transpose(0, 1))
    lse.copy_(sums[0].flatten())


def _backward_flash(given: tuple[Tensor, ...], grads: tuple[Tensor, ...], *, look: Look) -> None:
    dout, q, k, v, out = map(_batched, given[:5])
    sums = given[5].view(1, q.shape[1], q.shape[2])
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, sums, 0.0, True, scale=look.scale
    )
    for grad, computed in zip(grads, made, strict=True):
        grad.copy_(computed[0].transpose(0, 1))


# ---- CUDA ----------------------------------------------------------------------------------------


def _runs_on_cudas_kernel(q_THE: Tensor) -> bool:
    """Its flash kernel takes 16 bits alone; wider numbers go document by document in products."""
    return q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16)


def _table(q_THE: Tensor, documents: Documents) -> Tensor | None:
    """The tiles to take, or None where it is torch's kernel's."""
    return documents.tiles if tiles.takes(q_THE) else None


def _flash(qkv: Heads, *, documents: Documents, look: Look) -> tuple[Tensor, Tensor]:
    # The operators beneath torch.nn.attention.varlen, whose own signature differs between 2.11
    # and 2.13; these take fewer key heads than query heads as they are.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *qkv,
        documents.starts, documents.starts, documents.longest, documents.longest,
        0.0, not look.window, False,
        scale=look.scale, window_size_left=look.window - 1, window_size_right=0,
    )  # fmt: skip
    return out, lse


def _flash_backward(
    dout_THE: Tensor, kept: tuple[Tensor, ...], *, documents: Documents, look: Look
) -> tuple[Tensor, Tensor, Tensor]:
    q_THE, k_TGE, v_TGE, out_THE, lse = kept
    random_state = torch.zeros(2, dtype=torch.uint64, device=q_THE.device)  # dropout's, which is 0
    unused = q_THE.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        dout_THE.contiguous(), q_THE, k_TGE, v_TGE, out_THE, lse,
        documents.starts, documents.starts, documents.longest, documents.longest,
        0.0, not look.window, random_state, unused,
        scale=look.scale, window_size_left=look.window - 1, window_size_right=0,
    )  # fmt: skip


# ---- for models that run their own forward -------------------------------------------------------


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THE: Tensor,
        k_TGE: Tensor,
        v_TGE: Tensor,
        documents: Documents,
        look: Look,
    ) -> Tensor:
        out_THE, lse = forward((q_THE, k_TGE, v_TGE), documents=documents, look=look)
        ctx.save_for_backward(q_THE, k_TGE, v_TGE, out_THE, lse)
        ctx.how = documents, look
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        documents, look = ctx.how
        q, k, v = (x.new_empty(x.shape) for x in ctx.saved_tensors[:3])
        backward(douts[0], ctx.saved_tensors, grads=(q, k, v), documents=documents, look=look)
        return q, k, v, None, None


def attend(qkv: Heads, *, documents: Documents, look: Look) -> Tensor:
    """`forward`'s output with a graph."""
    made = _Attend.apply(*qkv, documents, look)
    assert isinstance(made, Tensor)
    return made
