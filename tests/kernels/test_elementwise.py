"""The passes between products: native and torch against each other, backwards against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafit.kernels import elementwise, native

BOTH = [torch.float32, torch.bfloat16]
T, D, F, H, E = 37, 56, 40, 3, 40  # no multiples of a vector

without_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def angles(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    half = values(T, E // 2, dtype=dtype)
    both = torch.cat([half, half], dim=1)
    return both.cos(), both.sin()


def counters() -> tuple[Tensor, Tensor]:
    return torch.arange(T) // 10 * 77_777_777, torch.arange(T) % 10


def every_pass(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """What each function makes of the same rows."""
    sizes = ((T, D), (D,), (T, D), (T, 2 * F), (T, F), (T, H + 2, E))
    x, weight, dy, both, dh, heads = (values(*s, dtype=dtype).to(device) for s in sizes)
    turns = (angles()[0].to(device), angles()[1].to(device))
    counted = (counters()[0].to(device), counters()[1].to(device))
    y, rstd = elementwise.rms_norm(x, weight, eps=1e-5, dtype=dtype)
    gradients = both.clone()
    weights = [values(E, dtype=dtype).to(device) for _ in range(2)]
    norms = elementwise.HeadNorms(weights[0], weights[1] + 1, H - 1, 1e-5, turns)
    q, k = elementwise.norm_heads(heads[:, :H], norms)
    wide = values(T, H + 2, E, dtype=dtype).to(device) + 1
    elementwise.norm_heads_backward_(wide[:, :H], heads[:, :H], norms=norms)
    low, low_dh = (
        (values(T, 5, dtype=dtype).to(device), values(n, 5, dtype=dtype).to(device))
        for n in (2 * F, F)
    )
    late = both.clone()
    return {
        "swiglu of sums": elementwise.swiglu(both, low=low),
        "swiglu of sums again": elementwise.swiglu_backward_(
            late, dh.clone(), low=low, low_dh=low_dh
        ),
        "gate and up of sums": late,
        "normed q": q,
        "normed k": k,
        "normed back": wide,
        "norm": y,
        "rstd": rstd,
        "norm back": elementwise.rms_norm_backward(
            dy, x, weight_D=weight, rstd_T=rstd, residual_TD=None
        ),
        "with residual": elementwise.rms_norm_backward(
            dy, x, weight_D=weight, rstd_T=rstd, residual_TD=dy
        ),
        "rotated": elementwise.rotate_(heads.clone()[:, :H], turns),
        "back": elementwise.rotate_(heads.clone()[:, :H], turns, inverse=True),
        "untouched": elementwise.rotate_(heads.clone(), turns)[:, H:],
        "swiglu": elementwise.swiglu(both),
        "again": elementwise.swiglu_backward_(gradients, dh),
        "gate and up": gradients,
        "dropped": elementwise.dropped(x, counted, share=0.3),
    }


@without_compiler
@pytest.mark.parametrize("dtype", BOTH)
def test_native_is_torch_to_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = every_pass(dtype)
    monkeypatch.setattr(native, "function", lambda *_: None)
    plain = every_pass(dtype)
    rounding = 1e-6 if dtype == torch.float32 else 2e-4  # a last digit here and there
    for name, expected in plain.items():
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < rounding, name


@without_compiler
def test_the_norm_of_wide_rows_is_written_in_the_products_dtype() -> None:
    x, weight = values(T, D, dtype=torch.float32), values(D, dtype=torch.float32)
    y, rstd = elementwise.rms_norm(x, weight, eps=1e-5, dtype=torch.bfloat16)
    wide, _ = elementwise.rms_norm(x, weight, eps=1e-5, dtype=torch.float32)
    assert torch.equal(y, wide.bfloat16())
    dy = values(T, D, dtype=torch.bfloat16)
    dx = elementwise.rms_norm_backward(dy, x, weight_D=weight, rstd_T=rstd, residual_TD=None)
    expected = elementwise.rms_norm_backward(
        dy.float(), x, weight_D=weight, rstd_T=rstd, residual_TD=None
    )
    assert dx.dtype == torch.float32
    assert torch.allclose(dx, expected, rtol=1e-5, atol=1e-5)


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward(dy)
    assert leaf.grad is not None
    return leaf.grad


def test_backwards_are_autograds() -> None:
    """In float64, of the lines that say what is computed."""
    wide = torch.float64
    x, weight, dy = values(T, D, dtype=wide), values(D, dtype=wide), values(T, D, dtype=wide)
    _, rstd = elementwise.rms_norm(x, weight, eps=1e-5, dtype=wide)
    expected = by_autograd(
        lambda x: elementwise.rms_norm(x, weight, eps=1e-5, dtype=wide)[0], x, dy
    )
    made = elementwise.rms_norm_backward(dy, x, weight_D=weight, rstd_T=rstd, residual_TD=None)
    assert torch.allclose(made, expected, rtol=1e-10)
    both, dh = values(T, 2 * F, dtype=wide), values(T, F, dtype=wide)
    expected = by_autograd(elementwise.swiglu, both, dh)
    h = elementwise.swiglu_backward_(both, dh)
    assert torch.allclose(h, elementwise.swiglu(values(T, 2 * F, dtype=wide)), rtol=1e-12)
    assert torch.allclose(both, expected, rtol=1e-10)


def test_rotating_back_undoes_it() -> None:
    x = values(T, H, E, dtype=torch.float64)
    turned = elementwise.rotate_(x.clone(), angles(torch.float64))
    assert not torch.allclose(turned, x)
    back = elementwise.rotate_(turned, angles(torch.float64), inverse=True)
    assert torch.allclose(back, x, rtol=1e-12)


def test_nan_and_infinity_stay_what_they_are() -> None:
    """The compiler may reorder sums, not reason that every number is finite."""
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [3.0, 4.0]])
    y, _ = elementwise.rms_norm(x, torch.ones(2), eps=0.0, dtype=torch.float32)
    assert y[0].isnan().all() and y[1].isnan().any() and y[2].isfinite().all()
    h = elementwise.swiglu(torch.tensor([[float("nan"), 1.0], [-1e30, 1.0], [200.0, 1.0]]))
    assert h[0].isnan().all() and h[1] == 0 and h[2] == 200


# ---- dropout by counters


def test_a_mask_depends_on_its_counters_alone() -> None:
    x = torch.ones(T, D)
    keys, places = counters()
    whole = elementwise.dropped(x, (keys, places), share=0.4)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    mixed = elementwise.dropped(x, (keys[order], places[order]), share=0.4)
    assert torch.equal(mixed, whole[order])
    assert not torch.equal(elementwise.dropped(x, (keys + 1, places), share=0.4), whole)


def test_masks_drop_their_share_and_do_not_resemble_each_other() -> None:
    """Over a million draws: the share to four sigma, and no correlation between neighbours in
    the row, tokens, or keys that differ by one bit."""
    rows, width, share = 1000, 1024, 0.1
    places = torch.arange(rows)

    def mask(key: int) -> Tensor:
        keys = torch.full((rows,), key)
        return (
            elementwise.dropped(torch.ones(rows, width), (keys, places), share=share) == 0
        ).double()

    first, other = mask(0x12345678), mask(0x12345679)
    sigma = (share * (1 - share) / first.numel()) ** 0.5
    for made in (first, other):
        assert abs(float(made.mean()) - share) < 4 * sigma
    pairs = {
        "neighbours": (first[:, 1:], first[:, :-1]),
        "tokens": (first[1:], first[:-1]),
        "keys": (first, other),
    }
    for name, (a, b) in pairs.items():
        correlation = float(((a - share) * (b - share)).mean()) / (share * (1 - share))
        assert abs(correlation) < 4 / a.numel() ** 0.5, name


def test_what_is_kept_is_scaled() -> None:
    made = elementwise.dropped(torch.ones(T, D), counters(), share=0.25)
    assert made.unique().tolist() == pytest.approx([0.0, 4 / 3])
