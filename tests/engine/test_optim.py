"""Updates: bf16 parameters have fp32 masters, bad gradients are never applied, decay groups."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafit.arguments import TrainingArguments
from lorafit.engine import optim
from lorafit.errors import ConfigError

CPU = torch.device("cpu")


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(dtype)


def updater(module: nn.Module, **given: object) -> optim.Updater:
    arguments = TrainingArguments("out", **{"learning_rate": 0.1, **given})
    decayed = optim.decayed_names(module)
    grouped = optim.groups(module, decayed=decayed, decay=arguments.weight_decay)
    return optim.Updater(optim.named(arguments, CPU).make(grouped))


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    module = model()
    made = updater(module, optim=name)
    module(torch.ones(2, 4)).sum().backward()
    made.apply(torch.tensor(True))
    before = [p.detach().clone() for p in module.parameters()]
    state = {k: str(v) for k, v in made.optimizer.state_dict()["state"].items()}
    for p in module.parameters():
        p.grad = torch.full_like(p, bad)
    norm = made.norm(max_norm=1.0)
    assert not torch.isfinite(norm)
    made.apply(torch.isfinite(norm))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert state == {k: str(v) for k, v in made.optimizer.state_dict()["state"].items()}
    made.optimizer.zero_grad()
    module(torch.ones(2, 4)).pow(2).sum().backward()
    made.apply(torch.tensor(True))
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_small_updates_of_bf16_parameters_are_not_lost() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    module = module.bfloat16()
    made = updater(module, learning_rate=1e-3, optim="sgd")
    for _ in range(8):
        made.optimizer.zero_grad()
        module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        made.apply(torch.tensor(True))
    # each update of 0.001 is below bf16's spacing at 1 (0.0039) and would round away
    assert module.weight.dtype == torch.bfloat16
    assert module.weight.item() == pytest.approx(0.992, abs=0.002)
    assert made.parameters[0].item() == pytest.approx(0.992, abs=1e-6)


def test_bf16_gradients_of_micro_batches_add_up_in_fp32() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    made = updater(module, optim="sgd")
    for _ in range(1000):
        module(torch.full((1, 1), 1.0, dtype=torch.bfloat16)).sum().backward()
    assert made.parameters[0].grad.item() == 1000  # type: ignore[union-attr]
    assert module.weight.grad is None


def test_state_with_masters_round_trips() -> None:
    module = model(torch.bfloat16)
    made = updater(module)
    module(torch.ones(2, 4, dtype=torch.bfloat16)).float().pow(2).sum().backward()
    made.apply(torch.tensor(True))
    again = updater(model(torch.bfloat16))
    again.load_state_dict(made.state_dict())
    for a, b in zip(made.parameters, again.parameters, strict=True):
        assert torch.equal(a, b)


def test_the_users_parameters_come_back_when_it_is_closed() -> None:
    module = model(torch.bfloat16)
    mine = list(module.parameters())
    optimizer = torch.optim.AdamW(mine, lr=0.1)
    for _ in range(2):
        made = optim.Updater(optimizer)
        assert all(p.dtype == torch.float32 for p in made.parameters)
        module(torch.ones(2, 4, dtype=torch.bfloat16)).float().pow(2).sum().backward()
        made.apply(torch.tensor(True))
        optimizer.zero_grad()
        made.close()
    assert [a is b for a, b in zip(optimizer.param_groups[0]["params"], mine, strict=True)]
    assert all(optimizer.state[p]["step"] == 2 for p in mine) and len(optimizer.state) == 4
    module(torch.ones(2, 4, dtype=torch.bfloat16)).float().sum().backward()
    assert mine[0].grad is not None  # no hook takes it away any more


def test_what_no_gradient_has_reached_is_known() -> None:
    module = model()
    reached = optim.Reached(module)
    assert reached.trained == 4 and next(iter(reached.silent)) == "0.weight"
    module[0](torch.ones(2, 4)).sum().backward()
    assert list(reached.silent) == ["1.weight", "1.bias"]
    reached.close()
    module(torch.ones(2, 4)).sum().backward()
    assert list(reached.silent) == ["1.weight", "1.bias"]


def test_norms_and_biases_take_no_weight_decay() -> None:
    groups = updater(model(), weight_decay=0.1).optimizer.param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 3)]


def test_paged_without_a_gpu_is_plain_adamw_and_says_so() -> None:
    arguments = TrainingArguments("out", optim="paged_adamw_32bit")
    made_by = optim.named(arguments, CPU)
    assert made_by.kind is torch.optim.AdamW and made_by.options["fused"]
    assert "nothing lost" in made_by.notice


CUDA = torch.device("cuda")
PAGED = ["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"]


@pytest.mark.parametrize("name", [*PAGED, "adamw_8bit", "adamw_bnb_8bit", "lion_8bit"])
def test_on_cuda_paged_and_8bit_are_bitsandbytes_own(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made_by = optim.named(TrainingArguments("out", optim=name), CUDA)
    family = bitsandbytes.optim.Lion if "lion" in name else bitsandbytes.optim.AdamW
    assert made_by.kind is family and made_by.notice == ""
    assert made_by.options["is_paged"] is name.startswith("paged_")
    assert made_by.options["optim_bits"] == (8 if "8bit" in name else 32)


def test_missing_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = TrainingArguments("out", optim="paged_adamw_8bit")
    with pytest.raises(ImportError, match=r"pip install 'lorafit\[quant\]'"):
        optim.named(arguments, CUDA)


def test_optim_args_reach_the_optimiser() -> None:
    made = updater(model(), optim="sgd", optim_args="momentum=0.9, nesterov=True")
    assert made.optimizer.param_groups[0]["momentum"] == 0.9
    assert made.optimizer.param_groups[0]["nesterov"] is True


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(ConfigError, match="No parameter"):
        optim.check_trainable(model().requires_grad_(False))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("given", [{}, {"fused": True}, {"amsgrad": True}])
def test_reserved_state_is_the_one_that_torch_would_make(kind: Any, given: Any) -> None:
    def after(*, reserved: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        made = kind(layer.parameters(), lr=0.1, **given)
        if reserved:
            optim.reserve(made)
            before = {p: {n: t.data_ptr() for n, t in made.state[p].items()} for p in made.state}
            assert len(before) == 2
        for _ in range(3):
            layer(torch.ones(1, 3)).sum().backward()
            made.step()
        state = [made.state[p] for p in layer.parameters()]
        if reserved:  # an update allocates nothing
            assert [{n: t.data_ptr() for n, t in s.items()} for s in state] == [*before.values()]
        kept = [one[name] for one in state for name in sorted(one)]
        return [*layer.parameters(), *kept]

    pairs = zip(after(reserved=False), after(reserved=True), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_state_of_other_optimisers_is_left() -> None:
    made = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1, momentum=0.9)
    optim.reserve(made)
    assert not made.state
