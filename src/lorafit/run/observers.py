"""Who looks at a run, and the events they are told. Decides nothing.

Owns the list of observers and how an event is made from what the trainer knows.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal

from lorafit.engine.evaluation import Evaluation
from lorafit.events import Evaluated, Event, Notice
from lorafit.run.journal import Journal

Observer = Callable[[Event], None]


class Observers(list[Observer]):
    """The observers in order; add and remove them as in any list."""

    def tell(self, *events: Event) -> None:
        """Tell all of them each event, in order."""
        for event, observer in product(events, self):
            observer(event)

    @contextmanager
    def writing(self, journal: Journal) -> Generator[None]:
        """`journal` is the last of them inside; it is closed afterwards."""
        self.append(journal)
        try:
            yield
        finally:
            self.remove(journal)
            journal.close()

    def say(self, *lines: str) -> None:
        """Tell them each line that is not empty."""
        self.tell(*(Notice(line) for line in lines if line))


def evaluated(
    measured: Evaluation, state: Any, *, name: str, occasion: Literal["asked", "reading"]
) -> Evaluated:
    """The event of an evaluation at the step and epoch where transformers' `state` stands."""
    return Evaluated(
        name=name,
        step=state.global_step,
        epoch=float(state.epoch or 0),
        loss=measured.loss,
        supervised_tokens=measured.supervised,
        examples=measured.examples,
        seconds=measured.seconds,
        occasion=occasion,
    )
