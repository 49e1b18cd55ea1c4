"""One forward and backward without an update: what they take at their peak, measured.

Calibrates the memory plan (`memory.calibrated`). Knows no files of a run and leaves it as it was:
gradients, modes and random state are put back.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Objective, Whole
from lorafit.engine.precision import Precision

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(
    model: nn.Module,
    objective: Objective,
    *,
    batch: MicroBatch,
    precision: Precision,
    trained: Sequence[Tensor] = (),
) -> int | None:
    """The bytes that forward and backward of `batch` take above the start, gradients among them:
    resident memory on a CPU, torch's allocator's on CUDA. None where the system does not say.

    Args:
        batch: The longest micro-batch, not moved yet.
        trained: Tensors that hold gradients besides the model's own: masters.
    """
    device = precision.device
    held = [(t, t.grad) for t in dict.fromkeys([*model.parameters(), *trained]) if t.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    for tensor, _ in held:
        tensor.grad = None
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            before = _begin(device)
            whole = Whole(batch.supervised, 1)
            objective.part(model, batch.to(device), whole=whole).backward()
            after = _highest(device)
    finally:
        for tensor, gradient in held:
            tensor.grad = gradient
        for module, mode in modes:
            module.training = mode
    return None if before is None or after is None else max(0, after - before)


def _begin(device: torch.device) -> int | None:
    """Bytes now; from here on the highest is kept."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL(None).malloc_trim(0)  # or what is free in the heap would not be seen to be used
        _CLEAR.write_text("5")
        return _line("VmRSS")
    return None


def _highest(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return _line("VmHWM")
    return None


def _line(name: str) -> int | None:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)
