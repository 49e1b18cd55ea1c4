"""The preloaded library of shim.c: made when it is needed, and switched on in a process."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class Mode(IntEnum):
    """What happens at the k-th operation: nothing, death before it, half of it and death, one
    error, or errors from there on."""

    WATCH, KILL, TEAR, ONCE, FROM = range(5)


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def build() -> Path:
    """The library, made anew where its source has changed."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"lorafit-faults-{os.getuid()}-{digest}.so"
    if not made.exists():
        beside = made.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-O1", "-shared", "-fPIC", "-o", str(beside), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        beside.rename(made)
    return made


def environment() -> dict[str, str]:
    """This process's environment, with the library preloaded into whatever is started with it."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "LD_PRELOAD": str(build()), "PYTHONHASHSEED": "0"}


class Shim:
    """The library in this process, which was started with `environment()`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("fault_seen", "fault_unseen", "fault_failed"):
            self._library[name].restype = ctypes.c_long

    def begin(
        self, root: Path, mode: Mode, *, at: int = 0, error: int = 0, log: Path | None = None
    ) -> None:
        """Watch what changes below `root` from here on."""
        wrong = self._library.fault_begin(
            os.fsencode(root),
            ctypes.c_int(mode),
            ctypes.c_long(at),
            ctypes.c_int(error),
            os.fsencode(log) if log else None,
        )
        assert not wrong, f"raw system calls cannot be followed here ({wrong})"

    def end(self) -> dict[str, int]:
        """Stop; operations seen, failed on purpose, and ways to write that were not followed."""
        self._library.fault_end()
        names = ("seen", "failed", "unseen")
        return {name: int(self._library[f"fault_{name}"]()) for name in names}
