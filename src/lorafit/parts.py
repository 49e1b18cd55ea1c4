"""What a run is made of, each made from arguments: plan, loader, objective, engine, evaluation.

Functions only; the trainer calls them and owns what they return. They decide nothing about when
things happen.
"""

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Subset

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.data import loader
from lorafit.engine import objective as objectives
from lorafit.engine import optim
from lorafit.engine.evaluation import Evaluation, Readings, evaluate, plan_readings
from lorafit.engine.layout import MicroBatch, as_given
from lorafit.engine.objective import ComputeLoss, Objective
from lorafit.engine.precision import Precision
from lorafit.engine.step import Engine
from lorafit.errors import ConfigError
from lorafit.model import base
from lorafit.run.callbacks import speed_metrics

Collate = Callable[[list[Any]], Any]
Overridden = Literal["", "compute_loss", "compute_loss_func"]


@dataclass(frozen=True)
class Plan:
    """`steps` optimiser steps over `epochs` (begun) epochs. What an epoch has of steps and of
    batches is None for a stream."""

    steps: int
    epochs: int
    steps_per_epoch: int | None
    batches_per_epoch: int | None


def plan(arguments: TrainingArguments, training: loader.Loader) -> Plan:
    """How long the run is; `max_steps` overrides `num_train_epochs`.

    Raises:
        ConfigError: a stream without max_steps, or an empty training set.
    """
    per_epoch, batches = training.steps_per_epoch, training.batches_per_epoch
    if per_epoch is None:
        if arguments.max_steps <= 0:
            raise ConfigError(
                "The training set is a stream: it has no length, and max_steps is not set.",
                why="The schedule needs to know how many steps there will be.",
                fix="Write max_steps=1000, say.",
            )
        return Plan(arguments.max_steps, sys.maxsize, None, None)
    if per_epoch == 0:
        raise ConfigError(
            "The training set gives no batch.",
            why="It is empty, or shorter than one batch with dataloader_drop_last=True.",
            fix="Pass more examples, or dataloader_drop_last=False.",
        )
    if arguments.max_steps > 0:
        steps, epochs = arguments.max_steps, arguments.max_steps / per_epoch
    else:
        steps, epochs = (
            math.ceil(arguments.num_train_epochs * per_epoch),
            arguments.num_train_epochs,
        )
    return Plan(steps, math.ceil(epochs), per_epoch, batches)


def columns_kept(collate: Collate, model: nn.Module, *, arguments: TrainingArguments) -> Collate:
    """`collate` on rows that hold only what the model's forward takes, if that is wanted."""
    if not arguments.remove_unused_columns:
        return collate
    return loader.keeping(base.forward_names(model, arguments.label_names), collate)


def _workers(arguments: TrainingArguments) -> loader.Workers:
    return loader.Workers(
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent=arguments.dataloader_persistent_workers,
    )


def training_loader(
    dataset: Any, collate: Collate, *, arguments: TrainingArguments
) -> loader.Loader:
    """The steps of the training set in the order that seed and sampling strategy give."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return loader.Loader(
        dataset,
        collate,
        batches=loader.Batches(
            size=arguments.per_device_train_batch_size,
            per_step=arguments.gradient_accumulation_steps,
            drop_last=arguments.dataloader_drop_last,
        ),
        ordering=_ordering(dataset, arguments, seed=seed),
        workers=_workers(arguments),
        seed=seed,
    )


def _ordering(
    dataset: Any, arguments: TrainingArguments, *, seed: int
) -> Callable[[int], Iterable[int]]:
    match arguments.train_sampling_strategy:
        case "sequential":
            return lambda _: range(len(dataset))
        case "group_by_length":
            lengths = loader.lengths_of(dataset, arguments.length_column_name)
            group = arguments.effective_batch_size
            return lambda epoch: loader.order_by_length(
                lengths, group=group, seed=seed, epoch=epoch
            )
        case _:
            return lambda epoch: loader.order(len(dataset), seed=seed, epoch=epoch)


def objective(
    model: nn.Module,
    compute_loss: ComputeLoss,
    *,
    arguments: TrainingArguments,
    overridden: Overridden,
    counting: bool,
) -> Objective:
    """Our summed nats where the model's loss is plain cross entropy and nobody overrides it.

    Args:
        compute_loss: The trainer's, for every other case.
        overridden: What replaces the model's loss, if anything.
        counting: Whether `compute_loss` is told the step's supervised tokens.
    """
    if not overridden and base.is_plain_causal(model):
        return objectives.summed(smoothing=arguments.label_smoothing_factor)
    if arguments.label_smoothing_factor:
        raise ConfigError(
            "label_smoothing_factor works on causal language models whose loss is plain cross "
            f"entropy; {type(model).__name__} computes its own, or it is overridden.",
            fix="Leave label_smoothing_factor out, or smooth inside your own loss.",
        )
    return objectives.own(
        compute_loss,
        divided=counting and (base.accepts_count(model) or overridden == "compute_loss_func"),
        shifted=base.declares_causal_loss(model),
    )


def takes_count(compute_loss: Callable[..., Any]) -> bool:
    """Whether an override of `Trainer.compute_loss` takes `num_items_in_batch`. Where it does not,
    as in scripts written before there was one, its loss is a mean over the micro-batch."""
    taken = inspect.signature(compute_loss).parameters
    return "num_items_in_batch" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def engine(
    model: nn.Module,
    objective: Objective,
    *,
    arguments: TrainingArguments,
    precision: Precision,
    steps: int,
    given: tuple[Optimizer | None, Any],
) -> tuple[Engine, str]:
    """The engine, and one line where the optimiser departs from its name.

    Args:
        given: The user's own optimiser and schedule; None for those to be made.
    """
    model = base.prepared(model, arguments)
    if arguments.torch_compile:
        model = torch.compile(  # type: ignore[assignment]
            model,
            backend=arguments.torch_compile_backend or "inductor",
            mode=arguments.torch_compile_mode,
        )
    optimizer, schedule = given
    if optimizer is None:
        updater, notice = optim.build(model, arguments, device=precision.device)
    else:
        updater, notice = optim.Updater(optimizer, {}), ""
    if schedule is None:
        schedule = compat.make_scheduler(updater.optimizer, arguments, total_steps=steps)
    made = Engine(
        model,
        objective,
        updater=updater,
        schedule=schedule,
        precision=precision,
        max_norm=arguments.max_grad_norm,
    )
    return made, notice


def readings(plan: Plan, arguments: TrainingArguments, *, train: Any, held_out: Any) -> Readings:
    """The automatic readings of a script that passes an evaluation set alone. None for streams,
    for named sets, and where `eval_strategy` was written out."""
    written = arguments.was_set("eval_strategy") or arguments.eval_strategy != "no"
    asked = written or isinstance(held_out, dict)
    size = examples_of(held_out)
    if asked or not size or plan.steps_per_epoch is None:
        return Readings(frozenset(), 0)
    processed = round((examples_of(train) or 0) * plan.steps / plan.steps_per_epoch)
    return plan_readings(
        steps=plan.steps, steps_per_epoch=plan.steps_per_epoch, examples=processed, held_out=size
    )


def subset(dataset: Any, examples: int, *, seed: int) -> Any:
    """`examples` of a map-style set, drawn once by the seed; all of it where it has no more."""
    size = examples_of(dataset)
    if size is None or examples >= size:
        return dataset
    return Subset(dataset, loader.order(size, seed=seed, epoch=0)[:examples])


def measure(
    model: nn.Module,
    dataset: Any,
    *,
    collate: Collate,
    arguments: TrainingArguments,
    objective: Objective,
    precision: Precision,
    after_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate `model` on all of `dataset`, in its order."""
    batches = loader.in_order(
        dataset,
        columns_kept(collate, model, arguments=arguments),
        batch_size=arguments.per_device_eval_batch_size,
        workers=_workers(arguments),
    )
    names = base.label_names(model, arguments.label_names)

    def told() -> Iterator[MicroBatch]:
        for batch in batches:
            yield as_given([batch], shifted=objective.shifted, labels=names)[0]
            after_batch()

    return evaluate(model, told(), objective=objective, precision=precision)


def metrics_of(measured: Evaluation, *, prefix: str, batch_size: int) -> dict[str, float]:
    """An evaluation under transformers' names: loss, runtime (seconds), rates per second."""
    rates = speed_metrics(
        prefix,
        time.time() - measured.seconds,
        num_samples=measured.examples,
        num_steps=math.ceil(measured.examples / batch_size),
    )
    return {f"{prefix}_loss": measured.loss, **rates}


def examples_of(dataset: Any) -> int | None:
    """How many examples a set holds; None for a stream, or for no set."""
    try:
        return len(dataset)
    except TypeError:
        return None


def deciding_metric(arguments: TrainingArguments, metrics: Mapping[str, float]) -> float:
    """The value of `metric_for_best_model`.

    Raises:
        ConfigError: it is not among `metrics`.
    """
    name = arguments.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ConfigError(
            f"metric_for_best_model={name!r} is not among the metrics: {', '.join(metrics)}.",
            fix="Name one of them.",
        )
    return metrics[name]


def is_better(value: float, best: float | None, *, greater: bool | None) -> bool:
    """Whether a metric beats the best so far; NaN never does."""
    if math.isnan(value):
        return False
    return best is None or (value > best if greater else value < best)


def last_evaluation(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last `eval_loss` that was logged; empty where there is none."""
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {"eval_loss": losses[-1]} if losses else {}
