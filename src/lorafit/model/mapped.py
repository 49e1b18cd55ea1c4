"""Weights that lie in a mapped file, brought into memory."""

from pathlib import Path

from torch import nn


def into_memory(model: nn.Module) -> None:
    """Copy every weight of `model` that lies in a mapped file, so that nothing holds the mapping:
    the pages of those that lie side by side elsewhere now (fused.py) would count as resident a
    second time. Nothing where the system does not tell what is mapped.
    """
    files = _mapped()
    for parameter in model.parameters():
        if any(start <= parameter.data_ptr() < end for start, end in files):
            parameter.data = parameter.data.clone()


def _mapped() -> list[tuple[int, int]]:
    """From where to where each file of weights lies in this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    ranges = (line.split()[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
