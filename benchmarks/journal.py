"""What the journal costs of a step: the microseconds and bytes of a line, beside a step's time.

    python benchmarks/journal.py [--lines 20000] [--out benchmarks/results/journal.txt]

Events as a run emits them are written one by one to a journal on the disk, and timed: the best of
five rounds, as others share the machine. A step writes one `StepEnd`; a reading two `Evaluated`,
each with the nats of 512 groups.
"""

import argparse
import tempfile
import time
from pathlib import Path

from lorafit.events import PROBE, Evaluated, Event, StepEnd
from lorafit.run.journal import Journal

STEP = StepEnd(1234, 1.2345678901234567, 2.345678901234567, 0.7654321098765432,
               0.00019876543210987654, 4096, 2345, 0.123456789)  # fmt: skip
READING = Evaluated(
    PROBE, 1234, 1.2345678901234567, 2.345678901234567, 102400, 2048, 12.3456789, "reading",
    tuple(123.456789 + n for n in range(512)), tuple(200 + n % 7 for n in range(512)),
)  # fmt: skip


def cost(event: Event, lines: int) -> tuple[float, float]:
    """Microseconds and bytes of a line of `event`."""
    best, size = float("inf"), 0.0
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder))
            began = time.perf_counter()
            for _ in range(lines):
                journal(event)
            best = min(best, time.perf_counter() - began)
            size = journal.synced() / lines
            journal.close()
    return 1e6 * best / lines, size


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/journal.txt"))
    given = parser.parse_args()
    told = ["event              us a line   bytes   steps of 100 ms"]
    for name, event, lines in (("StepEnd", STEP, given.lines), ("Evaluated, 512", READING, 500)):
        micros, size = cost(event, lines)
        told.append(f"{name:<16} {micros:>11.1f} {size:>7.0f}   {micros / 100_000:.2%}")
    print("\n".join(told))
    given.out.write_text("\n".join(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
