"""Signals are remembered, polled, and handlers put back."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lorafit.run.signals import HANDLED, STOPS, Asked, Signals, deafen, listening


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


def test_one_that_saves_does_not_stop() -> None:
    signals = Signals()
    with listening(signals):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            signals.poll()
            assert signals.save
            signals.save = False


def test_the_scripts_own_handler_is_called_and_decides() -> None:
    called: list[int] = []

    def own(number: int, _: object) -> None:
        called.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        signals = Signals()
        with listening(signals):
            for _ in range(2):  # a second one does not leave either
                os.kill(os.getpid(), signal.SIGTERM)
            signals.poll()
        assert signals.save and called == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening(Signals()) as signals:
            os.kill(os.getpid(), signal.SIGINT)
            signals.poll()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_was_set_inside_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with listening(Signals()):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_under_torchrun_an_echo_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with listening(Signals()) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Asked, match="SIGINT"):
            signals.poll()


class Rows(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.05)
        return os.getpid()


def test_data_workers_outlive_a_signal_to_the_group() -> None:
    """A worker that dies of it raises in the parent, in the middle of its save."""
    batches = DataLoader(Rows(), num_workers=2, worker_init_fn=deafen)
    pids = []
    for rows in batches:
        pid = int(rows[0])
        pids.append(pid)
        if len(pids) in (2, 4):
            other = subprocess.run(["kill", "-s", "TERM", str(pid)], check=False)
            assert other.returncode == 0
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGUSR1)
    assert len(pids) == 8 and len(set(pids)) == 2


def test_a_data_workers_parent_still_ends_it() -> None:
    iterator: Any = iter(DataLoader(Rows(), num_workers=1, worker_init_fn=deafen))
    pid = int(next(iterator)[0])
    (worker,) = iterator._workers
    assert worker.pid == pid
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
