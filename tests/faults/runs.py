"""The runs that faults are put into: four steps of a tiny Llama with LoRA and dropout.

Each saves at every step, keeps two, evaluates, restores the best and saves the final adapter.
Called again on the same folder it goes on by itself, as a restarted job does. What a run left is
compared as a `Trace`; nothing in it depends on the time.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import lorafit
from lorafit import cli
from lorafit.run import report
from lorafit.run.store import JOURNAL
from tests import tiny
from tests.conftest import shared_folder

STEPS = 4


def settings(folder: Path) -> dict[str, Any]:
    """Under the names that both Trainers know."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "num_train_epochs": 1, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip


def given() -> dict[str, Any]:
    """What both Trainers are made of."""
    rows = tiny.plain(4 * STEPS + 4)
    return {
        "model": tiny.llama(dropout=0.1),
        "data_collator": tiny.collate,
        "train_dataset": rows[4:],
        "eval_dataset": rows[:4],
    }


def python(folder: Path) -> None:
    """lorafit's Trainer in a script."""
    trainer = lorafit.Trainer(args=lorafit.TrainingArguments(**settings(folder)), **given())
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(folder))


def theirs(folder: Path) -> None:
    """transformers' Trainer in the same script, resumed as its documentation says."""
    arguments = transformers.TrainingArguments(**settings(folder))
    trainer = transformers.Trainer(args=arguments, **given())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) or False)
    trainer.save_model(str(folder))


def words(folder: Path, rows: Path) -> list[str]:
    """The command that `command` runs."""
    knobs = settings(folder) | {"max_steps": STEPS, "lora_r": 4, "lora_dropout": 0.1}
    for name in ("report_to", "num_train_epochs", "use_cpu"):
        del knobs[name]
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in knobs.items() if value is not True
    ]
    flags += ["--load-best-model-at-end", "--disable-tqdm", "--resume-from-checkpoint=auto"]
    model = shared_folder() / "models" / "stories260K"
    return ["train", f"--model={model}", f"--data={rows}", *flags, "--use-cpu"]


def command(folder: Path) -> None:
    """The command line."""
    rows = folder.parent.parent / "rows.jsonl"
    sys.argv = ["lorafit", *words(folder, rows)]
    cli.main()


RUNS: dict[str, Callable[[Path], None]] = {
    "python": python, "command": command, "theirs": theirs,
}  # fmt: skip


def make_rows(folder: Path) -> None:
    """The data file of `command`."""
    lines = (json.dumps({"question": f"Who is {n}?", "answer": f"A cat, {n}."}) for n in range(24))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Trace:
    """What a run left: digests of the final adapter, of the last checkpoint's adapter and of its
    state (optimiser, generators), journal lines of steps, the log, and every name in the folder."""

    adapter: str
    last_adapter: str
    last_state: str
    steps: list[Any]
    log: list[Any]
    names: list[str]

    def differences(self, other: "Trace") -> list[str]:
        """The names of what is not the same."""
        return [name for name, value in vars(self).items() if value != vars(other)[name]]


_TIMES = ("runtime", "per_second", "flos")


def trace(folder: Path, *, ours: bool) -> Trace:
    """What lies in `folder`, of lorafit's run or of transformers'."""
    last = folder / f"checkpoint-{STEPS}"
    lines: list[dict[str, Any]] = []
    if ours:
        lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    told = [line for line in lines if line["event"] == "StepEnd"]
    state = json.loads((last / "trainer_state.json").read_text())
    log = [
        {name: value for name, value in entry.items() if not name.endswith(_TIMES)}
        for entry in state["log_history"]
    ]
    return Trace(
        adapter=digest(folder / "adapter_model.safetensors"),
        last_adapter=digest(last / "adapter_model.safetensors"),
        last_state=digest(last / ("run_state.safetensors" if ours else "scheduler.pt")),
        steps=[[line["step"], line["loss"], line["learning_rate"]] for line in told],
        log=log,
        names=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")),
    )


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


PAGE_PARTS = ("frame.html.j2", "report.html.j2", "plot.html.j2")


def warm() -> None:
    """What every run would load first, once, before processes are forked from this one."""
    torch.set_num_threads(1)
    given()
    for part in PAGE_PARTS:
        report._templates().get_template(part)
