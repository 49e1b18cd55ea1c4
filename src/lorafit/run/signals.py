"""SIGINT, SIGTERM and SIGUSR1 while a run trains: remembered, polled, acted on at a safe place.

Owns the handlers, puts the previous ones back, and decides what a data worker hears. Does not save:
the trainer polls and decides.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lorafit.processes import Asked

STOPS = (signal.SIGINT, signal.SIGTERM)
SAVES: tuple[signal.Signals, ...] = (signal.SIGUSR1,) if sys.platform != "win32" else ()
HANDLED = (*STOPS, *SAVES)

ECHO = 2.0
"""Seconds in which a second signal under torchrun is the first one's echo: schedulers signal every
process, and torchrun passes on to its workers what it was sent itself."""


class Signals:
    """What has been asked of this process. `poll()` raises `Asked` once it was asked to stop.

    Attributes:
        save: A checkpoint is wanted, and the run is to go on; whoever saves it sets this back.
        theirs: The script's own handlers: called here, and whether to stop is theirs to decide.
    """

    def __init__(self) -> None:
        self._number, self._answered, self._heard_at = 0, False, 0.0
        self.save = False
        self.theirs: dict[int, Callable[..., Any]] = {}

    def poll(self) -> None:
        """Nothing, or `Asked`."""
        if self._number:
            self._answered = True
            raise Asked(self._number)

    def pass_on(self) -> None:
        """Raise again what came after the last poll, for whoever handles it now."""
        if self._number and not self._answered:
            signal.raise_signal(self._number)

    def heard(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: remember the first that asks to stop, leave at once at the second."""
        if number in self.theirs or number in SAVES:
            self.save = True
            if number in self.theirs:
                self.theirs[number](number, frame)
            return
        if self._number and not self._is_echo():
            # the second one: no more waiting, not even for a save
            os._exit(128 + number)
        if not self._number:
            self._number, self._heard_at = number, time.monotonic()

    def _is_echo(self) -> bool:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return under_torchrun and time.monotonic() - self._heard_at < ECHO


@contextmanager
def listening(signals: Signals) -> Generator[Signals]:
    """`signals`, which hears for the block, in the main thread only; elsewhere nothing is ever
    asked. What the process ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {int(number): signal.getsignal(number) for number in HANDLED}
    signals.theirs = {n: old for n, old in previous.items() if callable(old) and old not in _OURS}
    heard = [n for n, old in previous.items() if n in signals.theirs or old in _OURS]
    for number in heard:
        signal.signal(number, signals.heard)
    try:
        yield signals
    finally:
        for number in heard:
            if signal.getsignal(number) == signals.heard:  # else a callback has set another
                signal.signal(number, previous[number])
    signals.pass_on()


def leave(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler for before and after training: unwind as Ctrl-C does, with a shell's status."""
    raise SystemExit(128 + number)


def leave_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """A handler for Ctrl-C while packages are imported, some of which swallow what is raised."""
    os.write(2, b"Stopped.\n")
    os._exit(128 + number)


def unwind() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, where it left at once before."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_OURS = (signal.SIG_DFL, signal.default_int_handler, leave, leave_at_once)


def deafen(_worker: int) -> None:
    """What a data worker does first. A signal to the whole group is its parent's affair: a worker
    that died of it would take the save with it. From its parent alone SIGTERM still ends it."""
    for number in (signal.SIGINT, *SAVES):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
