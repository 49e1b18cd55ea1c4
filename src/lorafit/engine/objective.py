"""What a step minimises: our nats summed over supervised tokens, or the module's own loss.

Owns the division by the whole step, once. The first is the law's loss and holds for every layout;
the second serves modules and overrides whose number is only known to themselves: it weighs
micro-batches as transformers' Trainer does. Knows no optimiser and no data set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorafit.engine.layout import MicroBatch
from lorafit.engine.precision import Precision
from lorafit.errors import ConfigError
from lorafit.kernels.attention import Documents
from lorafit.kernels.cross_entropy import summed_and_each, summed_nats, supervised_tokens
from lorafit.kernels.lora import Counters
from lorafit.model.documents import Runner
from lorafit.model.lora import Drawn
from lorafit.world import ALONE, World


@dataclass(frozen=True, slots=True)
class Whole:
    """The step that a micro-batch is part of, over all micro-batches and processes: its supervised
    tokens, its number of micro-batches, its real tokens, and those with their padding."""

    supervised: int
    batches: int
    tokens: int = 0
    positions: int = 0

    @classmethod
    def of(cls, parts: Sequence[MicroBatch], world: World = ALONE) -> "Whole":
        """The step of which these are this process's part."""
        totals = world.added(
            sum(part.supervised for part in parts),
            len(parts),
            sum(part.tokens for part in parts),
            sum(part.positions for part in parts),
        )
        return cls(*totals)


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluated micro-batch: its mean loss, what the model returned, and the nats of each
    supervised token in `MicroBatch.owners`' order, [N]; None where only the module knows them."""

    loss: Tensor
    outputs: Any = None
    each: Tensor | None = None


class Part(Protocol):
    """A micro-batch's share of the step's loss, with a graph; shares add up to the loss."""

    def __call__(self, model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """`part` for training; `measure` for evaluation, without a graph. `shifted`: token t is
    predicted from t - 1. `divides`: parts add up to the same loss however rows are divided."""

    part: Part
    measure: Callable[[nn.Module, MicroBatch], Measured]
    shifted: bool
    divides: bool


def summed(precision: Precision, *, smoothing: float = 0.0) -> Objective:
    """The law's objective, for causal language models whose loss is plain cross entropy.

    The model is called without labels, so that it computes logits only.
    """

    def forward(model: nn.Module, batch: MicroBatch) -> tuple[Any, Tensor]:
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise _unlabelled(inputs)
        with precision.autocast():
            return model(**inputs), labels

    def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
        outputs, labels = forward(model, batch)
        nats = summed_nats(outputs["logits"], labels, smoothing=smoothing)
        return nats / max(whole.supervised, 1)

    def measure(model: nn.Module, batch: MicroBatch) -> Measured:
        outputs, labels = forward(model, batch)
        nats, each_N = summed_and_each(outputs["logits"], labels)
        return Measured(nats / max(batch.supervised, 1), outputs, each_N)

    return Objective(part, measure, shifted=True, divides=True)


def by_documents(runner: Runner | None, otherwise: Objective, *, drawn: Drawn) -> Objective:
    """The law's objective on documents lying end to end, by `runner`.

    Args:
        otherwise: For padded batches: all of them, or those whose predictions somebody wants.
        drawn: Where LoRA's dropouts look for the counters of a padded batch.
    """

    def states(batch: MicroBatch) -> Tensor:
        assert runner is not None
        inputs = batch.inputs
        ids_T: Tensor = inputs["input_ids"]
        return runner.states(
            ids_T,
            inputs["position_ids"],
            documents=Documents.on(ids_T.device, batch.documents),
            rows_N=inputs["rows"],
            counters=Counters(*batch.drawn) if batch.drawn else None,
        )

    def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
        if runner is None or not batch.documents:
            drawn.counters = Counters(*batch.drawn) if batch.drawn else None
            return otherwise.part(model, batch, whole=whole)
        nats = runner.nats(states(batch), batch.inputs["targets"])
        return nats / max(whole.supervised, 1)

    def measure(model: nn.Module, batch: MicroBatch) -> Measured:
        if runner is None or not batch.documents:
            return otherwise.measure(model, batch)
        nats_N = runner.each(states(batch), batch.inputs["targets"])
        total = nats_N.sum(dtype=_wide(nats_N))
        return Measured(total / max(batch.supervised, 1), each=nats_N)

    return Objective(part, measure, otherwise.shifted, otherwise.divides)


def _wide(tensor: Tensor) -> torch.dtype:
    """Float64, which Metal lacks."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _unlabelled(inputs: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"A batch has no labels, only {', '.join(inputs)}.",
        why="The loss is that of the labels' tokens.",
        fix="Give rows 'labels', or Trainer a data_collator that makes them: "
        "DataCollatorForLanguageModeling(tokenizer, mlm=False).",
    )


class ComputeLoss(Protocol):
    """(model, inputs, supervised tokens or None) -> (loss, outputs where they are asked for)."""

    def __call__(
        self, model: nn.Module, inputs: Any, *, count: int | None, outputs: bool
    ) -> tuple[Tensor, Any]: ...


def own(
    compute_loss: ComputeLoss,
    *,
    divided: Callable[[int | None], bool],
    shifted: bool,
    precision: Precision,
) -> Objective:
    """The module's (or an override's) own loss.

    Args:
        compute_loss: Called with the supervised tokens of the step; of the batch in evaluation.
        divided: Whether a loss that is told this count comes divided for the whole step; if not it
            is taken for a mean, and micro-batches weigh equally.
        shifted: Whether labels are shifted inside, for counting them.
    """

    def part(model: nn.Module, batch: MicroBatch, *, whole: Whole) -> Tensor:
        count = whole.supervised or None
        with precision.forwards(model):
            loss, _ = compute_loss(model, batch.inputs, count=count, outputs=False)
        return loss if divided(count) else loss / whole.batches

    def measure(model: nn.Module, batch: MicroBatch) -> Measured:
        count = batch.supervised or None
        with precision.forwards(model):
            return Measured(*compute_loss(model, batch.inputs, count=count, outputs=True))

    return Objective(part, measure, shifted, divides=False)


class LossFunction(Protocol):
    """A `compute_loss_func`: (outputs, labels, supervised tokens or None) -> loss."""

    def __call__(self, outputs: Any, labels: Any, *, num_items_in_batch: int | None) -> Tensor: ...


def smoothed(smoothing: float, *, shifted: bool) -> LossFunction:
    """Cross entropy of a module's logits with label smoothing, for modules whose own loss has none.

    Divided by the supervised tokens that it is told, else by those of the labels: transformers'
    LabelSmoother.
    """

    def function(outputs: Any, labels: Any, *, num_items_in_batch: int | None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        nats = summed_nats(logits, labels, smoothing=smoothing, shifted=shifted)
        return nats / (num_items_in_batch or max(supervised_tokens(labels, shifted=shifted), 1))

    return function


def own_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    function: LossFunction | None,
    count: int | None,
    passed_on: bool,
) -> tuple[Tensor, Any]:
    """The loss that the module returns, or that `function` makes of what it returns; with its
    outputs.

    Args:
        count: Supervised tokens of the step; of the batch in evaluation.
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


def loss_among(outputs: Any) -> Tensor | None:
    """The loss that a module returned without being given labels, which is a scalar; else None."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def predictions_of(outputs: Any, *, ignored: Sequence[str], with_loss: bool) -> Any:
    """What transformers' Trainer calls predictions: every output but the loss, one bare.

    Args:
        ignored: Names of outputs that are left out too.
        with_loss: Whether a tuple of outputs begins with the loss.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        kept = tuple(value for name, value in outputs.items() if name not in ("loss", *ignored))
    else:
        kept = tuple(outputs[1:] if with_loss else outputs)
    return kept[0] if len(kept) == 1 else kept
