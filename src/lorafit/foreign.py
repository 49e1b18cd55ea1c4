"""Files that strangers wrote, opened so that none can hang, flood or mislead the process.

Owns what is a plain file, how much of one is read, where a link may lead, and JSON that says each
thing once. Raises what the standard library raises, for the rooms to put into their own words.
"""

import errno
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES, DEEPEST = 16_000_000, 64
"""More than any configuration or header of a model has, and deeper than any nests: whoever walks
through one later walks in bounds."""

_NOT_WAITING = os.O_NONBLOCK if os.name == "posix" else 0
"""Opening a pipe nobody writes to would wait for ever."""


def opened(path: Path) -> BinaryIO:
    """The file at `path`, to be read.

    Raises:
        OSError: not there, not to be read, or a pipe, a socket or a device.
    """
    try:
        file = open(path, "rb", opener=_open)  # noqa: SIM115 the caller closes it
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, "no file has such a name", str(path)) from error
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def _open(name: str, flags: int) -> int:
    return os.open(name, flags | _NOT_WAITING)


def read(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """All of the file at `path`.

    Raises:
        OSError: as `opened`, or the file is larger than `most` bytes.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:g} MB", str(path))
    return data


def read_json(path: Path, *, once: bool = True) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        OSError: as `read`.
        ValueError: as `json_object`.
    """
    return json_object(read(path), once=once)


def json_object(data: bytes, *, once: bool = True) -> dict[str, Any]:
    """The JSON object that `data` holds.

    Args:
        once: Refuse a key that stands twice, of which readers take the one or the other.

    Raises:
        ValueError: it is not UTF-8, not JSON, not an object, nested too deeply.
    """
    try:
        made = json.loads(data.decode("utf-8"), object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(made, dict):
        raise ValueError("it does not hold a JSON object")
    level: list[Any] = [made]
    for _ in range(DEEPEST):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for part in inside for item in part if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    return made


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return made


def leads_out(path: Path) -> bool:
    """Whether `path` is a link to something outside its folder. The Hub's cache, whose folders
    hold links to files beside them, is one folder here."""
    folder = path.parent.resolve()
    cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    home = folder.parents[1] if cached else folder
    return not path.resolve().is_relative_to(home)
