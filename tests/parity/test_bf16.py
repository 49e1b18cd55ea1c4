"""bf16 on a CPU: no further from the fp32 truth than transformers' Trainer is.

One batch's loss cannot judge (errors cancel), so per-token nats and per-tensor gradients of 16
batches are held against fp32, in root mean square. The Trainer's figures are what accelerate's
autocast gives on the same model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorafit import TrainingArguments
from lorafit.engine import objective as objectives
from lorafit.engine import precision
from lorafit.engine.layout import as_given, packed
from lorafit.engine.objective import Whole
from lorafit.kernels.attention import Documents
from lorafit.model.documents import runner
from lorafit.model.lora import Drawn
from tests.parity.side_by_side import collate, make_model, rows

CPU = torch.device("cpu")
native = pytest.mark.skipif(
    not precision.native_bf16(CPU), reason="this CPU has no native bf16: training runs in fp32"
)


def batches() -> list[Any]:
    made = rows(32)
    return [collate(made[start : start + 2]) for start in range(0, 32, 2)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: nn.Module) -> list[Tensor]:
    taken = [parameter.grad.double() for parameter in trainable(model)]
    model.zero_grad()
    return taken


def token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels[:, 1:] != -100
    return functional.cross_entropy(
        logits[:, :-1][kept].float(), labels[:, 1:][kept], reduction="none"
    )


@contextmanager
def logits_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of each forward inside."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, out: seen.append(out["logits"]))
    yield seen
    hook.remove()


def ours(model: nn.Module, *, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    """Nats of every token, and the gradients of each batch, as the engine computes them."""
    chosen = precision.choose(TrainingArguments("out", bf16=bf16, use_cpu=True), CPU)
    objective = objectives.summed(chosen)
    nats: list[Tensor] = []
    taken: list[Tensor] = []
    for batch in batches():
        micro = as_given([batch], shifted=True)[0]
        with logits_of(model) as logits:
            part = objective.part(model, micro, whole=Whole(micro.supervised, 1))
        part.backward()
        nats.append(token_nats(logits[0].detach(), batch["labels"]))
        taken += gradients(model)
    return torch.cat(nats), taken


def theirs(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The same as transformers' Trainer computes them: accelerate's autocast around the forward."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    nats: list[Tensor] = []
    taken: list[Tensor] = []
    for batch in batches():
        count = (batch["labels"][:, 1:] != -100).sum()
        out = wrapped(**batch, num_items_in_batch=count)
        out["loss"].backward()
        nats.append(token_nats(out["logits"].detach(), batch["labels"]))
        taken += gradients(model)
    AcceleratorState._reset_state(True)
    return torch.cat(nats), taken


def end_to_end(model: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """The same with each batch packed and the layers fused. Runs on any CPU: where bf16 products
    are emulated they are slow, not other numbers."""
    found = runner(
        model,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None),
        dtype=dtype or torch.float32,
        drawn=Drawn(),
    )
    assert found.fused, found.said
    nats: list[Tensor] = []
    taken: list[Tensor] = []
    for batch in batches():
        (laid,) = packed([batch], budget=9999)
        inputs = laid.inputs
        states = found.states(
            inputs["input_ids"], inputs["position_ids"], documents=Documents(laid.documents),
            rows_N=inputs["rows"], counters=None,
        )  # fmt: skip
        (found.nats(states, inputs["targets"]) / laid.supervised).backward()
        each = found.each(states.detach(), inputs["targets"])
        # back from longest first to the batch's order, as the others have it
        lengths = batch["attention_mask"].sum(1).tolist()
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        counts = [int((batch["labels"][row, 1:] != -100).sum()) for row in order]
        parts = dict(zip(order, each.split(counts), strict=True))
        nats += [parts[row] for row in range(len(lengths))]
        taken += gradients(model)
    return torch.cat(nats), taken


def root_mean_square(errors: Tensor) -> float:
    return float(errors.double().pow(2).mean().sqrt())


def relative(a: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(a, truth, strict=True)])


@native
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_errors_are_no_larger_than_the_trainers(name: str, tiny_llama: Path) -> None:
    model = make_model(name, tiny_llama)
    model.eval()
    for parameter in trainable(model):  # B starts at zero, where A has no gradient
        nn.init.normal_(parameter, std=0.05)
    true_nats, true_gradients = ours(model, bf16=False)
    our_nats, our_gradients = ours(model, bf16=True)
    their_nats, their_gradients = theirs(model)
    assert root_mean_square(our_nats - true_nats) > 0
    assert root_mean_square(our_nats - true_nats) <= 1.1 * root_mean_square(their_nats - true_nats)
    assert root_mean_square(relative(our_gradients, true_gradients)) <= 1.1 * root_mean_square(
        relative(their_gradients, true_gradients)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-base", "bf16-base"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fused_errors_are_no_larger_than_the_trainers(
    name: str, dtype: torch.dtype, tiny_llama: Path
) -> None:
    """Over two adapters, as one draw moves the ratio by a tenth either way."""
    errors: dict[str, list[Tensor]] = {}
    for seed in range(2):
        model = make_model(name, tiny_llama).eval()  # afresh, as accelerate changes its forward
        torch.manual_seed(seed)
        for parameter in trainable(model):
            nn.init.normal_(parameter, std=0.05)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for parameter in frozen:  # the truth is that of the weights as they are loaded
            parameter.data = parameter.data.to(dtype).float()
        truth = end_to_end(model, None)
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        for who, made in (("our", end_to_end(model, torch.bfloat16)), ("their", theirs(model))):
            errors.setdefault(f"{who} nats", []).append(made[0] - truth[0])
            errors.setdefault(f"{who} gradients", []).append(relative(made[1], truth[1]))
    for what in ("nats", "gradients"):
        ours, their = (
            root_mean_square(torch.cat(errors[f"{who} {what}"])) for who in ("our", "their")
        )
        assert 0 < ours <= 1.1 * their, (what, ours / their)
