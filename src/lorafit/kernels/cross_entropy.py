"""The loss: nats summed over supervised tokens. The only place where a loss is computed.

`summed_nats` takes logits as a model made them. `linear_nats` takes the hidden states of supervised
tokens and a frozen head, a few rows at a time: logits become their own gradient in place and are
never all there; the head gets none. Backward by hand, with p = softmax(h W'):

    dh = (p - onehot) W       smoothed: (p - (1 - a) onehot - a / V) W
    with soft-capping z = c tanh(l / c): times 1 - (z / c)^2 before W

Knows neither models nor batches. Shapes: `B` rows, `T` tokens, `N` supervised tokens, `D` hidden,
`V` vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorafit.kernels import cuda, native
from lorafit.kernels.elementwise import accumulating
from lorafit.kernels.products import ROWS, linear, linear_backward, spare

IGNORE = -100
"""The label of a token that carries no loss (torch's and transformers' convention)."""


def reference(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The same sum in float64 and plain lines: what `summed_nats` is tested against. Scalar."""
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_BTV.double(), labels_BT, strict=True):
        for logits_V, label in zip(logits_TV[:-1], labels_T[1:].tolist(), strict=True):
            if label != IGNORE:
                total = total + logits_V.logsumexp(0) - logits_V[label]
    return total


def summed_nats(
    logits_BTV: Tensor, labels_BT: Tensor, *, smoothing: float = 0.0, shifted: bool = True
) -> Tensor:
    """Negative log-likelihood in nats, summed over the supervised tokens.

    Token t is predicted from the logits at t - 1, so the first label of a row is never used.
    Only supervised rows are upcast to float32, as transformers' `ForCausalLMLoss` upcasts all.

    Args:
        logits_BTV: Unshifted logits, any floating dtype.
        labels_BT: Unshifted labels, `IGNORE` where no loss is wanted.
        smoothing: Label smoothing (Szegedy et al. 2016), uniform over the vocabulary.
        shifted: False where logits and labels lie side by side (any leading shape), as those of a
            classifier.

    Returns:
        A float32 scalar (float64 for float64 logits); 0, with a graph, where nothing is supervised.
    """
    logits_NV, targets_N = _supervised(logits_BTV, labels_BT, shifted=shifted)
    return functional.cross_entropy(
        logits_NV, targets_N, reduction="sum", label_smoothing=smoothing
    )


def summed_and_each(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What `summed_nats` gives, bit for bit, and the nats of each supervised token, [N]."""
    logits_NV, targets_N = _supervised(logits_BTV, labels_BT, shifted=True)
    logs_NV = logits_NV.log_softmax(-1)  # of which cross entropy is made too
    total = functional.nll_loss(logs_NV, targets_N, reduction="sum")
    return total, functional.nll_loss(logs_NV, targets_N, reduction="none")


def _supervised(logits_BTV: Tensor, labels_BT: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    targets_BT = labels_BT[:, 1:] if shifted else labels_BT
    kept_BT = targets_BT != IGNORE
    logits_NV = (logits_BTV[:, :-1] if shifted else logits_BTV)[kept_BT]
    return logits_NV.to(accumulating(logits_NV.dtype)), targets_BT[kept_BT]


def supervised_tokens(labels: Tensor, *, shifted: bool) -> int:
    """How many labels carry loss; `shifted` leaves out each row's first, which nothing predicts."""
    return int(((labels[..., 1:] if shifted else labels) != IGNORE).sum())


@dataclass(frozen=True)
class Head:
    """A frozen output layer.

    Attributes:
        weight_VD: In the dtype of the product.
        softcap: Logits are bent to lie within this (Gemma 2); 0: as they are.
        smoothing: Label smoothing, uniform over the vocabulary.
    """

    weight_VD: Tensor
    softcap: float = 0.0
    smoothing: float = 0.0


CHUNK = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Bytes of logits at a time: within a CPU's last cache, and below the 32 MiB from which glibc asks
Linux for fresh pages each time; enough rows for a GPU's products."""


_LIFT = 4096.0
"""float16 cannot tell probabilities below 6e-8 from 0; their gradients are stored times this."""


def linear_nats(hidden_ND: Tensor, targets_N: Tensor, *, head: Head) -> Tensor:
    """Negative log-likelihood in nats of `hidden_ND @ head.T`, summed: a float32 scalar (float64
    for float64) whose backward is that of `hidden_ND` alone."""
    made = _LinearNats.apply(hidden_ND, targets_N, head)
    assert isinstance(made, Tensor)
    return made


def linear_nats_each(hidden_ND: Tensor, targets_N: Tensor, *, head: Head) -> Tensor:
    """The same for each token, [N], without a graph: what evaluation sums."""
    parts = [nats_N for nats_N, _ in _chunks(hidden_ND, targets_N, head=head)]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)


class _LinearNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor:
        dtype = head.weight_VD.dtype
        total = torch.zeros((), dtype=accumulating(dtype), device=hidden_ND.device)
        size = len(hidden_ND) + spare(hidden_ND, dtype), hidden_ND.shape[1]
        dhidden_ND = torch.empty(size, dtype=dtype, device=hidden_ND.device)
        start = 0
        for nats_N, dlogits_NV in _chunks(hidden_ND, targets_N, head=head):
            total += nats_N.sum()
            rows_ND = dhidden_ND[start : start + len(dlogits_NV)]
            linear_backward(dlogits_NV, head.weight_VD, out_TD=rows_ND)
            start += len(dlogits_NV)
        ctx.save_for_backward(dhidden_ND[: len(hidden_ND)])
        ctx.dtype = hidden_ND.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dhidden_ND,) = ctx.saved_tensors
        wide_ND = dhidden_ND.to(accumulating(dhidden_ND.dtype))
        lowered = grads[0] / _LIFT if dhidden_ND.dtype == torch.float16 else grads[0]
        return (wide_ND * lowered).to(ctx.dtype), None, None


def _chunks(hidden_ND: Tensor, targets_N: Tensor, *, head: Head) -> Iterator[tuple[Tensor, Tensor]]:
    """Nats of a few rows at a time, and the gradient of their logits, until the next are asked for:
    all stand in one buffer, as fresh memory of this size costs as much as the product. Rows beyond
    the last (`spare`) have a gradient of 0."""
    weight_VD = head.weight_VD
    fill = spare(hidden_ND, weight_VD.dtype)
    room = CHUNK.get(hidden_ND.device.type, CHUNK["cpu"])
    most = max(64, room // (len(weight_VD) * weight_VD.element_size()) // ROWS * ROWS)
    size = max(1, min(len(targets_N) + fill, most))
    buffer_NV = weight_VD.new_empty(size, len(weight_VD))
    filled_ND = functional.pad(hidden_ND, (0, 0, 0, fill)) if fill else hidden_ND
    for rows_ND, rows_N in zip(filled_ND.split(size), targets_N.split(size), strict=True):
        logits_NV = buffer_NV[: len(rows_ND)]
        linear(rows_ND.to(weight_VD.dtype).contiguous(), weight_VD, out_TO=logits_NV)
        nats_N = _nats_(logits_NV[: len(rows_N)], rows_N, head=head)
        logits_NV[len(rows_N) :] = 0
        yield nats_N, logits_NV


def _nats_(logits_NV: Tensor, targets_N: Tensor, *, head: Head) -> Tensor:
    """Nats of each row [N]; the logits become the gradient of their sum."""
    call = native.function("cross_entropy", logits_NV)
    if call:
        if len(targets_N) and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < len(
            logits_NV[0]
        ):  # C++ would read what lies beside the row
            raise IndexError(f"A label lies outside the vocabulary of {len(logits_NV[0])} tokens.")
        nats_N = torch.empty(len(logits_NV), dtype=torch.float32)
        call(logits_NV, targets_N, nats_N, *logits_NV.shape, head.smoothing, head.softcap)
        return nats_N
    lift = _LIFT if logits_NV.dtype == torch.float16 else 1.0
    if cuda.runs(logits_NV):
        return cuda.cross_entropy_(logits_NV, targets_N, head.smoothing, head.softcap, lift)
    wide_NV = logits_NV.to(accumulating(logits_NV.dtype))
    if head.softcap:
        wide_NV = head.softcap * torch.tanh(wide_NV / head.softcap)
    log_NV = wide_NV.log_softmax(dim=1)
    hit_N1, even = targets_N[:, None], head.smoothing / log_NV.shape[1]
    nats_N = -(1 - head.smoothing) * log_NV.gather(1, hit_N1)[:, 0] - even * log_NV.sum(dim=1)
    grad_NV = log_NV.exp_().sub_(even)
    grad_NV.scatter_add_(1, hit_N1, grad_NV.new_full(hit_N1.shape, head.smoothing - 1))
    if head.softcap:
        grad_NV *= 1 - (wide_NV / head.softcap).square()
    logits_NV.copy_(grad_NV * lift)
    return nats_N
