"""transformers' handler, state and control, as lorafit drives them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.run.callbacks import Callbacks


@dataclass
class Seen:
    tokens: int = 70
    positions: int = 100


def callbacks(*added: Any, model: nn.Module | None = None, **given: Any) -> Callbacks:
    arguments = compat.to_transformers(TrainingArguments("out", **given))
    made = Callbacks(arguments, added, model=model or nn.Linear(1, 1), processing_class=None)
    made.begin(max_steps=10, epochs=2, batch_size=4)
    return made


def test_callbacks_get_what_transformers_gives() -> None:
    got: dict[str, Any] = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            got.update(kwargs, args=args, state=state, control=control)

    made = callbacks(Look)
    made.shown(optimizer="o", lr_scheduler="s", train_dataloader="d")
    made.fire("on_step_end")
    assert isinstance(got["args"], transformers.TrainingArguments)
    assert isinstance(got["state"], transformers.TrainerState)
    assert isinstance(got["control"], transformers.TrainerControl)
    assert (got["optimizer"], got["lr_scheduler"], got["train_dataloader"]) == ("o", "s", "d")
    assert got["state"].max_steps == 10 and got["state"].is_world_process_zero


def test_what_is_asked_is_seen() -> None:
    made = callbacks(logging_steps=2, save_strategy="no")
    assert not made.control.should_log and not made.says_stop()
    made.moved(2, 0.4, seen=Seen())
    made.fire("on_step_end")
    assert made.control.should_log and not made.says_stop()
    made.moved(10, 2.0, seen=Seen())
    made.fire("on_step_end")
    assert made.says_stop()


def test_what_was_seen_is_counted() -> None:
    class Counted(nn.Linear):
        def num_parameters(self, exclude_embeddings: bool = False) -> int:
            return 3 if exclude_embeddings else 5

    for how, tokens in (("no", 0), ("all", 100), ("non_padding", 70)):
        made = callbacks(model=Counted(1, 1), include_num_input_tokens_seen=how)
        made.moved(1, 0.1, seen=Seen())
        assert made.state.num_input_tokens_seen == tokens
        assert made.state.total_flos == 6 * 3 * 100
    made = callbacks()
    made.moved(1, 0.1, seen=Seen())
    assert made.state.total_flos == 0


def test_state_comes_back_with_the_stateful_callbacks(tmp_path: Path) -> None:
    def stopping() -> Any:
        return transformers.EarlyStoppingCallback(early_stopping_patience=5)

    first = stopping()
    made = callbacks(first)
    made.moved(4, 0.8, seen=Seen())
    made.state.log_history.append({"loss": 1.0, "step": 4})
    made.state.best_metric = 0.5
    first.early_stopping_patience_counter = 3
    made.control.should_evaluate = True  # asked for, and interrupted
    made.keep_state(str(tmp_path / "state.json"))
    second = stopping()
    again = callbacks(second)
    again.state.max_steps = 99
    again.resume(tmp_path / "state.json")
    assert (again.state.global_step, again.state.best_metric) == (4, 0.5)
    assert again.state.log_history == [{"loss": 1.0, "step": 4}]
    assert again.state.max_steps == 99
    assert second.early_stopping_patience_counter == 3
    assert again.control.should_evaluate and not again.control.should_save
