"""One forward and backward without an update: what they take at their peak, measured.

Calibrates the memory plan (`memory.calibrated`). Knows no files of a run and leaves it as it was:
gradients, modes and random state are put back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafit.engine import limits
from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Objective, Whole
from lorafit.engine.precision import Precision
from lorafit.model.base import modes_kept


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
    gpus = [device] if device.type == "cuda" else []
    for tensor, _ in held:
        tensor.grad = None
    try:
        with modes_kept(model), torch.random.fork_rng(devices=gpus):
            model.train()
            before = _begin(device)
            whole = Whole(batch.supervised, 1)
            objective.part(model, batch.to(device), whole=whole).backward()
            after = _highest(device)
    finally:
        for tensor, gradient in held:
            tensor.grad = gradient
    return None if before is None or not after else max(0, after - before)


def _begin(device: torch.device) -> int | None:
    """Bytes now; from here on the highest is kept."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    limits.trim()  # or what is free in the heap would not be seen to be used
    return limits.resident() if limits.forget_peak() else None


def _highest(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return limits.peak()
