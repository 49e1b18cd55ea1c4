"""What a run is made of and runs on, as plain values that a checkpoint keeps and compares.

Owns how rows are told from other rows without reading them all. Classes no difference: `changes`
does.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from lorafit import processes
from lorafit.data.cache import Chosen
from lorafit.data.loader import is_stream
from lorafit.run import store

_SAMPLED = 16
_PACKAGES = ("lorafit", "torch", "transformers", "peft", "numpy")


def flat(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"data": {"rows": 3}}` as `{"data.rows": 3}`."""
    return {f"{fact}.{part}": value for fact, of in facts.items() for part, value in of.items()}


def of_machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": gpu,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def of_versions() -> dict[str, str]:
    """The packages that compute."""
    return store.versions_of(_PACKAGES)


def of_rows(dataset: Any) -> dict[str, Any]:
    """How many `rows` a set has, and a hash of `examples`: of all of them where lorafit encoded
    them, else of a few, which are read. None where that cannot be known: a stream, rows that are
    not the same twice, rows that cannot be read."""
    if dataset is None or is_stream(dataset):
        return {"rows": None, "examples": None}
    digest = blake2b(digest_size=16)
    if isinstance(dataset, Chosen):
        for stored, numbers in dataset.parts:
            digest.update(stored.wholes[numbers].tobytes() + stored.prompts[numbers].tobytes())
        return {"rows": len(dataset), "examples": digest.hexdigest()}
    last = len(dataset) - 1
    places = sorted(
        {last * part // (_SAMPLED - 1) for part in range(_SAMPLED)} if last >= 0 else ()
    )
    try:
        told, again = ([*_told([dataset[n] for n in places])] for _ in range(2))
    except Exception:  # whatever it is, it is said where the row is read to be trained on
        return {"rows": len(dataset), "examples": None}
    for part in told:
        digest.update(part)
    return {"rows": len(dataset), "examples": digest.hexdigest() if told == again else None}


def _told(value: Any) -> Iterator[bytes]:
    """`value` as bytes that are the same in every process; its type alone, if it is no data."""
    match value:
        case Mapping():
            for name, item in value.items():
                yield from _told(str(name))
                yield from _told(item)
        case list() | tuple():
            yield b"["
            for item in value:
                yield from _told(item)
            yield b"]"
        case Tensor() | numpy.ndarray() | numpy.generic():
            yield from _told(value.tolist())
        case str() | bytes() | int() | float() | None:
            yield repr(value).encode()
        case _:
            yield type(value).__qualname__.encode()
