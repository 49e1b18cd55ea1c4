"""SIGINT and SIGTERM while a run trains: remembered, polled, acted on at the next safe place.

Owns the handlers and puts the previous ones back. Does not save: the trainer polls and decides.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


_PYTHONS_OWN = (signal.SIG_DFL, signal.default_int_handler)


class Asked(Exception):
    """Raised at a poll after a signal came; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """What has been asked of this process. `poll()` raises `Asked` once a signal has come."""

    def __init__(self) -> None:
        self._number, self._answered = 0, False

    def poll(self) -> None:
        """Nothing, or `Asked`."""
        if self._number:
            self._answered = True
            raise Asked(self._number)

    def pass_on(self) -> None:
        """Raise again what came after the last poll, for whoever handles it now."""
        if self._number and not self._answered:
            signal.raise_signal(self._number)

    def heard(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler: remember the first, leave at once at the second."""
        if self._number:
            # the second one: no more waiting, not even for a save
            os._exit(128 + number)
        self._number = number


@contextmanager
def listening(signals: Signals) -> Generator[None]:
    """`signals` hears for the block, in the main thread only; elsewhere nothing is ever asked, and
    a handler of the script's own stays in its place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    free = [number for number in HANDLED if signal.getsignal(number) in _PYTHONS_OWN]
    previous = {number: signal.signal(number, signals.heard) for number in free}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    signals.pass_on()
