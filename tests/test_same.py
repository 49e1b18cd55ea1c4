"""The golden curve: 20 steps whose losses may only change on purpose (`make same`).

A change that should not alter numbers leaves these as they are. One that should says why in its
commit and writes the new ones here. On another processor or torch the last digits differ.
"""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lorafit import Trainer, TrainingArguments
from tests.parity.side_by_side import SMALL, collate, rows

GOLDEN = [
    4.5335622, 4.5335579, 4.5306153, 4.5536766, 4.5386567,
    4.5384202, 4.5599504, 4.511425, 4.5231771, 4.516686,
    4.5001931, 4.4870472, 4.4264755, 4.4270411, 4.4468369,
    4.41716, 4.4403114, 4.4709473, 4.4430313, 4.461812,
]  # fmt: skip


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_rslora=True))
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows(13) * 3, data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(GOLDEN, rel=1e-5), [round(loss, 7) for loss in losses]
