"""LoRA layers and the half blocks made of them: gradients in float64, what is kept, what is not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.kernels import elementwise, lora
from lorafit.kernels.attention import Documents, Look
from lorafit.kernels.attention_half import Around, AttentionHalf, attention_half
from lorafit.kernels.lora import Adapter, Counters, Layers
from lorafit.kernels.mlp_half import MlpHalf, mlp_half

D, H, G, E, F, R = 8, 4, 2, 4, 12, 3
LENGTHS = (3, 1, 4)
T = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def counters() -> Counters:
    lengths = torch.tensor(LENGTHS)
    keys = torch.randint(2**32, (len(LENGTHS),)).repeat_interleave(lengths)
    return Counters(keys, torch.cat([torch.arange(length) for length in LENGTHS]))


def around(share: float) -> Around:
    half = wide(T, E // 2)
    rotary = torch.cat([half, half], 1).cos(), torch.cat([half, half], 1).sin()
    return Around(Documents(LENGTHS), rotary, counters() if share else None, torch.float64)


def attention_parts(
    share: float, *, head_norms: bool, bias: bool
) -> tuple[AttentionHalf, list[Any]]:
    """A half with adapters of q, v and o, none of k; and their factors."""
    outs = (H * E, G * E, G * E)
    half = AttentionHalf(
        norm_D=wide(D),
        eps=1e-5,
        qkv=Layers(
            wide(sum(outs), D), wide(sum(outs)) if bias else None, outs,
            (Adapter(1.7, share, 1), None, Adapter(0.5, share, 2)),
        ),
        out=Layers(wide(D, H * E), None, (D,), (Adapter(1.7, share, 3),)),
        heads=H,
        groups=G,
        look=Look(E**-0.5),
        head_norms=(wide(E), wide(E)) if head_norms else None,
    )  # fmt: skip
    factors = [wide(R, D), wide(H * E, R), None, None, wide(R + 1, D), wide(G * E, R + 1),
               wide(R, H * E), wide(D, R)]  # fmt: skip
    return half, factors


def mlp_parts(share: float) -> tuple[MlpHalf, list[Any]]:
    adapter = (Adapter(1.7, share, salt) for salt in (4, 5, 6))
    half = MlpHalf(
        wide(D), 1e-5,
        Layers(wide(2 * F, D), None, (F, F), (next(adapter), next(adapter))),
        Layers(wide(D, F), wide(D), (D,), (next(adapter),)),
    )  # fmt: skip
    return half, [wide(R, D), wide(F, R), wide(R, D), wide(F, R), wide(R, F), wide(D, R)]


def leaves(factors: list[Any]) -> list[Tensor]:
    return [factor.requires_grad_() for factor in factors if factor is not None]


KINDS = [
    pytest.param({"head_norms": False, "bias": False}, id="llama"),
    pytest.param({"head_norms": False, "bias": True}, id="qwen2"),
    pytest.param({"head_norms": True, "bias": False}, id="qwen3"),
]


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_half_passes_gradcheck(
    kind: dict[str, bool], keeps: bool, share: float
) -> None:
    half, factors = attention_parts(share, **kind)
    x, trained, shared = wide(T, D).requires_grad_(), leaves(factors), around(share)

    def run(x: Tensor, *given: Tensor) -> Tensor:
        left = list(given)
        filled = tuple(None if factor is None else left.pop(0) for factor in factors)
        return attention_half(x, half, around=shared, factors=filled, keeps=keeps)

    assert torch.autograd.gradcheck(run, (x, *trained))


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("late", [False, True])
def test_the_mlp_half_passes_gradcheck(
    share: float, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gate and up made again; where they are kept they become gradients in place, so that
    backward may run once, and gives the same bits. `late`: as CUDA adds what adapters add."""
    monkeypatch.setattr(elementwise, "adds_low", lambda _: late)
    half, factors = mlp_parts(share)
    x, trained, shared = wide(T, D).requires_grad_(), leaves(factors), around(share).counters
    how: dict[str, Any] = {"counters": shared, "dtype": torch.float64}

    def run(x: Tensor, *given: Tensor, keeps: bool = False) -> Tensor:
        return mlp_half(x, half, factors=given, keeps=keeps, **how)

    assert torch.autograd.gradcheck(run, (x, *trained))
    grads = [
        torch.autograd.grad(run(x, *trained, keeps=keeps).square().sum(), (x, *trained))
        for keeps in (False, True)
    ]
    assert all(map(torch.equal, *grads))


def test_a_half_that_needs_no_gradient_of_its_rows_makes_none() -> None:
    half, factors = attention_parts(0.0, head_norms=False, bias=False)
    trained = leaves(factors)
    made = []
    for asked in (True, False):
        x = torch.ones(T, D, dtype=torch.float64, requires_grad=asked)
        out = attention_half(x, half, around=around(0.0), factors=tuple(factors))
        torch.manual_seed(0)
        made.append(torch.autograd.grad(out.sum(), trained))
    assert len(made[1]) == len(trained)


def test_lora_is_its_reference() -> None:
    x, weight, a, b = wide(T, D), wide(F, D), wide(R, D), wide(F, R)
    layers = Layers(weight, None, (F,), (Adapter(1.7),))
    joined = lora.join(layers, [a, b])
    made, _ = lora.forward(x, layers, joined=joined, counters=None)
    assert torch.allclose(made, lora.reference(x, weight, a_RD=a, b_OR=b, scale=1.7), rtol=1e-12)


def test_what_is_kept_is_what_is_said() -> None:
    """Elements that backward keeps of one micro-batch, beside its inputs' own."""
    sizes: list[int] = []

    def kept(run: Any) -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            run()
        return sum(sizes)

    x = wide(T, D).requires_grad_()
    half, factors = attention_parts(0.0, head_norms=False, bias=False)
    ranks, shared, given = 2 * R + 1, around(0.0), tuple(factors)
    lse, out = T * H, T * H * E
    qkv = T * (H + 2 * G) * E
    least = T * D + out + lse + T * R
    assert kept(lambda: attention_half(x, half, around=shared, factors=given, keeps=False)) == least
    more = qkv + T * ranks
    assert kept(lambda: attention_half(x, half, around=shared, factors=given)) == least + more
    mlp, theirs = mlp_parts(0.0)
    how: dict[str, Any] = {"counters": None, "dtype": torch.float64, "factors": tuple(theirs)}
    least = T * D + T * R
    assert kept(lambda: mlp_half(x, mlp, keeps=False, **how)) == least
    assert kept(lambda: mlp_half(x, mlp, **how)) == least + T * 2 * F + T * 2 * R
