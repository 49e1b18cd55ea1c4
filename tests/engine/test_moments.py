"""A run goes on under any member of its optimiser's family: under its like bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_packing import trained
from tests.tiny import adapter, arguments, plain, same
from torch import Tensor, nn

from lorafit.arguments import ModelArguments, TrainingArguments
from lorafit.engine import moments, optim
from lorafit.errors import ConfigError
from lorafit.model import adapters, base
from lorafit.run import checkpoint

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

CPU = torch.device("cpu")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
LION = ("lion_32bit", "lion_8bit", "paged_lion_32bit")


class Run:
    """A linear layer of 8,192 weights (8 bits) and 64 biases (32 bits) that learns a fixed map."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(128, 64)
        given = TrainingArguments("out", learning_rate=1e-3, weight_decay=0.01)
        kind, options = optim._kind(name, given, device=CPU)  # as it is on CUDA, paged or not
        groups = optim.groups(self.model, decayed=["weight"], decay=0.01)
        made = optim.Recipe(kind, {"lr": 1e-3, **options}).make(groups)
        self.updater, self.step = optim.Updater(made), 0

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            rows = torch.randn(32, 128, generator=torch.Generator().manual_seed(self.step))
            self.updater.zero_grad()
            (self.model(rows) - rows[:, :64].roll(1, 1)).square().mean().backward()
            self.updater.apply(torch.tensor(True))
            self.step += 1
        return self

    def resumed(self, name: str) -> "Run":
        """A fresh run under `name`, with this one's weights and what a checkpoint keeps of it."""
        other = Run(name)
        other.model.load_state_dict(self.model.state_dict())
        tensors: dict[str, Tensor] = {}
        kept = checkpoint._split(self.updater.state_dict(), "optimizer", tensors=tensors)
        assert all(type(tensor) is Tensor for tensor in tensors.values())
        other.updater.load_state_dict(checkpoint._join(kept, tensors))
        other.step = self.step
        return other

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("name", [*ADAMW, *LION])
def test_under_its_like_it_goes_on_bit_for_bit(name: str) -> None:
    straight, half = Run(name).go(8), Run(name).go(4)
    assert torch.equal(half.resumed(name).go(4).weights(), straight.weights())


@pytest.mark.parametrize(
    ("one", "other"),
    [(a, b) for family in (ADAMW, LION) for a in family for b in family if a != b],
)
def test_under_another_it_goes_on_closely(one: str, other: str) -> None:
    straight, first = Run(one).go(30), Run(one).go(10)
    there = first.resumed(other).go(10).resumed(one).go(10)
    begun = Run(one).weights()
    moved = straight.weights() - begun
    eight = "8bit" in one + other
    difference = (there.weights() - straight.weights()).norm() / moved.norm()
    assert float(difference) < (0.1 if eight else 1e-5), "of the way that the run has come"
    fresh = Run(one)
    fresh.model.load_state_dict(first.model.state_dict())
    fresh.step = 10
    lost = (fresh.go(20).weights() - straight.weights()).norm() / moved.norm()
    assert float(difference) < float(lost) / 3, "forgetting the moments is worse by far"


def test_small_tensors_stay_in_32_bits() -> None:
    run = Run("adamw_torch").go(3).resumed("adamw_8bit")
    weight, bias = (run.updater.optimizer.state[p] for p in run.model.parameters())
    assert weight["state1"].dtype == torch.uint8 and bias["state1"].dtype == torch.float32
    assert (weight["step"], bias["step"]) == (3, 3)
    back = run.resumed("adamw_torch").updater.optimizer
    exact = Run("adamw_torch").go(3).updater.optimizer
    own, was = (o.state[o.param_groups[1]["params"][0]]["exp_avg"] for o in (back, exact))
    assert torch.equal(own, was)


def test_the_rate_goes_on_where_the_schedule_had_it() -> None:
    run = Run("adamw_torch").go(1)
    for group in run.updater.optimizer.param_groups:
        group |= {"lr": 5e-4, "initial_lr": 1e-3}
    assert [g["lr"] for g in run.resumed("adamw_8bit").updater.optimizer.param_groups] == [5e-4] * 2


def test_other_parameters_are_refused() -> None:
    state = Run("adamw_torch").go(1).updater.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"shape \[3\] for a tensor \[64, 128\]"):
        Run("adamw_8bit").updater.load_state_dict(state)


def test_bytes_of_state() -> None:
    sizes = [200_000, 5_000, 100]
    assert moments.state_bytes(sizes, name="paged_adamw_32bit") == (205_100 * 8, 1_600_000)
    assert moments.state_bytes(sizes, name="paged_adamw_8bit") == (410_800, 400_000)
    assert moments.state_bytes(sizes, name="lion_8bit") == (205_400, 200_000)


@pytest.mark.parametrize(
    ("name", "runs"),
    [("paged_adamw_32bit", "adamw_torch_fused"), ("paged_adamw_8bit", "adamw_8bit")],
)
def test_without_a_gpu_it_is_said_what_paging_would_have_saved(name: str, runs: str) -> None:
    made = optim.named(TrainingArguments("out", optim=name), CPU, sizes=[200_000, 100])
    held, paged = (1_600_800, 1_600_000) if runs == "adamw_torch_fused" else (400_800, 400_000)
    assert f"{runs} runs instead, with {held:,} bytes of state in memory" in made.notice
    assert f"on a GPU {paged:,} of {held:,} bytes of state could leave it" in made.notice
    on_gpu = optim.named(
        TrainingArguments("out", optim=name), torch.device("cuda"), sizes=[200_000]
    )
    assert "can leave the GPU" in on_gpu.notice


def wide(folder: Path) -> Any:
    torch.manual_seed(0)
    given = ModelArguments(model=str(folder), lora_r=64, lora_target_modules="q_proj,v_proj")
    return adapters.attach(base.load_model(given), given)


def test_a_run_goes_on_under_8_bits_exactly_and_under_32_if_accepted(
    tiny_llama: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"optim": "adamw_8bit", "save_strategy": "steps", "save_steps": 3}
    straight = trained(tmp_path, wide(tiny_llama), **how)
    from lorafit import Trainer
    from lorafit.data.collate import PadCollator

    def again(**more: Any) -> Any:
        values = {"layout": "packed", "num_train_epochs": 2, **how, **more}
        trainer = Trainer(
            model=wide(tiny_llama), args=arguments(tmp_path, **values),
            data_collator=PadCollator(0), train_dataset=plain(12),
        )  # fmt: skip
        trainer.train(str(tmp_path / "checkpoint-3"))
        return trainer

    exact = again()
    held = {s["state1"].dtype for s in exact.optimizer.state.values()}
    assert torch.uint8 in held and same(adapter(straight), adapter(exact))
    with pytest.raises(ConfigError, match=r"optimizer.state='32-bit' \(was \"8-bit, bitsand"):
        again(optim="adamw_torch", accept=False)
    other = adapter(again(optim="adamw_torch"))
    for name, tensor in adapter(straight).items():
        assert float((other[name] - tensor).norm() / tensor.norm()) < 0.05
