"""A run that is watched: it ends where it begins to memorise, shows answers, and keeps its page."""

import io
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console as Terminal

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.deploy import samples
from lorafit.deploy.generate import go_on
from lorafit.errors import ConfigError
from lorafit.events import Evaluated, MemoryPeak, Notice, RunEnded, Sampled
from lorafit.model import adapters
from lorafit.run import record
from lorafit.run.console import Console
from tests.test_trainer_stops import Send
from tests.tiny import adapter, arguments, events_of, llama, make, plain, same

ENTRY = dict[str, list[int]]


def row(ids: list[int]) -> ENTRY:
    return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}


COUNTED = [row([(5 * start + at) % 16 + 1 for at in range(12)]) for start in range(16)]
"""Rows that count upwards: there is nothing else in them to learn."""
_DRAWN = random.Random(0)
MIXED = [row([_DRAWN.randrange(1, 17) for _ in range(12)]) for _ in range(12)]
"""The same ids without order: a model that has learned which ids there are does better on them, one
that is sure of what follows does ever worse."""


def memorising(folder: Path, **given: Any) -> Any:
    values: dict[str, Any] = {
        "max_steps": 80, "lr_scheduler_type": "constant", "logging_steps": 500,
        "stop_when_memorising": True, "save_total_limit": 1, "eval_dataset": MIXED,
    }  # fmt: skip
    return make(folder, data=COUNTED, **(values | given))


def stopped(told: list[Any]) -> RunEnded:
    return next(event for event in reversed(told) if isinstance(event, RunEnded))


def test_it_stops_where_it_memorises_and_ends_with_the_best(tmp_path: Path) -> None:
    trainer = memorising(tmp_path)
    with events_of(trainer) as told:
        trainer.train()
    ended = stopped(told)
    assert ended.reason == "stopped" and ended.step < 80
    said = [event.text for event in told if isinstance(event, Notice)][-1]
    assert said.startswith("stopping: memorising since step")
    losses = {e.loss: e.step for e in told if isinstance(e, Evaluated) and e.name == "eval"}
    best = losses[min(losses)]
    assert ended.restored == str(tmp_path / f"checkpoint-{best}") and best < ended.step
    kept = adapters.read_adapter_state(Path(ended.restored))
    assert same(kept, adapter(trainer)), "it did not end with the best"
    again = trainer.evaluate(MIXED)["eval_loss"]
    assert again == pytest.approx(min(losses), rel=1e-5)


def test_it_goes_on_to_the_end_where_nobody_asks(tmp_path: Path) -> None:
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = memorising(tmp_path, stop_when_memorising=False, **given)
    trainer.train()
    assert trainer.state.global_step == 80
    assert record.read(tmp_path).verdict.kind == "memorising"


def test_patience_waits_for_as_many_evaluations(tmp_path: Path) -> None:
    ends = []
    for patience in (1, 3):
        trainer = memorising(
            tmp_path / str(patience), memorising_patience=patience, eval_strategy="steps",
            eval_steps=4,
        )  # fmt: skip
        with events_of(trainer) as told:
            trainer.train()
        ends.append(stopped(told).step)
    assert ends[1] == ends[0] + 2 * 4


def test_a_run_that_was_interrupted_stops_at_the_same_step_with_the_same_adapter(
    tmp_path: Path,
) -> None:
    whole = memorising(tmp_path / "whole")
    with events_of(whole) as expected:
        whole.train()
    cut = memorising(tmp_path / "cut", callbacks=[Send(signal.SIGINT, at=10)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = memorising(tmp_path / "cut")
    with events_of(resumed) as told:
        resumed.train("auto")
    ends = [stopped(expected), stopped(told)]
    assert ends[0].step == ends[1].step
    assert Path(ends[0].restored).name == Path(ends[1].restored).name
    assert same(adapter(whole), adapter(resumed))


def test_the_journal_is_read_once_a_reading_however_often_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = record.read, list[Path]()
    monkeypatch.setattr(record, "read", lambda folder: (reads.append(folder), read(folder))[1])
    trainer = memorising(
        tmp_path, max_steps=8, eval_strategy="steps", eval_steps=4, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    monkeypatch.setattr("lorafit.run.report.write", lambda *_: None)
    trainer.train()
    assert len(reads) == 2


def test_early_stopping_by_patience_still_works_beside_it(tmp_path: Path) -> None:
    trainer = memorising(
        tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, memorising_patience=50,
        callbacks=[lorafit.EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    with events_of(trainer) as told:
        trainer.train()
    best = trainer.state.best_global_step
    assert stopped(told).step == best + 2 * 4
    assert stopped(told).restored == str(tmp_path / f"checkpoint-{best}")


def test_without_evaluation_it_is_refused(tmp_path: Path) -> None:
    for given in ({"eval_dataset": None}, {"eval_strategy": "no"}):
        with pytest.raises(ConfigError, match="stop_when_memorising: no evaluation loss is read"):
            memorising(tmp_path, **given).train()


def test_a_run_that_is_to_stop_can_be_practised(tmp_path: Path) -> None:
    found = memorising(tmp_path, learning_rate=2e-2).practice().findings
    assert [each.title for each in found if each.mark == "stop"] == ["stopping"], "no stop token"


def test_on_the_command_line_it_evaluates_often_enough_to_see_it() -> None:
    made = lorafit.TrainingArguments.recipe(stop_when_memorising=True)
    assert (made.eval_strategy, made.eval_steps) == ("steps", 0.05)
    assert (made.save_strategy, made.save_steps) == ("steps", 0.05)
    asked = lorafit.TrainingArguments.recipe(stop_when_memorising=True, eval_strategy="epoch")
    assert (asked.eval_strategy, asked.save_strategy) == ("epoch", "epoch")


def test_a_page_is_kept_beside_the_journal(tmp_path: Path) -> None:
    trainer = memorising(tmp_path, max_steps=4)
    trainer.train()
    page = (tmp_path / "report.html").read_text()
    assert "finished after step 4" in page
    assert not trainer.observers.followers


# ---- answers -----------------------------------------------------------------------------------


class Words:
    """A tokenizer as far as answers need one: an id is written as a number."""

    eos_token_id = None

    def decode(self, ids: Any, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(int(each)) for each in ids)

    def save_pretrained(self, folder: str) -> None:
        del folder


def shown(folder: Path, **given: Any) -> lorafit.Trainer:
    return lorafit.Trainer(
        model=llama(dropout=0.3),
        args=arguments(
            folder, **({"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3} | given)
        ),
        data_collator=PadCollator(0),
        train_dataset=plain(12),
        eval_dataset=plain(30)[20:],
        processing_class=Words(),  # type: ignore[arg-type]
    )


def test_answers_are_shown_at_each_evaluation_and_leave_no_trace(tmp_path: Path) -> None:
    quiet, trainer = shown(tmp_path / "quiet"), shown(tmp_path / "shown", show_samples=2)
    quiet.train()
    with events_of(trainer) as told:
        trainer.train()
    assert same(adapter(quiet), adapter(trainer)), "answering drew random numbers"
    found = [event for event in told if isinstance(event, Sampled)]
    assert [event.step for event in found] == [3, 3]
    for event, entry in zip(found, plain(30)[20:], strict=False):
        start = next(at for at, label in enumerate(entry["labels"]) if label >= 0)
        prompt = entry["input_ids"][:start]
        assert event.prompt == " ".join(map(str, prompt))
        (new,) = go_on(
            trainer.model.eval(), [prompt], stops=[], sampling=samples.SHORT
        )  # fmt: skip
        assert event.answer == " ".join(map(str, new))
    read = record.read(tmp_path / "shown").of(Sampled)
    assert list(read) == found


def test_a_run_whose_answers_cannot_be_shown_says_so_and_goes_on(tmp_path: Path) -> None:
    trainer = memorising(tmp_path, max_steps=4, show_samples=1)  # without a tokenizer
    with events_of(trainer) as told:
        trainer.train()
    said = "\n".join(event.text for event in told if isinstance(event, Notice))
    assert said.count("answers cannot be shown, left out: they need a processing_class") == 1
    assert stopped(told).reason == "finished"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 3, 4, -100, 6], ([1, 2], [3, 4])),
        ([1, 2, 3, 4, 5, 6], ([1, 2], [3, 4, 5, 6])),
        ([-100] * 6, ([1, 2, 3, 4, 5, 6], [])),
    ],
    ids=["the first answer", "text", "nothing learned"],
)
def test_a_row_is_parted_before_its_first_answer(
    labels: list[int], expected: tuple[list[int], list[int]]
) -> None:
    made = samples.parted(torch.arange(1, 7), torch.tensor(labels))
    assert tuple(part.tolist() for part in made) == expected


def test_the_same_flag_is_unknown_to_transformers() -> None:
    """A knob of ours must not hide one of theirs."""
    theirs = {field.name for field in transformers.TrainingArguments.__dataclass_fields__.values()}
    assert not theirs & {"stop_when_memorising", "memorising_patience", "show_samples"}


def test_an_error_in_a_callback_leaves_no_bar_and_gives_the_cursor_back(tmp_path: Path) -> None:
    class Fails(lorafit.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ValueError("mine")

    file = io.StringIO()
    trainer = make(tmp_path, callbacks=[Fails])
    trainer.observers.remove(trainer._console)
    trainer._console = Console(live=True, terminal=Terminal(file=file, force_terminal=True))
    trainer.observers.insert(0, trainer._console)
    with pytest.raises(ValueError, match="mine"):
        trainer.train()
    hidden, back = (file.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert -1 < hidden < back


def test_memory_is_held_against_its_plan(tmp_path: Path) -> None:
    trainer = lorafit.Trainer(
        model=llama(), args=arguments(tmp_path, layout="packed"), data_collator=PadCollator(0),
        train_dataset=plain(12),
    )  # fmt: skip
    with events_of(trainer) as told:
        trainer.train()
    peaks = [event for event in told if isinstance(event, MemoryPeak)]
    assert {event.planned_bytes for event in peaks} == {trainer._packing.planned} != {0}
