"""What several processes cost and win on this machine's cores.

    python benchmarks/several.py --out benchmarks/results/several.txt

SmolLM2-135M's shape with random weights, LoRA r=16, 16 examples of unequal length a step: one
process on all cores against as many processes of one thread, in turns; then what the exchanges of a
step take by themselves, and how long a run takes to end after SIGTERM to the launcher.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.events import StepEnd
from lorafit.world import World, join
from saving import model

STEP = 16


def rows(count: int) -> list[dict[str, list[int]]]:
    """`count` rows of 40 to 300 random ids, all supervised."""
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(40, 301, (count,), generator=drawn).tolist()
    ids = [torch.randint(3, 1000, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def exchanges(world: World, parameters: list[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of a word between hosts, and of the gradients."""
    loss, taken = torch.zeros(()), dict[str, float]()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    ways = {
        "word": lambda: world.added(1, 2, 3, 4),
        "gradients": lambda: world.share_gradients(loss, parameters),
    }
    for name, way in ways.items():
        seconds = []
        for _ in range(30):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        taken[name] = 1e3 * median(seconds[5:])
    return taken


def work(steps: int, count: int) -> None:
    """One process of `count`: tells tokens per second and what the exchanges take."""
    arguments = lorafit.TrainingArguments(
        os.environ["SEVERAL_FOLDER"], max_steps=steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=STEP // count, use_cpu=True, logging_steps=1000,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = lorafit.Trainer(
        model=model(), args=arguments, data_collator=PadCollator(0),
        train_dataset=rows(STEP * steps),
    )  # fmt: skip
    told: list[Any] = []
    trainer.observers.append(told.append)
    trainer.train()
    seen = [event for event in told if isinstance(event, StepEnd)][1:]
    rate = sum(event.tokens for event in seen) / sum(event.seconds for event in seen)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    costs = exchanges(join(torch.device("cpu")), trained)
    if trainer.is_world_process_zero():
        print("TOLD", json.dumps({"rate": rate, **costs}))


def launched(count: int, steps: int, cores: int) -> list[str]:
    """The command that starts `count` processes over all cores."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [
        sys.executable, *(start if count > 1 else []), __file__, "--work", str(count),
        "--steps", str(steps), "--threads", str(cores // count),
    ]  # fmt: skip


def measure(count: int, steps: int, cores: int) -> dict[str, float]:
    """What a run of `count` processes tells."""
    with tempfile.TemporaryDirectory() as folder:
        surroundings = {"OMP_NUM_THREADS": str(cores // count), "SEVERAL_FOLDER": folder}
        done = subprocess.run(
            launched(count, steps, cores), capture_output=True, text=True,
            env=os.environ | surroundings,
        )  # fmt: skip
    line = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    if not line:
        raise SystemExit(f"{count} processes told nothing:\n{done.stdout}{done.stderr}")
    return json.loads(line[0].removeprefix("TOLD "))


def seconds_to_end(count: int, cores: int) -> float:
    """From SIGTERM to the launcher, in the middle of a step, until everything has ended."""
    with tempfile.TemporaryDirectory() as folder:
        surroundings = {"OMP_NUM_THREADS": str(cores // count), "SEVERAL_FOLDER": folder}
        running = subprocess.Popen(
            launched(count, 100, cores), env=os.environ | surroundings,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        journal = Path(folder) / "journal.jsonl"
        while not (journal.exists() and journal.read_text().count("StepEnd") > 0):
            time.sleep(0.1)
        time.sleep(1)
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait()
        if not list(Path(folder).glob("checkpoint-*")):
            raise SystemExit("it ended without a checkpoint")
        return time.monotonic() - began


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first is not timed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=int, default=0, help="for the processes themselves")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.work:
        torch.set_num_threads(given.threads)
        work(given.steps, given.work)
        return
    cores = len(os.sched_getaffinity(0))
    told: dict[int, list[dict[str, float]]] = {1: [], cores: []}
    for _, count in [(number, count) for number in range(given.rounds) for count in told]:
        told[count].append(measure(count, given.steps, cores))
        print(count, told[count][-1], flush=True)
    rates = {count: [each["rate"] for each in runs] for count, runs in told.items()}
    ratios = [several / one for one, several in zip(rates[1], rates[cores], strict=True)]
    last = told[cores][-1]
    text = "\n".join([
        f"SmolLM2-135M's shape, LoRA r=16, fp32, {STEP} examples of 40 to 300 tokens a step",
        f"{cores} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        *(f"{count} x {cores // count} thread(s): {median(rate):.1f} tokens/s "
          f"({min(rate):.1f} to {max(rate):.1f})" for count, rate in rates.items()),
        f"{cores} processes against one, round by round: {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        f"a word between hosts: {last['word']:.2f} ms; all gradients: {last['gradients']:.1f} ms",
        f"from SIGTERM to the launcher until all has ended, checkpoint saved: "
        f"{seconds_to_end(cores, cores):.1f} s",
    ])  # fmt: skip
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
