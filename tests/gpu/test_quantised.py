"""CUDA: quantised bases, and optimiser state that is paged. Run where there is a GPU:

pytest -m gpu tests/gpu
"""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafit.arguments import ModelArguments, TrainingArguments
from lorafit.engine import optim, precision
from lorafit.model import adapters, base, quantised
from tests.test_packing import CONFIGS, far, trained

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
PAGED = ["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"]


def is_managed(tensor: Tensor) -> bool:
    """What the driver says of the memory: CU_POINTER_ATTRIBUTE_IS_MANAGED."""
    answer = ctypes.c_uint(0)
    driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64(tensor.data_ptr())
    assert driver.cuPointerGetAttribute(ctypes.byref(answer), 8, pointer) == 0
    return answer.value == 1


class Run:
    """A layer of a million weights that learns a fixed map."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model, self.step = nn.Linear(1024, 1024).to(CUDA), 0
        made = optim.named(TrainingArguments("out", optim=name), CUDA, sizes=[2**20, 1024])
        self.notice = made.notice
        groups = optim.groups(self.model, decayed=[], decay=0.0)
        self.updater = optim.Updater(made.make(groups))

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            rows = torch.randn(32, 1024, generator=torch.Generator().manual_seed(self.step))
            self.updater.zero_grad()
            (self.model(rows.to(CUDA)) - rows.to(CUDA)).square().mean().backward()
            self.updater.apply(torch.tensor(True))
            self.step += 1
        torch.cuda.synchronize()
        return self

    @property
    def state(self) -> dict[str, Any]:
        return self.updater.optimizer.state[self.model.weight]


@pytest.mark.parametrize("name", PAGED)
def test_paged_state_is_paged_and_survives_a_spike(name: str) -> None:
    run = Run(name).go(3)
    assert "can leave the GPU" in run.notice
    assert run.state["state1"].is_paged and is_managed(run.state["state1"])
    before = run.state["state1"].clone()
    free, _ = torch.cuda.mem_get_info()
    spike = torch.empty(int(free * 0.98), dtype=torch.uint8, device=CUDA).fill_(1)
    torch.cuda.synchronize()
    run.updater.optimizer.prefetch_state(run.model.weight)  # type: ignore[operator]
    del spike
    torch.cuda.empty_cache()
    assert torch.equal(run.state["state1"], before)
    straight = Run(name).go(6)
    assert torch.equal(run.go(3).model.weight, straight.model.weight)


@pytest.mark.parametrize("name", PAGED)
def test_a_resumed_run_is_still_paged(name: str) -> None:
    run, other = Run(name).go(3), Run(name)
    other.model.load_state_dict(run.model.state_dict())
    other.updater.load_state_dict(run.updater.state_dict())
    other.step = run.step
    assert other.state["state1"].is_paged and is_managed(other.state["state1"])
    assert torch.equal(other.go(3).model.weight, run.go(3).model.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(made)
    return made


def adapted(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    given = ModelArguments(model=str(folder), quantize=kind)
    return adapters.attach(base.load_model(given, precision.home(CUDA)), given)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_law_holds_over_a_quantised_base(kind: str, folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"use_cpu": False, "optim": "sgd"}
    one, other = (
        trained(tmp_path, adapted(folder, kind), token_budget=budget, **given)
        for budget in (40, 4096)
    )
    assert one._packing.runner.fused and len(quantised.packed(one.model)) > 0
    loss, weights = far(one, other)
    assert loss < 1e-5 and weights < 1e-4
    before = one.evaluate()["eval_loss"]
    one._settings.per_device_eval_batch_size = 1
    assert one.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_a_run_in_bf16_over_nf4_learns(folder: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, adapted(folder, "nf4"), use_cpu=False, bf16=True)
    assert run._packing.runner.fused
    assert run.state.log_history[-2]["loss"] < run.state.log_history[0]["loss"]
