"""What one checkpoint costs beside one step.

    python benchmarks/saving.py --steps 12 --out benchmarks/results/saving.txt

SmolLM2-135M's shape with random weights, LoRA r=16 on all linear layers (the recipe), 16 examples a
step; every step saves a whole, synced checkpoint by the trainer's own code. Tells medians of the
step, of the save and of its parts, and from which interval on a save beside training would win 1%.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.events import StepEnd
from lorafit.run import checkpoint, store

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def model() -> Any:
    """The base with a fresh adapter."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def rows(count: int, length: int) -> list[dict[str, list[int]]]:
    """`count` rows of random ids, all supervised."""
    drawn = torch.randint(3, 1000, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in drawn]


@contextmanager
def timed(where: Any, name: str, taken: dict[str, list[float]]) -> Iterator[None]:
    """Inside, each call of `where.name` is timed."""
    inner: Callable[..., Any] = getattr(where, name)

    def call(*given: Any, **how: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*given, **how)
        finally:
            taken[name].append(time.perf_counter() - began)

    setattr(where, name, call)
    yield
    setattr(where, name, inner)


def measure(steps: int, length: int) -> dict[str, Any]:
    """Seconds of steps and saves, bytes of a checkpoint."""
    taken: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        arguments = lorafit.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            save_strategy="steps", save_steps=1, save_total_limit=2, use_cpu=True,
            disable_tqdm=True, logging_steps=1000,
        )  # fmt: skip
        trainer = lorafit.Trainer(
            model=model(), args=arguments, data_collator=PadCollator(0),
            train_dataset=rows(16 * steps, length),
        )  # fmt: skip
        told: list[Any] = []
        trainer.observers.append(told.append)
        with (
            timed(trainer, "_keep", taken),
            timed(checkpoint, "_write_state", taken),
            timed(store, "_write_manifest", taken),
            timed(store, "_sync", taken),
            timed(os, "fsync", taken),
        ):
            trainer.train()
        newest, _ = store.newest(Path(folder))
        assert newest is not None
        began = time.perf_counter()
        checkpoint.load(newest)
        loading = time.perf_counter() - began
        size = store.bytes_of(newest)
    seconds = [event.seconds for event in told if isinstance(event, StepEnd)]
    return {"step": seconds[1:], "bytes": size, "verified and read": [loading], **taken}


def report(measured: dict[str, Any], length: int) -> str:
    """The figures in words."""
    step, save = median(measured["step"]), median(measured["_keep"])
    names = {
        "_write_state": "optimiser, generators, position",
        "_write_manifest": "sync and sha256",
    }
    parts = [f"  of that {said}: {1e3 * median(measured[n]):.0f} ms" for n, said in names.items()]
    synced = 1e3 * sum(measured["fsync"]) / len(measured["_keep"])
    return "\n".join(
        [
            f"SmolLM2-135M's shape, LoRA r=16, fp32, 16 examples of {length} tokens a step",
            f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
            f"torch {torch.__version__}; the machine was shared with other work",
            f"one step: {1e3 * step:.0f} ms",
            f"one whole checkpoint ({measured['bytes'] / 1e6:.0f} MB, synced): {1e3 * save:.0f} ms "
            f"(from {1e3 * min(measured['_keep']):.0f} to {1e3 * max(measured['_keep']):.0f})",
            *parts,
            f"  of that fsync alone: {synced:.0f} ms",
            f"verified and read again: {1e3 * measured['verified and read'][0]:.0f} ms",
            f"a save costs {save / step:.2f} steps; saving every 500 steps costs "
            f"{100 * save / step / 500:.3f}% of the run, and 1% at one save in "
            f"{100 * save / step:.0f} steps",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    measured = measure(given.steps, given.length)
    text = report(measured, given.length)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
        kept = {name: value for name, value in measured.items() if name not in ("_sync",)}
        given.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
