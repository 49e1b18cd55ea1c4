"""transformers' TrainerCallback protocol: its own handler, state and control, driven by our events.

Existing callbacks and trackers work unchanged because nothing here imitates them: the classes are
transformers'. Knows no engine and no data.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    TrainOutput,
    speed_metrics,
)

from lorafit import foreign, processes
from lorafit.errors import ConfigError
from lorafit.panel import fits

__all__ = [
    "Callbacks",
    "EarlyStoppingCallback",
    "EvalLoopOutput",
    "EvalPrediction",
    "PredictionOutput",
    "TrainOutput",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "speed_metrics",
]


def _nothing(*_: Any, **__: Any) -> None: ...


class ProgressCallback(transformers.ProgressCallback):
    """Stands where transformers has its own, whose bar lorafit's console draws; taken out of the
    handler, the console is silent."""

    on_train_begin = on_step_end = on_prediction_step = on_evaluate = _nothing
    on_predict = on_log = on_train_end = _nothing


class PrinterCallback(transformers.PrinterCallback):
    """The same where progress is printed and not drawn (`disable_tqdm=True`)."""

    on_log = _nothing


class EmptyCacheCallback(TrainerCallback):
    """Hands cached GPU memory back every `torch_empty_cache_steps`."""

    def on_step_end(self, *given: Any, **_: Any) -> None:
        """After a step."""
        arguments, state, _control = given
        if state.global_step % arguments.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()


_OURS = (ProgressCallback, PrinterCallback)
_THEIRS = (transformers.ProgressCallback, transformers.PrinterCallback)


class Seen(Protocol):
    """Tokens of the run so far, and tokens with their padding."""

    tokens: int
    positions: int


_PLACES = ("is_world_process_zero", "is_local_process_zero")
"""What a state says of the process that has it."""


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
        progress = PrinterCallback if arguments.disable_tqdm else ProgressCallback
        extra = [EmptyCacheCallback] if arguments.torch_empty_cache_steps else []
        self.arguments = arguments
        self.handler = CallbackHandler(
            [DefaultFlowCallback, *reporters, *added, progress, *extra],
            model,
            processing_class,
            None,
            None,
        )
        self.control = TrainerControl()
        self.state: Any = self._fresh_state()
        self._flops_per_position = 0.0
        self.fire("on_init_end")

    def draws(self) -> bool:
        """Whether lorafit's console is to show progress: its stand-in is there, and no callback of
        the user's that shows it."""
        known = self.handler.callbacks
        ours = any(isinstance(callback, _OURS) for callback in known)
        return ours and all(isinstance(c, _OURS) for c in known if isinstance(c, _THEIRS))

    def _fresh_state(self) -> TrainerState:
        return TrainerState(
            stateful_callbacks=self._stateful(),
            is_world_process_zero=processes.number() == 0,
            is_local_process_zero=processes.local_number() == 0,
        )

    def begin(self, *, max_steps: int, epochs: int, batch_size: int) -> None:
        """A fresh state for a run of `max_steps` optimiser steps."""
        self.control = TrainerControl()
        self.state = self._fresh_state()
        self.state.train_batch_size = batch_size
        self.state.compute_steps(self.arguments, max_steps)
        self.state.max_steps, self.state.num_train_epochs = max_steps, epochs
        count: Any = getattr(self.handler.model, "num_parameters", None)
        counted: Any = count(exclude_embeddings=True) if callable(count) else 0
        self._flops_per_position = 6.0 * counted

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

    def says_stop(self) -> bool:
        """Whether the epoch, or all of training, is to end here."""
        return self.control.should_epoch_stop or self.control.should_training_stop

    def end_epoch(self, *, stop: bool) -> None:
        """The epoch ends; so does training, if `stop` says so."""
        self.control.should_training_stop |= stop
        self.fire("on_epoch_end")

    def resume(self, path: Path) -> list[str]:
        """The state a checkpoint kept, and that of its stateful callbacks; an evaluation that was
        asked for and interrupted is asked for again. A line for each part that is not there."""
        saved = _read_state(path)
        fresh, self.state = self.state, saved
        for name in ("max_steps", "num_train_epochs", "train_batch_size"):
            setattr(saved, name, getattr(fresh, name))
        for name in ("logging_steps", "eval_steps", "save_steps", *_PLACES):
            setattr(saved, name, getattr(fresh, name))
        control = _parts(saved.stateful_callbacks.pop("TrainerControl", {}))
        self.control.should_evaluate = control.get("should_evaluate") is True
        # the save that was to follow the evaluation: what was saved instead knows nothing of it
        self.control.should_save = (
            self.control.should_evaluate and control.get("should_save") is True
        )
        lost = [
            name for name, kept in saved.stateful_callbacks.items() if not self._put(name, kept)
        ]
        best = saved.best_model_checkpoint
        if best and not Path(best).is_dir():
            saved.best_model_checkpoint = None
            lost.append(f"best_model_checkpoint {best}")
        return [f"the checkpoint's {name} is not here any more: left out" for name in lost]

    def _put(self, name: str, kept: Any) -> bool:
        """Give the callbacks of that class their saved states, in order; whether there is one."""
        states = kept if isinstance(kept, list) else [kept]
        ones: list[Any] = [c for c in self._stateful() if type(c).__name__ == name]
        for callback, state in zip(ones, states, strict=False):
            own = _parts(callback.state())
            for key, value in _parts(state).items():
                # a file may not name what the callback never wrote: its methods, say
                if key in own and type(value) in (type(own[key]), int, float):
                    setattr(callback, key, value)
        return bool(ones)

    def _stateful(self) -> list[Any]:
        candidates = [*self.handler.callbacks, self.control]
        return [callback for callback in candidates if isinstance(callback, ExportableState)]

    def keep_state(self, path: Path) -> None:
        """Write trainer_state.json, the stateful callbacks' state as it is now included."""
        self.state.stateful_callbacks = TrainerState(
            stateful_callbacks=self._stateful()
        ).stateful_callbacks
        self.state.save_to_json(str(path))

    def fire(self, event: str, **context: Any) -> None:
        """Tell every callback; what they ask for is in `control` afterwards."""
        act = getattr(self.handler, event)
        self.control = act(self.arguments, self.state, self.control, **context)


def _parts(state: Any) -> dict[str, Any]:
    """What a stateful callback kept, by name."""
    kept = state if isinstance(state, dict) else {}
    parts = [kept.get("args"), kept.get("attributes")]
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def _read_state(path: Path) -> Any:
    """trainer_state.json as transformers' state, each value of the kind that a fresh one has.

    Raises:
        ConfigError: it is none.
    """
    kinds = {
        **TrainerState.__annotations__,
        "log_history": list[dict[str, Any]],
        "stateful_callbacks": dict,
    }
    try:
        if foreign.leads_out(path):
            raise ValueError("it is a link that leads out of its folder")
        written = foreign.read_json(path, once=False)
        for name, value in written.items():
            kind = float if kinds[name] is int else kinds[name]
            if not fits(value, kind | None):
                raise ValueError(f"{name}={value!r:.80}")
        return TrainerState(**written)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the state of a run: {error}.",
            fix="Resume another checkpoint: resume_from_checkpoint='checkpoint-N'.",
        ) from error


def set_verbosity(level: int) -> None:
    """transformers' own log level, which its callbacks and trackers write at."""
    logging.getLogger("transformers").setLevel(level)
