"""journal.jsonl: every event of a run, one append-only line each. The source of truth of a run.

Knows how to write and read lines; draws no conclusions.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.events import Event
from lorafit.run.store import JOURNAL, make_folder


class Journal:
    """An open journal; call it with each event. Lines are flushed as they are written."""

    def __init__(self, folder: Path) -> None:
        self.path = make_folder(folder) / JOURNAL
        self._file = self.path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Append one line: `{"event": name, ...fields}`; what is not finite becomes a string."""
        fields = {name: _plain(value) for name, value in asdict(event).items()}
        line = {"event": type(event).__name__, **fields}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def forget_after(folder: Path, step: int) -> None:
    """Drop the lines that a resumed run will write again: steps and readings after `step`.

    The journal is replaced whole, so that a kill leaves the old one or the new one.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _stays(line, step)]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)


def _stays(line: str, step: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return event.get("event") != "RunEnded" and event.get("step", 0) <= step
