"""A process that has everything imported, and forks one child per run: `python -m` with the library
of shim.py preloaded, jobs as lines of JSON on its input, answers on its output.

A job is a run with one fault (or several kills), then the same run again without any; the answer
says what came of both.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError
from tests.faults import power, runs
from tests.faults.shim import Mode, Shim

PATIENCE = 120
"""Seconds after which a child counts as hung."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, or minus the signal; what it wrote to its terminal; an
    exception that was none of lorafit's; the operations it made."""

    status: int
    said: str = ""
    trace: str = ""
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether a person has seen no traceback."""
        return not self.trace and "Traceback" not in self.said


def child(work: Path, body: Callable[[], dict[str, int]]) -> Ended:
    """Run `body` in a fork of this process."""
    said, told = work / "said", work / "told"
    told.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        terminal = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        signal.alarm(PATIENCE)
        status, answer = 0, {}
        try:
            answer = {"seen": body()}
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(bool(left.code))
        except LorafitError as error:
            status, answer = 2, {"said": str(error)}
        except BaseException:
            status, answer = 1, {"trace": traceback.format_exc()}
        sys.stdout.flush()
        told.write_text(json.dumps(answer))
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    answer = json.loads(told.read_text()) if told.exists() else {}
    printed = said.read_text(errors="replace") if said.exists() else ""
    return Ended(
        status=os.waitstatus_to_exitcode(status),
        said=printed + answer.get("said", ""),
        trace=answer.get("trace", ""),
        seen=answer.get("seen", {}),
    )


class Worker:
    """Mutable: `work` holds the folders of the job at hand; references are made when needed."""

    def __init__(self, work: Path) -> None:
        self.work, self.shim = work, Shim()
        self.references: dict[str, runs.Trace] = {}
        runs.make_rows(work)
        runs.warm()

    def attempt(self, run: str, base: Path, mode: Mode = Mode.WATCH, **fault: Any) -> Ended:
        """One child: `run` in `base / "run"`, with a fault."""

        def body() -> dict[str, int]:
            self.shim.begin(base, mode, **fault)
            try:
                runs.RUNS[run](base / "run")
            except SystemExit as left:
                if left.code:
                    raise
            finally:
                seen = self.shim.end()
            return seen

        return child(self.work, body)

    def reference(self, run: str) -> runs.Trace:
        """What an undisturbed run leaves."""
        if run not in self.references:
            base = self.fresh()
            ended = self.attempt(run, base)
            assert ended.status == 0, ended
            self.references[run] = runs.trace(base / "run", ours=run != "theirs")
        return self.references[run]

    def fresh(self) -> Path:
        """An empty folder, named alike each time, as paths are written into files."""
        base = self.work / "base"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        return base

    # ---- jobs ----------------------------------------------------------------------------------

    def count(self, run: str) -> dict[str, Any]:
        """Operations of an undisturbed run, by kind."""
        self.reference(run)
        ended = self.attempt(run, self.fresh(), log=self.work / "log")
        operations = power.read(self.work / "log")
        if run != "theirs":
            power.Disk(operations, self.work / "base")  # fails where one was not seen
        kinds = [operation.kind.name for operation in operations]
        return {"kinds": kinds, **ended.seen}

    def fault(self, run: str, mode: str, at: int, error: str = "") -> dict[str, Any]:
        """A fault at operation `at`, then the run again."""
        reference = self.reference(run)
        base = self.fresh()
        number = getattr(errno, error) if error else 0
        hit = self.attempt(run, base, Mode[mode], at=at, error=number)
        debris = [p.name for p in (base / "run").glob(".*")] if (base / "run").is_dir() else []
        final = base / "run" / "adapter_model.safetensors"
        right = final.exists() and runs.digest(final) == reference.adapter
        return {
            **self.judged(run, base, reference),
            "first": hit.status,
            "clean": hit.clean,
            "honest": hit.status != 0 or right,
            "left": debris,
            "first_said": (hit.trace or hit.said)[-1500:],
        }

    def judged(self, run: str, base: Path, reference: runs.Trace) -> dict[str, Any]:
        """The run again without a fault: whether it ends as it would have undisturbed."""
        again = self.attempt(run, base)
        differs = ["raised"]
        if again.status == 0:
            try:
                differs = runs.trace(base / "run", ours=run != "theirs").differences(reference)
            except Exception:
                differs = [f"unreadable: {traceback.format_exc()[-500:]}"]
        failed = (again.trace or again.said)[-1500:] if differs else ""
        return {"ok": not differs, "differs": differs, "said": failed}

    def kills(self, run: str, seed: int, most: int) -> dict[str, Any]:
        """Kills at random operations of one run after another, then the run again."""
        reference = self.reference(run)
        base, draw = self.fresh(), random.Random(seed)
        survived = 0
        for _ in range(most):
            mode = draw.choice([Mode.KILL, Mode.KILL, Mode.TEAR])
            if self.attempt(run, base, mode, at=draw.randint(1, 120)).status == 0:
                break
            survived += 1
        return {**self.judged(run, base, reference), "kills": survived}

    def signals(self, run: str, seed: int, most: int) -> dict[str, Any]:
        """SIGTERM, SIGINT or SIGKILL after random times, again and again, then the run again."""
        reference = self.reference(run)
        base, draw, sent, bad, told = self.fresh(), random.Random(seed), 0, [], []
        for _ in range(most):
            number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            after = draw.uniform(0.02, 0.8)

            def body(number: int = number, after: float = after) -> dict[str, int]:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if os.fork() == 0:
                    signal.alarm(0)
                    os.execvp(
                        "sh", ["sh", "-c", f"sleep {after}; kill -{int(number)} {os.getppid()}"]
                    )
                runs.RUNS[run](base / "run")
                return {}

            ended = child(self.work, body)
            if ended.status == 0:
                break
            sent += 1
            told.append([int(number), ended.status, ended.said[-600:]])
            expected = {-int(number), 128 + int(number), 1, 2}
            if ended.status not in expected:
                bad.append([ended.status, ended.trace[-500:]])
        judged = self.judged(run, base, reference)
        return {**judged, "sent": sent, "bad": bad, "told": told if not judged["ok"] else []}

    def limit(self, run: str, files: int) -> dict[str, Any]:
        """So few file handles that something fails; then enough."""
        reference = self.reference(run)
        base = self.fresh()

        def body() -> dict[str, int]:
            held = len(os.listdir("/proc/self/fd"))
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (held + files, most))
            try:
                runs.RUNS[run](base / "run")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            return {}

        hit = child(self.work, body)
        said = (hit.trace or hit.said)[-1500:]
        judged = self.judged(run, base, reference)
        return {**judged, "first": hit.status, "clean": hit.clean, "first_said": said}

    def power_loss(self, run: str, seed: int, states: int, part: int, parts: int) -> dict[str, Any]:
        """The power fails after each operation; some legal states of the disk are made, and the run
        goes on from there."""
        reference, log = self.reference(run), self.work / "power.log"
        self.attempt(run, self.fresh(), log=log)
        operations = power.read(log)
        disk = power.Disk(operations, self.work / "base")
        tried, bad, seen = 0, [], set[str]()
        for at in range(len(operations) + 1):
            for number in range(states):
                state = disk.after(at, seed=f"{seed} {at} {number}", style=number)
                if (key := power.digest(state)) in seen:
                    continue
                seen.add(key)
                if int(key, 16) % parts != part:
                    continue
                base = self.fresh()
                power.write(state, base)
                judged = self.judged(run, base, reference)
                tried += 1
                if not judged["ok"]:
                    bad.append({"at": at, "number": number, **judged})
        lost = self.lost_at_the_end(disk, len(operations), states=states, reference=reference)
        return {"tried": tried, "bad": bad, "operations": len(operations), "lost": lost}

    def lost_at_the_end(
        self, disk: power.Disk, end: int, *, states: int, reference: runs.Trace
    ) -> int:
        """States of the disk after the programme has ended well that lack its adapter."""
        lost = 0
        for number in range(10 * states):
            base = self.fresh()
            power.write(disk.after(end, seed=f"end {number}", style=number), base)
            adapter = base / "run" / "adapter_model.safetensors"
            lost += not adapter.exists() or runs.digest(adapter) != reference.adapter
        return lost


def main() -> None:
    """Serve until the input ends."""
    # faults are put between operations, whatever the disk: one that waits for nothing is faster
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAULTS_DIR") or memory) as work:
        os.environ["LORAFIT_CACHE"] = str(Path(work) / "cache")
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        worker = Worker(Path(work).resolve())
        jobs = {name: getattr(worker, name) for name in JOBS}
        for line in sys.stdin:
            job = json.loads(line)
            answer = jobs[job.pop("job")](**job)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


JOBS = ("count", "fault", "kills", "signals", "limit", "power_loss")

if __name__ == "__main__":
    main()
