"""mlx-lm's LoRA trainer on the CPU, fed the same micro-batches in the file's order.

Its own batches are sorted by length and padded to a multiple of 32; the padding is kept. No
clipping, as it has none. Its loss of a step is the mean of its micro-batches' means.
"""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from protocol import LEARNING_RATE, Job, Report

KEYS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


class Stopwatch(TrainingCallback):
    """mlx-lm reports every `steps_per_report` micro-batches, here one step."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_train_loss_report(self, train_info: dict[str, float]) -> None:
        """A step ended."""
        self._report.step(float(train_info["train_loss"]))


def batches(job: Job, rows: list[dict[str, list[int]]]) -> Iterator[tuple[mx.array, mx.array]]:
    """Ids padded with 0, and where each row's loss begins and ends."""
    for numbers in job.sequential():
        held = [rows[number] for number in numbers]
        width = 1 + 32 * -(-max(len(row["input_ids"]) for row in held) // 32)
        ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in held]
        spans = [(row["labels"].count(-100), len(row["input_ids"]) - 1) for row in held]
        yield mx.array(ids), mx.array(spans)


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    report.imported("mlx-lm", "mlx", "mlx-cpu")
    job.refuse(collate=("pad",), order=("sequential",), compile=(False,), device=("cpu",))
    mx.set_default_device(mx.cpu)
    mx.random.seed(1)
    rows = list(job.rows())
    model, _ = load_model(Path(job.model))
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": 16, "scale": 2.0, "dropout": 0.0, "keys": KEYS}
    )
    report.loaded()
    train(
        model,
        mlx.optimizers.AdamW(LEARNING_RATE, weight_decay=0.0),
        train_dataset=rows,
        args=TrainingArgs(
            batch_size=job.batch, iters=job.steps * job.accumulation, max_seq_length=2048,
            grad_accumulation_steps=job.accumulation, steps_per_report=job.accumulation,
            steps_per_save=10**9, adapter_file=str(Path(job.scratch, "adapters.safetensors")),
        ),
        iterate_batches=lambda **_: batches(job, rows),
        training_callback=Stopwatch(report),
    )  # fmt: skip
    report.done(job.sequential())


if __name__ == "__main__":
    main()
