"""Trying rates and measuring what quantising costs leave the run and its files as they were."""

from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import adapter, arguments, plain, same

import lorafit
from lorafit.arguments import ModelArguments
from lorafit.data.collate import PadCollator
from lorafit.engine.precision import Precision
from lorafit.model import adapters, base
from lorafit.run import rates, trial
from lorafit.run.gap import Gap, loss_gap

FULL = Precision(torch.device("cpu"))


def adapted(folder: Path, kind: str = "") -> Any:
    torch.manual_seed(0)
    given = ModelArguments(model=str(folder), quantize=kind)
    return adapters.attach(base.load_model(given), given)


def test_the_range_test_leaves_no_trace(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = lorafit.Trainer(
        model=adapted(tiny_llama), args=arguments(tmp_path / "run", layout="packed"),
        data_collator=PadCollator(0), train_dataset=plain(24),
    )  # fmt: skip
    before, drawn = adapter(trainer), torch.get_rng_state()
    run = trainer._begin(None)
    with closing(run.engine.updater):
        rows = cycle(run.loader.epoch(0))
        torch.set_rng_state(drawn)
        step = trial.stepping(run.engine.updater.optimizer, lambda: run.take(next(rows)).loss)
        with trial.untouched(trainer.model):
            curve = rates.sweep(step, rates.rising(1e-5, 3.0, steps=60))
    assert len(curve.rates) > 20 and curve.rate is not None and 1e-5 < curve.rate < 1, curve
    assert same(adapter(trainer), before) and torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not [*(tmp_path / "run").rglob("*")]


@pytest.mark.parametrize("warmup", [0, 10])
def test_groups_keep_their_proportions(warmup: int) -> None:
    """LoRA+'s: `learning_rate` is the first group's, also where a warmup begins at 0."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 1e-3}, {"params": [torch.zeros(1)], "lr": 1.6e-2}]
    )
    if warmup:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / warmup)
        assert optimizer.param_groups[1]["lr"] == 0.0
    assert trial.stepping(optimizer, lambda: torch.tensor(2.0))(0.5) == 2.0
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 8.0])


def test_what_is_trained_comes_back_when_a_trial_fails(tiny_llama: Path) -> None:
    model = adapted(tiny_llama).eval()
    before = {name: t.clone() for name, t in adapters.adapter_state(model).items()}

    def fail() -> float:
        model.train()
        for tensor in adapters.adapter_state(model).values():
            tensor.fill_(float("nan"))
        return 1 / 0

    with pytest.raises(ZeroDivisionError), trial.untouched(model):
        fail()
    assert same(adapters.adapter_state(model), before) and not model.training


STORY = [[1, 403, 407, 261, 378, 439, 316, 338, 261, 292, 447, 416, 306], [1, 403, 407, 261]]


def test_what_quantising_costs(tiny_llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in STORY]
    batches = [PadCollator(0)(rows)]
    gaps: dict[str, Gap] = {}
    for kind in ("nf4", "int8"):
        found = loss_gap(adapted(tiny_llama, kind), batches, precision=FULL, free=10**9)
        assert isinstance(found, Gap) and found.tokens == 15
        assert str(found).startswith("quantising the base costs ")
        gaps[kind] = found
    assert gaps["nf4"].whole == gaps["int8"].whole
    whole = base.load_model(ModelArguments(model=str(tiny_llama)))
    with torch.no_grad():
        nats = [
            whole(torch.tensor([r]), labels=torch.tensor([r])).loss * (len(r) - 1) for r in STORY
        ]
    assert gaps["nf4"].whole == pytest.approx(float(sum(nats)) / 15, rel=1e-5)
    assert abs(gaps["int8"].nats) < 0.05 < abs(gaps["nf4"].nats) < 1


def test_why_it_was_not_measured(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    told: dict[str, Any] = {"precision": FULL, "free": 10**9}
    assert "not quantised" in str(loss_gap(adapted(tiny_llama), [], **told))
    model = adapted(tiny_llama, "nf4")
    tight = loss_gap(model, [], precision=FULL, free=1000)
    assert tight == "the base in full takes 1.04 MB, and 1.00 kB are free"
    base.unwrap(model).save_pretrained(tmp_path)
    base.unwrap(model).name_or_path = str(tmp_path / "gone")
    assert "cannot be loaded" in str(loss_gap(model, [], **told))
    base.load_model(ModelArguments(model=str(tiny_llama), quantize="nf4")).save_pretrained(tmp_path)
    there = adapted(tmp_path)
    assert "own files are quantised" in str(loss_gap(there, [], **told))
