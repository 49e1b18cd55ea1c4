"""transformers' Trainer with PEFT, as its documentation writes it.

`pad` is its usual collator, `flatten` its DataCollatorWithFlattening: examples of a micro-batch end
to end, kept apart by their positions. bf16 means a bf16 base and autocast, as the flag `bf16=True`.
`knobs` reach its TrainingArguments: use_liger_kernel is Liger as transformers applies it.
"""

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import base
from protocol import Job, Report, Seen, Ticks


class Stopwatch(Ticks, TrainerCallback):
    """Reports steps and losses."""


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    liger = ["liger_kernel"] if job.knobs.get("use_liger_kernel") else []
    report.imported("transformers", "peft", "accelerate", *liger, "torch")
    job.refuse(collate=("pad", "flatten"), compile=(False,))
    rows = list(job.rows())
    collate = (
        DataCollatorWithFlattening()
        if job.collate == "flatten"
        else DataCollatorForSeq2Seq(base.tokenizer(job))
    )
    seen = Seen(rows, collate)
    trainer = Trainer(
        model=base.adapted(job),
        args=TrainingArguments(**base.arguments(job)),
        train_dataset=rows,
        data_collator=seen,
        callbacks=[Stopwatch(report)],
    )
    trainer.train()
    if job.adapter:
        trainer.save_model(job.adapter)
    report.done(seen.order)


if __name__ == "__main__":
    main()
