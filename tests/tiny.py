"""A tiny random Llama with LoRA, rows of unequal length and supervision, and a run over them."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lorafit
from lorafit.events import Event
from lorafit.model import adapters
from tests.parity.side_by_side import collate, rows

__all__ = ["adapter", "arguments", "collate", "events_of", "llama", "make", "plain", "rows", "same"]

VOCABULARY = 64


@cache
def _llama(dropout: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # sharp enough that a wrong loss is a different one
        base.lm_head.weight.mul_(20)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora, autocast_adapter_dtype=False)


def llama(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy, the same each time; adapter in the base's dtype."""
    return copy.deepcopy(_llama(dropout, dtype))


def plain(count: int) -> list[dict[str, list[int]]]:
    """`count` rows in the tiny vocabulary."""
    return rows(count, VOCABULARY)


def arguments(folder: Path, **given: Any) -> lorafit.TrainingArguments:
    """One step is 4 examples; everything is logged, nothing saved. Run as given, as `collate` is
    nobody's that lorafit knows."""
    values: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "seed": 3, "layout": "as_given",
    }  # fmt: skip
    return lorafit.TrainingArguments(**(values | given))


def make(
    folder: Path, *, model: Any = None, data: Any = None, kind: Any = lorafit.Trainer, **given: Any
) -> Any:
    """A trainer over 12 rows; its own keywords are sorted out from the arguments' ones."""
    names = ("eval_dataset", "callbacks", "compute_loss_func", "model_init", "optimizers")
    own = {name: given.pop(name) for name in names if name in given}
    return kind(
        model=None if "model_init" in own else llama() if model is None else model,
        args=arguments(folder, **given),
        data_collator=collate,
        train_dataset=plain(12) if data is None else data,
        **own,
    )


def adapter(trainer: Any) -> dict[str, Tensor]:
    """The trained tensors as they are now."""
    return {name: value.clone() for name, value in adapters.adapter_state(trainer.model).items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fingerprint(model: nn.Module, *, trainable: bool) -> dict[str, tuple[torch.dtype, str]]:
    """dtype and sha256 of every parameter that is (not) trainable."""
    return {
        name: (p.dtype, hashlib.sha256(p.detach().view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, p in model.named_parameters()
        if p.requires_grad is trainable
    }


@contextmanager
def events_of(trainer: Any) -> Iterator[list[Event]]:
    """What the observers are told inside."""
    told: list[Event] = []
    trainer.observers.append(told.append)
    yield told
    trainer.observers.remove(told.append)


def numbers(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The named values of each log entry that has them all."""
    log = trainer.state.log_history
    return [tuple(e[n] for n in names) for e in log if all(n in e for n in names)]
