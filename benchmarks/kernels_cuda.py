"""What the CUDA kernels cost: attention by tiles beside torch's flash kernel, passes beside bytes.

    python benchmarks/kernels_cuda.py

Median microseconds of one call, replayed as a graph with the cache flushed between. Attention is
called as kernels/attention.py calls it, with the documents' own bounds and with those of a recorded
graph. Of a pass: how fast it moves the bytes that it must, beside a copy of 1 GiB. Writes
results/kernels-cuda.txt.
"""

import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.engine.graph import Size
from lorafit.kernels import attention, cuda, elementwise, tiles
from lorafit.kernels.attention import Documents, Look
from lorafit.kernels.elementwise import HeadNorms

CUDA = torch.device("cuda")
HEADS = {"9/3 x 64": (9, 3, 64), "32/8 x 64": (32, 8, 64), "16/8 x 128": (16, 8, 128)}
WIDTHS = {"135M": (576, 1536), "0.6B": (1024, 3072), "1B": (2048, 8192)}
"""Hidden and feed-forward, of SmolLM2, Qwen3 and Llama 3.2."""
TOKENS, RANKS = 9344, 16
RESULTS = Path(__file__).parent / "results" / "kernels-cuda.txt"


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return 1e3 * do_bench(graph.replay, warmup=3, rep=15, return_mode="median")


def lengths(kind: str) -> list[int]:
    """Of documents: `d1`, many short ones; else all of one length."""
    if kind != "d1":
        return [int(kind)] * (16384 // int(kind))
    drawn, made = random.Random(0), list[int]()
    while sum(made) < TOKENS:
        made.append(min(2048, max(16, round(110 * math.exp(0.75 * drawn.gauss(0, 1))))))
    return made


def ways(kind: str) -> Iterator[tuple[str, int, Documents]]:
    """Each way of taking the documents: its name, tokens, and what attention is told."""
    own = lengths(kind)
    size, tokens = Size.holding(own), sum(own)
    starts = torch.tensor([0, *own]).cumsum(0).int().to(CUDA)
    table = tiles.table(own).to(CUDA)
    filled = size.filled(own)
    bounds = torch.tensor([0, *filled]).cumsum(0).int().to(CUDA)
    room = tiles.table(filled, tiles.most(size.tokens, size.documents)).to(CUDA)
    yield "flash", tokens, Documents(tuple(own), starts)
    yield "tiles", tokens, Documents(tuple(own), starts, tiles=table)
    yield "flash in a graph", size.tokens, Documents((), bounds, size.longest)
    yield "tiles in a graph", size.tokens, Documents((), bounds, size.longest, room)


def attentions() -> Iterator[str]:
    """A line for each kind of heads and of documents."""
    for kind in ("d1", "512", "2048", "8192"):
        for name, (heads, groups, width) in HEADS.items():
            told = []
            for way, tokens, documents in ways(kind):
                wide = torch.randn(tokens, heads + 2 * groups, width, device=CUDA).bfloat16()
                q, k, v = wide.split((heads, groups, groups), dim=1)
                grads = torch.empty_like(wide).split((heads, groups, groups), dim=1)
                told.append(f"{way} {_attention((q, k, v), grads, documents)}")
            yield f"attention, {name:<11} {kind:<5} {'  '.join(told)}"


def _attention(qkv: Any, grads: Any, documents: Documents) -> str:
    how: dict[str, Any] = {"documents": documents, "look": Look(qkv[0].shape[2] ** -0.5)}
    kept = (*qkv, *attention.forward(qkv, **how))
    dout = torch.randn_like(kept[3])
    there = microseconds(lambda: attention.forward(qkv, **how))
    back = microseconds(lambda: attention.backward(dout, kept, grads=grads, **how))
    return f"{there:.0f} + {back:.0f}"


def passes() -> Iterator[str]:
    """A line for each pass and width: microseconds, and how fast it moves what it must move."""
    one, other = (torch.rand(1 << 29, device=CUDA).bfloat16() for _ in range(2))
    rate = 4 * one.numel() / microseconds(lambda: one.copy_(other)) / 1e6
    yield f"a copy of 1 GiB: {rate:.2f} TB/s, read and written"
    for name, (hidden, wide) in WIDTHS.items():
        for what, (call, moved) in _passes(hidden, wide).items():
            took = microseconds(call)
            yield f"{name:<5} {what:<34}{took:8.1f} us  {2 * moved / took / 1e6:5.2f} TB/s"


def _passes(hidden: int, wide: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each pass and the numbers of 16 bits that it reads and writes."""
    x, dx, both, dh = (
        _rows(width) for width in (hidden, hidden, 2 * wide, wide)
    )  # fmt: skip
    weight, rstd = torch.ones_like(x[0]), torch.ones(TOKENS, device=CUDA)
    low, low_dh = (_rows(2 * RANKS), _wide(2 * wide, 2 * RANKS)), (_rows(RANKS), _wide(wide, RANKS))
    heads = _rows(24 * 128).view(TOKENS, 24, 128)
    angles = torch.rand(TOKENS, 128, device=CUDA), torch.rand(TOKENS, 128, device=CUDA)
    ones = torch.ones_like(heads[0, 0])
    norms = HeadNorms(ones, ones, 16, 1e-6, angles)
    norm: dict[str, Any] = {"weight_D": weight, "rstd_T": rstd, "residual_TD": x}
    rows, ff = TOKENS * hidden, TOKENS * wide
    return {
        "norm": (lambda: elementwise.rms_norm(x, weight, eps=1e-5, dtype=x.dtype), 2 * rows),
        "norm, backward": (lambda: elementwise.rms_norm_backward(dx, x, **norm), 4 * rows),
        "SwiGLU": (lambda: elementwise.swiglu(both), 3 * ff),
        "SwiGLU, adding": (lambda: elementwise.swiglu(both, low=low), 3 * ff),
        "SwiGLU, backward": (lambda: elementwise.swiglu_backward_(both, dh), 6 * ff),
        "SwiGLU, backward, adding": (
            lambda: elementwise.swiglu_backward_(both, dh, low=low, low_dh=low_dh), 6 * ff
        ),
        "24 heads of 128, normed, rotated": (
            lambda: elementwise.norm_heads(heads, norms), 2 * heads.numel()
        ),
        "the same, backward": (
            lambda: elementwise.norm_heads_backward_(heads, heads, norms=norms), 3 * heads.numel()
        ),
    }  # fmt: skip


def _rows(width: int) -> Tensor:
    return torch.randn(TOKENS, width, device=CUDA).bfloat16()


def _wide(columns: int, ranks: int) -> Tensor:
    return torch.randn(columns, ranks, device=CUDA).bfloat16()


def main() -> None:
    """Measure and write."""
    import triton

    assert cuda.available()
    told = (
        f"{datetime.now(UTC):%Y-%m-%d}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}; bf16, {TOKENS:,} tokens, microseconds (forward + backward)"
    )
    lines = [told]
    for part in (passes(), attentions()):
        for line in part:
            print(line, flush=True)
            lines.append(line)
            RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
