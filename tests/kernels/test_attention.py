"""Attention over documents: against the reference, with every way of computing it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.kernels import attention, native
from lorafit.kernels.attention import Documents, Look, attend, reference

H, G, E = 4, 2, 16
LENGTHS = (5, 40, 1, 17, 33)


def heads(dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), count, E) for count in (H, G, G))
    return [(torch.randn(s, generator=generator) * 2).to(dtype).requires_grad_() for s in shapes]


def errors(dtype: torch.dtype, look: Look, lengths: tuple[int, ...] = LENGTHS) -> list[float]:
    """Of the output and the three gradients, by norm, against float64."""
    documents = Documents(lengths)
    ours, exact = (
        heads(dtype, lengths),
        [x.detach().double().requires_grad_() for x in heads(dtype, lengths)],
    )
    out, truth = (
        attend(tuple(ours), documents=documents, look=look),
        reference(tuple(exact), documents=documents, look=look),
    )
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    out.backward(dout.to(dtype))
    truth.backward(dout)
    pairs = [
        (out.detach(), truth.detach()),
        *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
    ]
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


WAYS = ["own", "native", "products", "flash"]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of it in attention.cpp, or how softmax is computed: in one native pass, by torch, or
    within torch's flash kernel."""
    if request.param in ("native", "own") and native.compiler() is None:
        pytest.skip("no C++ compiler")
    if request.param == "own":
        if not attention._is_own(tuple(x.detach() for x in heads(torch.bfloat16))):
            pytest.skip("this CPU does not multiply pairs of bf16, or has matrix tiles")
        return "own"
    monkeypatch.setattr(attention, "_is_own", lambda _: False)
    if request.param != "native":
        monkeypatch.setattr(native, "function", lambda *_: None)
    flash = request.param == "flash"
    monkeypatch.setattr(attention, "_prefers_flash", lambda q, look: flash and not look.window)
    return request.param


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("block", [256, 16])
def test_it_is_the_reference(
    way: str, window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    dtypes = [torch.float32, torch.bfloat16] + [torch.float64] * (way != "flash")
    for dtype in dtypes[:2] if way == "own" else dtypes:
        found = errors(dtype, Look(E**-0.5, window))
        assert max(found) < TOLERANCE[dtype], (dtype, found)


def test_ours_errs_less_than_products(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are not rounded to bf16."""
    if way != "own":
        pytest.skip("of attention.cpp")
    own = errors(torch.bfloat16, Look(E**-0.5), (200, 61))
    monkeypatch.setattr(attention, "_is_own", lambda _: False)
    products = errors(torch.bfloat16, Look(E**-0.5), (200, 61))
    assert all(ours < 0.8 * theirs for ours, theirs in zip(own, products, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_does_not_depend_on_who_computes_what(way: str, dtype: torch.dtype) -> None:
    """A document alone, beside others, by one thread or head by head on several: the same bits."""
    if way != "own":
        pytest.skip("of attention.cpp")
    q, k, v = (x.detach() for x in heads(dtype, (33, 70, 5)))
    dout, threads, found = torch.randn(q.shape).to(dtype), torch.get_num_threads(), []
    for lengths, count in (((33, 70, 5), 1), ((33, 70, 5), 8), ((70,), 1), ((70,), 8)):
        torch.set_num_threads(count)
        at = slice(0, None) if len(lengths) > 1 else slice(33, 103)
        given = tuple(x[at].clone().requires_grad_() for x in (q, k, v))
        out = attend(given, documents=Documents(lengths), look=Look(E**-0.5))
        out.backward(dout[at])
        mine = slice(33, 103) if len(lengths) > 1 else slice(0, None)
        found.append([out.detach()[mine], *(x.grad[mine] for x in given)])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_documents_do_not_see_each_other(way: str) -> None:
    """Whatever stands in one, the others' outputs keep their bits; a leak planted in the spans is
    seen at once."""
    look, documents = Look(E**-0.5), Documents(LENGTHS)
    q, k, v = (x.detach() for x in heads(torch.float32))
    before, _ = attention.forward((q, k, v), documents=documents, look=look)
    second = list(documents.spans())[1]
    for x in (q, k, v):
        x[second] += 1
    after, _ = attention.forward((q, k, v), documents=documents, look=look)
    others = torch.ones(len(q), dtype=torch.bool)
    others[second] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[second], after[second])
    leaking, _ = attention.forward((q, k, v), documents=Documents((45, 1, 17, 33)), look=look)
    assert not torch.equal(leaking[second], after[second])


def test_the_future_is_not_seen(way: str) -> None:
    look, documents = Look(E**-0.5), Documents((20,))
    q, k, v = (x.detach() for x in heads(torch.float32, (20,)))
    before, _ = attention.forward((q, k, v), documents=documents, look=look)
    k[10:], v[10:] = 3.0, 3.0
    after, _ = attention.forward((q, k, v), documents=documents, look=look)
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


def test_gradients_by_hand_are_those_of_differences() -> None:
    q, k, v = heads(torch.float64, (3, 1, 4))
    how = {"documents": Documents((3, 1, 4)), "look": Look(0.7, 3)}
    assert torch.autograd.gradcheck(lambda *x: attend(x, **how), (q, k, v))


def test_large_scores_do_not_overflow(way: str) -> None:
    q, k, v = (x.detach() * 100 for x in heads(torch.float32))
    out, lse = attention.forward((q, k, v), documents=Documents(LENGTHS), look=Look(1.0))
    assert out.isfinite().all() and lse.isfinite().all()


# ---- CUDA's operators, stood in for on a CPU


ATEN = torch.ops.aten


def parameters(operator: str) -> list[str]:
    return [a.name for a in getattr(ATEN, operator).default._schema.arguments]


class Aten:
    """torch.ops.aten with the reference in place of CUDA's flash kernel."""

    def __init__(self) -> None:
        self.called: list[dict[str, object]] = []

    def _bound(
        self, operator: str, given: tuple[object, ...], named: dict[str, object]
    ) -> dict[str, Any]:
        names = parameters(operator)
        assert named.keys() <= set(names)
        self.called.append({**dict(zip(names, given, strict=False)), **named})
        return self.called[-1]

    def _out(self, call: dict[str, Any]) -> Tensor:
        starts = call["cum_seq_q"].tolist()
        lengths = tuple(b - a for a, b in pairwise(starts))
        assert call["max_q"] == max(lengths) and call["window_size_right"] == 0
        assert call["is_causal"] is (call["window_size_left"] == -1)
        look = Look(call["scale"], call["window_size_left"] + 1)
        qkv = (call["query"], call["key"], call["value"])
        return reference(qkv, documents=Documents(lengths), look=look)

    def _flash_attention_forward(self, *given: Any, **named: Any) -> tuple[Any, ...]:
        call = self._bound("_flash_attention_forward", given, named)
        return self._out(call).to(call["query"].dtype), torch.zeros(1), None, None, None

    def _flash_attention_backward(self, *given: Any, **named: Any) -> tuple[Tensor, ...]:
        call = self._bound("_flash_attention_backward", given, named)
        leaves = {name: call[name].detach().requires_grad_() for name in ("query", "key", "value")}
        with torch.enable_grad():
            out = self._out(call | leaves)
        return torch.autograd.grad(out, list(leaves.values()), call["grad_out"].double())


@pytest.mark.parametrize("window", [0, 7])
def test_cudas_kernel_is_called_as_it_wants_to_be(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    aten = Aten()
    monkeypatch.setattr(attention, "_runs_on_cudas_kernel", lambda _: True)
    monkeypatch.setattr(torch.ops, "aten", aten)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ours, exact = (
        heads(torch.bfloat16),
        [x.detach().double().requires_grad_() for x in heads(torch.bfloat16)],
    )
    look = Look(E**-0.5, window)
    out = attend(tuple(ours), documents=Documents(LENGTHS, starts), look=look)
    truth = reference(tuple(exact), documents=Documents(LENGTHS), look=look)
    out.sum().backward()
    truth.sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 2e-2
    assert aten.called[0]["dropout_p"] == 0.0 and aten.called[0]["return_debug_mask"] is False


def test_starts_are_made_for_cuda_alone() -> None:
    assert Documents.on(torch.device("cpu"), [2, 3]).starts is None
    made = Documents.on(torch.device("meta"), [2, 3])
    assert made.longest == 3 and [*made.spans()] == [slice(0, 2), slice(2, 5)]
