"""Does a token cost the same whatever the number of examples, and of micro-batches in a step?

    python benchmarks/scaling.py

lorafit alone, on a tiny model, where any cost beside the model's own shows most. The examples are
drawn as they are asked for, so that memory is the trainer's and not the data's; their order is
random, as in real runs. The first 64 micro-batches are not timed. Each measurement is a fresh
process; medians over interleaved rounds. Results: benchmarks/results/scaling.json and scaling.txt.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import environments
import measure
import shapes
from comparison import machine
from peers.protocol import Drawn, Job

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
ACCUMULATIONS = (1, 2, 4, 8, 16, 32, 64)
MICRO_BATCHES, UNTIMED = 320, 64


@dataclass
class Point:
    """One setting and what its rounds gave."""

    what: str
    examples: int
    accumulation: int
    microseconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)

    def line(self) -> str:
        """For the table."""
        spread = f"[{min(self.microseconds):.1f}-{max(self.microseconds):.1f}]"
        return (
            f"{self.what:<22}{self.examples:>11,}{self.accumulation:>14}"
            f"{median(self.microseconds):>14.1f} {spread:<16}"
            f"{median(self.peak_mb):>9.0f}{median(self.starts_s):>12.1f}"
        )


def points(*, smoke: bool) -> list[Point]:
    """The settings: one of the two moves, the other stands."""
    by_count = [Point("examples in the set", count, 8) for count in COUNTS]
    by_parts = [Point("micro-batches a step", 10_000, parts) for parts in ACCUMULATIONS]
    return [by_count[0], by_parts[0]] if smoke else by_count + by_parts


def add(point: Point, *, model: Path, dtype: str, kept: Path) -> None:
    """Measure it once more.

    Raises:
        RuntimeError: the run failed; with its last words.
    """
    steps = MICRO_BATCHES // point.accumulation
    job = Job(
        model=str(model), examples=point.examples, dtype=dtype, order="random",
        accumulation=point.accumulation, steps=steps, log_every=steps,
    )  # fmt: skip
    run = measure.run("run_lorafit.py", environments.here("lorafit", "lorafit"), job, kept=kept)
    if run.error:
        raise RuntimeError(run.error)
    ends = [event["at"] for event in run.of("step")]
    first = max(1, UNTIMED // point.accumulation)
    tokens = (steps - first) * point.accumulation * job.batch * Drawn(0, 0).length
    point.microseconds.append((ends[-1] - ends[first - 1]) / tokens * 1e6)
    point.peak_mb.append(run.of("done")[0]["peak"] / 1e6)
    point.starts_s.append(ends[0] - run.began)


def main() -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="tiny", choices=shapes.SHAPES)
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    root = environments.cache()
    out = root / "smoke-scaling" if given.smoke else Path(__file__).parent / "results" / "scaling"
    shape = shapes.SHAPES[given.shape]
    model = shapes.folder(shape, root, dtype=given.dtype, weights=True)
    measured = points(smoke=given.smoke)
    told = machine() | {"model": given.shape, "dtype": given.dtype, "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(1 if given.smoke else given.rounds):
            for point in measured:
                add(point, model=model, dtype=given.dtype, kept=Path(kept))
    columns = ("what moves", "examples", "accumulation", "us per token", "peak MB", "1st step s")
    header = "{:<22}{:>11}{:>14}{:>14} {:<16}{:>9}{:>12}".format(*columns[:4], "", *columns[4:])
    lines = [f"{name}: {value}" for name, value in told.items()]
    text = "\n".join([*lines, "", header, *(point.line() for point in measured)])
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".txt").write_text(text + "\n")
    record = told | {"points": [asdict(point) for point in measured]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
