"""The range test of the learning rate over a trainer's own steps: same rows, loss and optimiser.

Takes the steps, at rates that rise; what their losses say is `run/rates.py`'s, and putting the
model back `run/trial.py`'s. Writes no file.
"""

# a step is the trainer's own affair, and this takes one
# pyright: reportPrivateUsage=false

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any

from torch import Tensor

from lorafit.data.loader import StepBatches
from lorafit.engine.room import Full
from lorafit.model import base
from lorafit.model.lora import counting_dropout
from lorafit.model.noise import noisy_embeddings
from lorafit.run import rates, trial
from lorafit.run.rates import Curve
from lorafit.session import Session

SPAN = (1e-6, 1.0)
"""The lowest and the highest rate."""
STEPS, LEAST = 100, 40
"""Steps, and the fewest that a curve can be read from: windows of five to either side."""


def steps_within(seconds: float, *, each: float) -> int:
    """How many steps of `each` so many seconds a range test takes in `seconds`; 0: too few."""
    steps = min(STEPS, int(seconds / each))
    return steps if steps >= LEAST else 0


def find_rate(made: Any, *, steps: int) -> Curve:
    """The curve of so many steps, smaller ones where memory asks for it, and what it suggests.

    Args:
        made: A trainer that has not begun, whose `max_steps` they are; of no use afterwards. Its
            model, the random state and an optimiser of the user's own are untouched.

    Raises:
        OutOfMemoryError: not even the smallest part of a step fits.
    """
    theirs = [own for own in (made.optimizer, made.lr_scheduler) if own is not None]
    scaler = made._precision.scaler
    with trial.untouched(made.model), trial.states_kept(*theirs, scaler):
        run = made._begin(None)
        with (
            closing(run.engine.updater),
            base.without_cache(made.model),
            noisy_embeddings(made.model, run.arguments.neftune_noise_alpha),
            counting_dropout(made.model, made._packing.drawn),
        ):
            taken = _losses(run)
            step = trial.stepping(run.engine.updater.optimizer, lambda: next(taken))
            try:
                return rates.sweep(step, rates.rising(*SPAN, steps=steps))
            except Full as full:
                raise full.explained() from full


def _losses(run: Session) -> Iterator[Tensor]:
    """The loss of one step of `run` after the other, each taken when it is asked for."""
    for step in _endless(run):
        yield run.take(step).loss
        run.position = replace(run.position, step=run.position.step + 1)


def _endless(run: Session) -> Iterator[StepBatches]:
    for epoch in count():
        yield from run.loader.epoch(epoch)
