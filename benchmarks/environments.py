"""A virtual environment for each peer, made once and kept outside the repository.

    python benchmarks/environments.py [PEER ...]

Owns the versions that are measured and where they lie; knows nothing about what they run. The
folder is `LORAFIT_BENCH_CACHE`, or ~/.cache/lorafit-bench. torch stands first in every install and
in a constraints file: left to themselves, several of these packages ask for another one, and for
gigabytes of CUDA libraries with it.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

TORCH = "torch==2.13.0"
HUGGING_FACE = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0")
PACKAGES: dict[str, tuple[str, ...]] = {
    "lorafit": (TORCH, *HUGGING_FACE, "--editable", str(Path(__file__).parent.parent)),
    "transformers": (TORCH, *HUGGING_FACE),
    "trl": (TORCH, *HUGGING_FACE, "trl==1.16.0"),
    "unsloth": (
        TORCH, "unsloth==2026.10.9", "unsloth_zoo==2026.10.9",
        "transformers==5.17.0", "trl==1.15.0", "peft==0.21.2",
    ),
    "litgpt": (TORCH, "litgpt==0.5.13", "lightning==2.6.6"),
    "mlx": ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"),
}  # fmt: skip
# Its wheel is built against torch with CUDA and does not load beside the CPU one; text needs none.
UNWANTED = {"unsloth": "torchvision"}


class CannotInstallError(Exception):
    """A peer's environment could not be made; the message is the installer's last word."""


@dataclass(frozen=True)
class Environment:
    """Where a peer's interpreter lies."""

    peer: str
    python: Path


def cache() -> Path:
    """The folder for environments, models and data that are made once."""
    folder = os.environ.get("LORAFIT_BENCH_CACHE", "~/.cache/lorafit-bench")
    made = Path(folder).expanduser()
    made.mkdir(parents=True, exist_ok=True)
    return made


def here(peer: str, *needs: str) -> Environment:
    """This interpreter, for a peer that is installed beside the benchmark.

    Raises:
        CannotInstallError: one of the packages in `needs` is not installed.
    """
    if missing := [name for name in needs if find_spec(name) is None]:
        raise CannotInstallError(f"not installed: {', '.join(missing)}")
    return Environment(peer, Path(sys.executable))


def environment(peer: str) -> Environment:
    """The peer's own environment, made on the first call; minutes, and the package index.

    Raises:
        CannotInstallError: with what pip said last.
    """
    folder = cache() / "venvs" / peer
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    packages = PACKAGES[peer]
    if stamp.exists() and stamp.read_text().splitlines() == list(packages):
        return Environment(peer, python)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    index = os.environ.get("TORCH_INDEX")  # as the Makefile has it: torch's own CPU wheels
    _run([*pip, *(["--index-url", index] if index else []), TORCH])
    _run([*pip, *packages])
    if peer in UNWANTED:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", UNWANTED[peer]])
    stamp.write_text("\n".join(packages) + "\n")
    return Environment(peer, python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise CannotInstallError(said[-1])


def main() -> None:
    """Make the environments named, or all."""
    for peer in sys.argv[1:] or PACKAGES:
        try:
            print(peer, environment(peer).python)
        except CannotInstallError as error:
            print(peer, "cannot be installed:", error)


if __name__ == "__main__":
    main()
