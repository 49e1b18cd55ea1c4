"""docs/reliability.md from the rows of a sweep: what was tried, what came of it, beside whom."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
PACKAGES = ("torch", "transformers", "peft", "safetensors")

HEAD = """# What happens when it is killed

Written by `make faults`: every operation on a file that a run makes below its output folder (writes of native libraries included) is counted by a small library loaded before everything else, and at each of
them, in a run of its own, one fault happens. The run: four steps of a tiny Llama with LoRA (r=4) and dropout, saving at every step, keeping two checkpoints, evaluating, restoring the best, saving the final adapter.
Then the same command again, as a scheduler restarts it, with `resume_from_checkpoint="auto"` and nothing repaired by hand.

**Counted as survived**: the final adapter, the last checkpoint's optimiser and random states, the log and the journal are bit for bit those of a run that nothing happened to, and no file is left over; a fault that the system tells is
told to the person without a traceback, and the exit status is not 0. For transformers' Trainer (resumed by `get_last_checkpoint`, as its documentation says) the first half of this, without the journal.

"""

NOT = """
## Not promised

Bits on another machine type, torch version, thread count or layout (the curve, to rounding; docs/resuming.md). A GPU whose kernels are not deterministic. Network file systems without locks or atomic renames. A disk that says it has
written what it has not. Streams and collators that keep random generators of their own.
"""

OURS = "python"
THEIRS = "theirs"


class Row(Protocol):
    """A row of a sweep: `name` is its run and its fault."""

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def tried(self) -> int: ...
    @property
    def passed(self) -> int: ...


def page(rows: Sequence[Row], *, seed: int, minutes: float) -> str:
    """The page's text."""
    found = {row.name: f"{row.passed} of {row.tried}" for row in rows}
    faults = {row.name.split(" ", 1)[1]: row.what for row in rows if row.what}
    lines = ["| fault | Python | command line | transformers' Trainer |", "|---|---|---|---|"]
    for fault, what in faults.items():
        cells = (found.get(f"{run} {fault}", "") for run in (OURS, "command", THEIRS))
        lines.append(f"| {what} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    made = (
        f"\n{datetime.now(UTC):%d %B %Y}, {minutes:.0f} minutes, seed {seed}; Python "
        f"{platform.python_version()}, {versions}; {platform.system()} {platform.machine()}, one thread "
        "a run. Another file system or version makes other operations.\n"
    )
    return HEAD + "\n".join(lines) + "\n" + made + NOT
