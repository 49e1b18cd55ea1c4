"""One trainer per output folder: a lock that the kernel gives up together with its process.

Knows a folder and who holds it, not what is written there.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lorafit.errors import OutputError

FILE = ".lorafit.lock"
PATIENCE = 10.0
"""Seconds given to what a dead trainer started, as its data workers, to notice and end."""


@contextmanager
def held(folder: Path) -> Generator[str]:
    """Inside, no other trainer takes `folder`. One line where that cannot be had, else empty.

    The lock is the kernel's on an open file: a file that a killed process left is no obstacle.

    Raises:
        OutputError: another trainer holds it, which is named; or the folder cannot be written.
    """
    file = folder / FILE
    try:
        descriptor, notice = _take(file)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}.",
            fix="Choose another folder with --output-dir (output_dir=...).",
        ) from error
    try:
        yield notice
    finally:
        with suppress(OSError):  # before it is given up, so that it is nobody else's file
            file.unlink()
        os.close(descriptor)


def _take(file: Path) -> tuple[int, str]:
    """The open file, locked; and one line where there are no locks."""
    until = time.monotonic() + PATIENCE
    while True:
        flags = os.O_RDWR | os.O_CREAT
        if sys.platform != "win32":
            flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(file, flags, 0o644)
        try:
            locked, notice = _try(descriptor)
            if locked and (notice or _is_still(descriptor, file)):
                _sign(descriptor)
                return descriptor, notice
            if not locked:
                _refuse(file.parent, _holder(descriptor), patient=time.monotonic() < until)
                time.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try(descriptor: int) -> tuple[bool, str]:
    without = "nothing keeps a second trainer out of the output folder: "
    if sys.platform == "win32":
        return True, without + "no locks on this system"
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, ""
    except OSError as error:  # some network file systems
        return True, f"{without}its file system has no locks ({error.strerror})"
    return True, ""


def _is_still(descriptor: int, file: Path) -> bool:
    """Whether `file` is what was locked: who held it before may have removed it meanwhile."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    return False


def _sign(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": platform.node(), "started": started}
    with suppress(OSError):  # held all the same; a full disk is told of where it matters
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int) -> Mapping[str, Any]:
    """Who signed; empty where nobody has yet."""
    try:
        signed = json.loads(os.pread(descriptor, 4096, 0))
        return {"pid": int(signed["pid"]), **{k: ascii(signed[k])[1:-1] for k in _WORDS}}
    except (ValueError, TypeError, KeyError):
        return {}


_WORDS = ("host", "started")


def _refuse(folder: Path, holder: Mapping[str, Any], *, patient: bool) -> None:
    """Raise, unless the holder is unknown or gone and there is patience left."""
    here = holder.get("host") == platform.node()
    gone = not holder or (here and not psutil.pid_exists(holder["pid"]))
    if gone and patient:
        return
    who = "process {pid} on {host} since {started}".format(**holder) if holder else "somebody"
    ended = ", which has ended, but not all that it started" if holder and gone else ""
    raise OutputError(
        f"{folder} is being trained into by {who}{ended}.",
        why="Two runs in one folder would mix their checkpoints.",
        fix="Wait for it or stop it, or choose another folder: --output-dir (output_dir=...).",
    )
