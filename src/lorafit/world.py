"""What several processes say to one another: sums, one process's word, and that one has failed.

Every process does the same things in the same order; whatever they must agree on passes through
here. Words go from host to host (gloo), gradients from device to device, once a step. Knows tensors
and numbers, and nothing of training.
"""

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from lorafit import processes
from lorafit.errors import ConfigError, ElsewhereError
from lorafit.processes import Asked

T = TypeVar("T")
Unless = Callable[[BaseException], Any]


def _never(_: BaseException) -> None: ...


class World:
    """One process, which is all there is: nothing is sent. `Several` of them have its methods."""

    number, size = 0, 1
    apart = False
    """Whether processes work on different things now, so that none may wait for the others."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.number == 0

    def owns(self, item: int) -> bool:
        """Whether the item of this number is this process's to work on."""
        return item % self.size == self.number

    def added(self, *numbers: int) -> list[int]:
        """Each number, summed over processes."""
        return [*numbers]

    def highest(self, *numbers: int) -> list[int]:
        """The highest of each number over processes."""
        return [*numbers]

    def added_exactly(self, numbers: Tensor) -> Tensor:
        """Float64 numbers on the host, summed over processes."""
        return numbers

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it: plain values, as JSON
        has them."""
        return make()

    def agrees(self, value: Any) -> bool:
        """Whether every process has this value, plain as JSON has them."""
        seen = crc32(json.dumps(value, sort_keys=True).encode())
        high, low = self.highest(seen, -seen)
        return high == -low

    def gathered(self, tensor: Tensor) -> Tensor:
        """Every process's `tensor`, of one shape, joined in the first dimension."""
        return tensor

    def wait(self) -> None:
        """Until every process is here."""

    @contextmanager
    def first_ahead(self) -> Generator[None]:
        """The first process runs the block, then the others do."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def jointly(
        self,
        *,
        alike: bool = False,  # noqa: ARG002
        unless: Unless = _never,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Each process runs the block, its part of one work; where one fails none goes on.

        Args:
            alike: All do the same there, and may speak to one another; else they are `apart`.
            unless: Whether an error is this process's own affair: it runs the block again, and the
                others wait for it.

        Raises:
            Asked: one of them has raised it. ElsewhereError: one of the others has failed.
        """
        return nullcontext()

    def share_gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Add up `loss`, in place, and the gradients of `parameters` over processes. A parameter
        that has none anywhere keeps none."""

    def make_same(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's `tensors`, in place."""


class Several(World):
    """`size` processes, of which this is the one of this `number`. Whatever is sent raises
    ElsewhereError where another process has ended.

    Args:
        host: The group of processes through which hosts speak.
    """

    def __init__(self, number: int, size: int, *, host: Any) -> None:
        self.number, self.size, self.host = number, size, host

    def added(self, *numbers: int) -> list[int]:
        """Waits for all."""
        return self._told(numbers, dist.ReduceOp.SUM)

    def highest(self, *numbers: int) -> list[int]:
        """Waits for all."""
        return self._told(numbers, dist.ReduceOp.MAX)

    def _told(self, numbers: Sequence[int], how: Any) -> list[int]:
        told = torch.tensor(numbers, dtype=torch.int64)
        with _heeding():
            dist.all_reduce(told, how, group=self.host)
        return told.tolist()

    def added_exactly(self, numbers: Tensor) -> Tensor:
        """In place."""
        with _heeding():
            dist.all_reduce(numbers, group=self.host)
        return numbers

    def first(self, make: Callable[[], T]) -> T:
        """Sent as JSON."""
        told = [*json.dumps(make()).encode()] if self.is_first else []
        text = torch.zeros(self.highest(len(told))[0], dtype=torch.uint8)
        text[: len(told)] = torch.tensor(told, dtype=torch.uint8)
        with _heeding():
            dist.broadcast(text, group=self.host, group_src=0)
        return json.loads(text.numpy().tobytes())

    def gathered(self, tensor: Tensor) -> Tensor:
        """On the host."""
        own = torch.atleast_1d(tensor.detach().cpu()).contiguous()
        sent = own.flatten().view(torch.uint8)  # gloo does not know every dtype
        every = [torch.empty_like(sent) for _ in range(self.size)]
        with _heeding():
            dist.all_gather(every, sent, group=self.host)
        return torch.cat([each.view(own.dtype).view_as(own) for each in every])

    def wait(self) -> None:
        """For a day at most."""
        self.added(0)

    @contextmanager
    def jointly(self, *, alike: bool = False, unless: Unless = _never) -> Generator[None]:
        """One message at the end of the block says how it went."""
        failure: BaseException | None = None
        self.apart = not alike
        try:
            yield
        except ElsewhereError:
            raise
        except BaseException as error:
            if unless(error):
                raise
            failure = error
        finally:
            self.apart = False
        number = failure.number if isinstance(failure, Asked) else 0
        try:
            elsewhere, asked = self.highest(failure is not None, number)
        except ElsewhereError as ended:
            raise failure or ended from None
        if failure:
            raise failure
        if asked:
            raise Asked(asked)
        if elsewhere:
            raise ElsewhereError

    def share_gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Which there are, from host to host; then all as one, from device to device."""
        holding = self.added(*(p.grad is not None for p in parameters))
        summed = [p for p, count in zip(parameters, holding, strict=True) if count]
        for parameter in summed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._as_one([loss, *(p.grad for p in summed if p.grad is not None)], dist.all_reduce)

    def make_same(self, tensors: Iterable[Tensor]) -> None:
        """All as one."""
        self._as_one([t.detach() for t in tensors], partial(dist.broadcast, group_src=0))

    def _as_one(self, tensors: Sequence[Tensor], send: Callable[..., object]) -> None:
        """`send` all tensors of a kind as one, and put back what came of it."""
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        for dtype, device in sorted(kinds, key=str):
            alike = [t for t in tensors if (t.dtype, t.device) == (dtype, device)]
            flat = torch.cat([tensor.flatten() for tensor in alike])
            with _heeding():
                send(flat, group=self.host if device.type == "cpu" else None)
            parts = flat.split([tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


ALONE = World()


@contextmanager
def _heeding() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a closed connection, or a day without a word
        raise ElsewhereError from error


def join(device: torch.device) -> World:
    """The processes that a launcher has started, of which this one trains on `device`.

    Raises:
        ConfigError: they cannot be reached, or the device is not there.
    """
    size = processes.count()
    started = dist.is_available() and dist.is_initialized()
    if size == 1 and not (started and dist.get_world_size() > 1):
        return ALONE
    if started and dist.get_world_size() != size:
        raise ConfigError(
            f"A process group of {dist.get_world_size()} is there, and WORLD_SIZE={size}.",
            why="The environment says which of them each process is, and they must agree.",
            fix="Start the script with torchrun, which sets it.",
        )
    if device.type == "mps":
        raise ConfigError(
            f"WORLD_SIZE={size}: Metal trains in one process.",
            fix="Start it with python instead of torchrun.",
        )
    _check_device(device)
    if not started:
        _start(device)
    return Several(dist.get_rank(), size, host=_host_group())


def idle_gpus(device: torch.device) -> str:
    """One line where this machine has more GPUs than processes; else empty."""
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    here = processes.here()
    if there <= here:
        return ""
    return f"GPUs used: {here} of {there}; for all of them: torchrun --nproc-per-node {there} ..."


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    there = torch.cuda.device_count()
    if there < processes.here():
        raise ConfigError(
            f"{processes.here()} processes were started on this machine; GPUs visible: {there}.",
            why="One process uses one device.",
            fix=f"torchrun --nproc-per-node {there} ...",
        )
    torch.cuda.set_device(device)


def _start(device: torch.device) -> None:
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The {processes.count()} processes cannot reach each other: {error}",
            why="WORLD_SIZE in the environment says that several train together.",
            fix="Start them with torchrun; for one process unset WORLD_SIZE.",
        ) from error


def leave() -> None:
    """End the group, once all is well: NCCL complains of one that is left to the interpreter's end,
    and may wait for good where another process has failed."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _host_group.cache_clear()


@cache
def _host_group() -> Any:
    # a process that dies is noticed at once; one that encodes a large data set is waited for
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))
