"""What bounds a process's memory, read from sample files: containers, GPUs, and this machine."""

import resource
from pathlib import Path

import psutil
import pytest
import torch

from lorafit.engine import limits
from lorafit.engine.limits import Gpu, cgroup_folders, cgroup_left, gpu_of, here
from lorafit.engine.precision import native_bf16
from lorafit.errors import ConfigError

V2 = "35 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CPU = "37 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def test_version_two_is_followed_outwards() -> None:
    found = cgroup_folders("0::/user.slice/run-7.scope\n", V2)
    root = Path("/sys/fs/cgroup")
    assert found == [root / "user.slice/run-7.scope", root / "user.slice", root]


def test_version_one_is_told_from_other_controllers() -> None:
    groups = "9:name=systemd:/\n4:memory:/jobs/3\n1:cpu,cpuacct:/jobs/3\n0::/\n"
    root = Path("/sys/fs/cgroup/memory")
    assert cgroup_folders(groups, f"{CPU}\n{V1}") == [root / "jobs/3", root / "jobs", root]


def test_a_path_of_the_host_is_not_looked_for_inside() -> None:
    inside = V1.replace(" / ", " /docker/4add ", 1)
    root = Path("/sys/fs/cgroup/memory")
    assert cgroup_folders("4:memory:/docker/4add\n", inside) == [root]
    assert cgroup_folders("4:memory:/docker/4add/run\n", inside) == [root / "run", root]
    assert cgroup_folders("0::/../../host\n", V2) == [Path("/sys/fs/cgroup")]
    assert not cgroup_folders("", "no mounts at all")


@pytest.mark.parametrize(
    ("names", "cache"),
    [
        (("memory.max", "memory.current"), "inactive_file"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_what_a_container_leaves(names: tuple[str, str], cache: str, tmp_path: Path) -> None:
    limit, used = (tmp_path / name for name in names)
    assert cgroup_left(tmp_path, 0) is None
    limit.write_text("8000\n")
    used.write_text("5000\n")
    (tmp_path / "memory.stat").write_text(f"cache 4000\n{cache} 3000\n")
    assert cgroup_left(tmp_path, own=500) == 8000 - (5000 - 3000 - 500)
    assert cgroup_left(tmp_path, own=9000) == 8000
    limit.write_text("max\n" if "max" in names[0] else "9223372036854771712\n")
    assert cgroup_left(tmp_path, 0) is None


def test_the_least_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = here("cpu")
    assert 0 < machine.bytes <= psutil.virtual_memory().total and machine.why
    assert here("cpu", "1MB") == limits.Limit(10**6, "memory_limit=1MB")
    assert here("cpu", "900TB").bytes == pytest.approx(machine.bytes, rel=0.2)
    most = resource.getrlimit(resource.RLIMIT_AS)
    addresses = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _: (addresses + 10**7, most[1]))
    bound = here("cpu")
    assert "ulimit" in bound.why and bound.bytes == pytest.approx(limits.resident(), rel=0.2)
    with pytest.raises(ConfigError, match="is no amount of memory"):
        here("cpu", "lots")


def test_a_gpu_is_described_and_its_holders_named() -> None:
    described = "NVIDIA H100 80GB HBM3, 81559, 40000, 9.0\n"
    gpu = gpu_of(described, "4242, /usr/bin/python3, 40960\n77, [Not Found], [N/A]\n")
    assert gpu == Gpu(
        "NVIDIA H100 80GB HBM3", 81559 << 20, 40000 << 20, 9.0,
        ("/usr/bin/python3 (process 4242) holds 42.9 GB",),
    )  # fmt: skip
    assert gpu_of("", "") is None and gpu_of("No devices were found", "") is None
    half = here("cuda", "25%", gpu=gpu)
    assert half.bytes == (81559 << 20) // 4 and half.holders
    assert here("cuda", gpu=gpu).why == "free on NVIDIA H100 80GB HBM3"


def test_without_a_gpu_its_memory_must_be_said() -> None:
    assert here("cuda", "24GB").bytes == 24 * 10**9
    with pytest.raises(ConfigError, match="memory-limit 24GB"):
        here("cuda")
    with pytest.raises(ConfigError, match="leaves no memory"):
        here("cuda", "50%")


def test_bf16_is_known_as_torch_knows_it() -> None:
    assert limits.multiplies_bf16("cpu") == native_bf16(torch.device("cpu"))
    assert limits.multiplies_bf16("cuda", Gpu("V100", 1, 1, 7.0)) is False
    assert limits.has_tiles() == torch.cpu._is_amx_tile_supported()
