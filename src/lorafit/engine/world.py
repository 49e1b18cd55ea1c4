"""How many processes train together: one, in this version. Reads the launcher's environment."""

import os

from lorafit.errors import ConfigError


def check_alone() -> None:
    """Nothing, if this process trains by itself.

    Raises:
        ConfigError: a launcher such as torchrun started several (`WORLD_SIZE`).
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size != "1":
        raise ConfigError(
            f"WORLD_SIZE={size}: this version of lorafit trains in one process.",
            why="Several would each train an adapter of their own and write to the same folder.",
            fix="Start it with python instead of torchrun; one process uses one device.",
        )
