"""native.cpp, compiled once for this machine and called through ctypes.

Owns the compiler's command and where the library is kept; knows no mathematics. Where there is no
C++ compiler, or `LORAFIT_NATIVE=0` asks for none, `function` finds nothing and torch does the work:
the same numbers to rounding, in more passes over memory (benchmarks/results/kernels.txt).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
# Sums may be reordered, as vector units need; NaN and infinity keep their meaning.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
COMPILER_SECONDS = 120
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

Call = Callable[..., None]


def function(name: str, *tensors: Tensor) -> Call | None:
    """The native function `name` for tensors of these dtypes; None where torch must do the work.

    It takes contiguous CPU tensors, ints and floats, in the order of its C signature.
    """
    suffixes = [_SUFFIX.get(tensor.dtype) for tensor in tensors if tensor.device.type == "cpu"]
    if len(suffixes) != len(tensors) or None in suffixes:
        return None
    library = load()
    symbol = "_".join([name, *map(str, suffixes)])
    return None if library is None else _wrapped(library, symbol)


@cache
def _wrapped(library: ctypes.CDLL, symbol: str) -> Call | None:
    try:
        bare = library[symbol]
    except AttributeError:  # a pair of dtypes that nobody needs
        return None
    bare.restype = None

    def call(*given: Tensor | int | float | None) -> None:
        bare(*[_converted(value) for value in given])

    return call


def _converted(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


@cache
def load() -> ctypes.CDLL | None:
    """The library, compiled on the first call of a machine's first run (about 3 s); None without a
    compiler."""
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if os.environ.get("LORAFIT_NATIVE") == "0" or compiler is None:
        return None
    made = _home() / f"native-{_key(compiler)}.so"
    try:
        if not made.exists():
            _compile(compiler, made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError):  # an old compiler, a folder that may not execute
        return None


def _home() -> Path:
    """Where it is kept: a folder that nobody else may write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = base / "lorafit" / "native"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if home.stat().st_uid == os.getuid() and os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lorafit-"))


def _key(compiler: str) -> str:
    """What decides the library's code: source, flags, compiler, torch's threads, the processor."""
    said = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Feat"))]
    parts = [SOURCE.read_text(), *FLAGS, said.stdout, torch.__version__, *flags[:1]]
    return hashlib.sha256("\n".join([*parts, platform.machine()]).encode()).hexdigest()[:16]


def _compile(compiler: str, made: Path) -> None:
    # torch's own OpenMP, so that both use one pool of threads: two would fight for the cores
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    partial = made.with_name(f"{made.name}.{os.getpid()}")
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial), *map(str, threads[:1])]
    subprocess.run(command, capture_output=True, timeout=COMPILER_SECONDS, check=True)
    partial.replace(made)  # whole or not there, whoever else compiles at the same time
