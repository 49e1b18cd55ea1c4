"""The programmes in examples/ run, on the real input they are for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model

from lorafit import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from lorafit.events import Evaluated, Event, Notice

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_drop_in_runs_for_a_stranger(tmp_path: Path) -> None:
    said = run("drop_in.py", "--output", str(tmp_path / "out"))
    assert "Adapter loaded back" in said
    readings = [line for line in said.splitlines() if "eval loss" in line]
    assert len(readings) == 4


@pytest.mark.slow
def test_drop_in_takes_a_model_and_a_file(shared: Path, tiny_llama: Path, tmp_path: Path) -> None:
    data = shared / "data" / "gsm8k" / "train.jsonl"
    said = run(
        "drop_in.py", "--model", str(tiny_llama), "--data", str(data), "--output", str(tmp_path)
    )
    assert "Adapter loaded back" in said


def gsm8k(shared: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> Dataset:
    file = str(shared / "data" / "gsm8k" / "train.jsonl")
    rows = load_dataset("json", data_files=file, split="train").select(range(600))

    def tokenize(row: dict[str, str]) -> transformers.BatchEncoding:
        text = row["question"] + "\n" + row["answer"] + tokenizer.eos_token
        return tokenizer(text, truncation=True, max_length=256)

    return rows.map(tokenize, remove_columns=rows.column_names)


@pytest.mark.slow
def test_the_programme_of_the_readme(shared: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """GSM8K through `datasets`, PEFT's LoRA, bf16 and a paged optimiser asked for on a CPU."""
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    tokenized = gsm8k(shared, tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            num_train_epochs=1,
            optim="paged_adamw_32bit",
            bf16=True,
            logging_steps=10,
            save_strategy="epoch",
            learning_rate=1e-3,
            max_grad_norm=0.3,
            use_cpu=True,
        ),
        train_dataset=tokenized.select(range(500)),
        eval_dataset=tokenized.select(range(500, 600)),
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
    )
    seen: list[Event] = []
    trainer.observers.append(seen.append)
    result = trainer.train()
    assert result.global_step == 32
    readings = [
        event.loss for event in seen if isinstance(event, Evaluated) and event.name == "eval"
    ]
    assert len(readings) == 2 and readings[-1] < readings[0] - 0.3
    notices = [event.text for event in seen if isinstance(event, Notice)]
    assert sum("bf16" in text for text in notices) == 1
    assert sum("paged_adamw_32bit" in text for text in notices) == 1

    trainer.save_model(str(tmp_path / "adapter"))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tuned = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    ids = torch.tensor([tokenized[599]["input_ids"]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, trainer.model(ids).logits)
    assert (tmp_path / "run" / "checkpoint-32" / "adapter_model.safetensors").is_file()
