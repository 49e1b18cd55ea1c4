"""How much memory a run may take, and who says so. Reads the machine; knows no model.

On a CPU the least of what the user says, the container (cgroups, version 1 and 2), `ulimit -v` and
the machine's free memory allow; on CUDA what the device has free. Neither torch nor a GPU's library
is imported: `nvidia-smi` is asked.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lorafit import amounts, processes
from lorafit.errors import ConfigError

UNLIMITED = 1 << 60
"""A version 1 container without a limit says a little less than 2^63."""


@dataclass(frozen=True)
class Limit:
    """The most that this process may hold, in `bytes`: `why`. `holders` are other processes that
    hold memory of the device, each with how much."""

    bytes: int
    why: str
    holders: tuple[str, ...] = ()


def here(device: str, wanted: Any = None, *, gpu: "Gpu | None" = None) -> Limit:
    """The least of all limits on `device` ("cpu" or "cuda"), `wanted` (`memory_limit`) among them;
    a share is taken of the machine's memory, or of the GPU's.

    Raises:
        ConfigError: `wanted` is no amount, or there is no GPU and `wanted` does not say what one
            has.
    """
    whole, found = 0, list[Limit]()
    if device == "cpu":
        whole, found = psutil.virtual_memory().total, [*_of_process()]
    elif gpu:
        whole, found = gpu.total, [Limit(gpu.free, f"free on {gpu.name}", gpu.holders)]
    if wanted is not None:
        try:
            asked = amounts.bytes_of(wanted, whole)
        except ValueError as error:
            raise ConfigError(f"memory_limit={wanted!r} {error}.") from error
        found.append(Limit(asked, f"memory_limit={wanted}", gpu.holders if gpu else ()))
    if not found:
        raise ConfigError(
            "No NVIDIA GPU answers here.",
            why="Without one, nobody knows what memory it has.",
            fix="Say it: --memory-limit 24GB; or --device cpu.",
        )
    return min(found, key=lambda limit: limit.bytes)


def multiplies_bf16(device: str, gpu: "Gpu | None" = None) -> bool:
    """Whether the device multiplies bfloat16 itself, by what it says of itself: precision.py asks
    torch the same. A GPU that is not here is taken to."""
    if device == "cuda":
        return gpu is None or gpu.capability >= 8
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_processor())


def has_tiles() -> bool:
    """Whether this CPU has matrix tiles (AMX), whose products in 16 bits oneDNN compiles."""
    return "amx_tile" in _processor()


def _processor() -> set[str]:
    """What it can do, in Linux's words; none elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return set(next((line for line in lines if line.startswith("flags")), "").split())
    return set()


# ---- this process --------------------------------------------------------------------------------


def resident() -> int:
    """The bytes that this process holds now."""
    return psutil.Process().memory_info().rss


def peak() -> int:
    """The most that it held since `forget_peak`, resident; 0 where Linux does not say."""
    with suppress(OSError, IndexError):
        told = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(told.partition("VmHWM:")[2].split()[0]) << 10
    return 0


def forget_peak() -> bool:
    """Let the peak begin anew at what is resident now; whether the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False


def trim() -> None:
    """Hand back what the C library keeps of freed blocks, where it can."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


# ---- what a process on a CPU may hold ------------------------------------------------------------


def _of_process() -> Iterator[Limit]:
    held = psutil.Process().memory_info()
    own, sharing = held.rss, processes.here()
    free = psutil.virtual_memory().available // sharing
    yield Limit(free + own, "the machine's free memory")
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        for folder in cgroup_folders(groups, mounts):
            left = cgroup_left(folder, own)
            if left is not None:
                yield Limit(own + (left - own) // sharing, f"the container's limit ({folder})")
    with suppress(ImportError):  # Windows has no such limits
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            unused = held.vms - own  # addresses that hold nothing count there
            yield Limit(max(0, most - unused), "the limit on address space (ulimit -v)")


def cgroup_folders(groups: str, mounts: str) -> list[Path]:
    """The folders whose memory limits bind a process, from its own up to the outermost.

    Args:
        groups: /proc/self/cgroup.
        mounts: /proc/self/mountinfo.
    """
    folders: list[Path] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        if kind != "cgroup2" and not (kind == "cgroup" and "memory" in options.split(",")):
            continue
        root, mount = (Path(part) for part in before.split()[3:5])
        for group in groups.splitlines():
            _, controllers, path = group.split(":", 2)
            if ("memory" in controllers.split(",")) != (kind == "cgroup") or (
                kind == "cgroup2" and controllers
            ):
                continue
            # inside a container the path may be that of the host, which is not mounted here
            inside = Path(path).is_relative_to(root) and ".." not in path
            below = Path(path).relative_to(root) if inside else Path()
            folders += [mount / part for part in (below, *below.parents)]
    return folders


def cgroup_left(folder: Path, own: int) -> int | None:
    """The bytes that a group's limit leaves to a process that holds `own` of them, file cache that
    can be dropped not counted; None without a limit."""
    for most, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            limit = int((folder / most).read_text())  # "max" is no number
            if limit >= UNLIMITED:
                return None
            held = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            others = max(0, held - int(stat.get(cache, 0)) - own)
            return max(0, limit - others)
    return None


# ---- a GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of one: bytes in all and free, compute capability, who holds some."""

    name: str
    total: int
    free: int
    capability: float
    holders: tuple[str, ...] = ()


def first_gpu() -> Gpu | None:
    """The first GPU; None where none answers."""
    described = _asked("--query-gpu=name,memory.total,memory.free,compute_cap")
    return gpu_of(described, _asked("--query-compute-apps=pid,process_name,used_memory"))


def _asked(query: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, query, "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout
    return ""


def gpu_of(described: str, running: str) -> Gpu | None:
    """The GPU of two answers of nvidia-smi (csv, MiB, no units); None where they say nothing."""
    with suppress(ValueError):
        name, total, free, capability = (part.strip() for part in described.strip().split(","))
        rows = [[part.strip() for part in line.split(",")] for line in running.splitlines()]
        holders = tuple(
            f"{program} (process {number}) holds {amounts.shown(int(held) << 20)}"
            for number, program, held in rows
            if held.isdigit()
        )
        return Gpu(name, int(total) << 20, int(free) << 20, float(capability), holders)
    return None
