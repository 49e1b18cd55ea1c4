"""Unsloth's CPU backend: its model, its adapter, TRL's SFTTrainer as Unsloth patches it.

16-bit LoRA without gradient checkpointing. `compile` sets UNSLOTH_CPU_COMPILE, which needs a C++
compiler; what that costs lies before the first step's end.
"""

import os

from protocol import Job, Report, Seen, Ticks

JOB = Job.read()
REPORT = Report(JOB)
os.environ["UNSLOTH_CPU_COMPILE"] = str(int(JOB.compile))

# read on import: the switch above, and patches that must precede transformers and TRL
from unsloth import FastLanguageModel  # noqa: E402, I001
import base  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import DataCollatorForSeq2Seq, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Stopwatch(Ticks, TrainerCallback):
    """Reports steps and losses."""


def main() -> None:
    """Train, and report."""
    REPORT.imported("unsloth", "unsloth_zoo", "trl", "transformers", "peft", "torch")
    JOB.refuse(collate=("pad",))
    rows = list(JOB.rows())
    model, _ = FastLanguageModel.from_pretrained(
        JOB.model, dtype=base.NUMBERS[JOB.dtype], load_in_4bit=False, max_seq_length=2048
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, bias="none",
        target_modules=base.MODULES, use_gradient_checkpointing=False, random_state=1,
    )  # fmt: skip
    tokenizer = base.tokenizer(JOB)
    seen = Seen(rows, DataCollatorForSeq2Seq(tokenizer))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **{"max_length": 2048, **base.arguments(JOB)},
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=seen,
        callbacks=[Stopwatch(REPORT)],
    )
    trainer.train()
    REPORT.done(seen.order)


if __name__ == "__main__":
    main()
