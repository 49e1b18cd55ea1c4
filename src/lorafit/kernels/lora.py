"""Linear layers that read the same rows, with their LoRA adapters: y = x W' + s (drop(x) A') B'.

Hu et al. 2021. Weights are frozen and lie one below the other (q, k, v; gate, up), so that all of
them are one product; so are their A, and their B as blocks of one matrix. Backward by hand:

    dxa = dy sB          dB = s dy' xa        dA = dxa' drop(x)
    dx  = dy W + drop(dxa A)                  the weight gets none: it is frozen

Knows no autograd: the half blocks call these. PEFT's tensors are read as they are, each time.
Shapes: `T` tokens, `D` in, `O` out, `R` ranks of all layers together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorafit.kernels.elementwise import dropped, rms_norm_backward


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
    out_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [T, O], and x·A [T, R], which backward needs and which is small.

    Args:
        adds: Without it x·A·B is still to be added to y.
        out_TO: Where y is written, if anywhere.
    """
    if out_TO is None:
        y_TO = functional.linear(x_TD, layers.weight_OD, layers.bias_O)
    elif layers.bias_O is None:
        y_TO = torch.mm(x_TD, layers.weight_OD.T, out=out_TO)
    else:
        y_TO = torch.addmm(layers.bias_O, x_TD, layers.weight_OD.T, out=out_TO)
    if joined is None:
        return y_TO, None
    if counters is None or not layers.drops:
        xa_TR = x_TD @ joined.a_RD.T
    else:
        parts = zip(joined.a_RD.split(joined.ranks), layers.adapters, strict=True)
        xa_TR = torch.cat(
            [_drop(x_TD, adapter, counters=counters) @ a.T for a, adapter in parts], dim=1
        )
    return y_TO.addmm_(xa_TR, joined.b_OR.T) if adds else y_TO, xa_TR


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
    alike = x_TD.dtype == layers.stored_OD.dtype
    y_TD, xa_TR = forward(
        h_TO, layers, joined=joined, counters=counters, out_TO=into_TD if alike else None
    )
    if alike:
        return y_TD.add_(x_TD), xa_TR
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
    dx_TD = dy_TO @ layers.weight_OD if wanted else None
    if joined is None:
        return dx_TD, None
    dxa_TR = dy_TO @ joined.b_OR
    if not adds:
        return dx_TD, dxa_TR
    if dx_TD is not None and (counters is None or not layers.drops):
        dx_TD.addmm_(dxa_TR, joined.a_RD)
    elif dx_TD is not None and counters is not None:
        halves = zip(dxa_TR.split(joined.ranks, dim=1), joined.a_RD.split(joined.ranks),
                     layers.adapters, strict=True)  # fmt: skip
        for dxa_Tr, a_rD, adapter in halves:
            dx_TD += _drop(dxa_Tr @ a_rD, adapter, counters=counters)
    return dx_TD, dxa_TR


def backward_factors(
    dy_TO: Tensor,
    x_TD: Tensor,
    *,
    layers: Layers,
    products: tuple[Tensor | None, Tensor | None],
    joined: Joined | None,
    counters: Counters | None,
) -> list[Tensor | None]:
    """The gradients of A and B of each layer in turn: in the dtype of the product, on CUDA in
    float32, as they were summed.

    Args:
        products: xa from `forward`, dxa from `backward_rows`.
    """
    xa_TR, dxa_TR = products
    if joined is None or xa_TR is None or dxa_TR is None:
        return [None, None] * len(layers.widths)
    db_OR = _summed(dy_TO.T, xa_TR)
    if counters is None or not layers.drops:
        da_RD = _summed(dxa_TR.T, x_TD)
    else:
        parts = zip(dxa_TR.split(joined.ranks, dim=1), layers.adapters, strict=True)
        da_RD = torch.cat(
            [_summed(part.T, _drop(x_TD, adapter, counters=counters)) for part, adapter in parts]
        )
    grads: list[Tensor | None] = []
    row = column = 0
    for width, rank, adapter in zip(layers.widths, joined.ranks, layers.adapters, strict=True):
        if adapter is None:
            grads += [None, None]
        else:
            db_Or = db_OR[row : row + width, column : column + rank] * adapter.scale
            grads += [da_RD[column : column + rank], db_Or]
        row, column = row + width, column + rank
    return grads


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """A product over tokens, not rounded to 16 bits where the device can leave that out."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


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
        products=(xa_TR, dxa_TR), joined=joined, counters=counters,
    )  # fmt: skip
    if dn_TD is None or below is None:
        return None, grads
    dx_TD = rms_norm_backward(
        dn_TD, below.x_TD, weight_D=below.weight_D, rstd_T=below.rstd_T,
        residual_TD=below.residual_TD.contiguous(),
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
