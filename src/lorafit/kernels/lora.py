"""Linear layers that read the same rows, with their LoRA adapters: y = x W' + s (drop(x) A') B'.

Hu et al. 2021. Weights are frozen and lie one below the other (q, k, v; gate, up), so that all of
them are one product; so are their A, and their B as blocks of one matrix. Backward by hand:

    dxa = dy sB          dB = s dy' xa        dA = dxa' drop(x)
    dx  = dy W + drop(dxa A)                  the weight gets none: it is frozen

Knows no autograd: the half blocks call these. PEFT's tensors are read as they are, each time.
Shapes: `T` tokens, `D` in, `O` out, `R` ranks of all layers together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorafit.kernels.elementwise import dropped, rms_norm_backward
from lorafit.kernels.products import linear, linear_backward, over_rows


@dataclass(frozen=True)
class Adapter:
    """What a layer's adapter is besides its two matrices.

    Attributes:
        scale: alpha / r, or what stands for it.
        share: Probability of dropout.
        salt: Names the module in the counters of its dropout.
    """

    scale: float
    share: float = 0.0
    salt: int = 0


class Stored(Protocol):
    """Weights that are made anew for each product, such as quantised ones: [O, D]."""

    @property
    def dtype(self) -> torch.dtype:
        """What they are made in."""
        ...

    def __call__(self) -> Tensor:
        """Made, for nobody to keep."""
        ...


@dataclass(frozen=True)
class Layers:
    """Frozen weights side by side.

    Attributes:
        stored_OD: In the dtype of the product, or what makes them so.
        bias_O: None where none of the layers has one.
        widths: Rows of each layer; they add up to O.
        adapters: One for each layer; None where it has none.
    """

    stored_OD: Tensor | Stored
    bias_O: Tensor | None
    widths: tuple[int, ...]
    adapters: tuple[Adapter | None, ...]

    @property
    def weight_OD(self) -> Tensor:
        """The weights of one product."""
        return self.stored_OD if isinstance(self.stored_OD, Tensor) else self.stored_OD()

    @property
    def drops(self) -> bool:
        """Whether an adapter drops inputs."""
        return any(adapter is not None and adapter.share for adapter in self.adapters)


@dataclass(frozen=True)
class Counters:
    """What dropout's masks are made from: int64 [T], the key of each token's example in this step
    and its position there."""

    keys_T: Tensor
    places_T: Tensor

    def filled(self, rows: int) -> "Counters":
        """The same with so many more tokens of nobody's."""
        keys_T, places_T = (functional.pad(x, (0, rows)) for x in (self.keys_T, self.places_T))
        return Counters(keys_T, places_T)

    def of(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """For one adapter's `dropped`."""
        return self.keys_T * 0x9E3779B1 + adapter.salt * 0x85EBCA77, self.places_T


@dataclass(frozen=True)
class Joined:
    """The adapters of `Layers` as one: A below A, B block by block and scaled."""

    a_RD: Tensor
    b_OR: Tensor
    ranks: tuple[int, ...]


def reference(
    x_TD: Tensor, weight_OD: Tensor, *, a_RD: Tensor, b_OR: Tensor, scale: float
) -> Tensor:
    """One layer in plain lines and float64."""
    x_TD = x_TD.double()
    return x_TD @ weight_OD.double().T + scale * (x_TD @ a_RD.double().T) @ b_OR.double().T


def join(layers: Layers, factors: Sequence[Tensor | None]) -> Joined | None:
    """The adapters in the dtype of the product; None where no layer has one.

    Args:
        factors: A and B of each layer in turn, None and None where it has no adapter.
    """
    downs, ups = factors[0::2], factors[1::2]
    ranks = tuple(0 if a is None else len(a) for a in downs)
    if not sum(ranks):
        return None
    some = next(a for a in downs if a is not None)
    how: Any = {"dtype": layers.stored_OD.dtype, "device": some.device}
    a_RD = torch.empty(sum(ranks), some.shape[1], **how)
    b_OR = torch.zeros(sum(layers.widths), sum(ranks), **how)
    row = column = 0
    for width, rank, a, b, adapter in zip(
        layers.widths, ranks, downs, ups, layers.adapters, strict=True
    ):
        if a is not None and b is not None and adapter is not None:
            a_RD[column : column + rank] = a
            torch.mul(b, adapter.scale, out=b_OR[row : row + width, column : column + rank])
        row, column = row + width, column + rank
    return Joined(a_RD, b_OR, ranks)


def forward(
    x_TD: Tensor,
    layers: Layers,
    *,
    joined: Joined | None,
    counters: Counters | None,
    adds: bool = True,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [T, O], and x·A [T, R], which backward needs and which is small.

    Args:
        adds: Without it x·A·B is still to be added to y.
        residual_TO: Added to y, in its dtype.
        out_TO: Where y is written, if anywhere.
    """
    xa_TR = None
    if joined is not None and (counters is None or not layers.drops):
        xa_TR = linear(x_TD, joined.a_RD)
    elif joined is not None and counters is not None:
        parts = zip(joined.a_RD.split(joined.ranks), layers.adapters, strict=True)
        xa_TR = torch.cat(
            [linear(_drop(x_TD, adapter, counters=counters), a) for a, adapter in parts],
            dim=1,
        )
    low = (xa_TR, joined.b_OR) if adds and xa_TR is not None and joined is not None else None
    y_TO = linear(
        x_TD, layers.weight_OD,
        bias_O=layers.bias_O, low=low, residual_TO=residual_TO, out_TO=out_TO,
    )  # fmt: skip
    return y_TO, xa_TR


def onto(
    x_TD: Tensor,
    h_TO: Tensor,
    *,
    layers: Layers,
    joined: Joined | None,
    counters: Counters | None,
    into_TD: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """A half block's result, the residual rows x plus what `layers` make of h, in x's dtype and
    written to `into_TD` if that is given; and x·A."""
    if x_TD.dtype == layers.stored_OD.dtype:
        return forward(
            h_TO, layers, joined=joined, counters=counters,
            residual_TO=x_TD.contiguous(), out_TO=into_TD,
        )  # fmt: skip
    y_TD, xa_TR = forward(h_TO, layers, joined=joined, counters=counters)
    return torch.add(x_TD, y_TD, out=into_TD).to(x_TD.dtype), xa_TR


def backward_rows(
    dy_TO: Tensor,
    layers: Layers,
    *,
    joined: Joined | None,
    counters: Counters | None,
    wanted: bool = True,
    adds: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [T, D] (None unless `wanted`), and dxa [T, R] for `backward_factors`. Without `adds`
    dxa·A is still to be added to dx."""
    dxa_TR = None if joined is None else linear_backward(dy_TO, joined.b_OR)
    if not wanted:
        return None, dxa_TR
    if joined is None or dxa_TR is None or not adds:
        return linear_backward(dy_TO, layers.weight_OD), dxa_TR
    if counters is None or not layers.drops:
        low = dxa_TR, joined.a_RD
        return linear_backward(dy_TO, layers.weight_OD, low=low), dxa_TR
    dx_TD = linear_backward(dy_TO, layers.weight_OD)
    halves = zip(dxa_TR.split(joined.ranks, dim=1), joined.a_RD.split(joined.ranks),
                 layers.adapters, strict=True)  # fmt: skip
    for dxa_Tr, a_rD, adapter in halves:
        part_TD = linear_backward(dxa_Tr.contiguous(), a_rD)
        dx_TD += _drop(part_TD, adapter, counters=counters)
    return dx_TD, dxa_TR


def backward_factors(
    dy_TO: Tensor,
    x_TD: Tensor,
    *,
    layers: Layers,
    inner: tuple[Tensor | None, Tensor | None],
    joined: Joined | None,
    counters: Counters | None,
) -> list[Tensor | None]:
    """The gradients of A and B of each layer in turn: as `over_rows` sums them.

    Args:
        inner: xa from `forward`, dxa from `backward_rows`.
    """
    xa_TR, dxa_TR = inner
    if joined is None or xa_TR is None or dxa_TR is None:
        return [None, None] * len(layers.widths)
    if counters is None or not layers.drops:
        da_RD = over_rows(dxa_TR, x_TD)
    else:
        parts = zip(dxa_TR.split(joined.ranks, dim=1), layers.adapters, strict=True)
        da_RD = torch.cat(
            [over_rows(part, _drop(x_TD, adapter, counters=counters)) for part, adapter in parts]
        )
    grads: list[Tensor | None] = []
    parts_of_b = _upper_gradients(dy_TO, xa_TR, layers=layers, ranks=joined.ranks)
    for db_Or, da_rD, adapter in zip(
        parts_of_b, da_RD.split(joined.ranks), layers.adapters, strict=True
    ):
        grads += [None, None] if adapter is None else [da_rD, db_Or * adapter.scale]
    return grads


def _upper_gradients(
    dy_TO: Tensor, xa_TR: Tensor, *, layers: Layers, ranks: tuple[int, ...]
) -> Iterator[Tensor]:
    """Of each layer's B, unscaled. On CUDA one product, whose parts beside the diagonal are left,
    as launching three takes longer."""
    if not dy_TO.is_cuda:
        pairs = zip(dy_TO.split(layers.widths, dim=1), xa_TR.split(ranks, dim=1), strict=True)
        yield from (over_rows(dy_To, xa_Tr) for dy_To, xa_Tr in pairs)
        return
    rows = over_rows(dy_TO, xa_TR).split(layers.widths)
    for number, db_oR in enumerate(rows):
        yield db_oR.split(ranks, dim=1)[number]


class Below(NamedTuple):
    """What lies below layers that read a norm: its rows, weight and 1 / rms, and the gradient that
    passes around both."""

    x_TD: Tensor
    weight_D: Tensor
    rstd_T: Tensor
    residual_TD: Tensor


def backward_to_norm(
    dy_TO: Tensor,
    n_TD: Tensor,
    *,
    layers: Layers,
    xa_TR: Tensor | None,
    joined: Joined | None,
    counters: Counters | None,
    below: Below | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of a half block's rows through the norm `n_TD` (None without `below`), and those
    of `backward_factors`."""
    dn_TD, dxa_TR = backward_rows(
        dy_TO, layers, joined=joined, counters=counters, wanted=below is not None
    )
    grads = backward_factors(
        dy_TO, n_TD, layers=layers,
        inner=(xa_TR, dxa_TR), joined=joined, counters=counters,
    )  # fmt: skip
    if dn_TD is None or below is None:
        return None, grads
    dx_TD = rms_norm_backward(
        dn_TD, below.x_TD, weight_D=below.weight_D, rstd_T=below.rstd_T,
        residual_TD=below.residual_TD,
    )  # fmt: skip
    return dx_TD, grads


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, counted: tuple[Tensor, Tensor], share: float) -> Tensor:
        ctx.how = counted, share
        return dropped(x_TD, counted, share=share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        counted, share = ctx.how
        return dropped(grads[0].contiguous(), counted, share=share), None, None


def drop(x_TD: Tensor, adapter: Adapter, *, counters: Counters) -> Tensor:
    """The inputs that an adapter sees, with a graph: for layers that run their own forward."""
    made = _Dropped.apply(x_TD.contiguous(), counters.of(adapter), adapter.share)
    assert isinstance(made, Tensor)
    return made


def _drop(x_TD: Tensor, adapter: Adapter | None, *, counters: Counters) -> Tensor:
    if adapter is None or not adapter.share:
        return x_TD
    return dropped(x_TD, counters.of(adapter), share=adapter.share)
