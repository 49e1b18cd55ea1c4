"""Every fault at every operation, on every core: `python -m tests.faults.sweep` (`make faults`).

Writes docs/reliability.md. `--raw FILE` keeps each result as a line of JSON; `--only ROW` runs the
rows whose names begin so, and writes no page.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tests.faults import page, shim

SEED = 20261127
Job = dict[str, Any]
Result = dict[str, Any]


class Pool:
    """Processes with everything imported; each runs one job at a time."""

    def __init__(self, size: int) -> None:
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=shim.environment(),
            )
            for _ in range(size)
        ]

    def ask(self, job: Job, worker: int = 0) -> Result:
        """One job, waited for."""
        process = self._workers[worker]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker died at {job}")
        return json.loads(answer)

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """All of them, in their order, over all processes."""
        waiting: SimpleQueue[int] = SimpleQueue()
        for number in range(len(jobs)):
            waiting.put(number)
        results: list[Result] = [{} for _ in jobs]

        def serve(worker: int) -> None:
            while True:
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                results[number] = self.ask(jobs[number], worker)

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(self._workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._workers:
            assert process.stdin
            process.stdin.close()
            process.wait()


@dataclass(frozen=True)
class Row:
    """A row of the table: `passed` of `tried`; `failures` are jobs that failed, with answers."""

    name: str
    what: str
    run: str
    tried: int
    passed: int
    failures: list[tuple[Job, Result]]


@dataclass(frozen=True)
class Faults:
    """One fault at each operation of a run, or at every `stride`-th."""

    name: str
    what: str
    mode: str
    error: str = ""
    stride: int = 1
    only: tuple[str, ...] = ()


PYTHON = [
    Faults("kill", "`kill -9` before it", "KILL"),
    Faults("tear", "half of a write, then `kill -9`", "TEAR", only=("WRITE",)),
    Faults("full", "disk full from there on", "FROM", "ENOSPC"),
    Faults("full-once", "no space, once", "ONCE", "ENOSPC"),
    Faults("error", "input/output error, once", "ONCE", "EIO"),
    Faults("read-only", "read-only file system from there on", "FROM", "EROFS", stride=5),
]
COMMAND = [
    Faults("kill", "`kill -9` before it", "KILL", stride=8),
    Faults("full", "disk full from there on", "FROM", "ENOSPC", stride=8),
    Faults("error", "input/output error, once", "ONCE", "EIO", stride=8),
]
THEIRS = [  # a point takes four times as long as one of ours
    Faults("kill", "", "KILL", stride=4),
    Faults("tear", "", "TEAR", only=("WRITE",), stride=4),
    Faults("full", "", "FROM", "ENOSPC", stride=8),
    Faults("full-once", "", "ONCE", "ENOSPC", stride=8),
    Faults("error", "", "ONCE", "EIO", stride=8),
]
SWEEPS = {"python": PYTHON, "command": COMMAND, "theirs": THEIRS}


def faults_at(run: str, faults: Faults, kinds: Sequence[str], *, stride: int) -> list[Job]:
    """The jobs of one row."""
    every = [n + 1 for n, kind in enumerate(kinds) if not faults.only or kind in faults.only]
    at = every[:: stride or faults.stride]
    return [
        {"job": "fault", "run": run, "mode": faults.mode, "error": faults.error, "at": k}
        for k in at
    ]


def passes(job: Job, answer: Result) -> bool:
    """Whether nothing is lost: the run goes on by itself and ends bit for bit as undisturbed; an
    error was told without a traceback and left nothing behind; no failure ended as a success."""
    if job["run"] == "theirs":  # what it leaves lying about is not held against it
        return set(answer["differs"]) <= {"names"}
    if not answer["ok"]:
        return False
    told = answer["clean"] and answer["honest"]
    # what could not be deleted is deleted at the next start
    debris = [name for name in answer["left"] if ".deleted-" not in name]
    return told and (job["error"] != "ENOSPC" or not debris)


def row(name: str, what: str, jobs: list[Job], results: list[Result]) -> Row:
    """What came of the jobs of one row."""
    failures = [
        (job, answer) for job, answer in zip(jobs, results, strict=True) if not passes(job, answer)
    ]
    return Row(name, what, jobs[0]["run"], len(jobs), len(jobs) - len(failures), failures)


def sweep(pool: Pool, *, only: str = "", stride: int = 0) -> Iterator[Row]:
    """Each row as it is done."""
    for run, table in SWEEPS.items():
        wanted = [faults for faults in table if f"{run} {faults.name}".startswith(only)]
        if not wanted:
            continue
        counted = pool.ask({"job": "count", "run": run})
        if run != "theirs" and counted["unseen"]:
            raise RuntimeError(f"{run} writes in a way that is not followed: {counted['unseen']}")
        for faults in wanted:
            jobs = faults_at(run, faults, counted["kinds"], stride=stride)
            yield row(f"{run} {faults.name}", faults.what, jobs, pool.run(jobs))
    yield from seeded(pool, only=only, stride=stride)


def seeded(pool: Pool, *, only: str, stride: int) -> Iterator[Row]:
    """The rows whose faults are drawn, from `SEED`."""
    few = 20 // (stride or 1) or 1
    drawn: dict[str, tuple[str, list[Job]]] = {
        "python kills": (
            "up to 25 kills at random operations of one run, then the rest of it",
            [{"job": "kills", "run": "python", "seed": SEED + n, "most": 25} for n in range(few)],
        ),
        "python signals": (
            "up to 10 signals (SIGTERM, SIGINT, `kill -9`) at random times of one run",
            [{"job": "signals", "run": "python", "seed": SEED + n, "most": 10} for n in range(few)],
        ),
        "python handles": (
            "too few file handles",
            [{"job": "limit", "run": "python", "files": n} for n in range(2 * few)],
        ),
    }
    for name, (what, jobs) in drawn.items():
        if name.startswith(only):
            results = pool.run(jobs)
            bad = [
                (job, answer)
                for job, answer in zip(jobs, results, strict=True)
                if not answer["ok"] or answer.get("bad")
            ]
            faults = sum(answer.get("kills", answer.get("sent", 1)) for answer in results)
            yield Row(
                name, f"{what}: {faults} in all", "python", len(jobs), len(jobs) - len(bad), bad
            )
    if "python power".startswith(only):
        size = len(pool._workers)
        jobs = [
            {"job": "power_loss", "run": "python", "seed": SEED, "states": 1 if stride else 4}
            | {"part": n, "parts": size}
            for n in range(size)
        ]
        results = pool.run(jobs)
        tried, bad = sum(r["tried"] for r in results), [b for r in results for b in r["bad"]]
        lost = max(r["lost"] for r in results)
        failures = [(jobs[0], answer) for answer in bad] + [({}, {"lost": lost})] * bool(lost)
        what = "power lost: distinct states of the disk, unsynced data and names kept or not"
        yield Row("python power", what, "python", tried, tried - len(bad) - lost, failures)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--stride", type=int, default=0)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    began, pool = time.monotonic(), Pool(given.workers)
    rows = []
    for done in sweep(pool, only=given.only, stride=given.stride):
        rows.append(done)
        seconds = time.monotonic() - began
        sys.stderr.write(f"{seconds:7.0f} s  {done.name:20} {done.passed}/{done.tried}\n")
        if given.raw:
            with given.raw.open("a") as raw:
                raw.writelines(json.dumps([done.name, *pair]) + "\n" for pair in done.failures)
    pool.close()
    if not (given.only or given.stride):
        minutes = (time.monotonic() - began) / 60
        page.PAGE.write_text(page.page(rows, seed=SEED, minutes=minutes), encoding="utf-8")
    sys.exit(any(row.passed < row.tried for row in rows if not row.name.startswith("theirs")))


if __name__ == "__main__":
    main()
