"""Runs a peer once, in a fresh process, and reads what it reports. Owns processes, no numbers."""

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


def run(
    script: str, environment: Environment, job: Job, *, kept: Path, limit_s: float = 900
) -> Run:
    """Run a runner to its end, or to `limit_s`; what it had reported by then is kept.

    Args:
        kept: Folder for the log and for what the peer compiles: fresh for each benchmark, so that
            the first round of a peer that compiles is cold, and the others are not.
    """
    log_file = kept / f"{Path(script).stem}.log"
    with tempfile.TemporaryDirectory() as scratch, log_file.open("a") as log:
        told = asdict(job) | {"scratch": scratch}
        made = Run(job, time.monotonic())
        process = subprocess.Popen(
            [str(environment.python), str(PEERS / script), json.dumps(told)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=scratch, env=_surroundings(job, kept / environment.peer), start_new_session=True,
        )  # fmt: skip
        clock = threading.Timer(limit_s, _end, (process,))
        clock.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith(MARK):
                made.events.append(json.loads(line.removeprefix(MARK)))
            else:
                log.write(line)
        code = process.wait()
        timed_out = not clock.is_alive()
        clock.cancel()
        _end(process)
    if timed_out:
        made.error = f"stopped after {limit_s:.0f} s and {len(made.of('step'))} steps"
    elif code:
        made.error = _last_words(log_file) or f"exit code {code}"
    return made


def _surroundings(job: Job, compiled: Path) -> dict[str, str]:
    """The same for all: no hub, no trackers, the same threads, no GPU where the CPU is measured."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    return os.environ | hidden | {
        "OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_DISABLED": "true", "PYTHONHASHSEED": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(compiled), "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
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
