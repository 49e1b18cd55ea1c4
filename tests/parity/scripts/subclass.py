"""Subclasses: each method that people override, and what it is given."""

import math
import os

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


def run(kind, collator=collate, **given):
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
        data_collator=collator,
    )
    trainer.train()
    return {"log": trainer.state.log_history, "calls": list(calls)}


outcome = {kind.__name__: run(kind) for kind in (Weighted, Stepping, Loading, Optimising)}
outcome["Evaluating"] = run(
    Evaluating, metric_for_best_model="eval_perplexity", load_best_model_at_end=True,
    save_strategy="epoch", greater_is_better=False,
)  # fmt: skip

COUNTED = """
    training_step compute_loss _prepare_inputs prediction_step evaluation_loop evaluate log
    get_train_dataloader get_eval_dataloader create_optimizer create_scheduler
    get_decay_parameter_names save_model _save_checkpoint _save _get_train_sampler
    _get_eval_sampler compute_loss_context_manager
"""


def counting(*names):
    """A Trainer that counts the calls of these methods and goes on as before."""

    def counted(name):
        def method(self, *given, **named):
            calls.append(name)
            return getattr(Trainer, name)(self, *given, **named)

        return method

    return type("Counting", (Trainer,), {name: counted(name) for name in names})


for name in COUNTED.split():
    made = run(counting(name), save_strategy="epoch", num_train_epochs=1)
    outcome[f"calls of {name}"] = [len(made["calls"]), made["log"][:4]]


class Named(Trainer):
    """Its own choice of optimiser, by class and arguments; and of folder."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.SGD, {"lr": 0.2}

    def _get_output_dir(self, trial):
        return "elsewhere"


outcome["Named"] = [run(Named, save_strategy="epoch")["log"], sorted(os.listdir("elsewhere"))]


class Scaled(Trainer):
    """A loss that is divided for the whole step by itself, of batches without labels."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        calls.append((return_outputs, type(num_items_in_batch).__name__, type(inputs).__name__))
        inputs = {**inputs, "labels": inputs.pop("targets")}
        outputs = model(**inputs)
        loss = outputs.loss / 2
        return (loss, outputs) if return_outputs else loss


def unlabelled(rows):
    batch = collate(rows)
    return {**{name: batch[name] for name in ("input_ids", "attention_mask")},
            "targets": batch["labels"]}  # fmt: skip


outcome["Scaled"] = run(
    Scaled, eval_strategy="no", remove_unused_columns=False, collator=unlabelled
)


class Positional(Trainer):
    """Its third parameter under another name."""

    def training_step(self, model, inputs, *count):
        calls.append(len(count))
        return super().training_step(model, inputs, *count)


outcome["Positional"] = run(Positional)

late = Trainer(
    llama(),
    TrainingArguments("late", use_cpu=True, report_to="none", max_steps=2, logging_steps=1),
    train_dataset=plain(4),
    eval_dataset=plain(1),
    data_collator=collate,
)
late.evaluate()
whole = late.compute_loss
late.compute_loss = lambda *given, **named: whole(*given, **named) / 2
late.train()
outcome["assigned late"] = late.state.log_history[1:]

plainest = Trainer(llama(), TrainingArguments("out", use_cpu=True, report_to="none"))
plainest.current_gradient_accumulation_steps = 1
batch = collate(plain(2))
outcome["by hand"] = [
    plainest.training_step(plainest.model, dict(batch)).item(),
    plainest.compute_loss(plainest.model, dict(batch)).item(),
    len(plainest.compute_loss(plainest.model, dict(batch), return_outputs=True)),
    sum(p.grad is not None for p in plainest.model.parameters()),
]
