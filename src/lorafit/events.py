"""What a run tells its observers: frozen facts, units in their names. Knows no torch.

The trainer emits them in order; the journal writes each as one line, the console shows some.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason = Literal["finished", "stopped", "interrupted", "non-finite"]
"""Why a run ended."""


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Before the first step: what will be run.

    `examples_per_step` is the effective batch: per-device batch size x accumulation x processes.
    """

    examples: int | None
    examples_per_step: int
    batch_size: int
    accumulation: int
    processes: int
    steps: int
    first_step: int
    epochs: float
    trainable_parameters: int
    parameters: int
    device: str
    precision: str
    layout: str


@dataclass(frozen=True, slots=True)
class Notice:
    """One line a person should read once: a fallback, an alias, a departure."""

    text: str


@dataclass(frozen=True, slots=True)
class StepEnd:
    """One optimiser step. `loss` is nats per supervised token (the module's own loss otherwise);
    `gradient_norm` is before clipping; `learning_rate` the one the update used."""

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Logged:
    """What `logging_steps` asks for: `loss` is the mean of the steps since the last one."""

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class StepSkipped:
    """A step whose loss or gradients were not finite: nothing was applied.

    `examples` are the positions in the training set that the step read (empty for streams).
    `overflow`: its loss was finite under `fp16`, whose scaler goes on with half the scale.
    """

    step: int
    loss: float
    gradient_norm: float
    examples: tuple[int, ...]
    overflow: bool = False


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation: `loss` in nats per supervised token, summed in float64, divided once.

    `occasion` is "asked" for `eval_strategy` and `Trainer.evaluate`, "reading" for the automatic
    ones that a script gets by passing an evaluation set alone.
    """

    name: str
    step: int
    epoch: float
    loss: float
    supervised_tokens: int
    examples: int
    seconds: float
    occasion: Literal["asked", "reading"]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or final adapter that is complete on disk."""

    path: str
    step: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RunEnded:
    """After the last step, or where the run was stopped (`reason`)."""

    step: int
    epoch: float
    loss: float
    seconds: float
    reason: Reason
    restored: str = ""


Event: TypeAlias = (
    RunStarted | Notice | StepEnd | Logged | StepSkipped | Evaluated | Saved | RunEnded
)
