"""What a step minimises: our nats summed over supervised tokens, or the module's own loss.

Owns the division by the whole step, once. The first is the law's loss and holds for every layout;
the second serves modules and overrides whose number is only known to themselves: it weighs
micro-batches as transformers' Trainer does. Knows no optimiser and no data set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lorafit.engine.layout import MicroBatch
from lorafit.errors import ConfigError
from lorafit.kernels.cross_entropy import summed_nats


@dataclass(frozen=True, slots=True)
class Whole:
    """The step that a micro-batch is part of: its supervised tokens over all micro-batches and
    processes, and its number of micro-batches."""

    supervised: int
    batches: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluated micro-batch: `nats` is a sum over `count` tokens or rows."""

    nats: Tensor
    count: int
    logits: Any = None


class Part(Protocol):
    """A micro-batch's share of the step's loss, with a graph; shares add up to the loss."""

    def __call__(self, model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """`part` for training; `measure` for evaluation, without a graph. `shifted`: token t is
    predicted from t - 1."""

    part: Part
    measure: Callable[[nn.Module, MicroBatch], Measured]
    shifted: bool


def summed(*, smoothing: float = 0.0) -> Objective:
    """The law's objective, for causal language models whose loss is plain cross entropy.

    The model is called without labels, so that it computes logits only.
    """

    def forward(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise _unlabelled(inputs)
        return model(**inputs)["logits"], labels

    def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
        return summed_nats(*forward(model, batch), smoothing=smoothing) / max(whole.supervised, 1)

    def measure(model: nn.Module, batch: MicroBatch) -> Measured:
        logits, labels = forward(model, batch)
        return Measured(summed_nats(logits, labels), batch.supervised, logits)

    return Objective(part, measure, shifted=True)


def _unlabelled(inputs: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"A batch has no labels, only {', '.join(inputs)}.",
        why="The loss is that of the labels' tokens.",
        fix="Give rows 'labels', or Trainer a data_collator that makes them: "
        "DataCollatorForLanguageModeling(tokenizer, mlm=False).",
    )


class ComputeLoss(Protocol):
    """(model, inputs, supervised tokens of the step or None) -> (loss, outputs)."""

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], *, count: int | None
    ) -> tuple[Tensor, Any]: ...


def own(compute_loss: ComputeLoss, *, divided: bool, shifted: bool) -> Objective:
    """The module's (or an override's) own loss.

    Args:
        compute_loss: Called with the step's supervised tokens in training, None in evaluation.
        divided: Whether its loss is already divided by that count; if not it is taken for a mean,
            and micro-batches weigh equally.
        shifted: Whether labels are shifted inside, for counting them.
    """

    def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
        count = whole.supervised or None
        loss, _ = compute_loss(model, dict(batch.inputs), count=count)
        return loss if divided and count else loss / whole.batches

    def measure(model: nn.Module, batch: MicroBatch) -> Measured:
        loss, outputs = compute_loss(model, dict(batch.inputs), count=None)
        count = batch.supervised or batch.rows or 1
        return Measured(loss * count, count, logits_of(outputs))

    return Objective(part, measure, shifted)


def own_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    function: Callable[..., Tensor] | None,
    count: int | None,
    passed_on: bool,
) -> tuple[Tensor, Any]:
    """The loss that the module returns, or that `function(outputs, labels, ...)` makes of what it
    returns; with its outputs.

    Args:
        count: Supervised tokens of the step, None in evaluation.
        passed_on: Whether the module's forward takes the count as `num_items_in_batch`.

    Raises:
        ConfigError: the module returns no loss.
    """
    labels = inputs.pop("labels", None) if function else None
    given = {**inputs, "num_items_in_batch": count} if passed_on else inputs
    outputs = model(**given)
    if function:
        return function(outputs, labels, num_items_in_batch=count), outputs
    if isinstance(outputs, Mapping):
        if outputs.get("loss") is None:
            raise ConfigError(
                f"{type(model).__name__} returned no loss, only {', '.join(outputs)}; it was given "
                f"{', '.join(inputs)}.",
                fix="Give rows the labels its forward needs, or pass compute_loss_func.",
            )
        return outputs["loss"], outputs
    return outputs if isinstance(outputs, Tensor) else outputs[0], outputs


def logits_of(outputs: Any) -> Any:
    """What transformers' Trainer calls predictions: every output but the loss, one bare."""
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        kept = tuple(value for name, value in outputs.items() if name != "loss")
    else:
        kept = tuple(outputs[1:])
    return kept[0] if len(kept) == 1 else kept
