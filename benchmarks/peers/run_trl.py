"""TRL's SFTTrainer with its own defaults but for what is matched; its fused head included.

`pad` is its collator, `pack` its best-fit packing into rows as long as `knobs["max_length"]`, one
row a micro-batch. Packing runs before the clock starts and is kept by `datasets`.
"""

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import base
from protocol import Job, Report, Seen, Ticks


class Stopwatch(Ticks, TrainerCallback):
    """Reports steps and losses."""


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    report.imported("trl", "transformers", "peft", "accelerate", "torch")
    job.refuse(collate=("pad", "pack"), compile=(False,))
    rows = list(job.rows())
    trainer = SFTTrainer(
        model=base.adapted(job),
        args=SFTConfig(
            **{"max_length": None, "gradient_checkpointing": False, **base.arguments(job)},
            packing=job.collate == "pack",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer(job),
        callbacks=[Stopwatch(report)],
    )
    seen = Seen(rows, trainer.data_collator)
    trainer.data_collator = seen
    trainer.train()
    report.done(seen.order)


if __name__ == "__main__":
    main()
