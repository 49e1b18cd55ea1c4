"""What graphs are recorded for, and what fills a micro-batch up; recording is for tests/gpu."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorafit.engine.graph import LEAST, Size, Sums, rung
from lorafit.kernels import tiles

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=300)


@given(lengths)
def test_a_size_holds_its_documents_and_what_fills_it(lengths: list[int]) -> None:
    size = Size.holding(lengths)
    starts, table = (x if x is None else x.tolist() for x in size.tables(lengths))
    between = [end - start for start, end in pairwise(starts)]
    assert between[: len(lengths)] == lengths, "documents lie where they lay"
    assert starts[-1] == size.tokens and len(starts) == size.documents + 1
    assert all(0 <= length <= size.longest for length in between)
    assert (table is not None) == size.tiled
    assert size.tables([])[0][-1] == size.tokens, "what a graph is warmed up on"
    tiled = replace(size, tiled=True).tables(lengths)[1]
    assert tiled is not None
    assert len(tiled) == tiles.most(size.tokens, size.documents), "recorded graphs read so many"


@given(st.integers(1, 1_000_000))
def test_little_of_a_rung_is_left_over(tokens: int) -> None:
    assert tokens <= rung(tokens) == rung(rung(tokens))
    assert tokens < LEAST or (rung(tokens) - tokens) * 8 < tokens


def test_there_are_few_sizes() -> None:
    sizes = {Size.holding([length] * 16) for length in range(1, 513)}
    assert len(sizes) == 1 + 8 * 4, "512, then eighths up to 8,192"


def sums() -> tuple[Sums, Tensor]:
    parameter = torch.nn.Parameter(torch.ones(3))
    made = Sums([parameter])
    made.sums[0] += 5.0  # of the step before
    return made, parameter


def test_sums_begin_at_zero_where_no_gradient_stands() -> None:
    made, parameter = sums()
    made.open()
    assert parameter.grad is made.sums[0] and made.sums[0].tolist() == [0.0] * 3
    made.sums[0] += 2.0
    made.open()
    assert parameter.grad is not None and parameter.grad.tolist() == [2.0] * 3, "they go on"


def test_sums_go_on_from_a_gradient_that_autograd_left() -> None:
    made, parameter = sums()
    parameter.grad = torch.full((3,), 7.0)
    made.open()
    assert parameter.grad is made.sums[0] and parameter.grad.tolist() == [7.0] * 3


def test_whoever_waits_for_a_gradient_is_told() -> None:
    made, parameter = sums()
    seen: list[Tensor] = []
    parameter.register_post_accumulate_grad_hook(seen.append)
    made.open()
    made.close()
    assert seen == [parameter]
