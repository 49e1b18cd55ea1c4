"""docs/reliability.md from the rows of a sweep: what was tried, what came of it, beside whom."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
TEMPLATE = Path(__file__).with_name("page.md")
PACKAGES = ("torch", "transformers", "peft", "safetensors")

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
        f"{platform.python_version()}, {versions}; {platform.system()} {platform.machine()}, "
        "one thread a run. Another file system or version makes other operations.\n"
    )
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.replace("{table}", "\n".join(lines) + "\n" + made)
