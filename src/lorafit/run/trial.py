"""Training that leaves no trace: a model is tried, and is then as it was.

Owns putting back what a trial changed; what the numbers mean is `rates`'. Writes no file.
"""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit.model import adapters
from lorafit.model.base import modes_kept
from lorafit.run.checkpoint import random_state_kept


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


@contextmanager
def states_kept(*owned: Any) -> Generator[None]:
    """Each of `owned`, an optimiser, a schedule or a scaler, has the state that it had before."""
    states = [copy.deepcopy(own.state_dict()) for own in owned]
    try:
        yield
    finally:
        for own, state in zip(owned, states, strict=True):
            own.load_state_dict(state)


def stepping(optimizer: Optimizer, take: Callable[[], Tensor]) -> Callable[[float], float]:
    """A step at a rate -> its loss. The rate is that of the first group, which `learning_rate`
    sets; the others keep their proportions to it (LoRA+).

    Args:
        optimizer: Made for this: its state is of no use afterwards.
        take: Takes a step with it; the loss before its update.
    """
    groups = optimizer.param_groups
    given = [group.get("initial_lr", group["lr"]) for group in groups]  # a warmup begins at 0
    shares = [rate / given[0] if given[0] else 1.0 for rate in given]

    def step(rate: float) -> float:
        for group, share in zip(groups, shares, strict=True):
            group["lr"] = rate * share
        return float(take())

    return step
