"""A probe measures what a micro-batch takes, and leaves no trace of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_packing import model_of, trained
from tests.tiny import adapter, same

from lorafit import packing
from lorafit.data.collate import PadCollator
from lorafit.engine import memory, probe
from lorafit.engine.layout import packed

TOKENS = 12_000


@pytest.fixture
def ready(tmp_path: Path) -> Any:
    """A trainer with dropout, after a run."""
    return trained(tmp_path, model_of("llama", dropout=0.1))


def batch_of(tokens: int) -> Any:
    row = {"input_ids": [n % 97 for n in range(tokens)]}
    return packed([PadCollator(0)([row | {"labels": row["input_ids"]}])], budget=1, draw=(0, 1))[0]


def measured(trainer: Any, tokens: int) -> int:
    found = probe.peak(
        trainer.model, trainer._objective(), batch=batch_of(tokens), precision=trainer._precision
    )
    assert found is not None
    return found


def test_it_leaves_no_trace(ready: Any) -> None:
    weights, state = adapter(ready), torch.random.get_rng_state()
    first = next(p for p in ready.model.parameters() if p.requires_grad)
    first.grad = gradient = torch.ones_like(first)
    ready.model.eval()
    measured(ready, 50)
    assert first.grad is gradient and bool((gradient == 1).all())
    assert same(weights, adapter(ready)) and torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in ready.model.modules())
    others = [p for p in ready.model.parameters() if p.requires_grad and p is not first]
    assert all(p.grad is None for p in others)


def test_a_plan_calibrated_by_it_forecasts_what_it_measured(ready: Any) -> None:
    work = packing._work(
        ready.model, torch.float32, arguments=ready.args,
        rows=packing.Rows(None, lambda: None), fused=True,
    )  # fmt: skip
    made = memory.plan(replace(work, longest=TOKENS), tokens=1024, recompute="none")
    found = measured(ready, TOKENS)
    right = memory.calibrated(made, found)
    assert right.activations + right.passing + right.gradients == pytest.approx(found, rel=1e-3)
    # of a model this small half of the peak is the heap's
    assert made.per_token / 3 < right.per_token < made.per_token * 3
    assert right.optimiser == made.optimiser and right.start == made.start
