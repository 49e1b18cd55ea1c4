"""Checkpoints: where they lie, which go, and runs that go on from them."""

import json
from pathlib import Path

import pytest
from tests.tiny import adapter, collate, llama, plain
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **context):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def trainer_in(folder, *callbacks, model=None, **given):
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=llama(dropout=0.1) if model is None else model,
        args=TrainingArguments(**{**values, **given}),
        train_dataset=plain(14),
        eval_dataset=plain(1) * 4,
        data_collator=collate,
        callbacks=list(callbacks),
    )


def folders(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir())


def log_of(trainer):
    *steps, last = trainer.state.log_history
    return steps, sorted(last), trainer.state.global_step, trainer.state.epoch


straight = trainer_in("straight")
straight.train()
outcome = {"straight": [log_of(straight), folders("straight")]}
saved = json.loads(Path("straight/checkpoint-12/trainer_state.json").read_text())
outcome["state"] = [sorted(saved), saved["global_step"], saved["log_history"]]

for step in (3, 4, 6):  # inside an epoch, at its end, in the next one
    folder = f"part{step}"
    trainer_in(folder, Stop(step)).train()
    again = trainer_in(folder)
    again.train(resume_from_checkpoint=True)
    outcome[f"resumed at {step}"] = log_of(again)
    mine, whole = adapter(again), adapter(straight)
    assert all(((mine[name] - whole[name]).abs().max() < 1e-5) for name in whole)

afresh = trainer_in("part3", max_steps=2)
afresh.train(resume_from_checkpoint=False)
outcome["afresh"] = log_of(afresh)
named = trainer_in("elsewhere")
named.train(resume_from_checkpoint="straight/checkpoint-8")
outcome["named"] = log_of(named)
with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
    trainer_in("nothing").train(resume_from_checkpoint=True)
with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
    trainer_in("nothing").train(resume_from_checkpoint="nothing-here")

frozen = llama(dropout=0.1)
for name, parameter in frozen.named_parameters():
    parameter.requires_grad_(parameter.requires_grad and "layers.1" in name)
trainer_in("frozen", Stop(4), model=frozen).train()
again = trainer_in("frozen", model=frozen)
again.train(resume_from_checkpoint=True)
outcome["frozen"] = log_of(again)

longer = trainer_in("straight", num_train_epochs=4)
longer.train(resume_from_checkpoint=True)
outcome["longer"] = [log_of(longer), longer.state.max_steps]

for limit, strategy in ((2, "steps"), (2, "epoch")):
    folder = f"limit{limit}{strategy}"
    limited = trainer_in(
        folder, save_total_limit=limit, save_strategy=strategy, eval_strategy=strategy,
        eval_steps=2, load_best_model_at_end=True, learning_rate=1.0,
    )  # fmt: skip
    limited.train()
    best = limited.state.best_model_checkpoint
    outcome[folder] = [folders(folder), best, limited.state.best_metric]

trainer = trainer_in(
    "best", save_strategy="best", eval_strategy="epoch", metric_for_best_model="loss"
)
trainer.train()
outcome["best"] = [folders("best"), trainer.state.best_metric]
trainer = trainer_in("never", save_strategy="no")
trainer.train()
outcome["never"] = Path("never").exists() and folders("never")
