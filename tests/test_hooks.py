"""What subclasses override and call: where it is used, what is said, and where it is better."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lorafit
from lorafit.errors import ModelError
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
    said = [line for line in notices(make(tmp_path, kind=Mean)) if "as given" in line]
    assert said == ["micro-batches are run as given: compute_loss is yours"]
    assert not any("as given" in line for line in notices(make(tmp_path)))


def test_an_override_that_nothing_calls_is_named(tmp_path: Path) -> None:
    said = [line for line in notices(make(tmp_path, kind=Idle)) if "never called" in line]
    assert said == [
        "never called here, though transformers' Trainer does: "
        "_maybe_log_save_evaluate, get_batch_samples"
    ]


def test_an_assigned_method_is_an_override(tmp_path: Path) -> None:
    trainer = make(tmp_path)
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
    from lorafit.engine import evaluation

    def kept(*_: Any) -> None:
        raise AssertionError("something was kept")

    monkeypatch.setattr(evaluation.Gathered, "_add", kept)
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
