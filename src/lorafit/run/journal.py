"""journal.jsonl: every event of a run, one append-only line each. The source of truth of a run.

Knows how to write and read lines; draws no conclusions.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.events import Event
from lorafit.run.store import JOURNAL, make_folder, refusal, write_whole, writing


class Journal:
    """An open journal; call it with each event. Lines are flushed as they are written.

    Args:
        resumed_at: The step that a resumed run goes on from: what an interrupted one wrote of later
            steps is dropped, as it will be written again. None for a fresh run.
    """

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        self.path = make_folder(folder) / JOURNAL
        if resumed_at is not None:
            _forget_after(self.path, resumed_at)
        with writing(self.path):
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
            if _is_cut(self.path):
                self._file.write("\n")

    def __call__(self, event: Event) -> None:
        """Append one line: `{"event": name, ...fields}`; what is not finite becomes a string."""
        fields = {name: _plain(value) for name, value in asdict(event).items()}
        line = {"event": type(event).__name__, **fields}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise refusal(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a line that could not be written, as has been said
            self._file.close()


def _is_cut(path: Path) -> bool:
    """Whether a kill or a full disk has cut the last line short."""
    return path.read_bytes()[-1:] not in (b"", b"\n")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, step: int) -> None:
    """Drop what the run that is resumed wrote after saving `step`; earlier runs' lines stay.

    The journal is replaced whole, so that a kill leaves the old one or the new one.
    """
    if not path.is_file():
        return
    lines, events, begun = _read(path)
    # without the line of that save, which a kill may have cut off, the step alone decides
    saved = [n for n, event in enumerate(events) if n > begun and _saves(event, step)]
    known = saved[-1] + 1 if saved else len(lines)
    kept = lines[:begun] + [lines[n] for n in range(begun, known) if _stays(events[n], step)]
    write_whole(path, b"".join(kept))


def forget_unsaved(folder: Path) -> None:
    """Drop the lines of a last run that did not finish and of which nothing is left to resume: a
    run that was told to go on begins anew, and its steps are written again."""
    path = folder / JOURNAL
    if not path.is_file():
        return
    lines, events, begun = _read(path)
    if not any(event.get("reason") in ("finished", "stopped") for event in events[begun:]):
        write_whole(path, b"".join(lines[:begun]))


def _read(path: Path) -> tuple[list[bytes], list[dict[str, Any]], int]:
    """The lines, their events, and the number of the line with which the last run began."""
    lines = path.read_bytes().splitlines(keepends=True)
    events = [_event(line) for line in lines]
    begun = max((n for n, event in enumerate(events) if event.get("first_step") == 0), default=0)
    return lines, events, begun


def _event(line: bytes) -> dict[str, Any]:
    """The event of a line; one without a name for a line that a kill cut short."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _saves(event: dict[str, Any], step: int) -> bool:
    return event.get("event") == "Saved" and Path(event["path"]).name == f"checkpoint-{step}"


def _stays(event: dict[str, Any], step: int) -> bool:
    """Whether a line outlives resuming at `step`. A reading there is taken again."""
    name, at = event.get("event", "RunEnded"), event.get("step", 0)
    retaken = event.get("occasion") == "reading" and at == step
    return name != "RunEnded" and at <= step and not retaken
