"""Models: a fresh one each time, adapters side by side, recomputation, smoothing, seeds."""

from pathlib import Path

import torch
from peft import LoraConfig
from tests.tiny import collate, llama, plain
from transformers import Trainer, TrainingArguments


def trainer_with(model=None, **given):
    own = {name: given.pop(name) for name in list(given) if name == "model_init"}
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**values, **given}),
        train_dataset=plain(10),
        data_collator=collate,
        **own,
    )


def train(**given):
    trainer = trainer_with(**given)
    trainer.train()
    return trainer.state.log_history


def two_adapters():
    model = llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    return model


trainer = trainer_with(model_init=lambda: llama())
first = trainer.train().training_loss
outcome = {"afresh": [first, trainer.train().training_loss, trainer.state.log_history]}

model = two_adapters()
torch.manual_seed(1)
still = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
trainer = trainer_with(model=model)
trainer.train()
trainer.save_model("several")
outcome["several"] = [
    [entry.get("loss") for entry in trainer.state.log_history],
    all(torch.equal(p, still[n]) for n, p in model.named_parameters() if n in still),
    sorted(path.name for path in Path("several").iterdir() if path.is_dir()),
]
outcome["recomputed"] = train(
    model=llama(),
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
outcome["smoothed"] = train(model=llama(), label_smoothing_factor=0.1)
outcome["unclipped"] = train(model=llama(), max_grad_norm=0.0)
outcome["dropout"] = train(model=llama(dropout=0.3), seed=7)
outcome["evaluated dropout"] = train(model=llama(dropout=0.3), seed=7, full_determinism=False)
if torch.cpu._is_avx512_bf16_supported():  # elsewhere lorafit trains in fp32, and says so
    outcome["bf16"] = [entry.get("loss") for entry in train(model=llama(), bf16=True)][:2]
