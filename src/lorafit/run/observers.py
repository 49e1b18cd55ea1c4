"""Who looks at a run, and the events they are told. Decides nothing.

Owns the list of observers and how an event is made from what the trainer knows.
"""

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal

from lorafit.engine.evaluation import Evaluation
from lorafit.engine.optim import Reached
from lorafit.errors import ModelError
from lorafit.events import Evaluated, Event, Notice, RunEnded, StepEnd
from lorafit.model.base import some
from lorafit.run.journal import Journal

Observer = Callable[[Event], None]


class Observers(list[Observer]):
    """The observers in order; add and remove them as in any list.

    Attributes:
        followers: Told after all others, so that what they read of the run is written.
    """

    def __init__(self, given: Iterable[Observer] = ()) -> None:
        super().__init__(given)
        self.followers: list[Observer] = []

    def tell(self, *events: Event) -> None:
        """Tell all of them each event, in order."""
        for event, observer in product(events, [*self, *self.followers]):
            observer(event)

    @contextmanager
    def writing(self, journal: Journal, *followers: Observer) -> Generator[None]:
        """`journal` is the last of them inside, read by `followers`; closed afterwards."""
        self.append(journal)
        self.followers += followers
        try:
            yield
        finally:
            for follower in followers:
                self.followers.remove(follower)
            self.remove(journal)
            journal.close()

    def say(self, *lines: str) -> None:
        """Tell them each line that is not empty."""
        self.tell(*(Notice(line) for line in lines if line))


@contextmanager
def watching_gradients(observers: Observers, reached: Reached) -> Generator[None]:
    """Inside, an observer says, once numbers of a second step are known, which trained tensors no
    gradient has reached; then it leaves.

    Raises:
        ModelError: none was reached; from the observer.
    """
    steps = 0

    def look(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, StepEnd)
        over = steps >= 2 or isinstance(event, RunEnded)
        if look not in observers or not over:
            return
        observers.remove(look)
        reached.close()
        missing, names = len(reached.silent), some(list(reached.silent))
        if steps and missing == reached.trained:
            raise ModelError(
                f"No gradient has reached any of the {missing} trained tensors: {names}.",
                why="Training changes nothing: the loss does not depend on them.",
                fix="With gradient_checkpointing, leave use_reentrant out or False; else look at "
                "what the forward returns as its loss.",
            )
        if steps and missing:
            observers.say(
                f"{missing} of {reached.trained} trained tensors got no gradient in the first "
                f"{steps} steps: {names}"
            )

    observers.append(look)
    try:
        yield
    finally:
        reached.close()
        if look in observers:
            observers.remove(look)


def evaluated(
    measured: Evaluation, state: Any, *, name: str, occasion: Literal["asked", "reading"]
) -> Evaluated:
    """The event of an evaluation at the step and epoch where transformers' `state` stands."""
    return Evaluated(
        name=name,
        step=state.global_step,
        epoch=float(state.epoch or 0),
        loss=math.nan if measured.loss is None else measured.loss,
        supervised_tokens=measured.supervised,
        examples=measured.examples,
        seconds=measured.seconds,
        occasion=occasion,
        nats=measured.nats,
        tokens=measured.tokens,
    )
