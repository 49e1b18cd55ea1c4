"""The demo's pass marks: it learns the form of an answer, and from the right answers."""

import random
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from lorafit import demo, job
from lorafit.data import docstrings
from lorafit.data.read import Source
from lorafit.deploy.generate import Answer, Sampling, answer, answer_with_base, open_adapter
from lorafit.events import PROBE, Evaluated, Event
from tests.first_sentence import begins_like_a_docstring

pytestmark = pytest.mark.slow

BASE = Path(str(files("lorafit") / "assets" / "base"))


def train(folder: Path, given: tuple[Source, Source]) -> list[float]:
    """Evaluation losses in order, the first before training."""
    prepared = job.prepare(demo.settings(folder, BASE), given)
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Evaluated) and event.name != PROBE:
            losses.append(event.loss)

    prepared.trainer.observers.append(note)
    prepared.run()
    return losses


def begun(answers: list[Answer]) -> int:
    return sum(begins_like_a_docstring(one.text.strip()) for one in answers)


def test_pass_marks(tmp_path: Path) -> None:
    learned, held = docstrings.pairs()
    losses = train(tmp_path / "true", demo.sources(learned, held))
    assert losses[0] - min(losses[1:]) >= 0.5

    tuned = open_adapter(str(tmp_path / "true"), base=str(BASE))
    questions = [pair.question for pair in held]
    sampling = Sampling(max_new_tokens=64)
    after = answer(tuned, questions, sampling=sampling)
    assert sum(one.stopped for one in after) >= 90
    assert begun(after) >= 80
    assert begun(answer_with_base(tuned, questions, sampling=sampling)) <= 20

    answers = [pair.answer for pair in learned]
    random.Random(0).shuffle(answers)
    shuffled = [replace(pair, answer=text) for pair, text in zip(learned, answers, strict=True)]
    wrong = train(tmp_path / "shuffled", demo.sources(shuffled, held))
    assert min(wrong[1:]) > min(losses[1:])
