"""What a run computes: frozen tensors untouched, splits invisible, evaluation exact, losses honest.

Resuming and stopping are tests/test_trainer_stops.py's, callbacks tests/test_trainer_events.py's.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.engine import precision
from lorafit.errors import ConfigError, NonFiniteError
from lorafit.events import Notice, RunEnded, StepEnd, StepSkipped
from tests import test_house as house
from tests import tiny
from tests.tiny import adapter, events_of, llama, make, numbers, plain, same


def mean_nats(model: nn.Module, rows: list[dict[str, list[int]]], smoothing: float = 0.0) -> float:
    """The mean over all supervised tokens, one row at a time, in float64."""
    nats, count = 0.0, 0
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            scores = model(input_ids=ids)["logits"][0].double().log_softmax(-1)
        for at, label in enumerate(labels[1:]):
            if label != -100:
                plain_nats = -scores[at, label].item()
                spread = -scores[at].mean().item()
                nats += (1 - smoothing) * plain_nats + smoothing * spread
                count += 1
    return nats / count


# ---- what changes, and what must not


@pytest.mark.parametrize(
    ("dtype", "bf16"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_frozen_tensors_stay_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bf16: bool
) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: True)
    model = llama(dtype=dtype)
    frozen, before = (tiny.fingerprint(model, trainable=kind) for kind in (False, True))
    held: set[torch.dtype] = set()

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            held.update(p.dtype for group in optimizer.param_groups for p in group["params"])

    make(tmp_path, model=model, bf16=bf16, max_grad_norm=0.3, callbacks=[Look]).train()
    assert tiny.fingerprint(model, trainable=False) == frozen
    after = tiny.fingerprint(model, trainable=True)
    assert all(after[name][0] == before[name][0] for name in before)
    assert all(after[name][1] != before[name][1] for name in before)
    assert held == {torch.float32}


def test_bf16_products_run_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: True)
    model, seen = llama(), {}
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda m, i, out: seen.update(product=out.dtype))
    layer.register_forward_hook(lambda m, i, out: seen.update(residual=out.dtype))
    make(tmp_path, model=model, bf16=True, max_steps=1).train()
    assert seen == {"product": torch.bfloat16, "residual": torch.float32}


def test_updates_are_summed_in_float32(tmp_path: Path) -> None:
    """A bf16 adapter moves by steps far below its own resolution."""
    model = llama(dtype=torch.bfloat16)
    model.load_state_dict({n: torch.ones_like(v) for n, v in adapter_only(model)}, strict=False)
    before = {name: value.clone() for name, value in adapter_only(model)}
    given = {"learning_rate": 2e-4, "lr_scheduler_type": "constant", "num_train_epochs": 10}
    make(tmp_path, model=model, **given).train()  # 30 steps of 2e-4; bf16 near 1 has 4e-3 or 8e-3
    assert any(not torch.equal(before[name], value) for name, value in adapter_only(model))


def adapter_only(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]


# ---- the law


def test_a_split_changes_no_number(tmp_path: Path) -> None:
    """21 rows: the last step of each epoch is short, and its batches are of unequal sizes."""
    runs = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make(
            tmp_path, data=plain(21), num_train_epochs=2, max_grad_norm=0.5,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append((numbers(trainer, "loss", "grad_norm", "learning_rate"), adapter(trainer)))
    (expected, weights), *others = runs
    assert len(expected) == 6
    for log, trained in others:
        for (loss, norm, rate), (loss_0, norm_0, rate_0) in zip(log, expected, strict=True):
            assert loss == pytest.approx(loss_0, rel=1e-6)
            assert norm == pytest.approx(norm_0, rel=1e-5)
            assert rate == rate_0
        apart = sum((trained[n] - weights[n]).norm() ** 2 for n in weights)
        assert float(apart / sum(w.norm() ** 2 for w in weights.values())) ** 0.5 < 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_short_step_is_the_mean_over_its_tokens(tmp_path: Path, smoothing: float) -> None:
    data = plain(7)
    trainer = make(
        tmp_path, data=data, learning_rate=0.0, train_sampling_strategy="sequential",
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer.train()
    model = llama()
    expected = [mean_nats(model, part, smoothing) for part in (data[:4], data[4:])]
    assert [loss for loss, _ in numbers(trainer, "loss", "grad_norm")] == pytest.approx(
        expected, rel=1e-6
    )


def test_recomputing_changes_no_number(tmp_path: Path) -> None:
    logs, forwards = [], []
    for recompute in (False, True):
        model, ran = llama(), []
        inner = model.get_base_model().model.layers[0].mlp
        inner.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        trainer = make(tmp_path, model=model, gradient_checkpointing=recompute)
        trainer.train()
        logs.append([x for entry in numbers(trainer, "loss", "grad_norm") for x in entry])
        forwards.append(len(ran))
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)
    assert forwards[1] > 1.5 * forwards[0]


# ---- evaluation


def test_evaluation_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    held = plain(13)
    expected = mean_nats(llama(), held)
    for size in (1, 3, 8):
        trainer = make(tmp_path, per_device_eval_batch_size=size, label_smoothing_factor=0.1)
        metrics = trainer.evaluate(held)
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_named_sets_are_evaluated_each(tmp_path: Path) -> None:
    held = plain(13)
    parts = {"a": held[:4], "b": held[4:]}
    trainer = make(tmp_path, eval_dataset=parts)
    metrics = trainer.evaluate()
    tokens = {n: sum(x != -100 for r in part for x in r["labels"][1:]) for n, part in parts.items()}
    total = sum(metrics[f"eval_{name}_loss"] * count for name, count in tokens.items())
    assert total / sum(tokens.values()) == pytest.approx(mean_nats(llama(), held), rel=1e-6)


def test_evaluation_puts_each_modules_mode_back(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model.train()
    chosen = trainer.model.get_base_model().model.layers[1].eval()
    trainer.evaluate(plain(2))
    assert trainer.model.training and not chosen.training


# ---- losses that are not finite


class Poisoned(lorafit.Trainer):
    """The loss of the row with `marked` as its first id is NaN."""

    marked = -1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        bad = (inputs["input_ids"][:, 0] == self.marked).any()
        loss = loss * torch.nan if bad else loss
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_step_that_is_not_finite_is_not_applied(tmp_path: Path, optim: str) -> None:
    data = [{**row, "input_ids": [3, *row["input_ids"][1:]]} for row in plain(12)]
    data[5]["input_ids"][0] = Poisoned.marked = 4
    weights: list[dict[str, Tensor]] = []
    states: list[Any] = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(adapter(trainer))
            kept = trainer.optimizer.state_dict()["state"]
            states.append([v.clone() for s in kept.values() for v in s.values() if v is not None])

    trainer = make(
        tmp_path, kind=Poisoned, data=data, optim=optim, callbacks=[Look],
        train_sampling_strategy="sequential",
    )  # fmt: skip
    with events_of(trainer) as told:
        trainer.train()
    skipped = [event for event in told if isinstance(event, StepSkipped)]
    assert [(event.step, event.examples) for event in skipped] == [(2, (4, 5, 6, 7))]
    assert math.isnan(skipped[0].loss)
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    losses = [loss for loss, _ in numbers(trainer, "loss", "grad_norm")]
    assert [math.isnan(loss) for loss in losses] == [False, True, False]


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5] = torch.inf
    before = tiny.fingerprint(model, trainable=True)
    trainer = make(
        tmp_path, model=model, max_nonfinite_steps=2, eval_dataset=plain(2), eval_strategy="steps",
        eval_steps=2, save_strategy="best", data=plain(40),
    )  # fmt: skip
    with events_of(trainer) as told, pytest.raises(NonFiniteError, match="2 steps in a row"):
        trainer.train()
    assert tiny.fingerprint(model, trainable=True) == before
    assert isinstance(told[-1], RunEnded) and told[-1].reason == "non-finite"
    assert '"reason": "non-finite"' in (tmp_path / "journal.jsonl").read_text().splitlines()[-1]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5] = torch.inf
    trainer = make(
        tmp_path, model=model, max_nonfinite_steps=99, eval_dataset=plain(2), num_train_epochs=2,
        eval_strategy="epoch", save_strategy="best",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == math.inf  # as transformers, so that patience counts
    assert trainer.state.best_model_checkpoint is None
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- other losses, other models


class Mean(lorafit.Trainer):
    """An override from before there was a count."""

    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Counted(lorafit.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class PassedOn(lorafit.Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class Bare(lorafit.Trainer):
    """Returns the loss alone whatever is asked."""

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, num_items_in_batch=kwargs["num_items_in_batch"])


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [loss for loss, _ in numbers(trainer, "loss", "grad_norm")]


@pytest.mark.parametrize("kind", [Counted, PassedOn, Bare])
def test_an_override_that_counts_is_exact(tmp_path: Path, kind: Any) -> None:
    expected = losses(make(tmp_path))
    trainer = make(tmp_path, kind=kind)
    assert losses(trainer) == pytest.approx(expected, rel=1e-6)
    held = plain(5)
    ours = trainer.evaluate(held)["eval_loss"]
    assert ours == pytest.approx(mean_nats(trainer.model, held), rel=1e-3)


def test_an_override_that_does_not_count_is_a_mean_of_means(tmp_path: Path) -> None:
    data = plain(4)
    given = {"data": data, "train_sampling_strategy": "sequential", "eval_dataset": data[:1]}
    (loss,) = losses(trainer := make(tmp_path, kind=Mean, **given))
    model = llama()
    expected = (mean_nats(model, data[:2]) + mean_nats(model, data[2:])) / 2
    assert loss == pytest.approx(expected, rel=1e-6)
    ours = trainer.evaluate()["eval_loss"]
    assert ours == pytest.approx(mean_nats(trainer.model, data[:1]), rel=1e-6)


def test_a_loss_function_is_given_the_count(tmp_path: Path) -> None:
    def function(outputs: Any, labels: Tensor, num_items_in_batch: int | None = None) -> Tensor:
        nats = functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return nats / (num_items_in_batch or int((labels[:, 1:] != -100).sum()))

    expected = losses(make(tmp_path))
    trainer = make(tmp_path, compute_loss_func=function)
    assert losses(trainer) == pytest.approx(expected, rel=1e-6)
    held = plain(5)
    ours = trainer.evaluate(held)["eval_loss"]
    assert ours == pytest.approx(mean_nats(trainer.model, held), rel=1e-6)


class Line(nn.Module):
    """A module that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.mse_loss(x @ self.weight, y)}


def points(count: int) -> list[dict[str, Any]]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "y": row @ torch.tensor([2.0, -1.0]), "unused": "text"} for row in x]


def test_a_plain_module_trains_saves_and_resumes(tmp_path: Path) -> None:
    def trainer(model: nn.Module, **given: Any) -> Any:
        return lorafit.Trainer(
            model,
            tiny.arguments(tmp_path, learning_rate=0.1, num_train_epochs=8, **given),
            train_dataset=points(16),
            eval_dataset=points(4),
        )

    done = trainer(Line(), save_strategy="epoch", save_total_limit=5)
    with events_of(done) as told:
        done.train()
    readings = [event.loss for event in told if type(event).__name__ == "Evaluated"]
    assert readings[-1] < 0.1 * readings[0]
    again = trainer(Line())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert torch.equal(again.model.weight, done.model.weight)


def test_a_module_without_a_loss_is_explained(tmp_path: Path) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x @ self.weight}

    arguments = tiny.arguments(tmp_path)
    with pytest.raises(ConfigError, match="Scores returned no loss, only logits"):
        lorafit.Trainer(Scores(), arguments, train_dataset=points(4)).train()


def test_rows_without_labels_are_explained(tmp_path: Path) -> None:
    data = [{"input_ids": [3, 4, 5]}] * 4
    arguments = tiny.arguments(tmp_path)
    with pytest.raises(ConfigError, match="no labels, only input_ids"):
        lorafit.Trainer(llama(), arguments, train_dataset=data).train()


def test_model_init_starts_each_run_alike(tmp_path: Path) -> None:
    trainer = make(tmp_path, model_init=llama)
    first, trained = losses(trainer), adapter(trainer)
    assert losses(trainer)[-len(first) :] == first
    assert same(adapter(trainer), trained)


def test_given_optimisers(tmp_path: Path) -> None:
    model = llama()
    trainable = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trainable, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (1 + step))
    trainer = make(tmp_path, model=model, optimizers=(sgd, schedule))
    trainer.train()
    assert trainer.optimizer is sgd and trainer.lr_scheduler is schedule
    assert [rate for (rate,) in numbers(trainer, "learning_rate")] == [0.5, 0.25, 0.5 / 3]
    model = llama()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    trainer = make(tmp_path, model=model, optimizers=(sgd, None))
    trainer.train()
    rates = [rate for (rate,) in numbers(trainer, "learning_rate")]
    assert rates == pytest.approx([0.3, 0.2, 0.1])


# ---- data sets, lengths, order


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.rows = plain(count)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_a_stream_runs_for_max_steps(tmp_path: Path) -> None:
    expected = losses(make(tmp_path, data=plain(12), train_sampling_strategy="sequential"))
    streamed = losses(make(tmp_path, data=Stream(12), max_steps=5))
    assert len(streamed) == 5  # its second epoch has begun
    # the schedules differ, so only the first step can be the same
    assert streamed[0] == expected[0]
    with pytest.raises(ConfigError, match="max_steps"):
        make(tmp_path, data=Stream(12)).train()
    with pytest.raises(ConfigError, match="gave no row"):
        make(tmp_path, data=Stream(0), max_steps=2).train()


def test_kinds_of_data_sets_give_the_same_run(tmp_path: Path) -> None:
    data = plain(12)
    expected = losses(make(tmp_path))
    table = datasets.Dataset.from_list([{**row, "text": "not the model's"} for row in data])
    assert losses(make(tmp_path, data=table)) == expected


@pytest.mark.parametrize("removed", [True, False])
def test_columns_that_forward_does_not_take(tmp_path: Path, removed: bool) -> None:
    seen: set[str] = set()
    data = [{**row, "text": "not the model's"} for row in plain(4)]
    trainer = make(tmp_path, data=data, eval_dataset=data, remove_unused_columns=removed)
    inner = trainer.data_collator
    trainer.data_collator = lambda rows: seen.update(*rows) or inner(rows)
    trainer.train()
    assert seen == {"input_ids", "labels"} | (set() if removed else {"text"})


def test_an_empty_data_set_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="no batch"):
        make(folder, data=[]).train()
    assert list(folder.iterdir()) == []  # transformers makes the folder too


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_sampling_strategies_read_every_row(tmp_path: Path, strategy: str) -> None:
    seen: list[int] = []
    data = plain(24)
    trainer = make(tmp_path, data=data, train_sampling_strategy=strategy)
    inner = trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(map(data.index, rows)) or inner(rows)
    trainer.train()
    assert sorted(seen) == list(range(24))
    assert (seen == sorted(seen)) is (strategy == "sequential")
    if strategy == "group_by_length":
        assert len(data[seen[0]]["input_ids"]) == max(len(row["input_ids"]) for row in data)


@pytest.mark.parametrize(
    ("given", "steps", "epoch"),
    [
        ({"max_steps": 5, "num_train_epochs": 1}, 5, 5 / 3),
        ({"num_train_epochs": 1.5}, 5, 5 / 3),
        ({"num_train_epochs": 2}, 6, 2.0),
        ({"max_steps": 1, "gradient_accumulation_steps": 8}, 1, 1.0),
    ],
)
def test_the_length_of_a_run(
    tmp_path: Path, given: dict[str, Any], steps: int, epoch: float
) -> None:
    trainer = make(tmp_path, **given)
    with events_of(trainer) as told:
        trainer.train()
    assert trainer.state.global_step == steps == trainer.state.max_steps
    assert trainer.state.epoch == pytest.approx(epoch)
    assert told[-1].epoch == pytest.approx(epoch)  # type: ignore[union-attr]
    assert numbers(trainer, "learning_rate")[-1][0] == pytest.approx(1e-2 / steps)


# ---- knobs


def test_arguments_are_not_changed(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_dataset=plain(4), save_strategy="epoch", warmup_steps=0.1)
    before = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == before


def test_transformers_arguments_are_taken(tmp_path: Path) -> None:
    ours = losses(make(tmp_path))
    theirs = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=1, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    trainer = lorafit.Trainer(llama(), theirs, data_collator=tiny.collate, train_dataset=plain(12))
    assert losses(trainer) == ours


def test_neftune_is_on_in_training_alone(tmp_path: Path) -> None:
    given = {"eval_dataset": plain(3), "eval_strategy": "epoch", "eval_on_start": True}
    still, noisy = make(tmp_path, **given), make(tmp_path, neftune_noise_alpha=20.0, **given)
    assert losses(noisy)[0] != losses(still)[0]
    assert numbers(noisy, "eval_loss")[0] == numbers(still, "eval_loss")[0]


def test_what_this_machine_lacks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: False)
    trainer = make(tmp_path, bf16=True, optim="paged_adamw_32bit")
    with events_of(trainer) as told:
        trainer.train()
    said = [event.text for event in told if isinstance(event, Notice)]
    assert sum(line.startswith("bf16") for line in said) == 1
    assert sum(line.startswith("paged_adamw_32bit") for line in said) == 1
    expected = losses(make(tmp_path))
    assert [event.loss for event in told if isinstance(event, StepEnd)] == expected


def test_fp16_without_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16=True needs a CUDA device"):
        make(tmp_path, fp16=True)


@pytest.mark.parametrize("counted", ["no", "all", "non_padding"])
def test_tokens_and_operations_are_counted_as_transformers_does(
    tmp_path: Path, counted: str
) -> None:
    given = {"include_num_input_tokens_seen": counted, "train_sampling_strategy": "sequential"}
    ours = make(tmp_path, **given)
    theirs = transformers.Trainer(
        llama(),
        transformers.TrainingArguments(**vars_of(ours.args), **given),
        data_collator=tiny.collate,
        train_dataset=plain(12),
    )
    for trainer in (ours, theirs):
        trainer.train()
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    assert ours.state.total_flos == theirs.state.total_flos > 0
    names = "step", "num_input_tokens_seen"
    assert numbers(ours, *names) == numbers(theirs, *names)


def vars_of(args: lorafit.TrainingArguments) -> dict[str, Any]:
    """The keywords of `tiny.arguments`, for transformers."""
    names = (
        "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "learning_rate", "logging_steps", "save_strategy", "disable_tqdm",
        "use_cpu", "seed",
    )  # fmt: skip
    return {**{name: getattr(args, name) for name in names}, "report_to": "none"}


def test_cached_memory_is_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[int] = []
    trainer = make(tmp_path, torch_empty_cache_steps=2, num_train_epochs=2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: at.append(trainer.state.global_step))
    trainer.train()
    assert at == [2, 4, 6]


def test_the_log_level_reaches_transformers(tmp_path: Path) -> None:
    logger = transformers.utils.logging.get_logger("transformers")
    before = logger.level
    make(tmp_path)
    assert logger.level == before
    make(tmp_path, log_level="error")
    assert logger.level == transformers.utils.logging.ERROR
    logger.setLevel(before)


# ---- the path of a step


def test_the_path_of_a_step_is_what_the_house_counts(tmp_path: Path) -> None:
    """What runs between two steps' beginnings, over enough steps that their numbers are read."""
    begun: list[int] = []
    ran: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            ran.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    class Between(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)
            sys.setprofile({10: trace, 20: None}.get(len(begun), sys.getprofile()))

    given: dict[str, Any] = {"logging_steps": 500, "layout": "packed", "token_budget": 60}
    trainer = make(tmp_path, data=plain(84), callbacks=[Between], **given)
    trainer.data_collator = PadCollator(0)
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    found = set()
    for item in house.functions():
        file = str(house.PACKAGE / item.source.name)
        rows = [item.node.lineno, *(d.lineno for d in item.node.decorator_list)]
        if item.source.room != "kernels" and any((file, row) in ran for row in rows):
            found.add(f"{item.source.name}:{item.path}")
    assert trainer._packing.runner.fused
    assert found | {"trainer.py:Trainer._epoch"} == set(house.STEP_PATH)
