"""The demo: an embedded base, this Python's own documentation, and what training changed.

Offline and small. The base is a toy of a few million parameters, so it shows form, not knowledge.
Writes to the terminal through rich; decides nothing about training.
"""

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console as Terminal

from lorafit import config, job
from lorafit.data import docstrings, read
from lorafit.data.read import Source
from lorafit.deploy.generate import Answer, Sampling, answer, answer_with_base
from lorafit.events import PROBE, Evaluated, Event
from lorafit.model import adapters

SHOWN = 3
"""Prompts answered before and after."""


def run(folder: Path, *, overwrite: bool = False) -> None:
    """Train on 500 questions, evaluate on 100 from modules never seen, and show three answers.

    Raises:
        UsageError: `folder` cannot be written or holds a run; the standard library has no sources.
    """
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    with as_file(files("lorafit") / "assets" / "base") as base:
        learned, evaluation = docstrings.pairs()
        given = sources(learned, evaluation)
        prepared = job.prepare(settings(folder, base, overwrite=overwrite), given)
        readings: list[float] = []
        prepared.trainer.observers.append(lambda event: _note_reading(event, readings))
        terminal.print(
            "A base of 3 million parameters, pretrained on Python's own library, learns "
            "to answer\n[bold]What does os.path.join do?[/bold] as the documentation would. It "
            "shows form, not knowledge."
        )
        trained = prepared.run()
        tuned = adapters.load_tuned(trained, base=str(base))
        questions = [pair.question for pair in evaluation[:SHOWN]]
        sampling = Sampling(max_new_tokens=64)
        before = answer_with_base(tuned, questions, sampling=sampling)
        after = answer(tuned, questions, sampling=sampling)
    _show(terminal, questions, before=before, after=after)
    terminal.print(
        f"\nEvaluation loss: {readings[0]:.3f} nats per token before, {min(readings):.3f} after. "
        f"The adapter is {(trained / adapters.ADAPTER).stat().st_size / 1e6:.1f} MB in {trained}"
    )
    terminal.print(
        "Next: lorafit train --model FOLDER_OR_ID --data YOUR_FILE.jsonl", highlight=False
    )


def settings(folder: Path, base: Path, *, overwrite: bool = False) -> config.Settings:
    """The recipe, with what a model this small needs changed."""
    return config.load(
        None,
        {
            "model": str(base),
            "data": "the standard library",
            "output_dir": str(folder),
            "overwrite": overwrite,
            "learning_rate": 2e-3,
            "num_train_epochs": 2.0,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "bf16": False,
        },
    )


def sources(
    learned: Sequence[docstrings.QuestionAnswer], evaluation: Sequence[docstrings.QuestionAnswer]
) -> tuple[Source, Source]:
    """Questions and answers as training and evaluation data."""
    return _source("the standard library", learned), _source("held-out modules", evaluation)


def _source(name: str, pairs: Sequence[docstrings.QuestionAnswer]) -> Source:
    rows = [{"question": pair.question, "answer": pair.answer} for pair in pairs]
    return read.given(rows, [f"{pair.module}:{pair.line}" for pair in pairs], label=name)


def _note_reading(event: Event, readings: list[float]) -> None:
    if isinstance(event, Evaluated) and event.name != PROBE:
        readings.append(event.loss)


def _show(
    terminal: Terminal,
    questions: Sequence[str],
    *,
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> None:
    for question, base, tuned in zip(questions, before, after, strict=True):
        terminal.print(f"\n> {question}", style="bold", markup=False)
        terminal.print(f"base:  {_one_line(base)}", markup=False)
        terminal.print(f"tuned: {_one_line(tuned)}", markup=False)


def _one_line(shown: Answer) -> str:
    text = " ".join(shown.text.split())
    cut = text if len(text) <= 160 else text[:160] + " ..."
    return cut if shown.stopped else f"{cut} (did not stop by itself)"
