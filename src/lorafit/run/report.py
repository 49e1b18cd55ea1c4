"""A run folder -> report.html: the verdict, plots and all that a person asks next, in one file.

A pure function of the folder: the same files give the same page, byte for byte. The page fetches
nothing and its policy forbids that it could. Everything that comes from data or names is escaped.
Owns how it is worded; `record` owns what is known, `figures` what is drawn, `page/` how it looks.
"""

import base64
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lorafit.amounts import duration
from lorafit.events import (
    DataAudited,
    Evaluated,
    Event,
    Logged,
    Notice,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepEnd,
    StepSkipped,
)
from lorafit.run import figures, record, store
from lorafit.run.figures import Figure, Line
from lorafit.run.practice import Practice
from lorafit.run.record import Record

PLOTTING = "1.6.32"
"""uPlot's version, as it lies in assets/uplot."""
_SHARE = 0.01
"""Of a run's time, writing its page may take so much."""
_TONES = {
    "still learning": "learning",
    "flat": "flat",
    "memorising": "memorising",
    "unstable": "unstable",
    "too few points to say": "few",
}

# ---- what is told ------------------------------------------------------------------------------


def _facts(run: Record) -> list[tuple[str, str, str]]:
    """(name, value, unit) of the figures on top."""
    steps = run.started.steps if run.started else 0
    of = f"of {steps:,}" if steps else ""
    made = [("step", f"{run.last_step:,}", of)]
    evaluation = run.evaluation
    if run.verdict.best is not None:
        best = evaluation.losses[evaluation.steps.index(run.verdict.best)]
        made.append(("best evaluation loss", f"{best:.4f}", f"at step {run.verdict.best:,}"))
        made.append(("last evaluation loss", f"{evaluation.losses[-1]:.4f}", "nats per token"))
    if run.steps:
        late = [s.loss for s in run.steps[-10:]]
        made.append(("training loss", f"{sum(late) / len(late):.4f}", f"mean of {len(late)} steps"))
    if run.tokens_per_second:
        made.append(("speed", f"{run.tokens_per_second:,.0f}", "tokens/s"))
    made.append(("time", duration(run.seconds), "steps and evaluations"))
    if run.seconds_left is not None:
        made.append(("left", duration(run.seconds_left), "at this pace"))
    return made


def _state(run: Record) -> str:
    if run.ended:
        restored = f"; best adapter restored: {run.ended.restored}" if run.ended.restored else ""
        return f"{run.ended.reason} after step {run.ended.step:,}{restored}"
    if run.started:
        return f"running, or killed, at step {run.last_step:,} of {run.started.steps:,}"
    return "nothing of a run could be read"


def _commands(run: Record) -> list[tuple[str, str]]:
    folder = shlex.quote(str(run.folder))
    made: list[tuple[str, str]] = []
    settings = run.folder / store.SETTINGS
    whole = run.ended is not None and run.ended.reason == "finished"
    if settings.is_file() and run.checkpoints and not whole:
        resume = f"lorafit train {shlex.quote(str(settings))} --resume-from-checkpoint auto"
        made.append(("Resume it from its last checkpoint", resume))
    if run.best_adapter and run.best_adapter != f"checkpoint-{run.last_step}":
        best = shlex.quote(str(run.folder / run.best_adapter))
        made.append(("Ask the best adapter", f'lorafit generate --adapter {best} --prompt "..."'))
    if (run.folder / "adapter_config.json").is_file():
        ask = f'lorafit generate --adapter {folder} --prompt "..." --compare'
        made.append(("Ask the final adapter, and the base beside it", ask))
    return made


def _kept(run: Record) -> str:
    """Whether the best adapter is there; else how it would be the next time."""
    if run.verdict.best is None or run.verdict.kind != "memorising":
        return ""
    if run.best_adapter:
        return f"It is kept: {run.best_adapter}."
    return (
        "It was not saved: save where it is evaluated, and take the best one at the end "
        "(save_strategy and save_steps as eval_strategy and eval_steps, "
        "load_best_model_at_end=true)."
    )


def _samples(run: Record) -> list[tuple[str, str, list[tuple[int, str]]]]:
    """Each prompt with its row's answer, and what was answered at which step."""
    asked: dict[str, tuple[str, list[tuple[int, str]]]] = {}
    for sample in run.of(Sampled):
        asked.setdefault(sample.prompt, (sample.expected, []))[1].append(
            (sample.step, sample.answer)
        )
    return [(prompt, expected, told) for prompt, (expected, told) in asked.items()]


def _told_of(run: Record) -> dict[str, Any]:
    """What the template shows of a run."""
    losses = dict(zip(run.evaluation.steps, run.evaluation.losses, strict=True))
    return {
        "record": run,
        "name": run.folder.resolve().name,
        "state": _state(run),
        "tone": _TONES[run.verdict.kind],
        "facts": _facts(run),
        "kept": _kept(run),
        "samples": _samples(run),
        "audit": (run.of(DataAudited) or (None,))[-1],
        "commands": _commands(run),
        "notices": list(dict.fromkeys(notice.text for notice in run.of(Notice))),
        "skipped": [
            f"step {s.step:,} was not applied: loss {s.loss}, gradient norm {s.gradient_norm}, "
            f"examples {list(s.examples)}"
            for s in run.of(StepSkipped)
        ],
        "checkpoints": [
            (step, name, size, f"{losses[step]:.4f}" if step in losses else "")
            for step, name, size in run.checkpoints
        ],
    }


# ---- several runs ------------------------------------------------------------------------------


def _differing(runs: Sequence[Record]) -> list[tuple[str, list[str]]]:
    kept = [{s.name: s.value for s in run.settings} for run in runs]
    names = dict.fromkeys(name for settings in kept for name in settings)
    rows = [(name, [settings.get(name, "not kept") for settings in kept]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


# ---- the page ----------------------------------------------------------------------------------


def render(runs: Sequence[Record]) -> str:
    """The page of one run, or of several side by side."""
    drawn = figures.of_run(runs[0]) if len(runs) == 1 else figures.of_runs(runs)
    mark = " ".join(f"{len(run.events)}.{run.last_step}" for run in runs)
    shown = [_told_of(run) for run in runs]
    return _page(
        "report.html.j2",
        drawn,
        name=" and ".join(run["name"] for run in shown),
        source="journal.jsonl",
        mark="" if all(run.ended for run in runs) else mark,
        shown={"runs": shown, "differing": _differing(runs)},
    )


def render_practice(found: Practice) -> str:
    """The page of a practice run."""
    steps = range(1, len(found.curve) + 1)
    lines = [Line("training loss", steps, found.curve, colour="smooth")]
    if found.change:
        ends = [found.change.before, found.change.after]
        lines.append(Line("held-out rows", [0, len(steps)], ends, colour="eval"))
    told = f"{len(steps)} steps of the run's own settings, its schedule within them."
    drawn = [Figure("loss", "Loss", "nats per token", lines, told=told, tall=True)]
    return _page(
        "practice.html.j2",
        [
            *([figures.of_rates(found.rates)] if found.rates else []),
            *(drawn if found.curve else []),
        ],
        name="practice run",
        source="the practice run",
        shown={"found": found},
    )


def _page(
    template: str,
    drawn: Sequence[Figure],
    *,
    shown: Mapping[str, Any],
    name: str,
    source: str,
    mark: str = "",
) -> str:
    """A template in its frame, with style, plots and scripts.

    Args:
        mark: Changes with what is shown, while that may still change; else empty.
    """
    page, library = files("lorafit.run") / "page", files("lorafit.assets") / "uplot"
    scripts = [
        (library / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        (page / "report.js").read_text(encoding="utf-8"),
    ]
    styles = [library / "uPlot.min.css", page / "report.css"]
    return (
        _templates()
        .get_template(template)
        .render(
            **shown,
            name=name,
            source=source,
            figures=drawn,
            told={"figures": [f.as_told() for f in drawn], "ended": not mark, "mark": mark},
            style="\n".join(style.read_text(encoding="utf-8") for style in styles),
            scripts=scripts,
            policy=[_hash(script) for script in scripts],
            plotting=PLOTTING,
        )
    )


@cache
def _templates() -> Environment:
    """Those of the package, each compiled once."""
    page = files("lorafit.run") / "page"
    made = Environment(
        loader=FunctionLoader(lambda part: (page / part).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters["capitalised"] = _capitalised
    return made


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _hash(script: str) -> str:
    """What a policy calls a script that may run: nothing else does, whatever a row may hold."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def write(folders: Sequence[Path], target: Path) -> list[Record]:
    """Write the page of these folders' last runs to `target`, in one piece; what it is made of.

    Raises:
        OutputError: a folder holds no run, or `target` cannot be written.
    """
    runs = [record.read(folder) for folder in folders]
    store.write_whole(target, render(runs).encode())
    return runs


class Page:
    """Keeps report.html of a folder up to date while its run goes: call it with each event, after
    the journal. It is written anew at logs, readings and saves, in at most a hundredth of the run's
    time; one that cannot be written ends no run: `say` is told once, and it is left alone.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._next = 0.0
        self._is_left = False

    def __call__(self, event: Event) -> None:
        """Write it where it is time to."""
        if not isinstance(event, StepEnd):
            self._keep_up(event)

    def _keep_up(self, event: Event) -> None:
        news = isinstance(event, RunStarted | Logged | Evaluated | Saved)
        if self._is_left or not (news or isinstance(event, RunEnded)):
            return
        began = time.perf_counter()
        if began < self._next and not isinstance(event, RunEnded):
            return
        try:
            write([self._folder], self._folder / store.REPORT)
        except Exception as error:
            self._is_left = True
            self._say(f"{store.REPORT} is not kept up to date: {str(error).splitlines()[0]}")
        took = time.perf_counter() - began
        self._next = began + took / _SHARE
