"""TRL's SFTTrainer with its own defaults but for what is matched; its fused head included.

`pad` is its collator, `flatten` the same with padding_free, `pack` its best-fit packing into rows
as long as `knobs["max_length"]`, one row a micro-batch. Packing runs before the clock starts and is
kept by `datasets`. For the last two TRL warns unless flash-attn is there, as other attention may
look across examples; with SDPA transformers makes a mask of the positions, and none does (their
first losses are compared with each example's alone). The mask is dense, and that is what it costs.
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
    job.refuse(collate=("pad", "flatten", "pack"), compile=(False,))
    rows = list(job.rows())
    trainer = SFTTrainer(
        model=base.adapted(job),
        args=SFTConfig(
            **{"max_length": None, "gradient_checkpointing": False, **base.arguments(job)},
            packing=job.collate == "pack",
            padding_free=job.collate == "flatten",
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
