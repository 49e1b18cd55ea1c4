"""What is logged and written: state, metrics files, tables of numbers; arguments left alone."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from tests.tiny import collate, llama, plain
from transformers import Trainer, TrainingArguments
from transformers.hf_argparser import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint, set_seed


@dataclass
class ModelArguments:
    rank: int = field(default=4, metadata={"help": "of the adapter"})


def lines(text):
    return [line.split("=")[0].strip() for line in text.splitlines()]


parser = HfArgumentParser((ModelArguments, TrainingArguments))
given = (
    "--output_dir out --do_train --do_eval --per_device_train_batch_size 2 --max_steps 4 "
    "--learning_rate 0.01 --logging_steps 2 --eval_strategy steps --eval_steps 2 --save_steps 2 "
    "--report_to none --disable_tqdm true --use_cpu --include_num_input_tokens_seen true --seed 5 "
    "--lr_scheduler_type cosine --warmup_steps 1"
)
model_args, training_args = parser.parse_args_into_dataclasses(given.split())
set_seed(training_args.seed)
before = training_args.to_dict()
assert Path(training_args.output_dir).is_dir() is False
assert get_last_checkpoint(".") is None
trainer = Trainer(
    model=llama(),
    args=training_args,
    train_dataset=plain(8) if training_args.do_train else None,
    eval_dataset=plain(1) * 4 if training_args.do_eval else None,
    data_collator=collate,
)
result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
trainer.save_model()
metrics = result.metrics
metrics.pop("total_flos", None)  # PrinterCallback takes it out
metrics["train_samples"] = len(trainer.train_dataset)
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()
outcome = {
    "result": [result.global_step, result.training_loss, sorted(metrics), len(result)],
    "log": trainer.state.log_history,
    "flos": trainer.state.total_flos,
    "tokens": trainer.state.num_input_tokens_seen,
    "untouched": training_args.to_dict() == before,
    "last": get_last_checkpoint("out"),
    "zero": [trainer.is_world_process_zero(), trainer.is_local_process_zero()],
}
metrics = trainer.evaluate()
metrics["perplexity"] = math.exp(metrics["eval_loss"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
outcome["evaluated"] = [metrics["perplexity"], sorted(metrics)]
for name in ("train_results", "eval_results", "all_results", "trainer_state"):
    outcome[name] = sorted(json.loads(Path(f"out/{name}.json").read_text()))
state = json.loads(Path("out/trainer_state.json").read_text())
outcome["state"] = {key: state[key] for key in sorted(state) if key != "stateful_callbacks"}

accelerator = trainer.accelerator
outcome["accelerator"] = [
    accelerator.is_main_process,
    accelerator.num_processes,
    str(accelerator.device),
    accelerator.unwrap_model(trainer.model) is trainer.model,
    accelerator.wait_for_everyone(),
    accelerator.gather([1]),
]
outcome["adapter"] = sorted(
    path.name for path in Path("out").iterdir() if path.name.startswith("adapter")
)
