"""Which matrix products run in which dtype. Knows the hardware, not the model.

Parameters, residual stream, norms and embedding keep the dtype they were loaded in; under `bf16`
or `fp16` only what torch.autocast lists (matrix products) takes 16-bit operands. `fp16` adds a
gradient scaler, as its range needs one.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from lorafit.arguments import TrainingArguments
from lorafit.engine.layout import mapped
from lorafit.errors import ConfigError
from lorafit.model.base import Home


@dataclass(frozen=True)
class Precision:
    """Autocast for one device: `dtype` None is full precision; `scaler` acts with float16 only."""

    device: torch.device
    dtype: torch.dtype | None = None
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    notice: str = ""

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward, in training and in evaluation alike."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @contextmanager
    def forwards(self, model: nn.Module) -> Generator[None]:
        """Inside, `model`'s forward runs so and returns float32: what a loss of the user's own
        makes of its outputs is in full precision, as under accelerate."""
        if self.dtype is None:
            yield
            return
        entered: list[AbstractContextManager[object]] = []

        def enter(*_: Any) -> None:
            entered.append(self.autocast())
            entered[-1].__enter__()

        def leave(*given: Any) -> Any:
            entered.pop().__exit__(None, None, None)
            return mapped(given[-1], lambda t: t.float() if t.dtype is self.dtype else t)

        hooks = (
            model.register_forward_pre_hook(enter, prepend=True),
            model.register_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def settling(self) -> int:
        """Steps in a row that float16 may lose while the scaler finds its scale: 16 halvings lead
        from the 65,536 it begins with to 1."""
        return 16 if self.scaler.is_enabled() else 0

    def __str__(self) -> str:
        names = {None: "fp32", torch.bfloat16: "bf16 products", torch.float16: "fp16 products"}
        return names[self.dtype]


def native_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 itself; emulated bf16 is far slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        has_avx512 = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
        has_amx = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and (has_avx512 or has_amx)
    return False


def home(device: torch.device) -> Home:
    """Where a quantised base is made, its products in bf16 where the device has it natively."""
    return Home(device, torch.bfloat16 if native_bf16(device) else torch.float32)


def products(precision: Precision, weights: torch.dtype) -> torch.dtype:
    """The dtype of matrix products over a base of this dtype: its own, unless autocast asks for
    another or the processor would have to emulate it, some fifty times as slow as float32."""
    if precision.dtype is not None:
        return precision.dtype
    device = precision.device
    halves = (torch.bfloat16, torch.float16)
    emulated = device.type == "cpu" and not (weights == torch.bfloat16 and native_bf16(device))
    return torch.float32 if weights in halves and emulated else weights


def choose(arguments: TrainingArguments, device: torch.device) -> Precision:
    """The precision that `bf16`, `fp16` and `tf32` ask for, as far as `device` has it natively.

    Raises:
        ConfigError: `fp16=True` without CUDA.
    """
    tf32 = _set_tf32(arguments.tf32, device)
    if arguments.fp16:
        if device.type != "cuda":
            raise ConfigError(
                f"fp16=True needs a CUDA device; this run is on {device.type}.",
                why="CPUs have no fast float16 arithmetic, and its narrow range needs a scaler.",
                fix="Write bf16=True (native bfloat16 where the CPU has it), or leave both out.",
            )
        return Precision(device, torch.float16, GradScaler(device.type), tf32)
    if not arguments.bf16:
        return Precision(device, notice=tf32)
    if native_bf16(device):
        notice = "" if device.type == "cuda" else "bf16: native on this CPU; matrix products use it"
        return Precision(device, torch.bfloat16, notice="; ".join(filter(None, (notice, tf32))))
    emulated = (
        f"bf16: this {device.type} has no native bfloat16, where emulation is far slower; "
        "training runs in fp32"
    )
    return Precision(device, notice="; ".join(filter(None, (emulated, tf32))))


def _set_tf32(asked: bool | None, device: torch.device) -> str:
    """Let float32 products on CUDA take TensorFloat-32, or not; a line where that does nothing."""
    if asked is None:
        return ""
    if device.type != "cuda":
        return f"tf32 does nothing on {device.type}: only CUDA has it" if asked else ""
    torch.backends.cuda.matmul.allow_tf32 = asked
    torch.backends.cudnn.allow_tf32 = asked
    old = asked and torch.cuda.get_device_capability(device)[0] < 8
    return "tf32 does nothing on this GPU: it has none before Ampere" if old else ""
