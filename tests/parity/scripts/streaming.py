"""Streams: sets without a length, `max_steps`, epochs, steps given as parts of a run."""

import datasets
import torch
from tests.tiny import collate, llama, plain
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments


class Endless(IterableDataset):
    def __init__(self, rows, passes=100):
        self.rows, self.passes, self.epochs = rows, passes, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for _ in range(self.passes):
            yield from self.rows


class Mapped(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(value) for name, value in self.rows[index].items()}


def run(rows, held=None, collator=collate, **given):
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=llama(),
        args=TrainingArguments(**{**values, **given}),
        train_dataset=rows,
        eval_dataset=held,
        data_collator=collator,
    )
    trainer.train()
    state = trainer.state
    return [state.log_history, state.global_step, state.max_steps, state.num_train_epochs]


rows = plain(12)
table = datasets.Dataset.from_list(rows)
longer = [dict(row, text="words", weight=1.0) for row in rows]


def stack(features):
    return {name: torch.stack([row[name] for row in features]) for name in features[0]}


outcome = {
    "stream": run(Endless(rows), max_steps=5),
    "short stream": run(Endless(rows, passes=1), max_steps=5),
    "streamed table": run(table.to_iterable_dataset(), max_steps=3),
    "evaluated stream": run(
        rows, Endless(rows[:1], passes=4), max_steps=2, eval_strategy="steps", eval_steps=1
    ),
    "map": run([dict(row) for row in rows]),
    "torch": run(Mapped(rows[:1] * 12), collator=stack),
    "table": run(table),
    "columns": run(longer),
    "workers": run(rows, dataloader_num_workers=2),
    "kept workers": run(
        rows, dataloader_num_workers=1, dataloader_persistent_workers=True, num_train_epochs=2
    ),
    "dropped": run(rows, dataloader_drop_last=True, per_device_train_batch_size=5),
    "in order": run(rows, train_sampling_strategy="sequential"),
    "another order": run(rows, data_seed=11),
    "half an epoch": run(rows, num_train_epochs=0.5),
    "an epoch and a half": run(rows, num_train_epochs=1.5),
    "parts": run(
        rows, rows[:1], num_train_epochs=4, logging_steps=0.25, eval_strategy="steps",
        eval_steps=0.5, save_strategy="steps", save_steps=0.5,
    ),
}  # fmt: skip
