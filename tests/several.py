"""Several processes that train together, as torchrun would have started them."""

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.tiny", "lorafit"])


class Failed(Exception):
    """What a process raised that returned nothing: its type's name, and all of it."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def together(count: int, work: Callable[..., Any], *given: Any, seconds: float = 120) -> list[Any]:
    """What `work(*given)` returns in each of `count` processes; a `Failed` for one that raises.

    `work` is a function of a module, and what it returns and takes can be pickled.
    """
    port = _free_port()
    pipes = [FORKS.Pipe(duplex=False) for _ in range(count)]
    started = [
        FORKS.Process(target=_run, args=(pipe, number, count, port, work, given))
        for number, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(started, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        return [_answer(mine, seconds) for mine, _ in pipes]
    finally:
        for process in started:
            process.join(5)
            process.kill()


def _answer(mine: Connection, seconds: float) -> Any:
    if not mine.poll(seconds):
        return Failed("Silence", f"nothing for {seconds} s")
    try:
        return torch.load(io.BytesIO(mine.recv_bytes()), weights_only=False)
    except (EOFError, ConnectionResetError):
        return Failed("Silence", "it ended without a word")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(
    answer: Connection, number: int, count: int, port: int, work: Callable[..., Any], given: Any
) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        made = work(*given)
    except BaseException as error:
        made = Failed(type(error).__name__, f"{error}\n{traceback.format_exc()}")
    told = io.BytesIO()  # a pipe would send tensors as memory that ends with this process
    torch.save(made, told)
    answer.send_bytes(told.getvalue())
