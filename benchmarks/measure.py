"""Runs a peer once, in a fresh process, and reads what it reports. Owns processes, no numbers.

A runner loads its libraries and then asks for its job on standard input: on a machine with cores to
spare that can be done for the next run while another one trains (`begin`).
"""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environments import Environment
from peers.protocol import MARK, Job

PEERS = Path(__file__).parent / "peers"


@dataclass
class Run:
    """What a run reported. `error` is empty, or why it did not come to its end."""

    job: Job
    began: float
    events: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def losses(self) -> dict[int, float]:
        """Nats per supervised token by step, as far as the peer told."""
        told = [*self.of("step"), *self.of("loss")]
        return {event["step"]: event["loss"] for event in told if event["loss"] is not None}


def threads() -> int:
    """OMP_NUM_THREADS, or the cores that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Begun:
    """A runner's process that has no job yet. `end` it if it gets none."""

    script: str
    process: subprocess.Popen[str]
    scratch: tempfile.TemporaryDirectory[str]
    log: Path
    at: float

    def end(self) -> None:
        """The process, what it started, and its folder."""
        _end(self.process)
        self.process.wait()
        self.scratch.cleanup()


def begin(script: str, environment: Environment, *, device: str, kept: Path) -> Begun:
    """Start a runner, which loads its libraries and waits.

    Args:
        kept: Folder for the log and for what the peer compiles: fresh for each benchmark, so that
            the first round of a peer that compiles is cold, and the others are not.
    """
    log_file = kept / f"{Path(script).stem}.log"
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with log_file.open("a") as log:
        process = subprocess.Popen(
            [str(environment.python), str(PEERS / script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=scratch.name,
            env=_surroundings(device, kept / environment.peer), start_new_session=True,
        )  # fmt: skip
    return Begun(script, process, scratch, log_file, time.monotonic())


def run(
    script: str, environment: Environment, job: Job, *, kept: Path, limit_s: float = 900,
    begun: Begun | None = None,
) -> Run:  # fmt: skip
    """Run a runner to its end, or to `limit_s`; what it had reported by then is kept.

    Args:
        kept: As `begin`.
        begun: The process, if there is one already. The time that it waited for its job is not
            counted: the run began so much later.
    """
    begun = begun or begin(script, environment, device=job.device, kept=kept)
    process, asked = begun.process, time.monotonic()
    made = Run(job, begun.at)
    clock = threading.Timer(limit_s, _end, (process,))
    clock.start()
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):  # it ended while loading: its exit code tells
        process.stdin.write(json.dumps(asdict(job) | {"scratch": begun.scratch.name}) + "\n")
        process.stdin.close()
    with begun.log.open("a") as log:
        for line in process.stdout:
            if line.startswith(MARK):
                made.events.append(json.loads(line.removeprefix(MARK)))
            else:
                log.write(line)
    code = process.wait()
    timed_out = not clock.is_alive()
    clock.cancel()
    begun.end()
    if ready := made.of("ready"):
        made.events = [event for event in made.events if event["event"] != "ready"]
        made.began += max(0.0, asked - ready[0]["at"])
    if timed_out:
        made.error = f"stopped after {limit_s:.0f} s and {len(made.of('step'))} steps"
    elif code:
        made.error = _last_words(begun.log) or f"exit code {code}"
    return made


def _surroundings(device: str, compiled: Path) -> dict[str, str]:
    """The same for all: no hub, no trackers, the same threads, no GPU where the CPU is measured."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return os.environ | hidden | {
        "OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_DISABLED": "true", "PYTHONHASHSEED": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
        "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(compiled / "unsloth"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_CACHE": str(compiled / "datasets"),
    }  # fmt: skip


def _end(process: subprocess.Popen[str]) -> None:
    """The process and what it started, compilers included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [
        line for line in lines if line.startswith("this peer") or "Error" in line.split(":")[0]
    ]
    return (named or lines or [""])[-1][:300]
