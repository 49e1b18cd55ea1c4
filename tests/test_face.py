"""What scripts read and call of a Trainer besides its work."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorafit
from lorafit.errors import ConfigError
from tests.tiny import llama, make


def shown(trainer: Any, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether lorafit's console writes of its training."""
    trainer.train()
    out = capsys.readouterr()
    return "Training on 12 examples" in out.out + out.err


def test_the_console_shows_until_its_callback_is_taken_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(make(tmp_path), capsys)
    silent = make(tmp_path)
    silent.remove_callback(transformers.PrinterCallback)
    assert not shown(silent, capsys)
    bars = make(tmp_path, disable_tqdm=False)
    assert type(bars.pop_callback(transformers.ProgressCallback)).__name__ == "ProgressCallback"
    assert not shown(bars, capsys)


def test_the_console_leaves_the_screen_to_another_progress_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(transformers.PrinterCallback())
    assert not shown(trainer, capsys)
    trainer.remove_callback(trainer.callback_handler.callbacks[-1])
    assert shown(trainer, capsys)


def test_state_and_control_can_be_set(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    trainer.state, trainer.control = state, control
    assert trainer.state is state and trainer.control is control


def test_names_of_older_scripts(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert trainer.model_wrapped is trainer.model
    assert trainer.tokenizer is trainer.processing_class is None
    assert trainer.is_local_process_zero() and trainer.is_world_process_zero()
    assert trainer.args.parallel_mode.value == "not_parallel"
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (False, False)


def test_the_arguments_lie_beside_what_they_made(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    kept = json.loads((tmp_path / "adapter" / "training_args.json").read_text())
    assert kept["learning_rate"] == 1e-2 and kept["seed"] == 3


def test_a_card_says_what_it_is_given(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.create_model_card(language="en", license="mit", tags=["a", "b"], dataset="mine")
    head = (tmp_path / "README.md").read_text().split("---")[1]
    for line in ("language: en", "license: mit", "- a", "mine"):
        assert line in head


@pytest.mark.parametrize("name", ["push_to_hub", "hyperparameter_search"])
def test_refused_with_the_reason_and_what_instead(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name) as raised:
        getattr(make(tmp_path), name)()
    assert raised.value.fix


def test_metrics_are_formatted_for_people(tmp_path: Path) -> None:
    given = {"train_loss": 1.23456789, "train_runtime": 61.5, "total_flos": 2.0**31}
    formatted = make(tmp_path).metrics_format(given)
    assert formatted == {"train_loss": 1.2346, "train_runtime": "0:01:01.50", "total_flos": "2GF"}


def test_an_accelerator_names_what_it_lacks(tmp_path: Path) -> None:
    accelerator = make(tmp_path).accelerator
    with pytest.raises(AttributeError, match=r"no save_state.* wait_for_everyone of it"):
        accelerator.save_state("here")
    assert not hasattr(accelerator, "save_state")


def test_what_callbacks_need_is_exported() -> None:
    assert lorafit.TrainerCallback is transformers.TrainerCallback
    assert lorafit.EarlyStoppingCallback is transformers.EarlyStoppingCallback
    assert lorafit.EvalPrediction is transformers.EvalPrediction


def test_tokens_per_second_are_logged_where_tokens_are_counted(tmp_path: Path) -> None:
    trainer = make(tmp_path, model=llama(), include_num_input_tokens_seen="non_padding")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["num_input_tokens_seen"] > 0 and first["train_tokens_per_second"] > 0
