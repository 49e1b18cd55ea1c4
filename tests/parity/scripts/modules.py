"""Modules that are no language models: dicts, tuples, label names, several labels, no loss."""

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama import LlamaConfig, LlamaForSequenceClassification


class Line(nn.Module):
    """y = ax + b, as transformers' own tests have it."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.kind = kind

    def forward(self, input_x, labels=None, **unused):
        y = input_x * self.a + self.b
        if labels is None:
            return {"y": y} if self.kind == "dict" else (y,)
        loss = nn.functional.mse_loss(y, labels)
        if self.kind == "dict":
            return {"loss": loss, "y": y}
        return (loss, y, y) if self.kind == "double" else (loss, y)


class TwoLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x, start=None, end=None):
        y, z = x * self.a, x - self.a
        if start is None:
            return y, z
        loss = nn.functional.mse_loss(y, start) + nn.functional.mse_loss(z, end)
        return loss, y, z


noise = np.random.RandomState(3).normal(scale=0.1, size=32).astype(np.float32)
xs = np.linspace(-1, 1, 32, dtype=np.float32)
points = [{"input_x": x, "labels": 2 * x + 3 + n} for x, n in zip(xs, noise, strict=True)]


def run(model, rows, held=None, loss=None, **given):
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**values, **given}),
        train_dataset=rows,
        eval_dataset=held or rows[:8],
        compute_loss_func=loss,
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = trainer.predict(held or rows[:8])
    labels = found.label_ids
    return [
        trainer.state.log_history,
        metrics["eval_loss"],
        [np.asarray(part).tolist() for part in _tuple(found.predictions)],
        None if labels is None else [np.asarray(part).tolist() for part in _tuple(labels)],
        sorted(found.metrics),
    ]


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


def absolute(outputs, labels, num_items_in_batch=None):
    y = outputs["y"] if isinstance(outputs, dict) else outputs[-1]
    return (y - labels).abs().sum() / (num_items_in_batch or labels.numel())


class Labelled(Line):
    def forward(self, input_x, target=None):
        return super().forward(input_x, target)


outcome = {kind: run(Line(kind), points) for kind in ("dict", "tuple", "double")}
outcome["other names"] = run(
    Labelled("dict"),
    [{"input_x": row["input_x"], "target": row["labels"]} for row in points],
    label_names=["target"],
)
outcome["two labels"] = run(
    TwoLabels(),
    [{"x": x, "start": x, "end": x - 1} for x in xs],
    label_names=["start", "end"],
)
outcome["own function"] = run(Line("dict"), points, loss=absolute)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_labels=3, pad_token_id=0,
)  # fmt: skip
classes = [{"input_ids": [1 + i % 7, 2 + i % 5, 3], "label": i % 3} for i in range(24)]
model = LlamaForSequenceClassification(config)
outcome["classes"] = run(model, classes, learning_rate=1e-2)
outcome["smoothed"] = run(
    LlamaForSequenceClassification(config) if torch.manual_seed(0) else None,
    classes, learning_rate=1e-2, label_smoothing_factor=0.1, gradient_accumulation_steps=1,
)[0][:-1]  # fmt: skip
