"""CUDA: attention, Triton's passes, graphs, and the law, against the CPU. Run where there is a GPU:

pytest -m gpu tests/gpu
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lorafit.kernels import attention, cuda, tiles
from lorafit.kernels.attention import Documents, Look, attend, reference
from tests.kernels.test_attention import LENGTHS, E, heads
from tests.kernels.test_elementwise import every_pass
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


@pytest.mark.parametrize("way", ["tiles", "flash"])
@pytest.mark.parametrize("shape", [(9, 3, 64), (8, 2, 64), (4, 2, 128)])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_are_the_reference(
    dtype: torch.dtype, window: int, shape: tuple[int, int, int], way: str
) -> None:
    lengths, (count, groups, width) = (1, 63, 64, 65, 200, 513, 30), shape
    documents, look = Documents.on(torch.device("cuda"), lengths), Look(width**-0.5, window)
    assert documents.tiles is not None and tiles.takes(torch.empty(1, count, width))
    if way == "flash":
        documents = replace(documents, tiles=None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(lengths), count + 2 * groups, width, generator=generator).to(dtype)
    dout = torch.randn(rows[:, :count].shape, generator=generator).to(dtype)
    results = []
    for _ in range(2):
        wide = rows.cuda()
        q, k, v = wide.split((count, groups, groups), dim=1)
        out, lse = attention.forward((q, k, v), documents=documents, look=look)
        dq, dk, dv = torch.full_like(wide, 7.0).split((count, groups, groups), dim=1)
        kept = (q, k, v, out, lse)
        attention.backward(dout.cuda(), kept, grads=(dq, dk, dv), documents=documents, look=look)
        results.append((out, dq, dk, dv))
    if way == "tiles":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "bit for bit"
    exact = [x.double().requires_grad_() for x in rows.split((count, groups, groups), dim=1)]
    truth = reference((exact[0], exact[1], exact[2]), documents=Documents(lengths), look=look)
    truth.backward(dout.double())
    for a, b in zip(results[0], (truth, *(x.grad for x in exact)), strict=True):
        assert b is not None
        error = (a.double().cpu() - b.detach()).norm() / b.detach().norm()
        assert float(error) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_are_the_plain_ones(dtype: torch.dtype) -> None:
    ours = {name: value.double().cpu() for name, value in every_pass(dtype, "cuda").items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "runs", lambda *_: False)
        plain = every_pass(dtype, "cuda")
    rounding = 1e-6 if dtype == torch.float32 else 2e-3  # a last digit here and there
    for name, expected in plain.items():
        exact = expected.double().cpu()
        assert float((ours[name] - exact).norm() / exact.norm()) < rounding, name
    home = every_pass(dtype, "cpu")["dropped"] == 0
    assert torch.equal(ours["dropped"] == 0, home), "one mask on every device"


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_changes_nothing_on_cuda(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"use_cpu": False, "learning_rate": 2e-3}
    padded, split = (
        trained(tmp_path, model_of(name, dropout=0.1), layout="as_given", **given, **parts)
        for parts in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    )
    laid = trained(tmp_path, model_of(name, dropout=0.1), token_budget=40, **given)
    loss, weights = far(padded, laid)
    yardstick = far(padded, split)
    assert laid._packing.layout == "packed"
    assert loss < 1e-5 and weights < max(1e-4, 5 * yardstick[1])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_graphs_change_nothing(
    name: str, adapter: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(graphs: str) -> Any:
        monkeypatch.setenv("LORAFIT_GRAPHS", graphs)
        model = model_of(name, dropout=0.1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter)
        return trained(tmp_path, model, use_cpu=False, bf16=True, num_train_epochs=4)

    plain, replayed = run("0"), run("1")
    states = replayed._packing.runner.states.fused
    assert states._graphs, "nothing was recorded"
    loss, weights = far(plain, replayed)
    assert loss < 1e-3 and weights < 2e-2


def test_graphs_are_recorded_again_after_the_adapter_was_off(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, model_of("llama"), use_cpu=False, bf16=True, num_train_epochs=6, train=False
    )
    recorded: list[int] = []

    class Off(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            recorded.append(len(trainer._packing.runner.states.fused._graphs))
            if state.global_step == 8:
                with trainer.model.disable_adapter():
                    trainer.evaluate()

    trainer.add_callback(Off())
    trainer.train()
    assert recorded[7] and recorded[-1], recorded


def test_a_run_in_bf16_learns_the_same(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path, model_of("llama"), use_cpu=False, bf16=True, layout=layout)
        for layout in ("as_given", "packed")
    ]
    assert runs[1]._packing.runner.fused
    assert far(*runs)[0] < 1e-2
