"""The loss: nats summed over supervised tokens. The only place where a loss is computed.

Knows neither models nor batches, only logits and labels. Shapes: `B` rows, `T` tokens,
`N` supervised tokens, `V` vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

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
    targets_BT = labels_BT[:, 1:] if shifted else labels_BT
    kept_BT = targets_BT != IGNORE
    logits_NV = (logits_BTV[:, :-1] if shifted else logits_BTV)[kept_BT]
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    targets_N = targets_BT[kept_BT]
    return functional.cross_entropy(
        logits_NV, targets_N, reduction="sum", label_smoothing=smoothing
    )


def supervised_tokens(labels: Tensor, *, shifted: bool) -> int:
    """How many labels carry loss; `shifted` leaves out each row's first, which nothing predicts."""
    return int(((labels[..., 1:] if shifted else labels) != IGNORE).sum())
