"""CUDA: attention, compiled passes, and the law, against the CPU. Run where there is a GPU:

pytest -m gpu tests/gpu
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.kernels import elementwise
from lorafit.kernels.attention import Documents, Look, attend, reference
from tests.kernels.test_attention import LENGTHS, E, heads
from tests.test_packing import CONFIGS, far, model_of, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_is_the_reference(dtype: torch.dtype, window: int) -> None:
    documents, look = Documents.on(torch.device("cuda"), LENGTHS), Look(E**-0.5, window)
    ours = [x.detach().cuda().requires_grad_() for x in heads(dtype)]
    exact = [x.detach().double().requires_grad_() for x in heads(dtype)]
    out = attend((ours[0], ours[1], ours[2]), documents=documents, look=look)
    truth = reference((exact[0], exact[1], exact[2]), documents=Documents(LENGTHS), look=look)
    dout = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout.to(out))
    truth.backward(dout)
    pairs = [(out, truth), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for a, b in pairs:
        assert a is not None and b is not None
        error = (a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()
        assert float(error) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_passes_are_the_plain_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    for tokens in (37, 300, 301):
        x, both, dh = values(tokens, 64), values(tokens, 96), values(tokens, 48)
        counters = torch.arange(tokens).cuda(), torch.arange(tokens).cuda()
        dropped = elementwise.dropped(x, counters, share=0.3)
        home = elementwise.dropped(x.cpu(), (counters[0].cpu(), counters[1].cpu()), share=0.3)
        assert torch.equal(dropped.cpu(), home), "one mask on every device"
        plain = elementwise._swiglu(both)
        assert torch.allclose(elementwise.swiglu(both), plain, rtol=1e-2, atol=1e-3)
        again, grads = both.clone(), both.clone()
        elementwise.swiglu_backward_(again, dh)
        elementwise._swiglu_backward_(grads, dh)
        assert torch.allclose(again, grads, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_changes_nothing_on_cuda(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"use_cpu": False, "learning_rate": 2e-3}
    padded = trained(tmp_path, model_of(name, dropout=0.1), layout="as_given", **given)
    laid = trained(tmp_path, model_of(name, dropout=0.1), token_budget=40, **given)
    loss, weights = far(padded, laid)
    assert laid._packing.layout == "packed"
    assert loss < 1e-5 and weights < 1e-3


def test_a_run_in_bf16_learns_the_same(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path, model_of("llama"), use_cpu=False, bf16=True, layout=layout)
        for layout in ("as_given", "packed")
    ]
    assert runs[1]._packing.runner.fused
    assert far(*runs)[0] < 1e-2
