"""A function over many items, in order, by a process for each core.

Owns the processes: how many, what they inherit, how they end. Knows nothing of what they work on;
the data room is handed `spread` as a callable. Forked, so that the work need not be pickled, only
items and what becomes of them; so on Linux alone, for elsewhere a fork is unsafe or not there.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any, TypeAlias, TypeVar

from lorafit.errors import LorafitError

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_End: TypeAlias = "Connection[Any, Any]"

_FEW = 8
"""Items that are worked on here, before a process is worth its start."""
_MOST = 16
"""Processes: more than the one that reads and keeps can feed, and a bound on their memory."""
_THREADS = "TOKENIZERS_PARALLELISM"


def spread(work: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """What `work` makes of each item, in order, as `map` would give it.

    The first few are worked on here, so that the processes inherit what `work` has learned from
    them; what it remembers later stays in each. Those under way are one for each process. An error
    comes in its turn, be it from `work` or from reading the items.

    Raises:
        LorafitError: a process was killed.
    """
    waiting = iter(items)
    yield from map(work, islice(waiting, _FEW))
    count = min(_cores(), _MOST)
    if count < 2:
        yield from map(work, waiting)
        return
    for item in waiting:  # only where there is one is there a process
        with _forked(work, count) as ends:
            yield from _in_turn(ends, chain([item], waiting))


def _cores() -> int:
    """Those that this process may use; 1 where it may not fork, as the child of a pool."""
    if sys.platform != "linux" or current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0))


def _in_turn(ends: Sequence[_End], items: Iterable[Any]) -> Iterator[Any]:
    sent, failure = 0, None
    for item, failure in _caught(items):
        if failure:
            break
        end = ends[sent % len(ends)]
        made = [_received(end)] if sent >= len(ends) else []
        _send(end, item)
        sent += 1
        yield from made
    for number in range(max(0, sent - len(ends)), sent):
        yield _received(ends[number % len(ends)])
    if failure:
        raise failure


def _send(end: _End, item: Any) -> None:
    try:
        with suppress(OSError):  # it is gone, and the next turn says so
            end.send(item)
    except (TypeError, AttributeError, PicklingError) as error:
        raise LorafitError(
            f"A row holds something that cannot go to another process: {error}",
            why="Rows are encoded by a process for each core.",
            fix="Leave that column out: dataset.remove_columns(NAME).",
        ) from error


def _caught(items: Iterable[Any]) -> Iterator[tuple[Any, Exception | None]]:
    """The items, and what stopped them: it is read before the turn of those in front of it."""
    try:
        for item in items:
            yield item, None
    except Exception as error:
        yield None, error


def _received(end: _End) -> Any:
    try:
        is_made, outcome = end.recv()
    except (EOFError, OSError) as error:
        raise LorafitError(
            "A process that worked on the rows was killed.",
            why="Most often because memory ran out.",
            fix="Make room, or take fewer cores: taskset -c 0 lorafit ...",
        ) from error
    if not is_made:
        raise outcome
    return outcome


@contextmanager
def naming_the_killed(how_to_go_on: Callable[[], str]) -> Generator[None]:
    """What torch raises, anywhere, once a data worker is gone, comes out as an error for people.

    Args:
        how_to_go_on: Asked then.

    Raises:
        LorafitError: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LorafitError(
            f"A data worker was killed: {str(error).splitlines()[0]}",
            why="Most often because memory ran out, or shared memory (/dev/shm) is too small.",
            fix=("Take fewer of them: dataloader_num_workers.", how_to_go_on()),
        ) from error


@contextmanager
def _forked(work: Callable[[Any], Any], count: int) -> Generator[list[_End]]:
    """A connection to each of `count` processes, which end with the block."""
    fork = get_context("fork")
    pairs = [fork.Pipe() for _ in range(count)]
    processes = [
        fork.Process(target=_serve, args=(work, pairs), kwargs={"number": number}, daemon=True)
        for number in range(count)
    ]
    try:
        with _without_threads():
            for process in processes:
                process.start()
        for _, theirs in pairs:
            theirs.close()
        yield [ours for ours, _ in pairs]
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()
        for ours, _ in pairs:
            ours.close()


@contextmanager
def _without_threads() -> Generator[None]:
    """What is forked here tokenises in one thread: a parent's threads do not live on in its child,
    which would wait for them for ever. Said beforehand, or `tokenizers` prints a warning."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[_THREADS]
        os.environ |= {} if before is None else {_THREADS: before}


def _serve(work: Callable[[Any], Any], pairs: Sequence[tuple[_End, _End]], *, number: int) -> None:
    """The child: answers until the parent is gone or kills it. What the whole group is sent is the
    parent's affair."""
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(sent, signal.SIG_IGN)
    end = pairs[number][1]
    for other in chain.from_iterable(pairs):
        if other is not end:  # held open here, the others would not see the parent go
            other.close()
    with suppress(EOFError, OSError):
        while True:
            end.send(_outcome(work, end.recv()))
    os._exit(0)  # nothing that the parent has begun is flushed or ended here


def _outcome(work: Callable[[Any], Any], item: Any) -> tuple[bool, Any]:
    try:
        return True, work(item)
    except Exception as error:
        return False, error
