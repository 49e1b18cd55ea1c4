"""Signals are remembered, polled, and handlers put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from lorafit.run.signals import HANDLED, STOPS, Asked, Signals, listening


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_raised_at_the_next_poll(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in HANDLED]
    signals = Signals()
    with listening(signals):
        signals.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(Asked, match=number.name) as asked:
            signals.poll()
    assert asked.value.number == number
    assert [signal.getsignal(one) for one in HANDLED] == before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), listening(Signals()):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_hear_nothing_and_break_nothing() -> None:
    ran: list[bool] = []

    def body() -> None:
        with listening(Signals()):
            ran.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert ran == [True]


def test_the_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal\n"
        "from lorafit.run.signals import Signals, listening\n"
        "with listening(Signals()):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('twice', flush=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (130, "once\n")
