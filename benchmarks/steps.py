"""Where the time of a training step goes on CUDA: host, GPU, and each kernel.

    python benchmarks/steps.py smollm2-135m d1 64
    python benchmarks/steps.py qwen3-0.6b gsm8k 16 --dropout 0.1 --knobs '{"recompute": "mlp"}'

Random weights in bf16 drawn on the device, LoRA of rank 16 on all linears, lorafit as it comes, so
many examples a step. A step is timed from its beginning until the device is idle, so that host and
GPU do not overlap as they do in a run: what takes the time shows, not how much a run takes
(gpu.py). The last steps but four are read, when graphs are recorded.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import environments
import examples
import shapes
from lorafit import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

READ, AFTER = 16, 4
"""Steps that are read, and those after them, of which the last is profiled."""


class Clock(TrainerCallback):
    """Seconds of each step, the host's part of them, and the profile of the last but one."""

    def __init__(self, steps: int) -> None:
        self.steps, self.whole, self.host = steps, list[float](), list[float]()
        self.seen = profile(activities=[ProfilerActivity.CUDA])

    def on_step_begin(self, *given: Any, **_: Any) -> None:
        torch.cuda.synchronize()
        if given[1].global_step == self.steps - 2:
            self.seen.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, *given: Any, **_: Any) -> None:
        self.host.append(time.perf_counter() - self.began)
        torch.cuda.synchronize()
        self.whole.append(time.perf_counter() - self.began)
        if given[1].global_step == self.steps - 1:
            self.seen.__exit__(None, None, None)

    def milliseconds(self, of: list[float]) -> float:
        """The median of the steps that are read."""
        return 1e3 * statistics.median(of[-READ - AFTER : -AFTER])


def main() -> None:
    """Train some steps and print where their time went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=shapes.SHAPES)
    parser.add_argument("data", choices=examples.SETS)
    parser.add_argument("per_step", type=int, help="examples")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=780e12, help="of the device, for MFU")
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON for lorafit's arguments")
    given = parser.parse_args()
    shape, root = shapes.SHAPES[given.shape], environments.cache()
    data, each = examples.for_steps(
        given.data, root, vocabulary=shape.vocabulary, steps=given.steps, per_step=given.per_step
    )
    clock = Clock(given.steps)
    trainer = _trainer(shape, data, each, given, clock)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    whole, host = clock.milliseconds(clock.whole), clock.milliseconds(clock.host)
    tokens = data.mean_length * each
    useful = shape.flops_per_token(mean_context=data.mean_context, supervised=data.share)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(*trainer._packing.notices, sep="\n")
    print(
        f"{shape.name}, {each} examples of {given.data}, {tokens:,.0f} tokens: {whole:.1f} ms, the "
        f"host {host:.1f}; MFU {1e3 * tokens * useful / whole / given.rate:.3f}; "
        f"{peaks[0] >> 20:,} MiB allocated, {peaks[1] >> 20:,} reserved"
    )
    print("all steps, ms:", *(f"{1e3 * seconds:.0f}" for seconds in clock.whole))
    ran = [e for e in clock.seen.key_averages() if e.device_type == DeviceType.CUDA]
    ran.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in ran)
    print(f"the GPU: {total / 1e3:.2f} ms in {sum(e.count for e in ran)} kernels")
    for e in ran[:40]:
        print(f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:6d}  {e.key[:120]}")


def _trainer(shape: Any, data: Any, each: int, given: argparse.Namespace, clock: Clock) -> Trainer:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    folder = shapes.folder(shape, environments.cache(), dtype="bf16", weights=False)
    bare = shapes.drawn(folder, device="cuda")
    lora = LoraConfig(
        r=shapes.RANK, lora_alpha=shapes.ALPHA, lora_dropout=given.dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=each, max_steps=given.steps,
        bf16=True, logging_steps=given.steps, save_strategy="no", report_to="none",
        disable_tqdm=True, optim="adamw_torch", train_sampling_strategy="sequential", **given.knobs,
    )  # fmt: skip
    return Trainer(
        model=get_peft_model(bare, lora),
        args=arguments,
        train_dataset=[json.loads(line) for line in data.path.open()],
        data_collator=DataCollatorForLanguageModeling(
            tokenizer=AutoTokenizer.from_pretrained(folder), mlm=False
        ),
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()
