"""The loss against its float64 reference, and against torch's own error in low precision."""

import pytest
import torch
from torch.nn import functional

from lorafit.kernels import cross_entropy, native
from lorafit.kernels.cross_entropy import (
    IGNORE,
    Head,
    linear_nats,
    linear_nats_each,
    reference,
    summed_nats,
    supervised_tokens,
)


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


# ---- without logits


SETTINGS = [(0.0, 0.0), (0.0, 0.1), (2.0, 0.0), (2.0, 0.1)]


def states(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight, torch.randint(11, (7,), generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, *, targets: torch.Tensor, head: Head
) -> torch.Tensor:
    """In float64, by torch."""
    logits = hidden.double() @ weight.double().T
    logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
    return functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=head.smoothing
    )


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "function", lambda *_: None)
    elif native.compiler() is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize(("softcap", "smoothing"), SETTINGS)
def test_the_head_passes_gradcheck(softcap: float, smoothing: float) -> None:
    hidden, weight, targets = states()
    head = Head(weight, softcap, smoothing)
    assert torch.autograd.gradcheck(lambda h: linear_nats(h, targets, head=head), (hidden,))


@pytest.mark.parametrize(("softcap", "smoothing"), SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_the_head_is_the_sum_over_logits(
    way: str, dtype: torch.dtype, tolerance: float, softcap: float, smoothing: float
) -> None:
    hidden, weight, targets = states(dtype)
    exact = hidden.detach().double().requires_grad_()
    head = Head(weight, softcap, smoothing)
    made = linear_nats(hidden, targets, head=head)
    truth = plain(exact, weight, targets=targets, head=head)
    (made / 3).backward()
    (truth / 3).backward()
    assert hidden.grad is not None and exact.grad is not None
    assert float(made) == pytest.approx(float(truth), rel=tolerance)
    assert float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm()) < tolerance
    each = linear_nats_each(hidden.detach(), targets, head=head)
    assert float(each.sum()) == pytest.approx(float(made), rel=1e-6)


def test_a_few_rows_at_a_time_are_all_rows(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(150, 8, requires_grad=True)
    weight, targets = torch.randn(11, 8), torch.randint(11, (150,))
    whole = linear_nats(hidden, targets, head=Head(weight))
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 1})  # 64 rows, the fewest
    parts = linear_nats(hidden, targets, head=Head(weight))
    grads = [torch.autograd.grad(nats, hidden)[0] for nats in (whole, parts)]
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_rows_that_fill_up_change_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(150, 8, requires_grad=True)
    weight, targets = torch.randn(11, 8), torch.randint(11, (150,))
    exactly = linear_nats(hidden, targets, head=Head(weight))
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "spare", lambda x, _: -len(x) % cross_entropy.ROWS)
    filled = linear_nats(hidden, targets, head=Head(weight))
    grads = [torch.autograd.grad(nats, hidden)[0] for nats in (exactly, filled)]
    assert float(filled) == pytest.approx(float(exactly), rel=1e-6)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)
    assert len(linear_nats_each(hidden.detach(), targets, head=Head(weight))) == 150


def test_16_bits_on_a_cpu_are_filled_up() -> None:
    for rows, dtype, missing in (
        (64, torch.bfloat16, 0),
        (65, torch.float16, 31),
        (65, torch.float32, 0),
    ):
        assert cross_entropy.spare(torch.empty(rows, 2), dtype) == missing


def test_small_probabilities_survive_float16() -> None:
    """Of 100,000 even ones each is 1e-5, below float16's normal numbers."""
    weight = torch.randn(100_000, 4).half() * 1e-3
    hidden, targets = torch.randn(3, 4).half().requires_grad_(), torch.tensor([1, 2, 3])
    linear_nats(hidden, targets, head=Head(weight)).backward()
    exact = hidden.detach().double().requires_grad_()
    plain(exact, weight, targets=targets, head=Head(weight)).backward()
    assert hidden.grad is not None and exact.grad is not None
    assert float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm()) < 5e-3


def test_a_label_outside_the_vocabulary_is_refused(way: str) -> None:
    hidden, weight, targets = states(torch.float32)
    for label in (11, -1):
        targets[3] = label
        with pytest.raises((IndexError, RuntimeError)):
            linear_nats(hidden, targets, head=Head(weight))


def test_no_rows_are_zero_nats() -> None:
    hidden, weight, targets = states(torch.float32)
    none = hidden[:0]
    linear_nats(none, targets[:0], head=Head(weight)).backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert len(linear_nats_each(none.detach(), targets[:0], head=Head(weight))) == 0
