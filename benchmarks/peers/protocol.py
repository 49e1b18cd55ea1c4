"""What runners and the benchmark say to each other: a job on standard input, lines of JSON back.

Owns the words and the stopwatch. Imports nothing beyond the standard library, as it is loaded in
every peer's environment; a runner knows its library and this file, and nothing of other peers.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

MARK = "@bench "
LEARNING_RATE, CLIP = 2e-4, 0.3


@dataclass(frozen=True)
class Job:
    """One run of one peer. What a peer cannot do, it refuses; it never does something else.

    Attributes:
        model: Folder with configuration, tokenizer and perhaps weights (else drawn from seed 0).
        data: File of examples; empty: drawn as they are asked for.
        examples: How many of them are trained on.
        dtype: "bf16" or "fp32": of the base, and of matrix products.
        batch, accumulation: Examples of a micro-batch, micro-batches of a step.
        order: "sequential", "group_by_length" or "random" (not told in the report).
        collate: "pad", "flatten" or "pack": padded, laid end to end, packed beforehand.
        compile: Let the peer compile, where it has its own way.
        synced: Steps after which the clock waits for the device.
        log_every: Losses are read every so many steps (and after the first).
        adapter: Folder to save the adapter to; empty: nowhere.
        knobs: More settings for the peer, by its own names.
    """

    model: str
    data: str = ""
    examples: int = 0
    dtype: str = "bf16"
    batch: int = 2
    accumulation: int = 8
    steps: int = 6
    device: str = "cpu"
    order: str = "sequential"
    collate: str = "pad"
    compile: bool = False
    synced: tuple[int, ...] = ()
    log_every: int = 1
    adapter: str = ""
    scratch: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Job":
        """The job on this process's standard input. Ask when the peer's library is loaded."""
        _tell({"event": "ready", "at": time.monotonic()})
        return cls(**json.loads(sys.stdin.readline()))

    def rows(self) -> "list[dict[str, list[int]]] | Drawn":
        """The examples: `input_ids` and `labels`."""
        if not self.data:
            return Drawn(self.examples, vocabulary=self.vocabulary())
        with Path(self.data).open() as file:
            return [json.loads(line) for line in islice(file, self.examples)]

    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return json.loads(Path(self.model, "config.json").read_text())["vocab_size"]

    def sequential(self) -> list[list[int]]:
        """Which examples each micro-batch holds, in file order."""
        count = self.batch * self.accumulation * self.steps
        order = [number % self.examples for number in range(count)]
        return [order[start : start + self.batch] for start in range(0, count, self.batch)]

    def refuse(self, **allowed: Sequence[object]) -> None:
        """Stop unless each named setting is among those that the peer can do."""
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SystemExit(f"this peer has no {name}={getattr(self, name)}")


@dataclass(frozen=True)
class Drawn:
    """A map-style set of any number of examples, each of 64 tokens, that holds none of them."""

    count: int
    vocabulary: int
    length: int = 64

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        ids = random.Random(index).choices(range(2, self.vocabulary), k=self.length)
        return {"input_ids": ids, "labels": list(ids)}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(self.count))


class Report:
    """Says where a run is, in lines of JSON with the time and the memory of the process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._steps = 0
        self._say("started")

    def imported(self, *packages: str) -> None:
        """The peer's library is there and nothing else yet; name the packages to report."""
        self._say("imported", versions=_versions(packages))

    def loaded(self) -> None:
        """Model, adapter and examples are in memory, and training begins."""
        self._say("loaded")

    def step(self, loss: float | None = None) -> None:
        """A step ended; loss in nats per supervised token of that step, if it is known."""
        self._steps += 1
        if self._steps in self._job.synced:
            _wait(self._job.device)
        self._say("step", step=self._steps, loss=loss)

    def loss(self, step: int, value: float) -> None:
        """The loss of a step, where it is known later than the step's end."""
        self._say("loss", step=step, loss=value)

    def scored(self, example: int, nats: float, targets: int) -> None:
        """The reference's word on one example: summed nats over so many supervised tokens."""
        self._say("scored", example=example, nats=nats, targets=targets)

    def done(self, order: list[list[int]]) -> None:
        """The run ended. `order`: the examples of each micro-batch, by number in the file."""
        parts = self._job.accumulation
        steps = [order[start : start + parts] for start in range(0, len(order), parts)]
        micro_batches = [[len(part) for part in step] for step in steps[: self._job.steps]]
        flat = [[example for part in step for example in part] for step in steps]
        self._say("done", order=flat[: self._job.steps], micro_batches=micro_batches)

    def _say(self, event: str, **more: object) -> None:
        _tell({"event": event, "at": time.monotonic(), **_memory(self._job.device), **more})


class Ticks:
    """A Trainer's callback but for its base class: reports steps, and losses as logged."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Nothing was computed yet."""
        self._report.loaded()

    def on_step_end(self, *_: object, **__: object) -> None:
        """The optimiser has stepped."""
        self._report.step()

    def on_log(self, _: object, state: Any, __: object, logs: dict[str, Any], **_more: Any) -> None:
        """The mean since the last log; exact for a step where each is logged."""
        if "loss" in logs:
            self._report.loss(state.global_step, float(logs["loss"]))


class Seen:
    """Wraps a collator and remembers which examples each micro-batch held.

    Args:
        lengths_column: Where a packed row says how long its examples are.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, list[int]]],
        collate: Callable[[list[dict[str, Any]]], Any],
        lengths_column: str = "seq_lengths",
    ) -> None:
        self._numbers = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
        self._collate, self._lengths = collate, lengths_column
        self.order: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        held: list[int] = []
        for row in rows:
            ids = list(row["input_ids"])
            for length in row.get(self._lengths) or [len(ids)]:
                held.append(self._numbers[tuple(ids[:length])])
                ids = ids[length:]
        self.order.append(held)
        return self._collate(rows)


def _tell(line: dict[str, object]) -> None:
    print(f"\n{MARK}{json.dumps(line)}", flush=True)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _memory(device: str) -> dict[str, int]:
    """Bytes: what the process holds, the most it held, and the most of the GPU's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    found = {
        "now": int(fields["VmRSS"].split()[0]) * 1024,
        "peak": int(fields["VmHWM"].split()[0]) * 1024,
    }
    if device == "cuda" and "torch" in sys.modules:
        found["device_peak"] = sys.modules["torch"].cuda.max_memory_allocated()
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        sys.modules["torch"].cuda.synchronize()
