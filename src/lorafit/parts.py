"""What a run is made of, each made from arguments: plan, loader, objective, engine, evaluation.

Functions only; the trainer calls them and owns what they return. They decide nothing about when
things happen.
"""

import inspect
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset

from lorafit.arguments import TrainingArguments
from lorafit.data import loader
from lorafit.data.loader import Loader
from lorafit.engine import objective as objectives
from lorafit.engine import optim
from lorafit.engine.evaluation import Readings, plan_readings
from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import ComputeLoss, Objective, Whole
from lorafit.engine.optim import Recipe, Updater
from lorafit.engine.precision import Precision
from lorafit.engine.step import Engine
from lorafit.errors import ConfigError
from lorafit.model import adapters, base
from lorafit.run import signals
from lorafit.run.callbacks import speed_metrics
from lorafit.run.checkpoint import Position
from lorafit.world import World

START = Position(0, 0, 0)


@dataclass(frozen=True)
class Plan:
    """`steps` optimiser steps over `epochs` (begun) epochs of `batches_per_epoch` batches. A stream
    counts as one epoch, as long as the run; `steps_per_epoch` is None for it."""

    steps: int
    epochs: int
    steps_per_epoch: int | None
    batches_per_epoch: int


def plan(arguments: TrainingArguments, training: loader.Loader, *, done: Position) -> Plan:
    """How long the run is; `max_steps` overrides `num_train_epochs`.

    Args:
        done: Where a resumed run goes on. It may have had other batches: what is left of its
            epochs is counted in batches of this one.

    Raises:
        ConfigError: a stream without max_steps, or an empty training set.
    """
    per_epoch, batches = training.steps_per_epoch, training.batches_per_epoch
    if per_epoch is None or batches is None:
        if arguments.max_steps <= 0:
            raise _endless()
        endless = arguments.max_steps * training.per_step
        return Plan(arguments.max_steps, sys.maxsize, None, endless)
    if per_epoch == 0:
        raise ConfigError(
            "The training set gives no batch.",
            why="It is empty, or shorter than one batch with dataloader_drop_last=True.",
            fix="Pass more examples, or dataloader_drop_last=False.",
        )
    begun = -(-done.rows // (training.size * training.per_step))
    if arguments.max_steps > 0:
        left = max(0, arguments.max_steps - done.step + begun)
        return Plan(arguments.max_steps, done.epoch + -(-left // per_epoch), per_epoch, batches)
    passes = arguments.num_train_epochs
    equivalent = done.epoch * per_epoch + begun
    steps = max(done.step, done.step + math.ceil(passes * per_epoch) - equivalent)
    return Plan(steps, math.ceil(passes), per_epoch, batches)


def disk(arguments: TrainingArguments, plan: Plan, *, left: int, each: int) -> int:
    """Bytes of the checkpoints that a run keeps at most, `left` steps before its end.

    Args:
        each: Bytes of one.
    """
    limit = arguments.save_total_limit
    match arguments.save_strategy:
        case "no":
            planned = 1  # where it is interrupted
        case "steps" if arguments.save_steps >= 1:
            planned = math.ceil(left / arguments.save_steps)
        case "steps":
            planned = math.ceil(left / (arguments.save_steps * plan.steps))
        case _:
            planned = math.ceil(left / (plan.steps_per_epoch or left or 1))
    return (min(planned, limit + 1) if limit else planned) * each


def _endless() -> ConfigError:
    return ConfigError(
        "The training set is a stream: it has no length, and max_steps is not set.",
        why="The schedule needs to know how many steps there will be.",
        fix="Write max_steps=1000, say.",
    )


def columns_kept(
    collate: loader.Collate, model: nn.Module, *, arguments: TrainingArguments
) -> loader.Collate:
    """`collate` on rows that hold only what the model's forward takes, if that is wanted."""
    if not arguments.remove_unused_columns:
        return collate
    return loader.keeping(base.forward_names(model, arguments.label_names), collate)


def data_loader(
    dataset: Any,
    collate: loader.Collate,
    *,
    arguments: TrainingArguments,
    sampler: Any,
    training: bool,
) -> loader.EpochLoader:
    """The batches of a set in the sampler's order. Only a training set's last may be left out."""
    return loader.make_loader(
        dataset,
        collate,
        size=arguments.train_batch_size if training else arguments.eval_batch_size,
        sampler=sampler,
        drop_last=training and arguments.dataloader_drop_last,
        workers=loader.Workers(
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
            worker_init_fn=signals.deafen,
        ),
        seed=order_seed(arguments),
    )


def steps_of(batches: Any, arguments: TrainingArguments) -> Loader:
    """What `batches` yields, in the steps of a run: every process reads all of a step's rows, which
    are few, and so knows what the others work on."""
    return Loader(
        deafened(batches),
        size=arguments.train_batch_size,
        per_step=arguments.gradient_accumulation_steps * arguments.world_size,
    )


def deafened(batches: Any) -> Any:
    """`batches`; a DataLoader of the script's own has workers that leave signals to their parent,
    as ours do.

    Raises:
        ConfigError: its sampler gives each process other rows.
    """
    if not isinstance(batches, DataLoader):
        return batches
    chosen = batches.batch_sampler
    samplers = (batches.sampler, chosen.sampler if isinstance(chosen, BatchSampler) else None)
    if any(isinstance(each, DistributedSampler) for each in samplers):
        raise ConfigError(
            "A loader's sampler is a DistributedSampler.",
            why="Each process reads all rows of a step and takes its share of them; of a share it "
            "would take a share.",
            fix="Leave the sampler out of your DataLoader.",
        )
    if batches.num_workers:
        theirs = batches.worker_init_fn
        ours = theirs is signals.deafen or (isinstance(theirs, partial) and theirs.func is _deafen)
        batches.worker_init_fn = theirs if ours else partial(_deafen, theirs)
    return batches


def _deafen(theirs: Callable[[int], object] | None, worker: int) -> None:
    signals.deafen(worker)
    if theirs:
        theirs(worker)


def order_seed(arguments: TrainingArguments) -> int:
    """What decides the order of examples."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def train_sampler(dataset: Any, arguments: TrainingArguments) -> loader.Order | None:
    """The order that seed and sampling strategy give; None for a stream."""
    if loader.is_stream(dataset):
        return None
    count, seed = len(dataset), order_seed(arguments)
    match arguments.train_sampling_strategy:
        case "sequential":
            return loader.Order(count, lambda _: range(count))
        case "group_by_length":
            lengths = loader.lengths_of(dataset, arguments.length_column_name)
            group = arguments.effective_batch_size
            return loader.Order(
                count,
                lambda epoch: loader.order_by_length(lengths, group=group, seed=seed, epoch=epoch),
            )
        case _:
            return loader.Order(count, lambda epoch: loader.order(count, seed=seed, epoch=epoch))


def eval_sampler(dataset: Any) -> Sequence[int] | None:
    """A set's own order; None for a stream."""
    return None if loader.is_stream(dataset) else range(len(dataset))


STEPPING = (
    *("training_step", "_prepare_inputs"),
    *("compute_loss_context_manager", "autocast_smart_context_manager"),
)
"""Methods that a step runs through the trainer for, where one of them is overridden."""


@dataclass(frozen=True)
class Overrides:
    """What of the Trainer's methods a subclass, or an assignment to an instance, has replaced;
    `compute_loss_func` counts as one. `idle`: methods of transformers' Trainer that they have made
    and nothing calls here."""

    names: frozenset[str]
    idle: frozenset[str] = frozenset()

    def any_of(self, *names: str) -> bool:
        """Whether one of them is replaced."""
        return not self.names.isdisjoint(names)

    @property
    def notices(self) -> list[str]:
        """A line where what was written is never called."""
        idle = f"never called here, though transformers' Trainer does: {_listed(self.idle)}"
        return [idle] * bool(self.idle)

    @property
    def of_step(self) -> frozenset[str]:
        """Those that see micro-batches, so that these must be as the collator made them."""
        seeing = {"compute_loss", "compute_loss_func", *STEPPING}
        return self.names & (seeing | {"get_train_dataloader", "_get_train_sampler"})

    @property
    def of_evaluation(self) -> frozenset[str]:
        """Those that an evaluation would run."""
        return self.names & _EVALUATING


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


_EVALUATING = {
    *("compute_loss", "compute_loss_func", "prediction_step", "evaluation_loop", "evaluate"),
    *("get_eval_dataloader", "get_test_dataloader", "_get_eval_sampler", "_prepare_inputs"),
    *("compute_loss_context_manager", "autocast_smart_context_manager"),
}


def objective(
    model: nn.Module,
    compute_loss: ComputeLoss,
    *,
    arguments: TrainingArguments,
    plain: bool,
    divided: Callable[[int | None], bool],
    precision: Precision,
) -> Objective:
    """Our summed nats where the model's loss is plain cross entropy and nobody overrides it.

    Args:
        compute_loss: The trainer's, for every other case.
        plain: Whether the loss is plain causal cross entropy, and nobody's own.
        divided: Whether a loss of its that is told this count comes divided for the whole step.
    """
    if plain:
        return objectives.summed(precision, smoothing=arguments.label_smoothing_factor)
    shifted = base.declares_causal_loss(model)
    return objectives.own(compute_loss, divided=divided, shifted=shifted, precision=precision)


def check_given(
    arguments: TrainingArguments,
    *,
    model: Any,
    model_init: Any,
    optimizers: tuple[Any, Any],
    kind: tuple[Any, Any] | None,
    sets: tuple[Any, Any],
) -> None:
    """Nothing, if a Trainer can be made of these.

    Args:
        sets: Those to train and to evaluate on.

    Raises:
        ConfigError: a model or an optimiser is given twice, or no model; no evaluation set where
            evaluations are asked for; a stream without max_steps.
    """
    train, held_out = sets
    if train is not None and arguments.max_steps <= 0 and loader.length_of(train) is None:
        raise _endless()
    if arguments.eval_strategy != "no" and held_out is None:
        raise ConfigError(
            f"eval_strategy={arguments.eval_strategy!r}, and there is no eval_dataset.",
            fix="Trainer(..., eval_dataset=...), or eval_strategy='no'.",
        )
    if model_init is not None and tuple(optimizers) != (None, None):
        raise ConfigError(
            "model_init makes a fresh model for each run, and optimizers belong to one model.",
            fix="Override create_optimizer and create_scheduler, or leave model_init out.",
        )
    if (model is None) == (model_init is None):
        raise ConfigError(
            "`Trainer` requires either a `model` or `model_init` argument: one of them.",
            fix="Trainer(model=...) or Trainer(model_init=lambda: ...).",
        )
    if kind and tuple(optimizers) != (None, None):
        raise ConfigError(
            "optimizers and optimizer_cls_and_kwargs are both given: leave one.",
            fix="The first is an optimiser that is made, the second how to make one.",
        )


def needed(function: Callable[..., Any]) -> int:
    """How many arguments a call of `function` must give by position."""
    bare = inspect.Parameter.empty
    taken = inspect.signature(function).parameters.values()
    return sum(p.default is bare and p.kind <= p.POSITIONAL_OR_KEYWORD for p in taken)


def takes_third(function: Callable[..., Any]) -> bool:
    """Whether `function` takes a third argument by position, whatever its name."""
    taken = inspect.signature(function).parameters.values()
    by_position = [p for p in taken if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return len(by_position) > 2 or any(p.kind is p.VAR_POSITIONAL for p in taken)


def takes_count(compute_loss: Callable[..., Any]) -> bool:
    """Whether an override of `Trainer.compute_loss` takes `num_items_in_batch`. Where it does not,
    as in scripts written before there was one, its loss is a mean over the micro-batch."""
    taken = inspect.signature(compute_loss).parameters
    return "num_items_in_batch" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def recipe(
    arguments: TrainingArguments,
    given: tuple[Any, dict[str, Any]] | None,
    *,
    model: nn.Module | None = None,
) -> Recipe:
    """The optimiser's class and keyword arguments: those `given`, else what `optim` names, for
    `model` where it is told."""
    trained = (p for p in model.parameters() if p.requires_grad) if model is not None else ()
    sizes = [parameter.numel() for parameter in trained]
    return Recipe(*given) if given else optim.named(arguments, arguments.device, sizes=sizes)


def optimizer(
    model: nn.Module, made_by: Recipe, *, arguments: TrainingArguments, decayed: Sequence[str]
) -> Optimizer:
    """The optimiser of the trainable parameters, in groups with and without weight decay, or in
    LoRA+'s.

    Args:
        decayed: Names of the parameters that take weight decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    optim.check_trainable(model)
    if not arguments.loraplus_lr_ratio:
        return made_by.make(optim.groups(model, decayed=decayed, decay=arguments.weight_decay))
    return adapters.loraplus(
        model,
        made_by.kind,
        options=made_by.options,
        ratio=arguments.loraplus_lr_ratio,
        decay=arguments.weight_decay,
    )


def engine(
    model: nn.Module,
    objective: Objective,
    *,
    arguments: TrainingArguments,
    precision: Precision,
    updater: tuple[Optimizer, Any],
    run_part: Callable[[MicroBatch, Whole], Tensor] | None,
    world: World,
) -> Engine:
    """The engine.

    Args:
        updater: Optimiser and schedule.
        run_part: See `Engine`.
    """
    model = base.prepared(model, arguments)
    if arguments.torch_compile:
        model = torch.compile(  # type: ignore[assignment]
            model,
            backend=arguments.torch_compile_backend or "inductor",
            mode=arguments.torch_compile_mode,
        )
    optimizer, schedule = updater
    return Engine(
        model,
        objective,
        updater=Updater(optimizer, model, world=world),
        schedule=schedule,
        precision=precision,
        max_norm=arguments.max_grad_norm,
        run_part=run_part,
    )


def readings(
    plan: Plan, arguments: TrainingArguments, *, train: Any, held_out: Any, overrides: Overrides
) -> Readings:
    """The automatic readings of a script that passes an evaluation set alone; of one that says when
    to evaluate, or names sets, those of the training examples beside. None for streams, where
    `eval_strategy` is "no" in writing, and where a reading would run what the user has written for
    evaluations that were not asked for."""
    written, named = arguments.was_set("eval_strategy"), isinstance(held_out, dict)
    size = min(map(len, held_out.values()), default=0) if named else loader.length_of(held_out)
    off = overrides.of_evaluation or (written and arguments.eval_strategy == "no")
    if arguments.stop_when_memorising and arguments.eval_strategy == "no" and (off or not size):
        raise ConfigError(
            "stop_when_memorising: no evaluation loss is read in this run.",
            why="Memorising shows in examples that are not trained on.",
            fix="Give an eval_dataset (on the command line --eval-share or --eval-data), and leave "
            "eval_strategy out or set it to 'steps' with eval_steps.",
        )
    if off or not size or plan.steps_per_epoch is None:
        return Readings(frozenset(), 0)
    processed = round((loader.length_of(train) or 0) * plan.steps / plan.steps_per_epoch)
    made = plan_readings(
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        examples=processed,
        held_out=size,
        often=arguments.stop_when_memorising,
    )
    asked = written or named or arguments.eval_strategy != "no"
    return replace(made, steps=frozenset()) if asked else made


def subset(dataset: Any, examples: int, *, seed: int) -> Any:
    """`examples` of a map-style set, drawn once by the seed; all of it where it has no more."""
    size = loader.length_of(dataset)
    if size is None or examples >= size:
        return dataset
    return Subset(dataset, loader.order(size, seed=seed, epoch=0)[:examples])


def speed_of(prefix: str, began: float, *, examples: int, batch_size: int) -> dict[str, float]:
    """Runtime (seconds) and rates per second of an evaluation that `began` then."""
    steps = math.ceil(examples / batch_size)
    return speed_metrics(prefix, began, num_samples=examples, num_steps=steps)
