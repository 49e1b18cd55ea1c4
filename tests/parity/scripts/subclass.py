"""Subclasses: each method that people override, and what it is given."""

import math

import torch
from tests.tiny import collate, llama, plain
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

calls = []


class Weighted(Trainer):
    """A loss of its own, scaled and with outputs; a value of its own in the log."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = 0.5 * total / count
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        logs["scale"] = 0.5
        super().log(logs, start_time)


class Stepping(Trainer):
    """Looks at each micro-batch and its loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        calls.append(("training_step", inputs["input_ids"].shape[0], loss.item()))
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        made = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        calls.append(("prediction_step", prediction_loss_only, made[0].item()))
        return made


class Loading(Trainer):
    """Its own loaders: a longer batch, sorted; and its own order."""

    def get_train_dataloader(self):
        rows = sorted(self.train_dataset, key=lambda row: len(row["input_ids"]))
        return DataLoader(rows, batch_size=3, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset=None):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(rows, batch_size=1, collate_fn=self.data_collator)


class Optimising(Trainer):
    """Its own optimiser and schedule."""

    def create_optimizer(self):
        a = [p for n, p in self.model.named_parameters() if p.requires_grad and "lora_A" in n]
        b = [p for n, p in self.model.named_parameters() if p.requires_grad and "lora_B" in n]
        self.optimizer = torch.optim.SGD([{"params": a, "lr": 0.1}, {"params": b, "lr": 0.5}])
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        calls.append(("create_scheduler", num_training_steps, optimizer is not None))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer, lambda step: 1 / (1 + step)
        )
        return self.lr_scheduler


class Evaluating(Trainer):
    """Adds a metric to each evaluation."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics[f"{metric_key_prefix}_perplexity"] = math.exp(metrics[f"{metric_key_prefix}_loss"])
        calls.append(("evaluate", sorted(metrics)))
        return metrics


def run(kind, **given):
    calls.clear()
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = kind(
        model=llama(),
        args=TrainingArguments(**{**values, **given}),
        train_dataset=plain(9),
        # one length of rows: the mean over batches is the mean over tokens
        eval_dataset=plain(1) * 4,
        data_collator=collate,
    )
    trainer.train()
    return {"log": trainer.state.log_history, "calls": list(calls)}


outcome = {kind.__name__: run(kind) for kind in (Weighted, Stepping, Loading, Optimising)}
outcome["Evaluating"] = run(
    Evaluating, metric_for_best_model="eval_perplexity", load_best_model_at_end=True,
    save_strategy="epoch", greater_is_better=False,
)  # fmt: skip

plainest = Trainer(llama(), TrainingArguments("out", use_cpu=True, report_to="none"))
plainest.current_gradient_accumulation_steps = 1
batch = collate(plain(2))
outcome["by hand"] = [
    plainest.training_step(plainest.model, dict(batch)).item(),
    plainest.compute_loss(plainest.model, dict(batch)).item(),
    len(plainest.compute_loss(plainest.model, dict(batch), return_outputs=True)),
    sum(p.grad is not None for p in plainest.model.parameters()),
]
