"""Attention tile by tile: its tables, and its kernels in Triton's interpreter, without a GPU.

In a process of its own, as Triton reads how it is to run when it is imported. bfloat16 is left to
tests/gpu: the interpreter cuts where hardware rounds.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.apart import needs_triton, run

from lorafit.engine.graph import Size
from lorafit.kernels import cuda, tiles

PROGRAMME = """
import torch
from lorafit.kernels import attention, tiles
from lorafit.kernels.attention import Documents, Look, attend, reference

MIXED = (1, 63, 64, 65, 200, 7)

def wide(shape, generator, dtype):  # q, k and v, or their gradients, side by side in rows
    tokens, heads, groups, width = shape
    row = torch.randn(tokens, (heads + 2 * groups) * width, generator=generator).to(dtype)
    return row.view(tokens, -1, width).split((heads, groups, groups), dim=1)

def ours(qkv, dout, lengths, window, room=0):
    scale = qkv[0].shape[2] ** -0.5
    table = tiles.table(lengths, room)
    out, lse = tiles.forward(qkv, table, scale=scale, window=window)
    heads = [x.shape[1] for x in qkv]
    grads = dout.new_full((len(dout), sum(heads), dout.shape[2]), 7.0).split(heads, dim=1)
    kept = (*qkv, out, lse)
    tiles.backward(dout, kept, grads=grads, tiles_N3=table, scale=scale, window=window)
    return out, lse, *grads

def made(lengths, heads, groups, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = wide((sum(lengths), heads, groups, width), generator, dtype)
    dout = torch.randn(qkv[0].shape, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, dout

def check(lengths, heads, groups, width, window, dtype, room=0):
    qkv, dout = made(lengths, heads, groups, width, dtype)
    out, lse, *grads = ours(qkv, dout, lengths, window, room)
    exact = [x.double().requires_grad_() for x in qkv]
    look = Look(width ** -0.5, window)
    truth = reference(exact, documents=Documents(lengths), look=look)
    truth.backward(dout.double())
    for name, a, b in zip("out dq dk dv".split(), (out, *grads), (truth, *(x.grad for x in exact))):
        error = float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1))
        limit = 2e-6 if dtype == torch.float32 else 2e-3
        case = (name, lengths, heads, groups, width, window, dtype, error)
        assert error < limit, case

for lengths in ((1,), (65,)):
    check(lengths, 1, 1, 16, 0, torch.float32)
for heads, groups, window in ((2, 2, 0), (3, 1, 7), (4, 1, 100)):
    check(MIXED, heads, groups, 16, window, torch.float32)
for width, window in ((64, 0), (128, 100)):
    check((63, 200), 3, 1, width, window, torch.float16)
check((100, 0, 30, 0), 3, 1, 64, 0, torch.float32, room=9)  # as a recorded graph reads it

for block, inner, window in ((32, 16, 7), (128, 32, 100), (32, 64, 0)):  # as may be tried for speed
    tiles.BLOCK, before = block, dict(tiles.LAUNCHES)
    for kernel in before:
        tiles.LAUNCHES[kernel] = (inner, 4, 2)
    check((1, 65, 130), 2, 1, 16, window, torch.float32)
    tiles.LAUNCHES.update(before)
tiles.BLOCK = 64

# Whatever stands in one document, even what is no number, the others keep their bits.
lengths, second = (70, 65, 13), slice(70, 135)
qkv, dout = made(lengths, 2, 1, 16, torch.float32)
before = ours(qkv, dout, lengths, 0)
for x in (*qkv, dout):
    x[second] = float("nan")
after = ours(qkv, dout, lengths, 0)
others = torch.ones(sum(lengths), dtype=torch.bool)
others[second] = False
for a, b in zip(before, after):
    kept = others if len(a) == len(others) else (slice(None), others)  # lse is [H, T]
    assert a[kept].isfinite().all() and torch.equal(a[kept], b[kept])
# A leak that is planted, by a table whose first document is one token longer, is seen.
qkv, dout = made(lengths, 2, 1, 16, torch.float32)
for a, b in zip(before, ours(qkv, dout, (71, 64, 13), 0)):
    assert not torch.equal(a, b), "a leak"

# Rows that do not lie heads side by side are taken too, and large scores stay numbers.
loose = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv]
for a, b in zip(before, ours(loose, dout, lengths, 0)):
    assert torch.equal(a, b)
assert all(x.isfinite().all() for x in ours([x * 1000 for x in qkv], dout, lengths, 7))

# attention.py takes this way where documents bring their tiles.
attention._runs_on_cudas_kernel = lambda _: True
leaves = [x.detach().requires_grad_() for x in qkv]
documents = Documents(lengths, tiles=tiles.table(lengths))
out = attend(tuple(leaves), documents=documents, look=Look(0.25))
out.backward(dout)
for a, b in zip((out, *(x.grad for x in leaves)), (before[0], *before[2:])):
    assert torch.equal(a, b)
"""


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(0, 9))
def test_each_token_is_in_one_tile_of_its_document(lengths: list[int], more: int) -> None:
    room = tiles.most(sum(lengths), len(lengths)) + more
    table = tiles.table(lengths, room)
    assert len(table) == room, "a recorded graph has so many"
    ends = torch.tensor(lengths).cumsum(0).tolist()
    seen: list[int] = []
    for first, start, end in table.tolist():
        seen += range(first, min(first + tiles.BLOCK, end))
        assert first == end == 0 or ((first - start) % tiles.BLOCK == 0 and end in ends)
        assert first >= end or start == 0 or start in ends
    assert sorted(seen) == list(range(sum(lengths)))
    sizes = [end - start for _, start, end in table.tolist()]
    assert sizes == sorted(sizes, reverse=True), "the longest begin first"


def test_long_documents_are_left_to_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: True)
    context = tiles.MEAN_CONTEXT
    assert tiles.wins([16, 110, 2 * context]) is False and tiles.wins([110] * 64) is True
    assert tiles.wins([context] * 3) is True and tiles.wins([context + 1] * 3) is False
    sizes = [Size.holding([context + more]) for more in (0, 1)]
    assert [size.tiled for size in sizes] == [True, False], "what is recorded is one way"
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert tiles.wins([110] * 64) is False


@needs_triton
def test_tiles_are_the_reference() -> None:
    run(PROGRAMME, TRITON_INTERPRET="1")
