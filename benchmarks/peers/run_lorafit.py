"""lorafit's Trainer, as a script that changed its imports has it.

Its collator is not wrapped, as a wrapped one is a user's own, which lorafit calls as it is; the
order is the file's. `knobs` reach its TrainingArguments: layout, recompute and whatever comes.
"""

import base
from lorafit import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from protocol import Job, Report, Ticks


class Stopwatch(Ticks, TrainerCallback):
    """Reports steps and losses."""


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    job.refuse(collate=("pad",), order=("sequential", "random"), compile=(False,))
    report.imported("lorafit", "transformers", "peft", "torch")
    model = base.adapted(job)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**base.arguments(job)),
        train_dataset=job.rows(),
        data_collator=DataCollatorForLanguageModeling(tokenizer=base.tokenizer(job), mlm=False),
        callbacks=[Stopwatch(report)],
    )
    trainer.train()
    if job.adapter:
        trainer.save_model(job.adapter)
    report.done(job.sequential() if job.order == "sequential" else [])


if __name__ == "__main__":
    main()
