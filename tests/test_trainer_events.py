"""What others see of a run: transformers' callbacks, the log, the journal; and what they may do."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorafit
from lorafit import parts
from lorafit.data.loader import order
from lorafit.engine.evaluation import Readings
from lorafit.errors import ConfigError
from lorafit.events import (
    PROBE,
    Evaluated,
    Logged,
    MemoryPeak,
    RunEnded,
    RunStarted,
    Saved,
    StepEnd,
)
from tests import tiny
from tests.tiny import adapter, events_of, llama, make, numbers, plain, same

HELD = plain(30)[26:]
EVENTS = [name for name in dir(transformers.TrainerCallback) if name.startswith("on_")]


class Record(transformers.TrainerCallback):
    """Writes down every event with the step and epoch at which it came."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []
        for name in EVENTS:
            setattr(self, name, self._recorder(name))

    def _recorder(self, name: str) -> Any:
        def told(args: Any, state: Any, control: Any, **context: Any) -> None:
            self.seen.append((name, state.global_step, round(state.epoch or 0, 6)))

        return told


SCRIPTS: list[dict[str, Any]] = [
    {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    {"eval_strategy": "epoch", "eval_delay": 1, "eval_on_start": True, "save_strategy": "no"},
    {"logging_strategy": "epoch", "save_strategy": "no"},
    {"logging_steps": 4, "logging_first_step": True, "save_strategy": "no", "max_steps": 5},
    {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "loss"},
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: "-".join(map(str, script.values())))
def test_callbacks_see_what_they_see_under_transformers(
    tmp_path: Path, script: dict[str, Any]
) -> None:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **script,
    }  # fmt: skip
    seen, logs = [], []
    for library in (lorafit, transformers):
        record = Record()
        trainer = library.Trainer(
            llama(),
            library.TrainingArguments(output_dir=str(tmp_path / library.__name__), **given),
            data_collator=tiny.collate,
            train_dataset=plain(10),
            eval_dataset=plain(3) if "eval_strategy" in script else None,
            callbacks=[record],
        )
        trainer.train()
        seen.append(record.seen)
        logs.append([(e["step"], sorted(e)) for e in trainer.state.log_history])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 20
    assert logs[0] == logs[1]


def test_a_callback_may_stop_the_run(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make(tmp_path, callbacks=[Stop], num_train_epochs=3)
    with events_of(trainer) as told:
        assert trainer.train().global_step == 2
    assert isinstance(told[-1], RunEnded) and told[-1].reason == "stopped"
    assert told[-1].epoch == pytest.approx(2 / 3)


def test_a_callback_may_end_an_epoch_save_and_evaluate(tmp_path: Path) -> None:
    class Ask(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1
            control.should_evaluate = control.should_save = state.global_step == 3

    trainer = make(tmp_path, callbacks=[Ask], num_train_epochs=2, eval_dataset=plain(2))
    with events_of(trainer) as told:
        trainer.train()
    steps = [(event.step, round(event.epoch, 3)) for event in told if isinstance(event, StepEnd)]
    assert steps == [(1, 0.333), (2, 1.333), (3, 1.667), (4, 2.0)]
    asked = [e for e in told if isinstance(e, Evaluated) and e.occasion == "asked"]
    assert [event.step for event in asked] == [3]
    assert [event.step for event in told if isinstance(event, Saved)] == [3]


def test_early_stopping(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, data=plain(6), num_train_epochs=40, learning_rate=0.3, eval_dataset=HELD,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=3)],
    )  # fmt: skip
    trainer.train()
    losses = [loss for (loss,) in numbers(trainer, "eval_loss")]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 40


def test_callbacks_state_is_put_back(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "data": plain(6), "num_train_epochs": 40, "learning_rate": 0.3, "eval_dataset": HELD,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
    }  # fmt: skip

    def trainer() -> Any:
        stopping = transformers.EarlyStoppingCallback(early_stopping_patience=3)
        return make(tmp_path, callbacks=[stopping], **given)

    (whole := trainer()).train()
    last = whole.state.global_step
    (resumed := trainer()).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last - 2}"))
    assert resumed.state.global_step == last


# ---- readings


def test_readings_leave_no_trace_but_their_own(tmp_path: Path) -> None:
    """With dropout, and an evaluation set that draws random numbers when it is read."""

    class Drawing(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            torch.rand(1)
            return super().__getitem__(index)

    outcomes = []
    for held in (None, Drawing(plain(6))):
        record = Record()
        trainer = make(
            tmp_path / str(held is None), model=llama(dropout=0.3), data=plain(100),
            num_train_epochs=2, eval_dataset=held, callbacks=[record],
        )  # fmt: skip
        with events_of(trainer) as told:
            trainer.train()
        log = [
            {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
            for entry in trainer.state.log_history
        ]
        outcomes.append((log, record.seen, adapter(trainer), torch.get_rng_state()))
    (log_0, seen_0, adapter_0, random_0), (log_1, seen_1, adapter_1, random_1) = outcomes
    assert log_0 == log_1 and seen_0 == seen_1
    assert same(adapter_0, adapter_1) and torch.equal(random_0, random_1)
    everything = [event for event in told if isinstance(event, Evaluated)]
    readings, probes = (
        [event for event in everything if event.name == name] for name in ("eval", PROBE)
    )
    assert everything == [event for pair in zip(readings, probes, strict=True) for event in pair]
    chosen = sorted(order(100, seed=3, epoch=0)[:6])
    probe = trainer.evaluate([plain(100)[n] for n in chosen])["eval_loss"]
    assert probes[-1].loss == pytest.approx(probe, rel=1e-6) and probes[-1].loss < probes[0].loss
    assert [(event.step, event.occasion) for event in readings] == [
        (step, "reading") for step in (0, 25, 50)
    ]
    assert readings[0].loss != readings[-1].loss
    lines = [json.loads(x) for x in (tmp_path / "False" / "journal.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["event"] == "Evaluated"] == [
        event.loss for event in everything
    ]


@pytest.mark.parametrize("at_start", [False, True])
def test_training_examples_are_read_beside_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_start: bool
) -> None:
    """Of the same examples each time; callbacks, logs and the run's random numbers, which dropout
    draws here, do not notice."""
    outcomes: list[Any] = []
    for probed in (True, False):
        if not probed:
            monkeypatch.setattr(parts, "readings", lambda *_, **__: Readings(frozenset(), 0))
        trainer = make(
            tmp_path / str(probed), model=llama(dropout=0.3), data=plain(40), num_train_epochs=2,
            eval_strategy="epoch", eval_on_start=at_start, eval_dataset=HELD,
            callbacks=[record := Record()],
        )  # fmt: skip
        with events_of(trainer) as told:
            trainer.train()
        read = [(e.step, e.occasion) for e in told if isinstance(e, Evaluated) and e.name == PROBE]
        due = [(step, "reading") for step in (0, 10, 20) if step or at_start]
        assert read == (due if probed else [])
        assert [name for name, *_ in record.seen].count("on_evaluate") == 2 + at_start
        assert not any("probe" in key for entry in trainer.state.log_history for key in entry)
        outcomes.append(adapter(trainer))
    assert same(*outcomes)


def test_readings_are_turned_off_in_writing(tmp_path: Path) -> None:
    for given in ({"eval_strategy": "no"}, {"eval_strategy": "epoch"}):
        trainer = make(tmp_path, eval_dataset=plain(4), **given)
        with events_of(trainer) as told:
            trainer.train()
        readings = [e for e in told if isinstance(e, Evaluated) and e.occasion == "reading"]
        assert {e.name for e in readings} == (set() if "no" in given.values() else {PROBE})


def test_transformers_arguments_get_readings_too(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = lorafit.Trainer(
        llama(), args, tiny.collate, train_dataset=plain(40), eval_dataset=plain(8)
    )
    with events_of(trainer) as told:
        trainer.train()
    assert [event.step for event in told if isinstance(event, Evaluated)] == [0, 0, 2, 2]


# ---- events


def test_the_events_of_a_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=2, logging_steps=2, save_strategy="epoch")
    with events_of(trainer) as told:
        trainer.train()
    names = [type(event).__name__ for event in told]
    logs = [event for event in told if isinstance(event, Logged)]
    losses = [event.loss for event in told if isinstance(event, StepEnd)]
    assert names[0] == "RunStarted" and names[-1] == "RunEnded"
    assert names.count("StepEnd") == 6 and names.count("Saved") == 2
    assert [event.loss for event in logs] == pytest.approx(
        [sum(losses[at : at + 2]) / 2 for at in (0, 2, 4)]
    )
    peaks = [event for event in told if isinstance(event, MemoryPeak)]
    assert [event.step for event in peaks] == [2, 4, 6]
    assert all(0 < a.bytes <= b.bytes for a, b in pairwise(peaks))
    started = told[0]
    assert isinstance(started, RunStarted)
    assert (started.examples, started.examples_per_step, started.steps) == (12, 4, 6)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == names


def test_tensorboard_gets_the_numbers_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back from the files that the real package wrote."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make(
        tmp_path / "run", report_to="tensorboard", eval_dataset=HELD, eval_strategy="epoch",
        num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    written = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    tags = written.Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(tags)
    assert not any("probe" in tag for tag in tags)
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"):
        name = tag.removeprefix("train/").replace("eval/", "eval_")
        logged = [(e["step"], e[name]) for e in trainer.state.log_history if name in e]
        read = [(scalar.step, scalar.value) for scalar in written.Scalars(tag)]
        assert [step for step, _ in read] == [step for step, _ in logged] and len(read) > 1
        assert [v for _, v in read] == pytest.approx([v for _, v in logged], rel=1e-6)


def test_numbers_wait_no_longer_than_eight_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=4, logging_strategy="no")
    seen: list[tuple[int, int]] = []
    trainer.observers.append(
        lambda event: (
            isinstance(event, StepEnd) and seen.append((event.step, trainer.state.global_step))
        )
    )
    trainer.train()
    assert [step for step, _ in seen] == list(range(1, 13))
    assert max(read - step for step, read in seen) == 7


# ---- what cannot be


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": None}, "either a `model` or `model_init`"),
        (
            {"optimizers": (None, 1), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
            "leave one",
        ),
    ],
)
def test_what_a_trainer_refuses(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lorafit.Trainer(**{"model": llama(), "args": tiny.arguments(tmp_path), **given})


def test_what_train_and_evaluate_refuse(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match="hyperparameter_search"):
        trainer.train(trial=object())
    with pytest.raises(ConfigError, match="requires an eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="requires a train_dataset"):
        lorafit.Trainer(llama(), tiny.arguments(tmp_path)).train()


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, eval_dataset=plain(2), eval_strategy="epoch", metric_for_best_model="accuracy"
    )
    with pytest.raises(ConfigError, match="eval_accuracy"):
        trainer.train()
