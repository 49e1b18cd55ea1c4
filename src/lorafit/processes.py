"""Which of several processes this one is, as torchrun tells it in the environment.

Owns the launch and nothing else: what processes say to one another is `world.py`'s. Imports no
torch.
"""

import os
import signal
from enum import Enum

from lorafit.errors import ConfigError


class Asked(Exception):
    """Raised where a run is to stop at a signal, to this process or another; `number` is its."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class ParallelMode(Enum):
    """transformers' names for how work is divided."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


class OfProcesses:
    """What transformers' arguments say of the launch."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return count()

    @property
    def process_index(self) -> int:
        """This process among all of them."""
        return number()

    @property
    def local_process_index(self) -> int:
        """This process among those of this machine."""
        return local_number()

    @property
    def should_save(self) -> bool:
        """Whether this process writes files."""
        return number() == 0

    @property
    def should_log(self) -> bool:
        """Whether this process logs."""
        return number() == 0

    @property
    def parallel_mode(self) -> ParallelMode:
        """transformers' name for how processes divide the work."""
        return ParallelMode.DISTRIBUTED if count() > 1 else ParallelMode.NOT_PARALLEL


def count() -> int:
    """How many train together."""
    return max(1, _told("WORLD_SIZE", 1))


def number() -> int:
    """This one's among them, from 0: the first writes files and talks."""
    return _told("RANK", 0) if count() > 1 else 0


def local_number() -> int:
    """This one's among those of this machine."""
    return _told("LOCAL_RANK", 0) if count() > 1 else 0


def here() -> int:
    """How many of them run on this machine, and share its memory."""
    return max(1, _told("LOCAL_WORLD_SIZE", count()))


def _told(name: str, otherwise: int) -> int:
    value = os.environ.get(name) or str(otherwise)
    if not value.isdecimal():
        raise ConfigError(
            f"{name}={value!r} in the environment is no number.",
            why="It says which of several processes this one is.",
            fix="Start several with torchrun, which sets it; for one process unset it.",
        )
    return int(value)
