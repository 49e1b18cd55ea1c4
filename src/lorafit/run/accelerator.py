"""`trainer.accelerator`: what scripts ask of accelerate's Accelerator, answered by lorafit.

accelerate itself is not used. What this lacks is named when it is asked for. Knows the precision of
the run and nothing else of it.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor, nn

from lorafit import processes
from lorafit.data import loader
from lorafit.engine.layout import mapped
from lorafit.engine.precision import Precision
from lorafit.errors import ConfigError
from lorafit.world import ALONE, World

T = TypeVar("T")


def _nothing(*_: Any, **__: Any) -> None:
    """What a function of the first process does elsewhere."""


class Accelerator:
    """This process of `world` on `precision`'s device; attributes and methods are accelerate's.

    Args:
        seed: Of the order that a prepared DataLoader of the script's own gets.
    """

    sync_gradients = True

    def __init__(self, precision: Precision, world: World = ALONE, *, seed: int) -> None:
        self._precision, self._seed, self._world = precision, seed, world
        self.device = precision.device
        self.num_processes, self.process_index = world.size, world.number
        self.local_process_index = processes.local_number()
        self.is_main_process, self.is_last_process = world.is_first, world.number + 1 == world.size
        self.is_local_main_process = self.local_process_index == 0
        self.use_distributed = world.size > 1
        on = "MULTI_GPU" if self.device.type == "cuda" else "MULTI_CPU"
        self.distributed_type = on if self.use_distributed else "NO"

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
        """Print, on the first process of this machine."""
        if not self.is_local_main_process:
            return
        (file or sys.stdout).write(sep.join(map(str, values)) + end)

    def wait_for_everyone(self) -> None:
        """Return once every process is here."""
        self._together("wait_for_everyone").wait()

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True) -> nn.Module:  # noqa: ARG002
        """The model beneath torch.compile; a PEFT model stays one."""
        beneath = vars(model).get("_modules", {}).get("_orig_mod")
        return model if beneath is None else beneath

    def gather(self, tensor: T) -> T:
        """What every process has, joined in the first dimension; tensors within lists and mappings
        too."""
        world = self._together("gather")
        return mapped(tensor, lambda own: world.gathered(own).to(own.device))

    def _together(self, name: str) -> World:
        """The world, where all do the same.

        Raises:
            ConfigError: a step or an evaluation is shared out, so that not all of them come here.
        """
        if self._world.apart:
            raise ConfigError(
                f"trainer.accelerator.{name}: processes are at different examples here.",
                why="Some run fewer batches than others, and would never answer.",
                fix="Gather in a callback, or in compute_metrics, where every process comes by.",
            )
        return self._world

    def gather_for_metrics(self, input_data: T, use_gather_object: bool = False) -> T:
        """The same; tensors alone are sent."""
        if use_gather_object and self._world.size > 1:
            raise ConfigError(
                "trainer.accelerator.gather_for_metrics: objects are not sent, tensors are.",
                fix="torch.distributed.all_gather_object(...) sends anything.",
            )
        return self.gather(input_data)

    def reduce(self, tensor: T, reduction: str = "sum", scale: float = 1.0) -> T:
        """The sum over processes (the mean, or this one's with "none"), times `scale`."""
        world = self._together("reduce")
        if reduction == "none" or world.size == 1:
            return tensor
        scale = scale / world.size if reduction == "mean" else scale
        return mapped(tensor, lambda own: world.gathered(own[None]).sum(0).to(own) * scale)

    def pad_across_processes(
        self,
        tensor: T,
        dim: int = 0,
        pad_index: int = 0,
        pad_first: bool = False,
    ) -> T:
        """The tensor, as long in dimension `dim` as the longest process's."""

        world = self._together("pad_across_processes")

        def padded(own: Tensor) -> Tensor:
            if dim >= own.ndim:
                return own
            missing = world.highest(own.shape[dim])[0] - own.shape[dim]
            if not missing:
                return own
            shape = [missing if at == dim % own.ndim else n for at, n in enumerate(own.shape)]
            filling = own.new_full(shape, pad_index)
            return torch.cat([filling, own] if pad_first else [own, filling], dim)

        return mapped(tensor, padded)

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
        """The first process runs ahead, of all machines'."""
        with self._world.first_ahead():
            yield

    local_main_process_first = main_process_first

    def on_main_process(self, function: Callable[..., T]) -> Callable[..., T]:
        """A decorator: run on the first process; elsewhere what it makes returns None."""
        return function if self.is_main_process else _nothing  # type: ignore[return-value]

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
