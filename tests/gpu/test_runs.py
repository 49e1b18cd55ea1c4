"""CUDA: whole runs: memory that runs out, float16, resuming, a practice run. Where there is a GPU:

pytest -m gpu tests/gpu
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.events import OutOfMemory
from tests.test_packing import far, model_of, trained
from tests.tiny import adapter, arguments, events_of, plain, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTH, ROWS = 512, 24


def wide() -> Any:
    """A model that keeps some 150 KB of a token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


@contextmanager
def at_most(more: int) -> Generator[None]:
    """Inside, the allocator has `more` bytes above what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_runs_out_changes_no_number(tmp_path: Path) -> None:
    ids = torch.randint(512, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    runs, told = [], []
    for room in (8 << 30, 1200 << 20):
        args = arguments(
            tmp_path, use_cpu=False, layout="packed", per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=1, optim="sgd", learning_rate=1.0, eval_strategy="no",
        )  # fmt: skip
        model = wide().cuda()
        trainer = lorafit.Trainer(model, args, PadCollator(0), train_dataset=data)
        with at_most(room), events_of(trainer) as seen:
            trainer.train()
        told.append([event for event in seen if isinstance(event, OutOfMemory)])
        runs.append(trainer)
    assert not told[0] and told[1], "the smaller room was too small for a step"
    loss, weights = far(*runs)
    assert loss < 1e-6 and weights < 1e-5


def test_float16_with_its_scaler_learns_as_float32(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path, model_of("llama"), use_cpu=False, num_train_epochs=4, **given)
        for given in ({}, {"fp16": True})
    ]
    assert runs[1]._packing.runner.fused
    assert far(*runs)[0] < 2e-2


class Stop(lorafit.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("given", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_run_resumes_to_the_bit(given: dict[str, Any], tmp_path: Path) -> None:
    given = {"use_cpu": False, **given}
    whole = trained(tmp_path / "whole", model_of("llama", dropout=0.2), **given)
    trained(tmp_path / "part", model_of("llama", dropout=0.2), callbacks=[Stop()], **given)
    args = arguments(tmp_path / "part", layout="packed", num_train_epochs=2, **given)
    resumed = lorafit.Trainer(
        model_of("llama", dropout=0.2), args, PadCollator(0), train_dataset=plain(12)
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(adapter(whole), adapter(resumed))


def test_a_practice_run_goes_through_and_leaves_nothing(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, use_cpu=False, bf16=True, layout="packed", num_train_epochs=20, eval_strategy="no"
    )
    trainer = lorafit.Trainer(
        model_of("llama"), args, PadCollator(0), train_dataset=plain(48), eval_dataset=plain(8)
    )
    before = adapter(trainer)
    found = {finding.title: finding for finding in trainer.practice().findings}
    assert {"gradients", "resuming", "loading", "memory"} <= found.keys()
    assert "the same, bit for bit" in found["resuming"].said
    assert same(before, adapter(trainer))
