"""`trainer.accelerator`: what scripts ask of accelerate's Accelerator, answered for one process.

accelerate itself is not used. What this lacks is named when it is asked for. Knows the precision of
the run and nothing else of it.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor, nn

from lorafit.data import loader
from lorafit.engine.precision import Precision

T = TypeVar("T")


class Accelerator:
    """One process on `precision`'s device; attributes and methods are accelerate's.

    Args:
        seed: Of the order that a prepared DataLoader of the script's own gets.
    """

    is_main_process = is_local_main_process = is_last_process = True
    num_processes = 1
    process_index = local_process_index = 0
    sync_gradients = True
    use_distributed = False
    distributed_type = "NO"

    def __init__(self, precision: Precision, *, seed: int) -> None:
        self._precision, self._seed = precision, seed
        self.device = precision.device

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names.get(self._precision.dtype, "no") if self._precision.dtype else "no"

    @property
    def scaler(self) -> Any:
        """torch's gradient scaler; it acts with fp16 only."""
        return self._precision.scaler

    def print(
        self, *values: Any, sep: str = " ", end: str = "\n", file: TextIO | None = None
    ) -> None:
        """Print, on the main process."""
        (file or sys.stdout).write(sep.join(map(str, values)) + end)

    def wait_for_everyone(self) -> None:
        """Nothing: there is nobody to wait for."""

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True) -> nn.Module:  # noqa: ARG002
        """The model beneath torch.compile; a PEFT model stays one."""
        beneath = vars(model).get("_modules", {}).get("_orig_mod")
        return model if beneath is None else beneath

    def gather(self, tensor: T) -> T:
        """What every process has: this one's."""
        return tensor

    def gather_for_metrics(self, input_data: T, use_gather_object: bool = False) -> T:  # noqa: ARG002
        """The same."""
        return input_data

    def reduce(self, tensor: T, reduction: str = "sum", scale: float = 1.0) -> T:  # noqa: ARG002
        """The sum or mean over processes: this one's."""
        return tensor

    def pad_across_processes(
        self,
        tensor: T,
        dim: int = 0,  # noqa: ARG002 accelerate's signature
        pad_index: int = 0,  # noqa: ARG002
        pad_first: bool = False,  # noqa: ARG002
    ) -> T:
        """The tensor: no other process has a longer one."""
        return tensor

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled with fp16."""
        self._precision.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """torch's: the norm before clipping."""
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def autocast(self) -> AbstractContextManager[object]:
        """The run's precision."""
        return self._precision.autocast()

    @contextmanager
    def no_sync(self, model: nn.Module) -> Generator[None]:  # noqa: ARG002
        """Gradients that are not summed over processes."""
        yield

    accumulate = no_sync

    @contextmanager
    def main_process_first(self) -> Generator[None]:
        """The main process runs ahead; it is the only one."""
        yield

    local_main_process_first = main_process_first

    def on_main_process(self, function: Callable[..., T]) -> Callable[..., T]:
        """A decorator: run on the main process."""
        return function

    on_local_main_process = on_main_process

    def prepare(self, *given: Any) -> Any:
        """Models on the device; DataLoaders in the run's order, where they shuffle; all else as it
        is."""
        made = tuple(self._prepared(item) for item in given)
        return made[0] if len(made) == 1 else made

    def prepare_data_loader(self, data_loader: Any) -> Any:
        """As `prepare`."""
        return self._prepared(data_loader)

    def _prepared(self, item: Any) -> Any:
        if isinstance(item, nn.Module):
            return item.to(self.device)
        return loader.prepared(item, seed=self._seed)

    def free_memory(self) -> None:
        """Hand cached GPU memory back."""
        torch.cuda.empty_cache()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer.accelerator has no {name}: lorafit does not use accelerate, and offers "
            f"{', '.join(name for name in dir(type(self)) if not name.startswith('_'))} of it."
        )
