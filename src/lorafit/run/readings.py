"""What the readings of a run may cost: fewer of them where they take longer than was planned.

Knows seconds and steps; neither data nor loss. Decides which reading is left out, never what is
read: a series of readings means something because it is of the same examples.
"""

import time
from dataclasses import dataclass

from lorafit.engine.evaluation import SHARE

LEAST = 5.0
"""Seconds that readings may take in any run: a short one is not read less to save a moment."""


@dataclass
class Cost:
    """Widens the gaps between readings so that they take `SHARE` of the run's time at most.

    Mutable: `spent` seconds, the last reading `latest` of them, at the step `read`.

    Attributes:
        steps: Of the run.
    """

    steps: int
    spent: float = 0.0
    latest: float = 0.0
    read: int | None = None
    _first: int = 0
    _began: float = 0.0

    def allows(self, step: int) -> bool:
        """Whether a reading that is due at `step` is to be taken: the first and the last are; of
        the others as many as the time left for them holds, evenly spread."""
        if self.read is None:
            self._first, self._began = step, time.monotonic()
        if self.read is None or step == self.steps:
            return True
        pace = (time.monotonic() - self._began) / max(step - self._first, 1)
        may = max(SHARE * pace * (self.steps - self._first), LEAST) - self.spent
        gap = (self.steps - self.read) / max(may / max(self.latest, 1e-9), 1.0)
        return step - self.read >= int(gap)

    def add(self, step: int, seconds: float) -> None:
        """A reading was taken."""
        self.read, self.latest, self.spent = step, seconds, self.spent + seconds
