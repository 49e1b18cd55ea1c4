"""The loss against its float64 reference, and against torch's own error in low precision."""

import pytest
import torch
from torch.nn import functional

from lorafit.kernels.cross_entropy import IGNORE, reference, summed_nats, supervised_tokens


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, vocabulary = 3, 17, 29
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows, tokens), generator=generator)
    labels[:, :5] = IGNORE
    labels[1, 9:] = IGNORE
    return logits, labels


def test_equals_the_reference() -> None:
    logits, labels = batch()
    truth = float(reference(logits, labels))
    assert float(summed_nats(logits, labels)) == pytest.approx(truth, rel=1e-6)
    assert float(summed_nats(logits.double(), labels)) == pytest.approx(truth, rel=1e-14)


def test_first_label_of_a_row_is_never_a_target() -> None:
    logits, labels = batch()
    moved = labels.clone()
    moved[:, 0] = 3
    assert summed_nats(logits, labels) == summed_nats(logits, moved)
    assert supervised_tokens(moved, shifted=True) == supervised_tokens(labels, shifted=True)
    assert supervised_tokens(moved, shifted=False) == supervised_tokens(labels, shifted=False) + 3


def test_rows_add_up() -> None:
    logits, labels = batch()
    apart = sum(summed_nats(logits[i : i + 1], labels[i : i + 1]) for i in range(3))
    assert apart == pytest.approx(float(summed_nats(logits, labels)), rel=1e-6)


def test_low_precision_is_no_worse_than_torch() -> None:
    logits, labels = batch()
    truth = reference(logits, labels)
    half = logits.bfloat16()
    torchs = functional.cross_entropy(
        half[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    assert abs(summed_nats(half, labels) - truth) <= abs(torchs - truth) + 1e-4


def test_nothing_supervised_is_zero_with_a_graph() -> None:
    logits, labels = batch()
    logits.requires_grad_()
    nats = summed_nats(logits, torch.full_like(labels, IGNORE))
    nats.backward()
    assert nats == 0
    assert logits.grad is not None and not logits.grad.any()


def test_smoothing_is_the_mixture_with_uniform() -> None:
    logits, labels = batch()
    kept = labels[:, 1:] != IGNORE
    log_p = logits[:, :-1][kept].double().log_softmax(-1)
    uniform = -log_p.mean(-1).sum()
    expected = 0.9 * reference(logits, labels) + 0.1 * uniform
    assert summed_nats(logits, labels, smoothing=0.1) == pytest.approx(float(expected), rel=1e-6)
