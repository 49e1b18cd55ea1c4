"""transformers' TrainerCallback protocol: its own handler, state and control, driven by our events.

Existing callbacks and trackers work unchanged because nothing here imitates them: the classes are
transformers'. Knows no engine and no data.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput, speed_metrics

__all__ = [
    "Callbacks",
    "EvalPrediction",
    "PredictionOutput",
    "TrainOutput",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "speed_metrics",
]


class Seen(Protocol):
    """Tokens of the run so far, and tokens with their padding."""

    tokens: int
    positions: int


class Callbacks:
    """The handler with the arguments, state and control it passes to every callback.

    Args:
        arguments: A real `transformers.TrainingArguments`.
        added: The user's callbacks, classes or instances.
    """

    def __init__(
        self, arguments: Any, added: Sequence[Any], *, model: Any, processing_class: Any
    ) -> None:
        reporters = get_reporting_integration_callbacks(arguments.report_to)
        self.arguments = arguments
        self.handler = CallbackHandler(
            [DefaultFlowCallback, *reporters, *added], model, processing_class, None, None
        )
        self.state: Any = TrainerState()
        self.control = TrainerControl()
        self._flops_per_position = 0.0
        self.fire("on_init_end")

    def begin(self, *, max_steps: int, epochs: int, batch_size: int) -> None:
        """A fresh state for a run of `max_steps` optimiser steps."""
        self.control = TrainerControl()
        self.state = TrainerState(stateful_callbacks=self._stateful())
        self.state.train_batch_size = batch_size
        self.state.compute_steps(self.arguments, max_steps)
        self.state.max_steps, self.state.num_train_epochs = max_steps, epochs
        self.state.is_local_process_zero = self.state.is_world_process_zero = True
        count = getattr(self.handler.model, "num_parameters", None)
        self._flops_per_position = 6.0 * count(exclude_embeddings=True) if count else 0.0

    def shown(self, **parts: Any) -> None:
        """What callbacks receive by name from now on: model, optimizer, lr_scheduler, ..."""
        vars(self.handler).update(parts)

    def moved(self, step: int, epoch: float, *, seen: Seen) -> None:
        """The state after a step: where the run stands, and what it has `seen` so far.

        Operations are counted as transformers does: 6 per parameter and position.
        """
        state = self.state
        state.global_step, state.epoch = step, epoch
        state.total_flos = self._flops_per_position * seen.positions
        counted = {"no": 0, "all": seen.positions, "non_padding": seen.tokens}
        state.num_input_tokens_seen = counted[self.arguments.include_num_input_tokens_seen]

    def asks(self) -> bool:
        """Whether logging, evaluating or saving is asked for now."""
        return self.control.should_log or self.control.should_evaluate or self.control.should_save

    def says_stop(self) -> bool:
        """Whether the epoch, or all of training, is to end here."""
        return self.control.should_epoch_stop or self.control.should_training_stop

    def resume(self, path: str) -> None:
        """The state a checkpoint kept, and that of its stateful callbacks; an evaluation that was
        asked for and interrupted is asked for again."""
        saved: Any = TrainerState.load_from_json(path)
        fresh, self.state = self.state, saved
        for name in ("max_steps", "num_train_epochs", "train_batch_size"):
            setattr(saved, name, getattr(fresh, name))
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(saved, name, getattr(fresh, name))
        control: Any = saved.stateful_callbacks.get("TrainerControl", {})
        self.control.should_evaluate = control.get("args", {}).get("should_evaluate", False)
        for callback in self.handler.callbacks:
            kept = saved.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and kept:
                self._restore(callback, kept)

    @staticmethod
    def _restore(callback: Any, kept: Any) -> None:
        one = kept[0] if isinstance(kept, list) else kept
        for name, value in {**one.get("args", {}), **one.get("attributes", {})}.items():
            setattr(callback, name, value)

    def _stateful(self) -> list[Any]:
        candidates = [*self.handler.callbacks, self.control]
        return [callback for callback in candidates if isinstance(callback, ExportableState)]

    def keep_state(self, path: str) -> None:
        """Write trainer_state.json, the stateful callbacks' state as it is now included."""
        for callback in self._stateful():
            name = type(callback).__name__
            self.state.stateful_callbacks[name] = callback.state()
        self.state.save_to_json(path)

    def fire(self, event: str, **context: Any) -> None:
        """Tell every callback; what they ask for is in `control` afterwards."""
        act = getattr(self.handler, event)
        self.control = act(self.arguments, self.state, self.control, **context)


def set_verbosity(level: int) -> None:
    """transformers' own log level, which its callbacks and trackers write at."""
    logging.getLogger("transformers").setLevel(level)
