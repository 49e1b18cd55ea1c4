"""journal.jsonl: every event of a run, one append-only line each. The source of truth of a run.

Knows how to write and read lines; draws no conclusions.
"""

import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lorafit.events import Event
from lorafit.run.store import JOURNAL, make_folder, refusal, write_whole, writing


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
        with writing(self.path):
            # half a character, as in names that are not UTF-8, becomes JSON's escape for it
            self._file = self.path.open(
                "a", buffering=1, encoding="utf-8", errors="backslashreplace"
            )
            if _is_cut(self.path):
                self._file.write("\n")

    def __call__(self, event: Event) -> None:
        """Append one line: `{"event": name, ...fields}`; what is not finite becomes a string."""
        line = {"event": type(event).__name__} | {n: _plain(v) for n, v in asdict(event).items()}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise refusal(self.path, error) from error

    def synced(self) -> int:
        """Its length in bytes, all of them on disk: a checkpoint never knows of more steps."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a line that could not be written, as has been said
            self._file.close()


def _is_cut(path: Path) -> bool:
    """Whether a kill or a full disk has cut the last line short."""
    return path.read_bytes()[-1:] not in (b"", b"\n")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(path: Path, length: int, *, saved: str) -> None:
    """Drop what the run that is resumed wrote after the line of saving `saved`, which is the first
    beyond `length`. A later run that began in the same folder keeps its lines."""
    if not path.is_file():
        return
    written = path.read_bytes()
    later = written[length:].splitlines(keepends=True)
    events = [_event(line) for line in later]
    began = next((n for n, event in enumerate(events) if event.get("first_step") == 0), None)
    kept = [later[n] for n, event in enumerate(events[:began]) if _saves(event, saved)][:1]
    newer = [] if began is None else later[began:]
    write_whole(path, b"".join([written[:length], *kept, *newer]))


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
    """The event of a line; one without a name for a line that a kill cut short, or that is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _saves(event: dict[str, Any], name: str) -> bool:
    return event.get("event") == "Saved" and Path(str(event.get("path"))).name == name


# ---- reading -----------------------------------------------------------------------------------


def read_events(path: Path) -> tuple[list[Event], list[str]]:
    """Every event that a line of `path` holds, in order, and a line of prose for all that was left
    out: lines cut short, events that this version does not know, fields that are not what they
    should be. A field that an older version did not write has its default.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    kinds: dict[str, Any] = {kind.__name__: kind for kind in get_args(Event)}
    found: list[Event] = []
    left_out = Counter[str]()
    for line in path.read_bytes().splitlines():
        name = ""
        try:
            told = dict(json.loads(line))
            name = str(told.get("event"))
            found.append(_made(kinds[name], told))
        except KeyError as unknown:
            what = unknown.args[0]
            left_out[f"{name} without {what}" if name in kinds else f"unknown event {name!r}"] += 1
        except (ValueError, TypeError, RecursionError, OverflowError):
            left_out[f"{name} with a field that is none of its kind" if name else "cut short"] += 1
    lines = [
        f"{count} line{'s' if count > 1 else ''} left out: {why}" for why, count in left_out.items()
    ]
    return found, lines if found or lines else ["the journal is empty"]


def _made(kind: Any, told: dict[str, Any]) -> Event:
    """The event of this kind. Raises KeyError for a field that is not there, ValueError or
    TypeError for one of another kind."""
    given = {
        name: _of_kind(told[name], wanted)
        for name, wanted, needed in _fields(kind)
        if needed or name in told
    }
    return kind(**given)


@cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """Of a kind of event: name and annotation of each field, and whether it has no default."""
    return [(field.name, field.type, field.default is MISSING) for field in fields(kind)]


def _of_kind(value: Any, kind: Any) -> Any:
    """`value` as the annotation `kind` of an event's field says."""
    if type(value) is kind:  # of nearly all values, and there are millions
        return value
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(value)
        many = inner[:1] * len(value) if Ellipsis in inner else inner
        return tuple(_of_kind(item, of) for item, of in zip(value, many, strict=True))
    if get_origin(kind) is Literal:
        return str(value)
    if type(None) in inner:
        return None if value is None else _of_kind(value, inner[0])
    # a float that is not finite was written as a string; a whole one may be without its point
    if kind is not float and type(value) is not kind:
        raise ValueError(value)
    return kind(value)
