"""Attention over documents on CUDA, in Triton, tile by tile of what there is.

A grid over documents is as high as the longest is long, and mostly empty where documents are
short; here it is a list of tiles, made on the host with the documents. `wins` says for which
documents this is the faster way, `takes` for which tensors; all others are torch's flash kernel's.
Shapes: `T` tokens, `H` query heads, `G` key heads, `E` head width, `N` tiles.
"""

from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels import cuda

BLOCK = 64
"""Tokens of a tile, of queries and of keys."""
MEAN_CONTEXT = 2048
"""Tokens of the document around a token, on average, up to which tiles win, or lose a fiftieth (at
heads of 128) and give the same bits in every run; longer ones are not measured
(benchmarks/results/attention-cuda.txt)."""
WIDTHS = (16, 32, 64, 128)
"""Of heads: powers of two that a matrix product takes."""
LAUNCHES = {
    ("forward", 64): (64, 4, 3),
    ("forward", 128): (64, 4, 3),
    ("backward_queries", 64): (64, 4, 3),
    ("backward_queries", 128): (64, 4, 2),
    ("backward_keys", 64): (64, 4, 3),
    ("backward_keys", 128): (64, 8, 2),
}
"""Of a kernel and heads up to a width: tokens of a block of its inner loop, warps and stages."""


def wins(lengths: Sequence[int]) -> bool:
    """Whether documents of these lengths are best taken by tiles, where there is Triton and the GPU
    has room for them: before Ampere it has not."""
    known = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    short = sum(x * x for x in lengths) <= MEAN_CONTEXT * sum(lengths)
    return short and known and cuda.available()


def takes(q_THE: Tensor) -> bool:
    """Whether the kernels know heads of this width."""
    return q_THE.shape[2] in WIDTHS


def most(tokens: int, documents: int) -> int:
    """No more tiles than these come of so many tokens in so many documents."""
    return tokens // BLOCK + documents


def table(lengths: Sequence[int], room: int = 0) -> Tensor:
    """int32 [N, 3], on the host: where each tile begins, and its document's begin and end.

    The longest documents come first, as their tiles take longest.

    Args:
        lengths: Of the documents, in order; 0 makes no tile.
        room: Fill up to so many by empty tiles.
    """
    spans = sorted(pairwise(accumulate(lengths, initial=0)), key=lambda span: span[0] - span[1])
    flat = [x for a, b in spans for at in range(a, b, BLOCK) for x in (at, a, b)]
    flat += [0] * (3 * room - len(flat))
    # of thousands of numbers, torch.tensor looks at each
    return torch.frombuffer(array("i", flat), dtype=torch.int32).view(-1, 3)


def forward(
    qkv: tuple[Tensor, Tensor, Tensor], tiles_N3: Tensor, *, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The output [T, H, E], contiguous, and the log sums, float32 [H, T]."""
    q_THE, k_TGE, v_TGE = map(_level, qkv)
    tokens, heads, width = q_THE.shape
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THE.device)
    _kernels().forward[heads, len(tiles_N3)](
        q_THE, k_TGE, v_TGE, out_THE, lse_HT, tiles_N3,
        *_row_strides(q_THE, k_TGE, v_TGE), tokens, min(window or tokens, tokens), scale,
        **_how("forward", sizes=(heads // k_TGE.shape[1], width)),
    )  # fmt: skip
    return out_THE, lse_HT


def backward(
    dout_THE: Tensor,
    kept: tuple[Tensor, ...],
    *,
    grads: tuple[Tensor, Tensor, Tensor],
    tiles_N3: Tensor,
    scale: float,
    window: int,
) -> None:
    """Writes the gradients of q, k and v.

    Args:
        kept: q, k, v, and both that `forward` returned.
        grads: Where to write them; rows may lie apart, their heads side by side.
    """
    q_THE, k_TGE, v_TGE = map(_level, kept[:3])
    out_THE, lse_HT = kept[3:]
    dq_THE, dk_TGE, dv_TGE = grads
    assert all(_is_level(grad) for grad in grads)
    dout_THE, delta_HT = dout_THE.contiguous(), torch.empty_like(lse_HT)
    (tokens, heads, width), groups = q_THE.shape, k_TGE.shape[1]
    strides = _row_strides(q_THE, k_TGE, v_TGE)
    numbers, sizes = (tokens, min(window or tokens, tokens), scale), (heads // groups, width)
    # queries first: they make the delta that keys read
    _kernels().backward_queries[heads, len(tiles_N3)](
        q_THE, k_TGE, v_TGE, out_THE, dout_THE, lse_HT, delta_HT, dq_THE, tiles_N3,
        *strides, dq_THE.stride(0), *numbers, **_how("backward_queries", sizes=sizes),
    )  # fmt: skip
    _kernels().backward_keys[groups, len(tiles_N3)](
        q_THE, k_TGE, v_TGE, dout_THE, lse_HT, delta_HT, dk_TGE, dv_TGE, tiles_N3,
        *strides, *_row_strides(dk_TGE, dv_TGE), *numbers, **_how("backward_keys", sizes=sizes),
    )  # fmt: skip


@cache
def _kernels() -> Any:
    from lorafit.kernels import triton_attention

    return triton_attention


def _is_level(x_THE: Tensor) -> bool:
    return x_THE.stride()[1:] == (x_THE.shape[2], 1)


def _level(x_THE: Tensor) -> Tensor:
    """With its heads side by side in each row, wherever the rows lie."""
    return x_THE if _is_level(x_THE) else x_THE.contiguous()


def _row_strides(*xs: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in xs)


def _how(kernel: str, *, sizes: tuple[int, int]) -> dict[str, int]:
    """For so many query heads to a key head, and heads so wide."""
    share, width = sizes
    inner, warps, stages = LAUNCHES[kernel, 64 if width <= 64 else 128]
    shape = {"SHARE": share, "WIDTH": width, "BLOCK": BLOCK, "INNER": inner}
    return {**shape, "num_warps": warps, "num_stages": stages}
