"""journal.jsonl: every event of a run, one append-only line each. The source of truth of a run.

Knows how to write and read lines; draws no conclusions.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.events import Event
from lorafit.run.store import JOURNAL, make_folder


class Journal:
    """An open journal; call it with each event. Lines are flushed as they are written.

    Args:
        resumed: The checkpoint that the run goes on from, and the length of its journal when it
            was saved: what an interrupted run wrote later is dropped, as it will be written again.
            None for a fresh run.
    """

    def __init__(self, folder: Path, *, resumed: tuple[Path, int] | None = None) -> None:
        self.path = make_folder(folder) / JOURNAL
        if resumed is not None and resumed[0].resolve().parent == folder.resolve():
            _forget_after(self.path, resumed[1], saved=resumed[0].name)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        if not _ends_its_line(self.path):
            self._file.write("\n")

    def __call__(self, event: Event) -> None:
        """Append one line: `{"event": name, ...fields}`; what is not finite becomes a string."""
        fields = {name: _plain(value) for name, value in asdict(event).items()}
        line = {"event": type(event).__name__, **fields}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def synced(self) -> int:
        """Its length in bytes, all of them on disk: a checkpoint never knows of more steps."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, length: int, *, saved: str) -> None:
    """Drop what the run that is resumed wrote after the line of saving `saved`, which is the first
    beyond `length`. A later run that began in the same folder keeps its lines."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        file.seek(length)
        later = file.read().splitlines(keepends=True)
        events = [_event(line) for line in later]
        began = next((n for n, event in enumerate(events) if event.get("first_step") == 0), None)
        kept = [n for n, event in enumerate(events[:began]) if _saves(event, saved)][:1]
        file.seek(length)
        file.writelines([later[n] for n in kept] + ([] if began is None else later[began:]))
        file.truncate()
        os.fsync(file.fileno())


def _event(line: bytes) -> dict[str, Any]:
    """The event of a line; one without a name for a line that a kill cut short."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _saves(event: dict[str, Any], name: str) -> bool:
    return event.get("event") == "Saved" and Path(event["path"]).name == name


def _ends_its_line(path: Path) -> bool:
    """Whether the file is empty or its last line whole, which a kill may have cut short."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() in (b"", b"\n")
