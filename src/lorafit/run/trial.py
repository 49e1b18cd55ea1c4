"""Training that leaves no trace: a model is tried, and is then as it was.

Owns putting back what a trial changed; what the numbers mean is `rates`'. Writes no file.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorafit.engine.layout import MicroBatch
from lorafit.engine.step import Engine
from lorafit.model import adapters
from lorafit.model.base import modes_kept
from lorafit.run import rates
from lorafit.run.checkpoint import random_state_kept
from lorafit.run.rates import Curve


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """What is trained inside, modes, gradients and the random state are put back."""
    before = {name: tensor.clone() for name, tensor in adapters.adapter_state(model).items()}
    try:
        with modes_kept(model), random_state_kept():
            yield
    finally:
        adapters.load_adapter_state(model, before)
        model.zero_grad()


def find_rate(
    model: nn.Module,
    step: Callable[[float], float],
    *,
    span: tuple[float, float] = (1e-6, 1.0),
    steps: int = 100,
) -> Curve:
    """The learning-rate range test on `model`, which is untouched afterwards.

    Args:
        step: Trains `model` one step at that rate; its loss in nats (`stepping` makes one).
        span: The lowest and the highest rate.
    """
    with untouched(model):
        return rates.sweep(step, rates.rising(*span, steps=steps))


def stepping(engine: Engine, steps: Iterator[Sequence[MicroBatch]]) -> Callable[[float], float]:
    """A step of `engine` at a rate -> its loss. Groups keep their rates' proportions (LoRA+).

    Args:
        engine: Made for this: its optimiser's state is of no use afterwards.
        steps: The micro-batches of one step after the other, as many as are asked for.
    """
    groups = engine.updater.optimizer.param_groups
    most = max(group["lr"] for group in groups) or 1.0
    shares = [group["lr"] / most or 1.0 for group in groups]

    def step(rate: float) -> float:
        for group, share in zip(groups, shares, strict=True):
            group["lr"] = rate * share
        return float(engine.step(next(steps), _NOBODY).loss)

    return step


class _Nobody:
    """Is told of nothing inside a step."""

    def after_micro_batch(self, *, last: bool) -> None:  # noqa: ARG002 the engine's
        return

    def before_update(self) -> None:
        return

    def after_update(self) -> None:
        return


_NOBODY = _Nobody()
