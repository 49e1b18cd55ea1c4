"""What subclasses override and call: where it is used, what is said, and where it is better."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lorafit
from lorafit.errors import ConfigError, ModelError, NonFiniteError
from lorafit.events import Evaluated, Notice
from tests.tiny import collate, events_of, llama, make, numbers, plain


def notices(trainer: Any) -> list[str]:
    """What is said while it trains."""
    with events_of(trainer) as told:
        trainer.train()
    return [event.text for event in told if isinstance(event, Notice)]


def losses(trainer: Any) -> list[float]:
    return [loss for (loss,) in numbers(trainer, "loss")]


# ---- what is said of overrides


class Mean(lorafit.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Idle(lorafit.Trainer):
    def _maybe_log_save_evaluate(self, *given: Any) -> None:
        raise AssertionError(given)

    def get_batch_samples(self, *given: Any) -> None:
        raise AssertionError(given)


def test_a_layout_that_an_override_makes_impossible_is_said_once(tmp_path: Path) -> None:
    made = make(tmp_path, kind=Mean, layout="packed")
    said = [line for line in notices(made) if "as given" in line]
    assert said == ["micro-batches are run as given: compute_loss is yours"]
    assert not any("as given" in line for line in notices(make(tmp_path, kind=Mean)))


def test_an_override_that_nothing_calls_is_named(tmp_path: Path) -> None:
    said = [line for line in notices(make(tmp_path, kind=Idle)) if "never called" in line]
    assert said == [
        "never called here, though transformers' Trainer does: "
        "_maybe_log_save_evaluate, get_batch_samples"
    ]


def test_an_assigned_method_is_an_override(tmp_path: Path) -> None:
    trainer = make(tmp_path, layout="packed")
    trainer.get_train_dataloader = lambda: DataLoader(plain(4), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    assert any("get_train_dataloader is yours" in line for line in notices(trainer))
    assert trainer.state.global_step == 1


def test_readings_leave_overridden_evaluation_alone(tmp_path: Path) -> None:
    def readings(kind: Any) -> int:
        trainer = make(tmp_path, kind=kind, data=plain(64), eval_dataset=plain(8))
        with events_of(trainer) as told:
            trainer.train()
        return sum(isinstance(event, Evaluated) for event in told)

    assert readings(lorafit.Trainer) > 1
    assert readings(Mean) == 0


def test_both_ways_of_saving_more_in_a_checkpoint(tmp_path: Path) -> None:
    class Beside(lorafit.Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / "more.txt").write_text("beside")

    class Instead(lorafit.Trainer):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            Path(output_dir, "mine.txt").write_text("instead")

    for kind, file in ((Beside, "more.txt"), (Instead, "mine.txt")):
        folder = tmp_path / kind.__name__
        make(folder, kind=kind, save_strategy="steps", save_steps=2).train()
        assert (folder / "checkpoint-2" / file).exists()
        resumed = make(folder, kind=kind)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3


# ---- data


def test_the_users_own_loader_shuffles_as_ours_does(tmp_path: Path) -> None:
    class Own(lorafit.Trainer):
        def get_train_dataloader(self) -> Any:
            rows: Any = self.train_dataset
            loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
            return self.accelerator.prepare(loader)

    assert losses(trained(make(tmp_path, kind=Own))) == losses(trained(make(tmp_path)))


def trained(trainer: Any) -> Any:
    trainer.train()
    return trainer


class Once(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = iter(rows)

    def __iter__(self) -> Any:
        return self.rows


def test_a_stream_that_ends_stops_the_run_and_says_so(tmp_path: Path) -> None:
    trainer = make(tmp_path, data=Once(plain(12)), max_steps=5)
    assert "the stream ended: stopped at step 3 of 5" in notices(trainer)
    assert trainer.state.global_step == 3


# ---- evaluation


class Own(nn.Module):
    """Returns its loss without labels; transformers' Trainer calls that loss a prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.a * x - 1).pow(2).mean(), "y": self.a * x}


def test_a_loss_without_labels_is_a_loss(tmp_path: Path) -> None:
    rows = [{"x": float(i)} for i in range(4)]
    settings = lorafit.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = lorafit.Trainer(Own(), settings)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx((1 + 0 + 1 + 4) / 4)
    found = trainer.predict(rows)
    assert np.asarray(found.predictions).tolist() == [0, 1, 2, 3]
    assert found.label_ids is None


def test_a_set_without_labels_measures_nothing_and_says_so(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3]} for _ in range(2)]
    settings = lorafit.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = lorafit.Trainer(llama(), settings)
    assert trainer.predict(rows).metrics.keys() >= {"test_runtime"}
    with events_of(trainer) as told:
        metrics = trainer.evaluate(rows)
    assert told == [Notice("the evaluation set has no labels: nothing is measured but speed")]
    assert "eval_loss" not in metrics and "eval_runtime" in metrics


def test_memory_does_not_grow_where_only_the_loss_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.run import metrics

    def kept(*_: Any) -> None:
        raise AssertionError("something was kept")

    monkeypatch.setattr(metrics.Gathered, "_add", kept)
    make(tmp_path, eval_dataset=plain(6)).evaluate()
    with pytest.raises(AssertionError):
        make(tmp_path).predict(plain(2))


# ---- optimiser


def test_loraplus_gives_b_its_own_rate(tmp_path: Path) -> None:
    trainer = make(tmp_path, loraplus_lr_ratio=16.0, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, rate in rates.items():
        assert rate == pytest.approx(16e-3 if "lora_B" in name else 1e-3), name
    assert len(rates) == sum(p.requires_grad for p in trainer.model.parameters())
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_users_optimiser_gets_its_own_parameters_back(tmp_path: Path) -> None:
    model = llama(dtype=torch.bfloat16)
    given = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=1e-2)
    make(tmp_path, model=model, optimizers=(optimizer, None)).train()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(given, held, strict=True))
    assert all(p in optimizer.state for p in given)


# ---- every trained tensor


def test_tensors_that_no_gradient_reaches_are_named(tmp_path: Path) -> None:
    model = llama()
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    said = [line for line in notices(make(tmp_path, model=model)) if "no gradient" in line]
    trained = sum(p.requires_grad for p in model.parameters())
    assert said == [f"1 of {trained} trained tensors got no gradient in the first 2 steps: idle"]
    assert not any("no gradient" in line for line in notices(make(tmp_path)))


def test_a_run_that_trains_nothing_is_stopped(tmp_path: Path) -> None:
    class Cut(lorafit.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **given: Any) -> Any:
            return model(**inputs).loss.detach().requires_grad_()

    with pytest.raises(ModelError, match="No gradient has reached any of the"):
        make(tmp_path, kind=Cut).train()


# ---- what callbacks and scripts change between and after steps


class Edits(lorafit.TrainerCallback):
    """Sets a trained tensor, and looks at gradients."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        next(p for p in model.parameters() if p.requires_grad).data.fill_(0.5)

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append(sum(p.grad is not None for p in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_callbacks_may_edit_weights_and_see_gradients(tmp_path: Path, dtype: Any) -> None:
    edits, model = Edits(), llama(dtype=dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    make(tmp_path, model=model, callbacks=[edits], learning_rate=1e-4).train()
    assert edits.seen == [len(trained)] * 3
    assert (trained[0] - 0.5).abs().max() < 0.01
    assert all(p.grad is None for p in trained)


def test_another_optimiser_of_its_kind_resumes(tmp_path: Path) -> None:
    make(tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=2).train()
    trainer = make(tmp_path, optim="adamw_torch_fused")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_weights_of_another_precision_resume(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = make(tmp_path, model=llama(dtype=torch.bfloat16))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_the_users_optimiser_is_left_able_to_step(tmp_path: Path) -> None:
    model = llama()
    given = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(given, lr=1e-2, fused=True)

    class Poison(lorafit.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                given[0].data[0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match="weights are not finite"):
        make(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[Poison()]).train()
    with torch.no_grad():
        given[0][0, 0] = 0.0
    before = given[1].detach().clone()
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    assert not torch.equal(given[1], before)


def test_a_run_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fails(lorafit.TrainerCallback):
        fails = True

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.fails:
                raise MemoryError

    failing = Fails()
    trainer = make(tmp_path, model_init=llama, callbacks=[failing])
    before = len(trainer.observers)
    for _ in range(2):
        with pytest.raises(MemoryError):
            trainer.train()
    failing.fails = False
    trainer.train()
    assert trainer.state.global_step == 3 and len(trainer.observers) == before


class ScheduleFree(torch.optim.SGD):
    """Writes down its modes, as schedule-free optimisers need them."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.modes: list[str] = []

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")


def test_optimisers_with_modes_are_told_them(tmp_path: Path) -> None:
    model = llama()
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given: dict[str, Any] = {"eval_strategy": "epoch", "eval_dataset": plain(2)}
    make(tmp_path, model=model, optimizers=(optimizer, None), **given).train()
    # once for the evaluation that was asked for, once for the training examples read beside it
    assert optimizer.modes == ["train", "eval", "train", "eval", "train"]


def test_a_loss_of_ones_own_sees_float32_and_no_autocast(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looking(lorafit.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **given: Any) -> Any:
            outputs = model(**inputs)
            seen.append((outputs.logits.dtype, torch.is_autocast_enabled("cpu")))
            return (outputs.loss, outputs) if given.get("return_outputs") else outputs.loss

    trainer = make(tmp_path, kind=Looking, bf16=True)
    trainer.train()
    assert set(seen) == {(torch.float32, False)}
    assert trainer._precision.dtype in (torch.bfloat16, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_strategy": "epoch"}, "there is no eval_dataset"),
        ({"model_init": llama, "optimizers": (object(), None)}, "model_init makes a fresh model"),
    ],
)
def test_what_cannot_go_together_is_said_at_once(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(tmp_path, **given)


def test_keeping_a_step_needs_a_run(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match="no training is going on"):
        trainer._save_checkpoint(trainer.model, None)


def test_a_loader_copied_from_transformers(tmp_path: Path) -> None:
    class Copied(lorafit.Trainer):
        def get_train_dataloader(self) -> Any:
            collator = self._get_collator_with_removed_columns(self.data_collator, "training")
            rows: Any = self.train_dataset
            sampler: Any = self._get_train_sampler()
            loader = DataLoader(
                rows, batch_size=self._train_batch_size, sampler=sampler, collate_fn=collator
            )
            return self.accelerator.prepare(loader)

    rows = [{**row, "text": "more"} for row in plain(12)]
    assert losses(trained(make(tmp_path, kind=Copied, data=rows))) == losses(
        trained(make(tmp_path))
    )


def test_each_run_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    class Own(lorafit.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LinearLR(
                self.optimizer, 1.0, 0.1, num_training_steps
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler

    trainer = make(tmp_path, kind=Own)
    trainer.train()
    trainer.train()
    rates = [rate for (rate,) in numbers(trainer, "learning_rate")]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0]  # not a schedule at its end


# ---- what a model or a script brings along


class Penalised(transformers.LlamaForCausalLM):
    """A loss of its own, which only training shows."""

    def forward(self, *given: Any, **named: Any) -> Any:
        outputs = super().forward(*given, **named)
        if self.training and outputs.loss is not None:
            outputs.loss = outputs.loss + 100
        return outputs


def test_a_forward_that_somebody_wrote_keeps_its_loss(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = Penalised(config)
    trainer = make(tmp_path, model=model)
    trainer.train()
    assert min(losses(trainer)) > 100
    patched = llama()
    inner, calls = patched.get_base_model(), []
    forward = inner.forward
    inner.forward = lambda *given, **named: (
        calls.append("labels" in named) or forward(*given, **named)
    )
    make(tmp_path, model=patched, remove_unused_columns=False).train()
    assert calls and all(calls)


def test_gradients_from_before_a_run_are_forgotten(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.train()
    model = llama()
    model(**collate(plain(2))).loss.backward()
    again = make(tmp_path, model=model)
    again.train()
    assert numbers(again, "grad_norm") == numbers(first, "grad_norm")


def test_what_the_optimiser_does_not_hold_counts_in_the_norm(tmp_path: Path) -> None:
    norms = []
    for kind in (transformers, lorafit):
        model: Any = llama()
        some = [p for n, p in model.named_parameters() if p.requires_grad and "q_proj" in n]
        trainer = kind.Trainer(
            model,
            kind.TrainingArguments(
                str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1,
                max_grad_norm=0.1, use_cpu=True, report_to="none", save_strategy="no",
            ),
            data_collator=collate,
            train_dataset=plain(8),
            optimizers=(torch.optim.SGD(some, lr=0.5), None),
        )  # fmt: skip
        trainer.train()
        norms.append(numbers(trainer, "loss", "grad_norm"))
    for theirs, ours in zip(*norms, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_reading_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "b"}] * 3
    trainer = make(tmp_path, eval_dataset=rows, data=plain(64))
    said = [line for line in notices(trainer) if "left out" in line]
    assert len(said) == 1 and said[0].startswith("loss cannot be read by itself")
    assert trainer.state.global_step == 16


def test_callbacks_see_what_a_script_adds_to_its_arguments(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(lorafit.TrainerCallback):
        def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
            seen.append((args.alpha, args.learning_rate))

    trainer = make(tmp_path, callbacks=[Look()])
    trainer.args.alpha = 0.3
    trainer.train()
    assert seen == [(0.3, 1e-2)] * 3


def test_batches_of_batches_weigh_by_their_rows(tmp_path: Path) -> None:
    class Pairs(lorafit.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **given: Any) -> Any:
            loss = (model(inputs["query"]["x"]) - model(inputs["passage"]["x"])).pow(2).mean()
            return (loss, None) if given.get("return_outputs") else loss

        def prediction_step(self, model: Any, inputs: Any, *more: Any, **given: Any) -> Any:
            return self.compute_loss(model, inputs).detach(), None, None

    rows = [{"query": {"x": [float(n)]}, "passage": {"x": [0.0]}} for n in range(4)]

    def stacked(features: Any) -> Any:
        return {
            name: {"x": torch.tensor([row[name]["x"] for row in features])} for name in features[0]
        }

    settings = lorafit.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False
    )
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    trainer = Pairs(model, settings, data_collator=stacked, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((0 + 1 + 4 + 9) / 4)


def test_overrides_are_called_by_the_names_transformers_uses(tmp_path: Path) -> None:
    class Named(lorafit.Trainer):
        def prediction_step(self, model: Any, inputs: Any, loss_only: bool, **named: Any) -> Any:
            return super().prediction_step(model, inputs, loss_only, **named)

        def evaluation_loop(self, dataloader: Any, description: str, **named: Any) -> Any:
            return super().evaluation_loop(dataloader, description, **named)

        def evaluate(self, eval_dataset: Any = None, **named: Any) -> Any:
            return super().evaluate(eval_dataset, **named)

        def create_scheduler(self, **named: Any) -> Any:
            return super().create_scheduler(**named)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return DataLoader(eval_dataset, batch_size=1, collate_fn=collate)

    given: dict[str, Any] = {"eval_strategy": "epoch", "eval_dataset": plain(2)}
    trainer = make(tmp_path, kind=Named, **given)
    trainer.train()
    assert len(numbers(trainer, "eval_loss")) == 1
    named = make(tmp_path, eval_dataset={"a": plain(2)})
    assert "eval_a_loss" in named.evaluate()


def test_a_schedule_that_follows_a_metric_follows_the_loss(tmp_path: Path) -> None:
    model = llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, threshold=1e9, threshold_mode="abs"
    )
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": plain(2)}
    make(tmp_path, model=model, optimizers=(optimizer, schedule), **given).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1**2, rel=0.2) or schedule.last_epoch
