"""A run that stops, however it does, goes on as if it had not; and ends with what was asked."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import lorafit
from lorafit.data import loader
from lorafit.data.collate import PadCollator
from lorafit.errors import NonFiniteError, TrainingInterrupted, UsageError
from lorafit.events import Notice, RunEnded, StepSkipped
from lorafit.model import adapters
from lorafit.run import checkpoint, store
from tests.tiny import adapter, arguments, events_of, llama, make, plain, same

ROOT = Path(__file__).parents[1]

RUN: dict[str, Any] = {  # 4 steps an epoch, the last of one row; 12 in all
    "data": plain(13), "num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    "logging_steps": 3, "max_grad_norm": 0.5,
}  # fmt: skip


HELD = plain(30)[26:]
"""Rows that no run trains on."""


def run(folder: Path, *, resume: Any = None, **given: Any) -> Any:
    """A run with dropout, as a new process would begin it."""
    torch.manual_seed(torch.initial_seed() % 1000 + 1)
    trainer = make(folder, model=llama(dropout=0.3), **(RUN | given))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log(trainer: Any) -> list[dict[str, float]]:
    """The log without what a clock had a hand in."""
    timed = ("runtime", "per_second")
    entries = trainer.state.log_history
    return [{k: v for k, v in e.items() if not k.endswith(timed)} for e in entries]


def state(trainer: Any) -> dict[str, Any]:
    kept = trainer.optimizer.state_dict()["state"]
    return {f"{n}.{k}": v for n, values in kept.items() for k, v in values.items()}


def assert_same(a: Any, b: Any) -> None:
    assert same(adapter(a), adapter(b))
    assert log(a) == log(b)
    assert same(state(a), state(b))
    assert a.lr_scheduler.state_dict()["last_epoch"] == b.lr_scheduler.state_dict()["last_epoch"]


def journal(folder: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == name]


# ---- resuming


@pytest.mark.parametrize("step", [2, 4, 5, 8])
def test_resuming_is_bitwise(tmp_path: Path, step: int) -> None:
    """In the middle of an epoch, at its end, in the middle of a log window."""
    evaluated = {"eval_dataset": plain(5), "eval_strategy": "epoch"}
    whole = run(tmp_path / "whole", **evaluated)
    part = run(tmp_path / "part", save_strategy="steps", save_steps=1, **evaluated)
    assert_same(whole, part)  # saving changes nothing
    for later in range(step + 1, 13):
        (tmp_path / "part" / f"checkpoint-{later}" / store.MANIFEST).unlink()
    resumed = run(tmp_path / "part", resume=True, **evaluated)
    assert_same(whole, resumed)
    assert journal(tmp_path / "part", "StepEnd") == list(range(1, 13))
    assert journal(tmp_path / "part", "Evaluated") == [4, 4, 8, 8, 12, 12]
    assert journal(tmp_path / "part", "RunEnded") == [12]


def test_bf16_masters_resume(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 5}
    whole = make(tmp_path, model=llama(dtype=torch.bfloat16), **(RUN | given))
    whole.train()
    resumed = make(tmp_path, model=llama(dtype=torch.bfloat16), **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    masters = [
        [p for group in trainer.optimizer.param_groups for p in group["params"]]
        for trainer in (whole, resumed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*masters, strict=True))
    assert same(adapter(whole), adapter(resumed))


def test_a_random_collator_resumes(tmp_path: Path) -> None:
    """The random numbers of rows that were read but not trained on are given back."""

    def trainer(name: str, **given: Any) -> Any:
        made = make(tmp_path / name, **(RUN | given))
        inner = made.data_collator

        def collated(rows: Any) -> Any:
            batch = inner(rows)
            batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
            return batch

        made.data_collator = collated
        return made

    whole = trainer("whole")
    whole.train()
    stopped = trainer("part", callbacks=[Send(signal.SIGINT, at=6)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer("part")
    resumed.train(resume_from_checkpoint="auto")
    assert_same(whole, resumed)


def test_auto_starts_afresh_and_true_does_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No valid checkpoint found"):
        run(tmp_path / "run", resume=True)
    assert list((tmp_path / "run").iterdir()) == []
    assert run(tmp_path / "run", resume="auto", max_steps=2).state.global_step == 2


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    whole = run(tmp_path, save_strategy="steps", save_steps=5)
    (tmp_path / "checkpoint-12" / checkpoint.TENSORS).write_bytes(b"torn")
    trainer = make(tmp_path, model=llama(dropout=0.3), **RUN)
    with events_of(trainer) as told:
        trainer.train(resume_from_checkpoint=True)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert any("checkpoint-12 skipped: run_state.safetensors has 4 bytes" in s for s in said)
    assert any("checkpoint-10 at step 10" in s for s in said)
    assert same(adapter(whole), adapter(trainer))
    with pytest.raises(UsageError, match="4 bytes"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-12"))


def test_an_adapter_alone_cannot_be_resumed(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=5, save_only_model=True, max_steps=5)
    for wanted in (True, str(tmp_path / "checkpoint-5")):
        with pytest.raises(UsageError, match="save_only_model"):
            run(tmp_path, resume=wanted)
    assert run(tmp_path, resume="auto", max_steps=2).state.global_step == 2


def test_a_longer_run_goes_on_from_the_end(tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "epoch"}
    whole = run(tmp_path / "whole", **given)
    run(tmp_path / "part", **given, max_steps=6)  # stops in the middle of its second epoch
    resumed = run(tmp_path / "part", resume=True, **given)
    assert same(adapter(whole), adapter(resumed))
    assert resumed.state.epoch == 3.0


def test_an_earlier_run_in_the_same_folder_keeps_its_lines(tmp_path: Path) -> None:
    run(tmp_path, max_steps=8)
    run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-4" / store.MANIFEST).unlink()
    run(tmp_path, max_steps=4, resume=True)
    assert journal(tmp_path, "StepEnd") == [*range(1, 9), *range(1, 5)]


# ---- signals


class Send(transformers.TrainerCallback):
    """Sends this process a signal during step `at`."""

    def __init__(self, number: int, *, at: int, event: str = "on_substep_end") -> None:
        self.number, self.at = number, at
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at:
            self.at = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("at", "event"), [(2, "on_substep_end"), (4, "on_step_begin"), (6, "on_substep_end")]
)
def test_interrupting_loses_nothing(tmp_path: Path, at: int, event: str) -> None:
    whole = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    send = Send(signal.SIGINT, at=at, event=event)
    trainer = make(tmp_path / "part", model=llama(dropout=0.3), **RUN, callbacks=[send])
    with events_of(trainer) as told, pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    folder = tmp_path / "part" / f"checkpoint-{at - 1}"
    assert f"at step {at - 1} of 12; saved {folder}" in str(stopped.value)
    assert "trainer.train(resume_from_checkpoint=True)" in str(stopped.value)
    assert not checkpoint.fault(folder)
    assert isinstance(told[-1], RunEnded) and told[-1].reason == "interrupted"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.evaluate(plain(2))  # nothing is left of the signal
    resumed = run(tmp_path / "part", resume=True)
    assert_same(whole, resumed)
    assert journal(tmp_path / "part", "StepEnd") == list(range(1, 13))


def test_terminating_raises_our_own(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="SIGTERM at step 2 of 12"):
        run(tmp_path, callbacks=[Send(signal.SIGTERM, at=3)])
    assert not checkpoint.fault(tmp_path / "checkpoint-2")


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="nothing to save"):
        run(tmp_path, callbacks=[Send(signal.SIGINT, at=1)])
    assert not list(tmp_path.glob("checkpoint-*"))


def test_interrupting_an_evaluation_takes_it_again(tmp_path: Path) -> None:
    given = {
        "eval_dataset": plain(20), "eval_strategy": "epoch", "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }  # fmt: skip
    whole = run(tmp_path / "whole", **given)
    send = Send(signal.SIGINT, at=5, event="on_prediction_step")  # after step 4
    with pytest.raises(KeyboardInterrupt, match="at step 4"):
        run(tmp_path / "part", callbacks=[send], **given)
    resumed = run(tmp_path / "part", resume=True, **given)
    assert_same(whole, resumed)
    assert journal(tmp_path / "part", "Evaluated") == [4, 4, 8, 8, 12, 12]


def test_interrupting_the_last_evaluation_leaves_no_step_to_take(tmp_path: Path) -> None:
    given = {"eval_dataset": plain(20), "eval_strategy": "steps", "eval_steps": 6, "max_steps": 6}
    whole = run(tmp_path / "whole", **given)
    send = Send(signal.SIGINT, at=7, event="on_prediction_step")
    with pytest.raises(KeyboardInterrupt, match="at step 6 of 6"):
        run(tmp_path / "part", callbacks=[send], **given)
    resumed = run(tmp_path / "part", resume=True, **given)
    assert resumed.state.global_step == 6
    assert_same(whole, resumed)


def test_readings_are_taken_once_however_often_a_run_stops(tmp_path: Path) -> None:
    given = {"eval_dataset": plain(6), "data": plain(100), "num_train_epochs": 2}
    whole = run(tmp_path / "whole", **given)
    readings = journal(tmp_path / "whole", "Evaluated")
    assert readings == [0, 0, 25, 25, 50, 50]
    for at in (10, 26, 27):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part", resume="auto", callbacks=[Send(signal.SIGINT, at=at)], **given)
    resumed = run(tmp_path / "part", resume=True, **given)
    assert_same(whole, resumed)
    assert journal(tmp_path / "part", "Evaluated") == readings


def test_interrupting_a_run_that_saves_adapters_alone_can_be_resumed(tmp_path: Path) -> None:
    given = {"save_only_model": True, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Send(signal.SIGINT, at=3)], **given)
    assert run(tmp_path, resume=True, **given).state.global_step == 12


def test_an_earlier_runs_checkpoint_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=2, seed=8, max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Send(signal.SIGINT, at=5)])
    assert_same(run(tmp_path / "whole"), run(tmp_path, resume=True))


# ---- what is saved, and what is put back


def best_of(trainer: Any) -> tuple[float, int]:
    entries = [e for e in trainer.state.log_history if "eval_loss" in e]
    return min((e["eval_loss"], e["step"]) for e in entries)


def test_the_best_adapter_is_restored(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, data=plain(6), num_train_epochs=12, learning_rate=0.3, eval_dataset=HELD,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        save_total_limit=1,
    )  # fmt: skip
    with events_of(trainer) as told:
        trainer.train()
    loss, step = best_of(trainer)
    assert 0 < step < 24  # training overshoots, or this tests nothing
    best = tmp_path / f"checkpoint-{step}"
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (loss, step)
    assert trainer.state.best_model_checkpoint == str(best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert [event.restored for event in told if isinstance(event, RunEnded)] == [str(best)]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {best.name, "checkpoint-24"}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 6]),
        ({"save_strategy": "epoch"}, [3, 6]),
        ({"save_strategy": "epoch", "save_total_limit": 1}, [6]),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, [5, 6]),
    ],
)
def test_when_it_saves(tmp_path: Path, given: dict[str, Any], steps: list[int]) -> None:
    make(tmp_path, num_train_epochs=2, **given).train()
    assert [step for step, _ in store.checkpoints(tmp_path)] == steps


@pytest.mark.parametrize("metric", [None, "loss"])
def test_only_what_is_best_is_saved(tmp_path: Path, metric: str | None) -> None:
    trainer = make(
        tmp_path, data=plain(6), num_train_epochs=12, learning_rate=0.3, eval_dataset=HELD,
        eval_strategy="epoch", save_strategy="best", metric_for_best_model=metric,
    )  # fmt: skip
    trainer.train()
    entries = [e for e in trainer.state.log_history if "eval_loss" in e]
    lowest = [min(e["eval_loss"] for e in entries[: n + 1]) for n in range(len(entries))]
    wanted = [e["step"] for e, low in zip(entries, lowest, strict=True) if e["eval_loss"] == low]
    assert [step for step, _ in store.checkpoints(tmp_path)] == wanted
    assert len(wanted) < len(entries)


def test_the_state_is_transformers(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="epoch", eval_dataset=plain(3), eval_strategy="epoch")
    trainer.train()
    read = transformers.TrainerState.load_from_json(
        str(tmp_path / "checkpoint-3" / "trainer_state.json")
    )
    assert (read.global_step, read.epoch, read.max_steps) == (3, 1.0, 3)
    assert read.log_history == trainer.state.log_history[: len(read.log_history)]
    assert len(read.log_history) == 4


def test_a_finished_adapter_is_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = PeftModel.from_pretrained(llama().unload(), str(tmp_path / "adapter"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        mine, theirs = (m.eval()(input_ids=ids).logits for m in (trainer.model, fresh))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, llama().eval()(input_ids=ids).logits)


def test_rotation_deletes_by_age(tmp_path: Path) -> None:
    """An earlier run in the same folder came further; this run's newest stays."""
    make(tmp_path, num_train_epochs=2, save_strategy="epoch").train()
    make(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert [step for step, _ in store.checkpoints(tmp_path)] == [3]


# ---- resuming what is not quite the same


def test_another_batch_size_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    """Four rows a step either way: the order, the schedule and the losses stay."""
    whole = make(tmp_path, **(RUN | {"save_strategy": "steps", "save_steps": 2}))
    whole.train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    resumed = make(tmp_path, **(RUN | split))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    kept = [(e["step"], pytest.approx(e["loss"], rel=1e-5)) for e in log(whole) if "loss" in e]
    assert [(e["step"], e["loss"]) for e in log(resumed) if "loss" in e] == kept


def test_arguments_that_changed_are_named(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=6)
    trainer = make(tmp_path, model=llama(dropout=0.3), **(RUN | {"learning_rate": 5e-3, "seed": 4}))
    with events_of(trainer) as told:
        trainer.train(resume_from_checkpoint=True)
    said = [event.text for event in told if isinstance(event, Notice)]
    (line,) = [text for text in said if "differ" in text]
    assert "learning_rate=0.005 (was 0.01)" in line and "seed=4 (was 3)" in line
    assert "output_dir" not in line and "warmup" not in line


def test_a_shuffled_loader_of_the_users_own_resumes(tmp_path: Path) -> None:
    """Its order comes from the process's random state, which the checkpoint has kept."""

    def trainer(name: str, **given: Any) -> Any:
        made = make(tmp_path / name, model=llama(dropout=0.3), **(RUN | given))
        rows: Any = plain(13)
        made.get_train_dataloader = lambda: DataLoader(
            rows, batch_size=2, shuffle=True, collate_fn=made.data_collator
        )
        return made

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("part", callbacks=[Send(signal.SIGINT, at=6)]).train()
    resumed = trainer("part")
    resumed.train(resume_from_checkpoint="auto")
    assert_same(whole, resumed)


def test_a_checkpoints_callback_that_is_gone_is_named(tmp_path: Path) -> None:
    stopping = transformers.EarlyStoppingCallback(3)
    best = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "eval_dataset": HELD}
    run(tmp_path, save_strategy="epoch", callbacks=[stopping], **best)
    trainer = make(tmp_path, model=llama(dropout=0.3), **(RUN | {"num_train_epochs": 4}))
    with events_of(trainer) as told:
        trainer.train(resume_from_checkpoint=True)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert "the checkpoint's EarlyStoppingCallback is not here any more: left out" in said


def test_an_interrupt_that_finds_too_many_bad_steps_ends_as_they_do(tmp_path: Path) -> None:
    class Poison(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
            if state.global_step == 1:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    callbacks = [Poison(), Send(signal.SIGINT, at=5)]
    trainer = make(tmp_path, callbacks=callbacks, **(RUN | {"logging_steps": 100}))
    with events_of(trainer) as told, pytest.raises(NonFiniteError):
        trainer.train()
    assert isinstance(told[-1], RunEnded) and told[-1].reason == "non-finite"


def test_another_batch_size_under_max_steps_goes_on_to_the_end(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": plain(16), "gradient_accumulation_steps": 1, "max_steps": 12}
    make(
        tmp_path, per_device_train_batch_size=4, save_strategy="steps", save_steps=8, **given
    ).train()
    resumed = make(tmp_path, per_device_train_batch_size=1, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.state.global_step == 12


def test_a_signal_after_the_last_step_is_passed_on(tmp_path: Path) -> None:
    class Late(transformers.TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make(tmp_path, callbacks=[Late()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 3


def test_the_best_is_kept_under_another_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "save_total_limit": 2, "eval_dataset": HELD,
        "learning_rate": 1.0, "model": llama(),
    }  # fmt: skip
    first = make(Path("out"), max_steps=2, **given)
    first.train()
    best = first.state.best_model_checkpoint
    resumed = make(tmp_path / "out", max_steps=6, **(given | {"model": llama()}))
    resumed.train(resume_from_checkpoint=True)
    if resumed.state.best_model_checkpoint == best:
        assert Path(best).is_dir()
    assert Path(resumed.state.best_model_checkpoint).is_dir()


def test_samples_are_rows_and_not_places_in_batches(tmp_path: Path) -> None:
    trainer = make(tmp_path, data=plain(10), per_device_train_batch_size=8, num_train_epochs=3)
    metrics = trainer.train().metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(30, 0.1)


def test_a_scripts_own_handler_stays(tmp_path: Path) -> None:
    """The pattern of clusters: the handler sets a flag, and a callback stops in good order."""
    flagged: list[int] = []

    class Flag(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            control.should_training_stop = bool(flagged)

    before = signal.signal(signal.SIGTERM, lambda number, _: flagged.append(number))
    try:
        trainer = make(tmp_path, callbacks=[Flag()])
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert flagged == [signal.SIGTERM] and trainer.state.global_step == 1


def test_a_card_that_was_written_anew_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    class Again(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
            model.save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}")

    run(tmp_path, save_strategy="steps", save_steps=6, callbacks=[Again()])
    assert run(tmp_path, resume=str(tmp_path / "checkpoint-6")).state.global_step == 12


# ---- resumed again and again, elsewhere, otherwise


def packed(folder: Path, *, resume: Any = None, callbacks: Any = (), **given: Any) -> Any:
    """A packed run with dropout, 12 steps."""
    values = {"layout": "packed", "num_train_epochs": 3, "lr_scheduler_type": "cosine", **given}
    trainer = lorafit.Trainer(
        model=llama(dropout=0.3), args=arguments(folder, **values),
        data_collator=PadCollator(0), train_dataset=plain(13), callbacks=[*callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert trainer._packing.layout == values["layout"]
    return trainer


@pytest.mark.parametrize("kind", [run, packed])
def test_five_resumptions_are_bitwise(tmp_path: Path, kind: Any) -> None:
    whole = kind(tmp_path / "whole")
    for at in (2, 4, 5, 9, 12):
        send = Send(signal.SIGINT, at=at, event="on_step_begin")
        with pytest.raises(KeyboardInterrupt):
            kind(tmp_path / "part", resume="auto", callbacks=[send])
    resumed = kind(tmp_path / "part", resume="auto")
    assert_same(whole, resumed)
    assert journal(tmp_path / "part", "StepEnd") == list(range(1, 13))
    assert journal(tmp_path / "part", "RunEnded") == [12]


@pytest.mark.parametrize("given", [{"token_budget": 40}, {"layout": "as_given"}])
def test_another_layout_goes_on_with_the_same_curve(tmp_path: Path, given: Any) -> None:
    whole = packed(tmp_path, save_strategy="steps", save_steps=6)
    trainer = packed(tmp_path / "other", resume=str(tmp_path / "checkpoint-6"), **given)
    kept = [(e["step"], pytest.approx(e["loss"], rel=1e-5)) for e in log(whole) if "loss" in e]
    assert [(e["step"], e["loss"]) for e in log(trainer) if "loss" in e] == kept
    said = (tmp_path / "other" / "journal.jsonl").read_text()
    assert "to rounding, not bit for bit" in said and next(iter(given)) in said


def forge(folder: Path, state: str) -> None:
    """Give a checkpoint another state, with a manifest that says so."""
    file, manifest = folder / checkpoint.STATE, folder / store.MANIFEST
    file.write_bytes(state.encode("latin-1"))
    described = json.loads(manifest.read_text())
    described["files"][file.name] = {"bytes": len(state), "sha256": store.sha256(file)}
    del described["sha256"]
    manifest.write_text(store.sealed(described))


class Lazy(torch.utils.data.Dataset[Any]):
    """Rows made when they are asked for, and remembered which."""

    def __init__(self, rows: int) -> None:
        self.rows, self.asked = rows, list[int]()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return plain(16)[index % 16]


def test_far_into_a_lazy_set_no_row_is_read_again(tmp_path: Path) -> None:
    def trainer(rows: Lazy, steps: int) -> Any:
        return make(tmp_path, data=rows, max_steps=steps, per_device_train_batch_size=2)

    first, count = Lazy(1_100_000), 1_000_000
    begun = trainer(first, 3)
    begun.args.save_strategy, begun.args.save_steps = "steps", 2
    begun.train()
    folder = tmp_path / "checkpoint-2"
    described = json.loads((folder / checkpoint.STATE).read_text())
    described["position"] = {"step": 2, "epoch": 0, "rows": count}
    forge(folder, json.dumps(described))
    resumed = Lazy(len(first))
    trainer(resumed, 4).train(resume_from_checkpoint=str(folder))
    order = loader.order(len(first), seed=3, epoch=0)
    assert resumed.asked[-8:] == order[count : count + 8]
    assert len(resumed.asked) <= 2 * 16 + 8 + 1


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(plain(40))


def test_a_stream_is_skipped_with_progress_and_may_be_interrupted(tmp_path: Path) -> None:
    given: Any = {"data": Stream(), "max_steps": 8}
    whole = run(tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", callbacks=[Send(signal.SIGINT, at=6)], **given)
    asked: list[int] = []

    class Skipping(Stream):
        def __iter__(self) -> Any:
            for number, row in enumerate(plain(40)):
                asked.append(number)
                if number == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield row

    interrupted = {**given, "data": Skipping()}
    with pytest.raises(KeyboardInterrupt, match="at step 5 of 8"):
        run(tmp_path / "part", resume="auto", **interrupted)
    assert len(asked) == 6  # of the 20 that were trained on
    trainer = make(tmp_path / "part", model=llama(dropout=0.3), **(RUN | given))
    with events_of(trainer) as told:
        trainer.train(resume_from_checkpoint=True)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert "reading past what was trained on: 1 of 10 batches" in said
    assert "reading past what was trained on: 10 of 10 batches" in said
    assert_same(whole, trainer)


# ---- what changed since


def test_a_strict_run_refuses_what_changes_it(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=6)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"(?s)learning_rate=0\.005 \(was 0\.01\).*--accept"):
        run(tmp_path, resume=True, learning_rate=5e-3, accept=False)
    with pytest.raises(UsageError, match=r"data\.rows=9 \(was 13\)"):
        run(tmp_path, resume=True, data=plain(9), accept=False)
    with pytest.raises(UsageError, match=r"data\.examples"):
        run(tmp_path, resume=True, data=plain(14)[1:], accept=False)
    with pytest.raises(UsageError, match=r"step\.examples=2 \(was 4\)"):
        run(tmp_path, resume=True, gradient_accumulation_steps=1, accept=False)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    run(tmp_path, resume=True, accept=False, logging_steps=5, save_steps=7)


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises(UsageError, match=r"(?s)cannot go on with optimizer\.kind.*SGD"):
        run(tmp_path, resume=True, optim="sgd")


def test_a_new_learning_rate_is_taken_up(tmp_path: Path) -> None:
    given: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    run(tmp_path, save_strategy="steps", save_steps=6, **given)
    new = {"learning_rate": 5e-3, "weight_decay": 0.1}
    folder = str(tmp_path / "checkpoint-6")
    trainer = run(tmp_path, resume=folder, logging_steps=1, **given, **new)
    rates = {e["step"]: e["learning_rate"] for e in log(trainer) if "learning_rate" in e}
    assert (rates[6], rates[7], rates[12]) == (1e-2, 5e-3, 5e-3)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_state_that_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="steps", save_steps=6)
    model = llama(dropout=0.3)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(UsageError):
        make(tmp_path, model=model, **RUN).train(resume_from_checkpoint=True)


# ---- somebody else's folders


def foreign(folder: Path, step: int) -> Path:
    """A checkpoint that transformers might have left."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text("{}")
    (made / "optimizer.pt").write_bytes(b"theirs")
    return made


def test_auto_beside_somebody_elses_checkpoints_is_refused(tmp_path: Path) -> None:
    theirs = foreign(tmp_path, 2)
    with pytest.raises(UsageError, match=r"(?s)not lorafit's.*checkpoint-2 skipped.*output_dir"):
        run(tmp_path, resume="auto")
    assert sorted(p.name for p in theirs.iterdir()) == ["optimizer.pt", "trainer_state.json"]


def test_somebody_elses_checkpoint_is_set_aside_whole(tmp_path: Path) -> None:
    foreign(tmp_path, 2)
    foreign(tmp_path, 9)
    run(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=4)
    aside = tmp_path / "checkpoint-2.not-lorafits-1"
    assert (aside / "optimizer.pt").read_bytes() == b"theirs"
    assert (tmp_path / "checkpoint-9" / "optimizer.pt").read_bytes() == b"theirs"
    trainer = run(tmp_path, resume="auto", max_steps=4)  # ours is found beside theirs
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("spoil", ["[]", "{}", '{"format": 3, "position": {"x": 1}}', "\xff"])
def test_state_that_is_no_state_is_skipped(tmp_path: Path, spoil: str) -> None:
    run(tmp_path, save_strategy="steps", save_steps=5)
    folder = tmp_path / "checkpoint-12"
    forge(folder, spoil)
    trainer = make(tmp_path, model=llama(dropout=0.3), **RUN)
    with events_of(trainer) as told:
        trainer.train(resume_from_checkpoint=True)
    said = [event.text for event in told if isinstance(event, Notice)]
    skipped = "checkpoint-12 skipped: (its state cannot be read|format None of another)"
    assert any(re.match(skipped, s) for s in said), said
    assert any("checkpoint-10 at step 10" in s for s in said)


# ---- a checkpoint on demand


def test_usr1_saves_and_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    sends = [Send(signal.SIGUSR1, at=at) for at in (1, 5)]
    part = run(tmp_path / "part", callbacks=sends, save_only_model=True)
    assert_same(whole, part)
    assert [step for step, _ in store.checkpoints(tmp_path / "part")] == [1, 5]
    assert_same(whole, run(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-5")))


def test_a_scripts_own_handler_gets_a_checkpoint_too(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        trainer = run(tmp_path, callbacks=[Send(signal.SIGTERM, at=3)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.state.global_step == 12
    assert [step for step, _ in store.checkpoints(tmp_path)] == [3]


def test_a_signal_during_a_save_waits_for_it(tmp_path: Path) -> None:
    class Saving(lorafit.Trainer):
        def save_model(self, *given: Any, **how: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().save_model(*given, **how)

    trainer = make(tmp_path, kind=Saving, **(RUN | {"save_strategy": "steps", "save_steps": 3}))
    with pytest.raises(TrainingInterrupted, match="at step 3 of 12"):
        trainer.train()
    assert not checkpoint.fault(tmp_path / "checkpoint-3")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_signal_before_the_first_step_is_ours(tmp_path: Path) -> None:
    class Reading(Lazy):
        def __getitem__(self, index: int) -> Any:
            if not self.asked:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    with pytest.raises(TrainingInterrupted, match="before the first step"):
        run(tmp_path, data=Reading(8))


# ---- numbers


def poison(model: Any, value: float = torch.nan) -> None:
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = value


class Poison(transformers.TrainerCallback):
    """Spoils a weight after step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
        if state.global_step == self.at:
            poison(model)


class Writing(lorafit.Trainer):
    """Writes its own way, unasked whether it is worth it."""

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            super().save_model(output_dir)


@pytest.mark.parametrize("kind", [lorafit.Trainer, Writing])
@pytest.mark.parametrize("given", [{"save_strategy": "steps", "save_steps": 2}, {}])
def test_a_bad_weight_is_never_saved(tmp_path: Path, given: Any, kind: Any) -> None:
    """At a save, and at the end of a run that saves nothing."""
    at = 4 if given else 12
    trainer = make(tmp_path, kind=kind, callbacks=[Poison(at)], **(RUN | given))
    with events_of(trainer) as told, pytest.raises(NonFiniteError, match="weights are not finite"):
        trainer.train()
    assert isinstance(told[-1], RunEnded) and told[-1].reason == "non-finite"
    assert [step for step, _ in store.checkpoints(tmp_path)] == ([2] if given else [])
    with pytest.raises(NonFiniteError):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_not_applied(tmp_path: Path, where: str) -> None:
    bad = {3} if where == "loss" else {3, 4}

    class Spoiled(lorafit.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **given: Any) -> Any:
            loss = super().compute_loss(model, inputs, **given)
            if self.state.global_step + 1 in bad and not given.get("return_outputs"):
                p = next(p for p in model.parameters() if p.requires_grad)
                spoiled = (p * 0).sqrt().sum() if where == "gradient" else torch.nan
                return loss + spoiled
            return loss

    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    trainer = make(tmp_path, kind=Spoiled, **(RUN | given))
    with events_of(trainer) as told:
        trainer.train()
    skipped = [event for event in told if isinstance(event, StepSkipped)]
    assert [event.step for event in skipped] == sorted(bad)
    order = loader.order(13, seed=3, epoch=0)
    assert list(skipped[0].examples) == order[8:12]
    states = [adapters.read_adapter_state(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    assert same(states[1], states[2]) and not same(states[4], states[5])
    assert all(t.isfinite().all() for state in states for t in state.values())


def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    class Judged(lorafit.Trainer):
        def evaluate(self, *given: Any, **how: Any) -> Any:
            metrics = super().evaluate(*given, **how)
            metrics["eval_good"] = {1: 1.0, 2: torch.inf, 3: torch.nan, 4: 0.5}[
                self.state.global_step
            ]
            return metrics

    trainer = make(
        tmp_path, kind=Judged, max_steps=4, eval_strategy="steps", eval_steps=1,
        save_strategy="best", metric_for_best_model="good", greater_is_better=True,
        eval_dataset=HELD, data=plain(16),
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 1)
    assert [step for step, _ in store.checkpoints(tmp_path)] == [1]


# ---- no pickle


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """A run with saves, best adapter and resumption, where any pickle is an error."""
    code = f"""
import sys
from pathlib import Path
import torch, pickle, datasets
from tests.test_trainer_stops import run, HELD, signal, Send

def never(*_, **__):
    raise AssertionError("pickled")

def hook(event, given):
    if event == "pickle.find_class":
        never()

torch.load = torch.save = never
for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
    setattr(pickle, name, never)
sys.addaudithook(hook)
folder, given = Path({str(tmp_path)!r}), dict(
    eval_dataset=HELD, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    load_best_model_at_end=True)
try:
    run(folder, callbacks=[Send(signal.SIGINT, at=6)], **given)
except KeyboardInterrupt:
    run(folder, resume="auto", **given).save_model(str(folder / "final"))
    print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.endswith("went on\n"), done.stderr
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".html", ".json", ".jsonl", ".safetensors", ".md"}


def test_the_package_names_no_pickle() -> None:
    """But for the error of a row that cannot go to a process of our own."""
    pickling = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(path.name, a.name) for a in node.names if a.name in pickling]
            elif isinstance(node, ast.ImportFrom) and node.module in pickling:
                found += [(path.name, a.name) for a in node.names]
            elif ast.unparse(node) in ("torch.load", "torch.save"):
                found.append((path.name, ast.unparse(node)))
    assert found == [("workers.py", "PicklingError")]


# ---- under torchrun


def test_torchrun_gives_a_save_its_time(tmp_path: Path) -> None:
    """SIGTERM to the agent: it passes it on and kills after 30 s."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "import time\n"
        "from tests.test_trainer_stops import run, transformers\n"
        "class Slow(transformers.TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        time.sleep(0.2)\n"
        f"        Path({str(tmp_path / 'began')!r}).touch()\n"
        f"run(Path({str(tmp_path / 'out')!r}), callbacks=[Slow()], num_train_epochs=100)\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    agent = subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        for _ in range(1200):
            if (tmp_path / "began").exists():
                break
            time.sleep(0.1)
        agent.terminate()
        _, told = agent.communicate(timeout=30)
    finally:
        agent.kill()
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    assert not checkpoint.fault(folder) and agent.returncode != 0
    assert "Stopped by SIGTERM" in told
