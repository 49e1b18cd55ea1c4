"""What the matrix products of a training step alone would take on this machine.

    python benchmarks/floor.py --shape smollm2-135m --dtype bf16

Runs the products that LoRA training cannot do without, and nothing else: per layer and projection
the frozen forward and dX, the adapter's two forward products, its two of dX, dA and dB; the head's
forward and dX for the supervised tokens. No attention, no elementwise pass, no loss, no optimiser,
no copy; every layer has its own weights, so that they come from memory as in training; results
land in buffers made beforehand. By torch and, where lorafit has products of its own, by those.
Tokens per second of the faster is the floor that shares are read against: an engine that reached
100% would do all the rest in no time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels import products as own
from shapes import RANK, SHAPES, Shape

NUMBERS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Products:
    """The products of `T` tokens for one projection, as calls that fill buffers of their own.

    T tokens, I inputs, O outputs, R rank.

    Attributes:
        ours: By lorafit's own, which add the adapter's part in the same pass.
    """

    weight_OI: Tensor
    a_RI: Tensor
    b_OR: Tensor
    x_TI: Tensor
    dy_TO: Tensor
    needs_dx: bool
    ours: bool
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> None:
        """Forward, then backward."""
        if self.ours:
            self._run_ours()
            return
        xa_TR = self._mm("xa", self.x_TI, self.a_RI.T)
        y_TO = self._mm("y", self.x_TI, self.weight_OI.T)
        torch.addmm(y_TO, xa_TR, self.b_OR.T, out=y_TO)
        dyb_TR = self._mm("dyb", self.dy_TO, self.b_OR)
        self._mm("db", xa_TR.T, self.dy_TO)  # its transpose: the faster of the two on CPUs
        self._mm("da", dyb_TR.T, self.x_TI)
        if self.needs_dx:
            dx_TI = self._mm("dx", self.dy_TO, self.weight_OI)
            torch.addmm(dx_TI, dyb_TR, self.a_RI, out=dx_TI)

    def _run_ours(self) -> None:
        """The same."""
        buffers = self.buffers
        if not buffers:
            buffers |= {"y": torch.empty_like(self.dy_TO), "dx": torch.empty_like(self.x_TI)}
        xa_TR = own.linear(self.x_TI, self.a_RI)
        own.linear(self.x_TI, self.weight_OI, low=(xa_TR, self.b_OR), out_TO=buffers["y"])
        dyb_TR = own.linear_backward(self.dy_TO, self.b_OR)
        own.over_rows(xa_TR, self.dy_TO)
        own.over_rows(dyb_TR, self.x_TI)
        if self.needs_dx:
            low = dyb_TR, self.a_RI
            own.linear_backward(self.dy_TO, self.weight_OI, low=low, out_TD=buffers["dx"])

    def _mm(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = left @ right
        return torch.mm(left, right, out=self.buffers[name])


def layers(
    shape: Shape, tokens: int, *, device: str, dtype: torch.dtype, ours: bool
) -> list[Products]:
    """Every projection of every layer. Weights are each layer's own; activations are shared."""

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype) * 0.02

    sizes = shape.matrices().values()
    wide = {width: drawn(tokens, width) for size in sizes for width in size}
    results: dict[tuple[int, int], dict[str, Tensor]] = {size: {} for size in sizes}
    return [
        Products(
            drawn(rows, columns), drawn(RANK, columns), drawn(rows, RANK),
            wide[columns], wide[rows],
            needs_dx=layer > 0 or number > 2, ours=ours, buffers=results[rows, columns],
        )
        for layer in range(shape.layers)
        for number, (rows, columns) in enumerate(sizes)
    ]  # fmt: skip


def head(
    shape: Shape, tokens: int, *, device: str, dtype: torch.dtype, ours: bool
) -> Callable[[], object]:
    """The head's forward and dX for `tokens` supervised tokens."""
    weight_VD = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
    hidden_ND = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    logits_NV, gradient_ND = hidden_ND @ weight_VD.T, torch.empty_like(hidden_ND)

    def work() -> None:
        if ours:
            own.linear(hidden_ND, weight_VD, out_TO=logits_NV)
            own.linear_backward(logits_NV, weight_VD, out_TD=gradient_ND)
            return
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=gradient_ND)

    return work


def seconds(work: Callable[[], object], *, device: str, repeats: int) -> float:
    """The median time of a call, after one that is not counted."""
    work()
    taken: list[float] = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return median(taken)


def tokens_per_second(
    shape: Shape, counts: list[int], *, device: str, dtype: str, supervised: float, repeats: int
) -> dict[int, float]:
    """The floor by tokens per micro-batch.

    Args:
        counts: Tokens of a micro-batch to try.
        supervised: Share of the tokens that carry loss.
    """
    where = {"device": device, "dtype": NUMBERS[dtype]}
    some = torch.empty(0, device=device)
    ways = [False, True] if own.is_own(some, NUMBERS[dtype]) else [False]
    return {
        tokens: tokens / min(
            _taken(shape, tokens, supervised=supervised, repeats=repeats, ours=ours, where=where)
            for ours in ways
        )
        for tokens in counts
    }  # fmt: skip


def _taken(
    shape: Shape, tokens: int, *, supervised: float, repeats: int, ours: bool, where: dict[str, Any]
) -> float:
    """Seconds of a micro-batch's products."""
    products = layers(shape, tokens, **where, ours=ours)

    def body() -> None:
        for each in products:
            each.run()

    device = where["device"]
    scored = head(shape, max(1, round(tokens * supervised)), **where, ours=ours)
    return seconds(body, device=device, repeats=repeats) + seconds(
        scored, device=device, repeats=repeats
    )


def matrix_rate(*, device: str, dtype: str, width: int) -> float:
    """Floating point operations per second of one square product."""
    left = torch.randn(width, width, device=device, dtype=NUMBERS[dtype])
    result = torch.empty_like(left)
    taken = seconds(lambda: torch.mm(left, left, out=result), device=device, repeats=10)
    return 2 * width**3 / taken


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=NUMBERS, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", default="512,1024,2048", help="of a micro-batch, each tried")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rates = tokens_per_second(
        SHAPES[given.shape], [int(count) for count in given.tokens.split(",")],
        device=given.device, dtype=given.dtype,
        supervised=given.supervised, repeats=given.repeats,
    )  # fmt: skip
    width = 8192 if given.device == "cuda" else 1024
    rate = matrix_rate(device=given.device, dtype=given.dtype, width=width)
    line = vars(given) | {"tokens_per_second": rates, "matrix_rate": rate, "width": width}
    sys.stdout.write(json.dumps(line | {"torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
