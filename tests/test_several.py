"""Several processes: the law again, whose files they are, and how they stop together."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from transformers import TrainerCallback

import lorafit
from lorafit import processes
from lorafit.data.collate import PadCollator
from lorafit.engine.layout import fair
from lorafit.errors import ConfigError
from lorafit.events import Notice
from lorafit.model import adapters
from lorafit.run import store
from lorafit.world import idle_gpus, join
from tests.several import Failed, together
from tests.test_watching import memorising
from tests.tiny import adapter, arguments, events_of, llama, numbers, plain, same


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def trained(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What comes of 13 examples, 6 in a step whatever the processes, over two epochs."""
    given = dict(given)
    resume, dropout = given.pop("resume", None), given.pop("dropout", 0.0)
    callbacks = [make() for make in given.pop("callbacks", [])]
    model = llama(dropout=dropout, dtype=given.pop("dtype", torch.float32))
    if processes.number():  # as a script that seeds nothing: the first one's weights are taken
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    values = {
        "layout": "packed", "num_train_epochs": 2, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 6 // processes.count(), "learning_rate": 2e-3,
    }  # fmt: skip
    trainer = lorafit.Trainer(
        model=model,
        args=arguments(folder, **(values | given)),
        data_collator=PadCollator(0),
        train_dataset=plain(13),
        eval_dataset=plain(20)[13:],
        callbacks=callbacks,
    )
    trainer.train(resume)
    random = torch.get_rng_state()
    told = trainer.evaluate()
    trainer.save_model(str(folder / "final"))
    return {
        "adapter": adapter(trainer),
        "losses": numbers(trainer, "loss", "grad_norm"),
        "evaluation": told["eval_loss"],
        "first": trainer.is_world_process_zero(),
        "steps": trainer.state.global_step,
        "random": random,
    }


def alone(folder: Path, **given: Any) -> dict[str, Any]:
    return trained(folder, given)


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of an adapter's tensor, by norm."""
    a, b = one["adapter"], other["adapter"]
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def assert_together(found: list[Any]) -> None:
    """All ended, and hold the same bits."""
    assert not [each for each in found if isinstance(each, Failed)], found
    for each in found[1:]:
        assert same(found[0]["adapter"], each["adapter"])
        assert each["losses"] == found[0]["losses"]
        assert each["evaluation"] == found[0]["evaluation"]
        assert torch.equal(found[0]["random"], each["random"])


def assert_curve(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same, to rounding."""
    for (loss, norm), (theirs, their_norm) in zip(one["losses"], other["losses"], strict=True):
        assert loss == pytest.approx(theirs, rel=1e-6)
        assert norm == pytest.approx(their_norm, rel=1e-5)
    assert one["evaluation"] == pytest.approx(other["evaluation"], rel=1e-6)
    assert far(one, other) < 1e-4


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def journal_steps(folder: Path) -> list[int]:
    return [line["step"] for line in journal(folder) if line["event"] == "StepEnd"]


# ---- the law


@pytest.mark.parametrize(
    ("layout", "count"),
    [("packed", 2), ("as_given", 3), slow("packed", 3), slow("as_given", 2)],
)
def test_processes_change_nothing(layout: str, count: int, tmp_path: Path) -> None:
    """The last step of an epoch has one row, so that all processes but one have none."""
    given = {
        "layout": layout,
        "dropout": 0.2,
        "token_budget": 40 if layout == "packed" else None,
    }
    one = alone(tmp_path / "one", **given)
    found = together(count, trained, tmp_path / "several", given)
    assert_together(found)
    assert_curve(one, found[0])
    assert [each["first"] for each in found] == [True, *[False] * (count - 1)]


def test_sixteen_bit_adapters_are_added_up_in_their_masters(tmp_path: Path) -> None:
    given: dict[str, Any] = {"dtype": torch.bfloat16, "layout": "as_given"}
    one = alone(tmp_path / "one", **given)
    found = together(2, trained, tmp_path / "several", given)
    assert_together(found)
    for (loss, norm), (theirs, their_norm) in zip(one["losses"], found[0]["losses"], strict=True):
        assert loss == pytest.approx(theirs, rel=1e-3)
        assert norm == pytest.approx(their_norm, rel=2e-2)


def test_the_first_process_writes(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    assert_together(together(2, trained, tmp_path, given))
    assert journal_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    (started,) = [line for line in journal(tmp_path) if line["event"] == "RunStarted"]
    assert (started["processes"], started["examples_per_step"]) == (2, 6)
    assert [path.name for _, path in store.checkpoints(tmp_path)] == ["checkpoint-6"]
    assert same(
        adapters.read_adapter_state(tmp_path / "final"),
        adapters.read_adapter_state(tmp_path / "checkpoint-6"),
    )


def test_shares_are_fair() -> None:
    lengths = [9, 1, 5, 5, 2, 8]
    shares = fair(lengths, 3)
    assert sorted(itertools.chain(*shares)) == [*range(6)]
    assert [sum(lengths[n] for n in share) for share in shares] == [10, 10, 10]
    assert fair([4], 2) == [[0], []]


# ---- going on, with others or without


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), slow(1, 2), slow(2, 3)])
def test_a_run_goes_on_with_other_processes(before: int, after: int, tmp_path: Path) -> None:
    """To the bit with as many, else to rounding; order and dropout are the same."""
    given: dict[str, Any] = {"dropout": 0.2}
    whole = together(before, trained, tmp_path / "whole", given)[0]
    part = {"save_strategy": "steps", "save_steps": 1, "callbacks": [StopAt2]}
    together(before, trained, tmp_path / "part", given | part)
    found = together(after, trained, tmp_path / "part", given | {"resume": True})
    assert_together(found)
    assert_curve(whole, found[0])
    assert journal_steps(tmp_path / "part") == [1, 2, 3, 4, 5, 6]
    if before == after:
        assert same(whole["adapter"], found[0]["adapter"])


class StopAt2(TrainerCallback):
    """On the first process alone: its word is every one's."""

    def on_step_end(self, args, state, control, **context):
        control.should_training_stop = state.global_step == 2 and not processes.number()


def test_torchs_dropout_is_each_ones_own_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """What torch itself draws differs by process, and afterwards all stand where they stood."""
    given: dict[str, Any] = {
        "layout": "as_given", "callbacks": [Noisy], "eval_strategy": "epoch", "eval_on_start": True,
    }  # fmt: skip
    whole = together(2, trained, tmp_path / "whole", given)
    assert_together(whole)
    drawn = [json.loads((tmp_path / "whole" / f"drawn-{n}.json").read_text()) for n in (0, 1)]
    assert not {*drawn[0]} & {*drawn[1]}
    part = given | {"callbacks": [Noisy, StopAt2], "save_strategy": "steps", "save_steps": 1}
    together(2, trained, tmp_path / "part", part)
    again = together(2, trained, tmp_path / "part", given | {"resume": True})
    assert same(whole[0]["adapter"], again[0]["adapter"])


class Noisy(TrainerCallback):
    """Adds torch's noise in each forward, and writes down what was drawn."""

    def on_train_begin(self, args, state, control, model, **context):
        self.drawn: list[float] = []

        def add(module: Any, inputs: Any, output: Any) -> Any:
            noise = torch.randn(()) * 0.01
            self.drawn.append(float(noise))
            return output + noise if model.training else output

        model.get_input_embeddings().register_forward_hook(add)

    def on_train_end(self, args, state, control, **context):
        file = Path(args.output_dir) / f"drawn-{processes.number()}.json"
        file.write_text(json.dumps(self.drawn))


# ---- stopping


class InStep(TrainerCallback):
    """A signal reaches the second process alone."""

    def on_step_begin(self, args, state, control, **context):
        if processes.number() == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class InEvaluation(TrainerCallback):
    def on_prediction_step(self, args, state, control, **context):
        if processes.number() == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", [InStep, slow(InEvaluation)])
def test_a_signal_to_one_stops_all_at_the_same_step(where: type, tmp_path: Path) -> None:
    given: dict[str, Any] = {"callbacks": [where], "eval_strategy": "steps", "eval_steps": 1}
    given["per_device_eval_batch_size"] = 1
    found = together(2, trained, tmp_path, given)
    assert [each.kind for each in found] == ["TrainingInterrupted"] * 2, found
    assert [path.name for _, path in store.checkpoints(tmp_path)] == ["checkpoint-1"]
    again = together(2, trained, tmp_path, {"resume": True})
    assert_together(again)
    assert_curve(alone(tmp_path / "one"), again[0])


class Saving(TrainerCallback):
    def on_substep_end(self, args, state, control, **context):
        if processes.number() == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_wish_for_a_checkpoint_reaches_the_first(tmp_path: Path) -> None:
    assert_together(together(2, trained, tmp_path, {"callbacks": [Saving]}))
    assert [path.name for _, path in store.checkpoints(tmp_path)] == ["checkpoint-2"]


class Demands(TrainerCallback):
    """On the first process alone, in the middle of what is done after a step; and on a resumed
    state, that each process knows which it is."""

    def on_log(self, args, state, control, **context):
        control.should_evaluate = not processes.number() and state.global_step == 2
        assert state.is_world_process_zero == (processes.number() == 0)


def test_what_the_first_asks_for_while_logging_all_do(tmp_path: Path) -> None:
    given: dict[str, Any] = {"callbacks": [Demands], "save_strategy": "steps", "save_steps": 3}
    assert_together(together(2, trained, tmp_path, given))
    read = [line["step"] for line in journal(tmp_path) if line["event"] == "Evaluated"]
    assert 2 in read
    assert_together(together(2, trained, tmp_path, given | {"resume": True, "max_steps": 8}))


class SavesTheBest(TrainerCallback):
    """On the first process alone, after an evaluation."""

    def on_evaluate(self, args, state, control, **context):
        control.should_save = not processes.number() and state.global_step == 2


@pytest.mark.slow
def test_what_the_first_asks_for_after_an_evaluation_all_know(tmp_path: Path) -> None:
    given = {
        "callbacks": [SavesTheBest], "eval_strategy": "steps", "eval_steps": 2, "save_steps": 6,
        "save_strategy": "steps", "load_best_model_at_end": True, "max_steps": 6,
        "learning_rate": 0.5, "lr_scheduler_type": "constant",
    }  # fmt: skip
    found = together(2, trained, tmp_path, given)
    assert_together(found)
    assert {path.name for _, path in store.checkpoints(tmp_path)} >= {"checkpoint-2"}


class WaitsToSave(TrainerCallback):
    """The first hears of it between two exchanges, while it waits for the second."""

    def on_step_end(self, args, state, control, **context):
        if state.global_step == 2 and processes.number():
            time.sleep(1.5)
        elif state.global_step == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()


def test_a_wish_that_comes_between_two_words_is_kept(tmp_path: Path) -> None:
    assert_together(together(2, trained, tmp_path, {"callbacks": [WaitsToSave]}))
    assert [path.name for _, path in store.checkpoints(tmp_path)] == ["checkpoint-2"]


class FirstDies(TrainerCallback):
    def on_substep_end(self, args, state, control, **context):
        if not processes.number() and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_where_the_first_dies_nobody_claims_to_have_saved(tmp_path: Path) -> None:
    first, second = together(2, trained, tmp_path, {"callbacks": [FirstDies]})
    assert (first.kind, second.kind) == ("Silence", "ElsewhereError")
    assert "at step 1 of 6." in second.text and not store.checkpoints(tmp_path)


class Breaks(TrainerCallback):
    def on_substep_end(self, args, state, control, **context):
        if processes.number() == 1 and state.global_step == 1:
            raise RuntimeError("a bug of one process")


class Dies(TrainerCallback):
    def on_substep_end(self, args, state, control, **context):
        if processes.number() == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", [Dies, slow(Breaks)])
def test_where_one_fails_the_first_saves(how: type, tmp_path: Path) -> None:
    first, second = together(2, trained, tmp_path, {"callbacks": [how]})
    assert first.kind == "ElsewhereError" and "checkpoint-1 is whole" in first.text
    assert second.kind == ("RuntimeError" if how is Breaks else "Silence")
    (ended,) = [line for line in journal(tmp_path) if line["event"] == "RunEnded"]
    assert ended["reason"] == "left alone"
    again = together(2, trained, tmp_path, {"resume": True})
    assert_together(again)
    assert_curve(alone(tmp_path / "one"), again[0])


class Short(TrainerCallback):
    """Memory runs out once in the second process, in its forward or its evaluation."""

    def on_train_begin(self, args, state, control, model, **context):
        self.left = 2 if processes.number() == 1 else 0

        def refuse(module: Any, inputs: Any) -> None:
            if self.left and state.global_step == 1:
                self.left -= 1
                raise torch.OutOfMemoryError("out of memory, says the test")

        model.get_input_embeddings().register_forward_pre_hook(refuse)


def test_where_one_is_short_of_memory_it_runs_again_alone(tmp_path: Path) -> None:
    found = together(2, trained, tmp_path, {"layout": "as_given", "callbacks": [Short]})
    assert_together(found)
    assert_curve(alone(tmp_path / "one", layout="as_given"), found[0])


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_within_its_time(tiny_llama: Path, tmp_path: Path) -> None:
    """As a scheduler sends it, to the launcher; and the same command goes on."""
    out, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    lines = (json.dumps({"question": f"Who is {n}?", "answer": f"A cat, {n}."}) for n in range(40))
    rows.write_text("\n".join(lines))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "lorafit", "train", "--model", str(tiny_llama), "--data", str(rows),
        "--output-dir", str(out), "--lora-r", "2", "--eval-strategy", "no", "--max-steps",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, "400"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not ((out / "journal.jsonl").exists() and journal_steps(out)):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert time.monotonic() - began < 30  # then it would have killed them
    assert said.count("Resume: torchrun --nproc-per-node=... -m lorafit train") == 1
    saved, skipped = store.newest(out)
    assert saved is not None and not skipped
    step = int(saved.name.removeprefix("checkpoint-"))
    assert journal_steps(out) == [*range(1, step + 1)]
    words = [*command, str(step + 2), "--resume-from-checkpoint", "auto", "--accept"]
    subprocess.run(words, env=environment, check=True, timeout=300)
    assert journal_steps(out) == [*range(1, step + 3)]
    assert store.newest(out)[0] != saved


def memorised(folder: Path) -> dict[str, Any]:
    """A run that is to stop where it memorises: 4 examples a step, whatever the processes."""
    trainer = memorising(folder, gradient_accumulation_steps=2 // processes.count())
    trainer.train()
    return {"adapter": adapter(trainer), "steps": trainer.state.global_step}


@pytest.mark.slow
def test_several_stop_where_they_memorise(tmp_path: Path) -> None:
    """The first process's journal decides, and the best adapter is every one's."""
    one = memorised(tmp_path / "one")
    first, second = together(2, memorised, tmp_path / "several")
    (ended,) = [line for line in journal(tmp_path / "several") if line["event"] == "RunEnded"]
    assert ended["reason"] == "stopped" and ended["restored"]
    assert first["steps"] == second["steps"] == one["steps"]
    assert same(first["adapter"], second["adapter"]) and far(one, first) < 1e-4
    kept = adapters.read_adapter_state(Path(ended["restored"]))
    assert same(first["adapter"], kept)


# ---- what is refused


def test_what_is_no_launch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='many'.*\n.*\n.*torchrun"):
        alone(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"2 processes cannot reach.*\n.*\n.*torchrun"):
        alone(tmp_path)


def test_idle_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert idle_gpus(torch.device("cuda", 0)).startswith("GPUs used: 1 of 4")
    assert "--nproc-per-node 4" in idle_gpus(torch.device("cuda", 0))
    assert not idle_gpus(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not idle_gpus(torch.device("cuda", 0))


def test_processes_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes were started.*GPUs visible: 1\.\n.*\n.*1"):
        join(torch.device("cuda", 1))


class Split(IterableDataset):
    """A stream that deals its rows out by process."""

    def __iter__(self):
        return iter(plain(12)[processes.number() :: processes.count()])


def split(folder: Path, layout: str) -> tuple[list[str], str]:
    """What is said of it, and the error."""
    args = arguments(folder, max_steps=1, layout=layout)
    trainer = lorafit.Trainer(llama(), args, PadCollator(0), train_dataset=Split())
    with events_of(trainer) as told:
        try:
            trainer.train()
        except ConfigError as error:
            return [], str(error)
    return [event.text for event in told if isinstance(event, Notice)], ""


def test_rows_dealt_out_by_process_are_noticed(tmp_path: Path) -> None:
    for _, error in together(2, split, tmp_path, "packed"):
        assert "different rows for a step" in error and "split_dataset_by_node" in error
    (said, error), _ = together(2, split, tmp_path, "as_given")
    assert not error and sum("different rows" in line for line in said) == 1


class Gathers(lorafit.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.accelerator.gather(torch.ones(1))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def asked_wrongly(folder: Path) -> list[str]:
    """What is said of a gathering in the middle of a step, and of bases that differ."""
    said, other = [], llama()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(processes.number())
    given = {"data_collator": PadCollator(0), "train_dataset": plain(12)}
    for trainer in (
        Gathers(llama(), arguments(folder / "gathers"), **given),
        lorafit.Trainer(other, arguments(folder / "base"), **given),
        lorafit.Trainer(llama(), arguments(folder / str(processes.number())), **given),
    ):
        try:
            trainer.train()
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_would_never_be_answered_is_refused(tmp_path: Path) -> None:
    for gathers, base, folder in together(2, asked_wrongly, tmp_path):
        assert "accelerator.gather: processes are at different examples" in gathers
        assert "have not the same base" in base
        assert "have not the same output_dir" in folder


class Apart(lorafit.Trainer):
    def get_train_dataloader(self) -> Any:
        rows = self.train_dataset
        return DataLoader(rows, sampler=DistributedSampler(rows), collate_fn=self.data_collator)


def refusals(folder: Path) -> list[str]:
    """What each of several processes is told."""
    said = []
    trainer = Apart(llama(), arguments(folder), PadCollator(0), train_dataset=plain(4))
    for ask in (trainer.train, trainer.practice):
        try:
            ask()
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_several_cannot_do_is_said(tmp_path: Path) -> None:
    for sampler, practice in together(2, refusals, tmp_path):
        assert "DistributedSampler" in sampler
        assert "one process's; 2 were started" in practice


def asked_of_accelerator(folder: Path) -> list[Any]:
    """accelerate's questions, answered by each process."""
    args = arguments(folder)
    trainer = lorafit.Trainer(llama(), args, PadCollator(0), train_dataset=plain(4))
    ours, number = trainer.accelerator, processes.number()
    own = torch.tensor([float(number)])
    order = []
    with args.main_process_first():
        order.append(number)
    ours.wait_for_everyone()
    longer = ours.pad_across_processes(torch.ones(number + 1), pad_index=7)
    return [
        (ours.num_processes, ours.process_index, ours.is_main_process, ours.is_last_process),
        ours.gather(own).tolist(), ours.gather_for_metrics({"a": own})["a"].tolist(),
        ours.reduce(own).tolist(), ours.reduce(own, "mean").tolist(), longer.tolist(),
        ours.on_main_process(lambda: "said")(), ours.gather(own > 0).tolist(),
        (args.world_size, args.process_index, args.local_process_index, args.should_save),
        args.parallel_mode.value, args.effective_batch_size,
    ]  # fmt: skip


def test_accelerators_questions(tmp_path: Path) -> None:
    first, second = together(2, asked_of_accelerator, tmp_path)
    assert first[0] == (2, 0, True, False) and second[0] == (2, 1, False, True)
    assert first[1] == second[1] == first[2] == [0.0, 1.0]
    assert (first[3], second[4]) == ([1.0], [0.5])
    assert (first[5], second[5]) == ([1.0, 7.0], [1.0, 1.0])
    assert (first[6], second[6]) == ("said", None)
    assert first[7] == second[7] == [False, True]
    assert first[8] == (2, 0, 0, True) and second[8] == (2, 1, 1, False)
    assert first[9:] == ["distributed", 8]


# ---- beside transformers' Trainer


def scripted(folder: Path, name: str) -> dict[str, Any]:
    """An ordinary script under the Trainer and the arguments of package `name`."""
    package: Any = importlib.import_module(name)
    values: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "use_cpu": True, "seed": 3,
        "gradient_accumulation_steps": 3, "num_train_epochs": 2, "learning_rate": 2e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    trainer = package.Trainer(
        model=llama(),
        args=package.TrainingArguments(**values),
        data_collator=PadCollator(0),
        train_dataset=plain(12),
    )
    trainer.train()
    return {"losses": numbers(trainer, "loss", "grad_norm"), "adapter": adapter(trainer)}


@pytest.mark.slow
def test_the_same_script_has_the_same_curve(tmp_path: Path) -> None:
    """Under torchrun as without it: order, shares and the loss's weights are transformers'."""
    theirs = together(2, scripted, tmp_path, "transformers")
    ours = together(2, scripted, tmp_path, "lorafit")
    assert not [each for each in (*theirs, *ours) if isinstance(each, Failed)], (theirs, ours)
    for (loss, norm), (other, other_norm) in zip(
        ours[0]["losses"], theirs[0]["losses"], strict=True
    ):
        assert loss == pytest.approx(other, rel=1e-6)
        assert norm == pytest.approx(other_norm, rel=1e-5)
    assert far(ours[0], theirs[0]) < 1e-4
