"""The C++ sources, compiled once for this machine and called through ctypes.

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
from types import MappingProxyType

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("native.cpp", "attention.cpp", "products.cpp"))
INCLUDED = tuple(HERE / name for name in ("native.h", "native16.h", "tile.h"))
# Sums may be reordered, as vector units need; NaN and infinity keep their meaning.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
COMPILER_SECONDS = 120
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint32, "f": ctypes.c_float}
SIGNATURES = MappingProxyType(
    {
        "rms_norm": "ppppiif",
        "rms_norm_backward": "ppppppii",
        "rotate": "pppiiiii",
        "swiglu": "ppii",
        "swiglu_backward": "pppii",
        "attention": "ppppppiiiiiiiif",
        "attention_backward": "pppppppppiiiiiiiiiiif",
        "linear": "pppppppiiii",
        "linear_backward": "pppppiiii",
        "over_rows": "pppiiii",
        "softmax": "ppiiiiif",
        "softmax_backward": "pppiiiiif",
        "cross_entropy": "pppiiff",
        "dropout": "ppppiiuf",
    }
)
"""What each function takes: pointers, int64, uint32, float; its own order."""

Call = Callable[..., None]


def function(name: str, *tensors: Tensor) -> Call | None:
    """The native function `name` for tensors of these dtypes; None where torch must do the work.

    It takes contiguous CPU tensors, ints and floats, in the order of its C signature.
    """
    if not all(tensor.is_cpu for tensor in tensors):
        return None
    return _wrapped(name, tuple(tensor.dtype for tensor in tensors))


@cache
def _wrapped(name: str, dtypes: tuple[torch.dtype, ...]) -> Call | None:
    library = load()
    if library is None or not _SUFFIX.keys() >= set(dtypes):
        return None
    try:
        bare = library["_".join([name, *(_SUFFIX[dtype] for dtype in dtypes)])]
    except AttributeError:  # a pair of dtypes that nobody needs
        return None
    bare.restype, bare.argtypes = None, [_TYPES[kind] for kind in SIGNATURES[name]]

    def call(*given: Tensor | int | float | None) -> None:
        bare(*[_address(value) if isinstance(value, Tensor) else value for value in given])

    return call


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def compiler() -> str | None:
    """What compiles; None where nothing does, or nothing is to."""
    if os.environ.get("LORAFIT_NATIVE") == "0":
        return None
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


@cache
def load() -> ctypes.CDLL | None:
    """The library, compiled on the first call of a machine's first run (about 3 s); None without a
    compiler."""
    found = compiler()
    if found is None:
        return None
    try:
        made = _home() / f"native-{_key(found)}.so"
        if not made.exists():
            _compile(found, made)
        return _opened(made) or _opened(_compile(found, made))
    # an old compiler, a folder that may not execute, a system that knows no owners of files
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def _opened(made: Path) -> ctypes.CDLL | None:
    """The library; None where the file is broken."""
    try:
        return ctypes.CDLL(str(made))
    except OSError:
        return None


def _home() -> Path:
    """Where it is kept: a folder that nobody else may write to."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = base / "lorafit" / "native"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = home.stat()
        ours = found.st_uid == os.getuid() and not found.st_mode & 0o022
        if ours and os.access(home, os.W_OK):
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
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Feat"))]
    sources = [path.read_text() for path in (*INCLUDED, *SOURCES)]
    parts = [*sources, *FLAGS, said.stdout, torch.__version__, *flags[:1]]
    return hashlib.sha256("\n".join([*parts, platform.machine()]).encode()).hexdigest()[:16]


def _compile(compiler: str, made: Path) -> Path:
    # torch's own OpenMP, so that both use one pool of threads: two would fight for the cores
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    handle, partial = tempfile.mkstemp(dir=made.parent)
    os.close(handle)
    command = [compiler, *FLAGS, *map(str, SOURCES), "-o", partial, *map(str, threads[:1])]
    subprocess.run(command, capture_output=True, timeout=COMPILER_SECONDS, check=True)
    os.replace(partial, made)  # whole or not there, whoever else compiles at the same time
    return made
