"""What a run tells its observers: frozen facts, units in their names. Knows no torch.

The trainer emits them in order; the journal writes each as one line, the console shows some.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason = Literal["finished", "stopped", "interrupted", "non-finite", "out-of-memory", "left alone"]
"""Why a run ended."""
PROBE = "probe"
"""The name under which the training examples are evaluated that the evaluation set is held to."""


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
class OutOfMemory:
    """Memory did not hold a part of a step or evaluation; the same examples run again, in parts of
    `budget` tokens, which gives the same numbers.

    `tokens` and `rows` are those of the part that failed; `recompute` is what backward makes again
    from now on, where parts cannot be smaller.
    """

    step: int
    doing: Literal["step", "evaluation"]
    tokens: int
    rows: int
    budget: int
    recompute: str
    message: str


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
    ones that a script gets by passing an evaluation set alone. The evaluation set is "eval", the
    fixed training examples that are evaluated like it are `PROBE`. `nats` are the summed nats of
    each example, or group of examples, always of the same ones, and `tokens` their supervised
    tokens; empty where they were not kept.
    """

    name: str
    step: int
    epoch: float
    loss: float
    supervised_tokens: int
    examples: int
    seconds: float
    occasion: Literal["asked", "reading"]
    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DataAudited:
    """What a run learns from: lines of the data report, those of them that would hurt, and one
    example in pieces of text, each learned or not."""

    lines: tuple[str, ...]
    harms: tuple[str, ...] = ()
    example: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the adapter answers to a prompt of the evaluation set, and what was `expected`."""

    step: int
    prompt: str
    answer: str
    expected: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The most memory that the run has held so far, and what was planned (0: nothing was): resident
    on a CPU, torch's allocations on CUDA, where the context that is planned for comes besides."""

    step: int
    bytes: int
    planned_bytes: int = 0


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
    RunStarted
    | Notice
    | DataAudited
    | StepEnd
    | Logged
    | StepSkipped
    | OutOfMemory
    | Evaluated
    | Sampled
    | MemoryPeak
    | Saved
    | RunEnded
)
