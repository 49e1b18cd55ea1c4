"""What tiles.py launches: causal attention over documents lying end to end, in Triton's language.

A program is a head and a tile: BLOCK tokens of one document, or fewer at its end. `tiles` [N, 3]
says of each where it begins, and where its document begins and ends; an empty one begins at its
document's end. `x_row` is how far apart the rows of x lie; a row's heads lie side by side. Rows of
neighbours are never read: beyond the document's end a tile is zeros. Logarithms are of base 2
within, natural in `lse`, [H, T] as is `delta`.

With s = scale q k^T, p = exp(s - lse), out = p v and do = d loss / d out, as in Dao et al. 2022:

    dv = p^T do      dp = do v^T      delta = rowsum(p * dp) = rowsum(out * do)
    ds = p * (dp - delta)             dq = scale ds k         dk = scale ds^T q

The sum over keys that makes dq and those over queries (of all heads that share a key head) that
make dk and dv are each one program's, in a fixed order: nothing is added up in memory.
"""

# Triton types a function of its own as one that, called from another, never returns.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
UNSET = tl.constexpr(-1e38)


@triton.jit(do_not_specialize=["tokens", "window"])
def forward(
    q, k, v, out, lse, tiles, q_row, k_row, v_row, tokens, window, scale,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    first, start, end = placed(tiles)
    if first >= end:
        return
    query = first + tl.arange(0, BLOCK)
    q_tile = rows(q + head * WIDTH, first, q_row, end, BLOCK, WIDTH)
    shared = head // SHARE * WIDTH
    highest = tl.full([BLOCK], UNSET, tl.float32)  # finite: a row may see nothing of a block
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    for at in range(earliest(first, start, window, INNER), tl.minimum(first + BLOCK, end), INNER):
        k_tile = rows(k + shared, at, k_row, end, INNER, WIDTH)
        v_tile = rows(v + shared, at, v_row, end, INNER, WIDTH)
        key = at + tl.arange(0, INNER)
        scores = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E)
        scores = tl.where(seen(query[:, None] - key[None, :], window), scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype.element_ty), v_tile, mixed * shrunk[:, None])
        highest = higher
    put(out + head * WIDTH, mixed / total[:, None], first, heads * WIDTH, end, BLOCK, WIDTH)
    sums = (highest + tl.log2(total)) / LOG2_E
    tl.store(column(lse, head, tokens) + query, sums, query < end)


@triton.jit(do_not_specialize=["tokens", "window"])
def backward_queries(
    q, k, v, out, dout, lse, delta, dq, tiles, q_row, k_row, v_row, dq_row, tokens, window, scale,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(0), tl.num_programs(0)
    first, start, end = placed(tiles)
    if first >= end:
        return
    query = first + tl.arange(0, BLOCK)
    own, shared = head * WIDTH, head // SHARE * WIDTH
    q_tile = rows(q + own, first, q_row, end, BLOCK, WIDTH)
    dout_tile = rows(dout + own, first, heads * WIDTH, end, BLOCK, WIDTH)
    out_tile = rows(out + own, first, heads * WIDTH, end, BLOCK, WIDTH)
    along = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    tl.store(column(delta, head, tokens) + query, along, query < end)  # for backward_keys
    sums = tl.load(column(lse, head, tokens) + query, query < end, 0.0) * LOG2_E
    made = tl.zeros([BLOCK, WIDTH], tl.float32)
    for at in range(earliest(first, start, window, INNER), tl.minimum(first + BLOCK, end), INNER):
        k_tile = rows(k + shared, at, k_row, end, INNER, WIDTH)
        v_tile = rows(v + shared, at, v_row, end, INNER, WIDTH)
        key = at + tl.arange(0, INNER)
        scores = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E)
        weights = tl.exp2(scores - sums[:, None])
        weights = tl.where(seen(query[:, None] - key[None, :], window), weights, 0.0)
        dweights = tl.dot(dout_tile, tl.trans(v_tile))
        dscores = weights * (dweights - along[:, None])
        made = tl.dot(dscores.to(k.dtype.element_ty), k_tile, made)
    put(dq + own, made * scale, first, dq_row, end, BLOCK, WIDTH)


@triton.jit(do_not_specialize=["tokens", "window"])
def backward_keys(
    q, k, v, dout, lse, delta, dk, dv, tiles,
    q_row, k_row, v_row, dk_row, dv_row, tokens, window, scale,
    SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    group, dout_row = tl.program_id(0), tl.num_programs(0) * SHARE * WIDTH
    first, _, end = placed(tiles)
    if first >= end:
        return
    key = first + tl.arange(0, BLOCK)
    k_tile = rows(k + group * WIDTH, first, k_row, end, BLOCK, WIDTH)
    v_tile = rows(v + group * WIDTH, first, v_row, end, BLOCK, WIDTH)
    made_k = tl.zeros([BLOCK, WIDTH], tl.float32)
    made_v = tl.zeros([BLOCK, WIDTH], tl.float32)
    blocks = tl.cdiv(tl.minimum(end, first + BLOCK - 1 + window) - first, INNER)
    for number in range(0, blocks * SHARE, 1):  # of each head that shares these keys, in one loop
        head, at = group * SHARE + number // blocks, first + number % blocks * INNER
        q_tile = rows(q + head * WIDTH, at, q_row, end, INNER, WIDTH)
        dout_tile = rows(dout + head * WIDTH, at, dout_row, end, INNER, WIDTH)
        query = at + tl.arange(0, INNER)
        sums = tl.load(column(lse, head, tokens) + query, query < end, 0.0) * LOG2_E
        along = tl.load(column(delta, head, tokens) + query, query < end, 0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E)
        weights = tl.exp2(scores - sums[None, :])
        weights = tl.where(seen(query[None, :] - key[:, None], window), weights, 0.0)
        made_v = tl.dot(weights.to(dout.dtype.element_ty), dout_tile, made_v)
        dweights = tl.dot(v_tile, tl.trans(dout_tile))
        dscores = weights * (dweights - along[None, :])
        made_k = tl.dot(dscores.to(q.dtype.element_ty), q_tile, made_k)
    put(dk + group * WIDTH, made_k * scale, first, dk_row, end, BLOCK, WIDTH)
    put(dv + group * WIDTH, made_v, first, dv_row, end, BLOCK, WIDTH)


@triton.jit
def placed(tiles):
    entry = tiles + tl.program_id(1) * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def earliest(first, start, window, INNER: tl.constexpr):
    # the first block of keys that the first query sees
    return start + tl.maximum(first - window + 1 - start, 0) // INNER * INNER


@triton.jit
def seen(behind, window):
    return (behind >= 0) & (behind < window)


@triton.jit
def column(x, head, tokens):
    return x + tl.cast(head, tl.int64) * tokens


@triton.jit
def rows(x, first, row, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = spots(x, first, row, end, BLOCK, WIDTH)
    return tl.load(at, inside, 0.0)


@triton.jit
def put(x, value, first, row, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = spots(x, first, row, end, BLOCK, WIDTH)
    tl.store(at, value.to(x.dtype.element_ty), inside)


@triton.jit
def spots(x, first, row, end, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.arange(0, BLOCK)[:, None]
    at = x + tl.cast(first, tl.int64) * row + token * row + tl.arange(0, WIDTH)[None, :]
    return at, first + token < end
