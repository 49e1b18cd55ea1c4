"""A run that stops, however it does, goes on as if it had not; and ends with what was asked."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lorafit.errors import NonFiniteError, TrainingInterrupted, UsageError
from lorafit.events import Notice, RunEnded
from lorafit.run import checkpoint, store
from tests.tiny import adapter, events_of, llama, make, plain, same

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
    assert journal(tmp_path / "part", "Evaluated") == [4, 8, 12]
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
    assert journal(tmp_path / "part", "Evaluated") == [4, 8, 12]


def test_readings_are_taken_once_however_often_a_run_stops(tmp_path: Path) -> None:
    given = {"eval_dataset": plain(6), "data": plain(100), "num_train_epochs": 2}
    whole = run(tmp_path / "whole", **given)
    readings = journal(tmp_path / "whole", "Evaluated")
    assert readings == [0, 25, 50]
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
