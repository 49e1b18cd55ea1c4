"""Unsloth: its model, its adapter, TRL's SFTTrainer as Unsloth patches it; 16-bit LoRA.

On a GPU `flatten` leaves the batches to Unsloth (padding-free where it sees fit) and `pad` asks for
padded ones, for which it compiles each block. On a CPU, its other backend, there is `pad` alone,
by transformers' collator. `knobs["use_gradient_checkpointing"]` is False unless given. `compile`
sets UNSLOTH_CPU_COMPILE, which needs a C++ compiler; what that costs lies before the first step's
end.
"""

import os
from collections.abc import Sequence
from typing import Any

# first, as it patches the others when it is imported
from unsloth import FastLanguageModel  # isort: skip
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from trl import SFTConfig, SFTTrainer

import base
from protocol import Job, Report, Seen, Ticks

LONGEST = 2048


class Stopwatch(Ticks, TrainerCallback):
    """Reports steps and losses."""


def model(job: Job, *, recompute: bool | str) -> Any:
    """The base as Unsloth loads it, with its adapter."""
    number = base.NUMBERS[job.dtype]
    made, _ = FastLanguageModel.from_pretrained(
        job.model, dtype=number, load_in_4bit=False, max_seq_length=LONGEST,
        use_gradient_checkpointing=recompute,
    )  # fmt: skip
    return FastLanguageModel.get_peft_model(
        made, r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=base.MODULES,
        use_gradient_checkpointing=recompute, random_state=1,
    )  # fmt: skip


def trainer(job: Job, rows: Sequence[dict[str, list[int]]], report: Report) -> tuple[Any, Seen]:
    """SFTTrainer, and what notes the micro-batches.

    A collator of the user's own would turn padding-free batches off, so the trainer's is wrapped
    when it is there.
    """
    knobs = dict(job.knobs)
    recompute = knobs.pop("use_gradient_checkpointing", False)
    tokenizer = base.tokenizer(job)
    own = job.device == "cpu"
    made = SFTTrainer(
        model=model(job, recompute=recompute),
        args=SFTConfig(
            **{"max_length": LONGEST, **base.arguments(job, knobs)},
            gradient_checkpointing=bool(recompute),  # else TRL's default turns it on
            # on a GPU it must see for itself that no example is too long, or pads them
            dataset_kwargs={"skip_prepare_dataset": True} if own else None,
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer) if own else None,
        callbacks=[Stopwatch(report)],
    )
    made.data_collator = seen = Seen(rows, made.data_collator)
    return made, seen


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    report.imported("unsloth", "unsloth_zoo", "trl", "transformers", "peft", "xformers", "torch")
    job.refuse(collate=("pad",) if job.device == "cpu" else ("pad", "flatten"))
    # both are read when a model is loaded or a trainer made, not on import
    os.environ["UNSLOTH_CPU_COMPILE"] = str(int(job.compile))
    os.environ["UNSLOTH_PADDING_CHOICE"] = "padded" if job.collate == "pad" else "auto"
    made, seen = trainer(job, list(job.rows()), report)
    made.train()
    report.done(seen.order)


if __name__ == "__main__":
    main()
