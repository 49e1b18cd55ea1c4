"""What cuda.py launches: Triton's own language in Python's syntax.

`width` is the length of a row; a program's first axis is its row, or a group of rows. Kernels are
named after the plain functions in elementwise.py and cross_entropy.py that say what they compute.
"""

# Triton types a function of its own as one that, called from another, never returns.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, weight, y, rstd, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row, at = tile(ROWS, WIDTH)
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
def rms_norm_backward(
    dy, x, weight, rstd, residual, dx, rows, width,
    ADDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = tile(ROWS, WIDTH)
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
def tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None], tl.arange(0, WIDTH)[None, :]


@triton.jit
def rotate(
    x, cosine, sine, stride, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    token, head, at = places(HEADS, HALF)
    inside = (head < heads) & (at < half)
    low_at = x + token * stride + head * half * 2 + at
    low, high = halves(low_at, inside, half)
    low, high = turned(low, high, cosine, sine, token, half, at, sign)
    tl.store(low_at, low, inside)
    tl.store(low_at + half, high, inside)


@triton.jit
def places(HEADS: tl.constexpr, HALF: tl.constexpr):
    return tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]


@triton.jit
def halves(low_at, inside, half):
    low = tl.load(low_at, inside, 0.0).to(tl.float32)
    return low, tl.load(low_at + half, inside, 0.0).to(tl.float32)


@triton.jit
def turned(low, high, cosine, sine, token, half, at, sign):
    turn = token * half * 2 + at
    cosine_low = tl.load(cosine + turn, at < half, 0.0)
    cosine_high = tl.load(cosine + turn + half, at < half, 0.0)
    sine_low = tl.load(sine + turn, at < half, 0.0) * sign
    sine_high = tl.load(sine + turn + half, at < half, 0.0) * sign
    return low * cosine_low - high * sine_low, high * cosine_high + low * sine_high


@triton.jit
def norm_heads(
    x, y, query, key, cosine, sine, stride, split, heads, half, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, head, at = places(HEADS, HALF)
    inside = (head < heads) & (at < half)
    low_at = x + token * stride + head * half * 2 + at
    low, high, scale = scaled_head(low_at, inside, half, eps)
    weight_low, weight_high = head_weights(query, key, head, split, at, half)
    low = rounded(rounded(low * scale, x) * weight_low, x)
    high = rounded(rounded(high * scale, x) * weight_high, x)
    low, high = turned(low, high, cosine, sine, token, half, at, 1.0)
    into = y + (token * heads + head) * half * 2 + at
    tl.store(into, low, inside)
    tl.store(into + half, high, inside)


@triton.jit
def norm_heads_backward(
    grad, x, query, key, cosine, sine, grad_stride, stride, split, heads, half, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, head, at = places(HEADS, HALF)
    inside = (head < heads) & (at < half)
    grad_at = grad + token * grad_stride + head * half * 2 + at
    low, high = halves(grad_at, inside, half)
    low, high = turned(low, high, cosine, sine, token, half, at, -1.0)
    weight_low, weight_high = head_weights(query, key, head, split, at, half)
    low, high = rounded(low, grad) * weight_low, rounded(high, grad) * weight_high
    raw_at = x + token * stride + head * half * 2 + at
    hat_low, hat_high, scale = scaled_head(raw_at, inside, half, eps)
    hat_low, hat_high = hat_low * scale, hat_high * scale
    along = (tl.sum(low * hat_low, 1) + tl.sum(high * hat_high, 1))[:, None] / (half * 2)
    tl.store(grad_at, scale * (low - hat_low * along), inside)
    tl.store(grad_at + half, scale * (high - hat_high * along), inside)


@triton.jit
def scaled_head(low_at, inside, half, eps):
    low, high = halves(low_at, inside, half)
    squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    return low, high, tl.rsqrt(squares / (half * 2) + eps)[:, None]


@triton.jit
def head_weights(query, key, head, split, at, half):
    known = at < half
    low = tl.where(head < split, tl.load(query + at, known, 0.0), tl.load(key + at, known, 0.0))
    at += half
    high = tl.where(head < split, tl.load(query + at, known, 0.0), tl.load(key + at, known, 0.0))
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def rounded(value, like):
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def swiglu(
    both, h, low, ups, rows, width, ranks, column_step, rank_step,
    RANKS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    at = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    gates, uppers = 0, 0
    if RANKS:
        gates, uppers = both_columns(ups, at, width, ranks, column_step, rank_step, RANKS)
    for step in range(STEPS):
        row = row_of(step, ROWS, STEPS)
        inside = (row < rows) & (at < width)
        gate, up = gate_and_up(both, low, gates, uppers, row, at, rows, width, ranks, RANKS)
        silu = rounded(gate * tl.sigmoid(gate), h)
        tl.store(h + row * width + at, silu * up, inside)


@triton.jit
def swiglu_backward(
    both, dh, h, low, ups, low_down, downs, rows, width,
    ranks, column_step, rank_step, ranks_down, column_step_down, rank_step_down,
    RANKS: tl.constexpr, RANKS_DOWN: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    at = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    gates, uppers = 0, 0
    if RANKS:
        gates, uppers = both_columns(ups, at, width, ranks, column_step, rank_step, RANKS)
    if RANKS_DOWN:
        steps = (ranks_down, column_step_down, rank_step_down)
        lowers = columns_of(downs, at, width, *steps, RANKS_DOWN)
    for step in range(STEPS):
        row = row_of(step, ROWS, STEPS)
        inside = (row < rows) & (at < width)
        gate, up = gate_and_up(both, low, gates, uppers, row, at, rows, width, ranks, RANKS)
        grad = tl.load(dh + row * width + at, inside, 0.0).to(tl.float32)
        if RANKS_DOWN:
            left = rows_of(low_down, row, rows, ranks_down, RANKS_DOWN)
            grad = rounded(grad + tl.dot(left, lowers, input_precision="ieee"), dh)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(h + row * width + at, rounded(silu, both) * up, inside)
        gate_at = both + row * width * 2 + at
        tl.store(gate_at, grad * up * sigmoid * (1.0 + gate - silu), inside)
        tl.store(gate_at + width, grad * silu, inside)


@triton.jit
def row_of(step, ROWS: tl.constexpr, STEPS: tl.constexpr):
    first = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS
    return (first + tl.arange(0, ROWS))[:, None]


@triton.jit
def gate_and_up(both, low, gates, uppers, row, at, rows, width, ranks, RANKS: tl.constexpr):
    inside = (row < rows) & (at < width)
    gate_at = both + row * width * 2 + at
    gate = tl.load(gate_at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_at + width, inside, 0.0).to(tl.float32)
    if RANKS:
        left = rows_of(low, row, rows, ranks, RANKS)
        gate = rounded(gate + tl.dot(left, gates, input_precision="ieee"), both)
        up = rounded(up + tl.dot(left, uppers, input_precision="ieee"), both)
    return gate, up


@triton.jit
def both_columns(ups, at, width, ranks, column_step, rank_step, RANKS: tl.constexpr):
    gates = columns_of(ups, at, width, ranks, column_step, rank_step, RANKS)
    beyond = ups + width * column_step
    return gates, columns_of(beyond, at, width, ranks, column_step, rank_step, RANKS)


@triton.jit
def columns_of(ups, at, width, ranks, column_step, rank_step, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)[:, None]
    return tl.load(ups + at * column_step + rank * rank_step, (at < width) & (rank < ranks), 0.0)


@triton.jit
def rows_of(low, row, rows, ranks, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)[None, :]
    return tl.load(low + row * ranks + rank, (row < rows) & (rank < ranks), 0.0)


@triton.jit
def dropped(x, y, keys, places, width, threshold, scale, TILE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    index = (tl.load(places + row) * width + at).to(tl.uint32)
    z = (index * 0x9E3779B9).to(tl.uint32) ^ tl.load(keys + row).to(tl.uint32)
    z = ((z ^ (z >> 16)) * 0x7FEB352D).to(tl.uint32)
    z = ((z ^ (z >> 15)) * 0x846CA68B).to(tl.uint32)
    z = z ^ (z >> 16)
    value = tl.load(x + row * width + at, at < width, 0.0).to(tl.float32) * scale
    tl.store(y + row * width + at, tl.where(z.to(tl.int64) >= threshold, value, 0.0), at < width)


@triton.jit
def cross_entropy(
    logits, targets, nats, width, smoothing, softcap, lift,
    CAPPED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base, target = logits + row * width, tl.load(targets + row)
    highest = tl.full((), float("-inf"), tl.float32)
    total, summed, hit = 0.0, 0.0, 0.0
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        z = capped(tl.load(base + at, at < width, float("-inf")), softcap, CAPPED)
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
        z = capped(tl.load(base + at, at < width, 0.0), softcap, CAPPED)
        grad = tl.exp(z - logarithm) - smoothing / width
        grad -= tl.where(at == target, 1.0 - smoothing, 0.0)
        if CAPPED:
            grad *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(base + at, grad * lift, at < width)


@triton.jit
def capped(value, softcap, CAPPED: tl.constexpr):
    wide = value.to(tl.float32)
    if CAPPED:  # tanh
        wide = softcap * (2.0 * tl.sigmoid(2.0 * wide / softcap) - 1.0)
    return wide
