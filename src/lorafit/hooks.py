"""Hooks: the methods of transformers' Trainer that subclasses override, and their own work.

Data loaders, loss, optimiser, evaluation and prediction. A method that a subclass overrides is used
wherever transformers' Trainer would use it; where none is, the engine does the work. `Trainer` adds
the loop.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit import compat, packing, parts
from lorafit.arguments import TrainingArguments
from lorafit.data import loader
from lorafit.engine import objective as objectives
from lorafit.engine import optim
from lorafit.engine.evaluation import Evaluation, Predicted, evaluate, measuring
from lorafit.engine.layout import MicroBatch, as_given, moved
from lorafit.engine.objective import Objective
from lorafit.engine.optim import Recipe
from lorafit.engine.room import Full
from lorafit.errors import ConfigError
from lorafit.face import Face
from lorafit.model import adapters, base
from lorafit.names import UNCALLED
from lorafit.packing import Packing
from lorafit.parts import Overrides
from lorafit.run.callbacks import EvalLoopOutput, PredictionOutput
from lorafit.run.metrics import Gathered, metrics_of
from lorafit.run.observers import evaluated
from lorafit.world import ALONE


class Hooks(Face):
    """See `Trainer`."""

    loss_is_scaled_for_ga: bool | None = None
    """Whether an overridden `compute_loss` divides by `num_items_in_batch` itself; None: it does
    where it is told that number."""

    _packing = Packing()
    _objective_of: tuple[tuple[Any, ...], Objective] | None = None
    _each: Tensor | None = None  # of the batch that was predicted last
    model_preparation_time: float | None = None
    """Seconds that an evaluation before any training took to find out the model's loss."""

    def _overrides(self) -> Overrides:
        """The methods that are not this class's own any more."""
        functions = ("compute_loss_func",) if self.compute_loss_func else ()
        own = {name: getattr(Hooks, name) for name in dir(Hooks) if not name.startswith("__")}
        replaced = (
            name
            for name, value in own.items()
            if name in vars(self) or getattr(type(self), name) is not value
        )
        known = {*dir(type(self)), *vars(self)}
        return Overrides(frozenset([*replaced, *functions]), UNCALLED & known)

    # ---- data ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """torch's DataLoader over `train_dataset`; override it for one of your own."""
        if self.train_dataset is None:
            raise ConfigError(
                "Trainer: training requires a train_dataset.",
                fix="Trainer(..., train_dataset=...).",
            )
        sampler = self._get_train_sampler(self.train_dataset)
        return self._loader(self.train_dataset, sampler, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """torch's DataLoader over `eval_dataset`: a set, the name of one in a dict of sets, or None
        for the trainer's own. Kept with `dataloader_persistent_workers`."""
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if self._settings.dataloader_persistent_workers and key in self._eval_loaders:
            return self._eval_loaders[key]
        dataset = self._evaluation_set(eval_dataset)
        made = self._loader(dataset, self._get_eval_sampler(dataset), training=False)
        self._eval_loaders[key] = made
        return made

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """torch's DataLoader over `test_dataset`, in its own order."""
        return self._loader(test_dataset, self._get_eval_sampler(test_dataset), training=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return parts.train_sampler(dataset, self._settings)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return parts.eval_sampler(eval_dataset)

    def _loader(self, dataset: Any, sampler: Any, *, training: bool) -> loader.EpochLoader:
        arguments = self._settings
        return parts.data_loader(
            dataset,
            parts.columns_kept(self.data_collator, self.model, arguments=arguments),
            arguments=arguments,
            sampler=sampler,
            training=training,
        )

    def _evaluation_set(self, given: Any) -> Any:
        if isinstance(given, str):
            return self.eval_dataset[given]
        chosen = self.eval_dataset if given is None else given
        if chosen is None:
            raise ConfigError(
                "Trainer: evaluation requires an eval_dataset.",
                fix="Trainer(..., eval_dataset=...) or trainer.evaluate(eval_dataset=...).",
            )
        return chosen

    def num_examples(self, dataloader: Any) -> int:
        """Rows of a loader's set; where it does not say, its batches times their nominal size."""
        rows = loader.rows_of(dataloader)
        return len(dataloader) * self._settings.train_batch_size if rows is None else rows

    def _prepare_input(self, data: Any) -> Any:
        return moved(data, self._device)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A batch on the model's device."""
        return moved(inputs, self.accelerator.device)

    # ---- loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The module's own loss of one batch; override it for another.

        Args:
            num_items_in_batch: Supervised tokens of the whole optimiser step, of the batch in
                evaluation; a loss that divides by it is exact under accumulation. None where the
                model takes no such number.

        Returns:
            A scalar, or (scalar, outputs) with `return_outputs`.
        """
        function = self.compute_loss_func
        smoothing = self._settings.label_smoothing_factor if model.training else 0
        smoothing = 0 if base.has_several_labels(self.model) else smoothing
        if function is None and smoothing and "labels" in inputs:
            function = objectives.smoothed(smoothing, shifted=base.declares_causal_loss(self.model))
        loss, outputs = objectives.own_loss(
            model,
            inputs,
            function=function,
            count=num_items_in_batch,
            passed_on=num_items_in_batch is not None and base.accepts_count(self.model),
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; its part of the step's loss, detached. Used
        where it is overridden; else the engine does the same."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self._precision.forwards(model), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self._divided(num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss_context_manager(self) -> AbstractContextManager[object]:
        """A context of your own around each loss: nothing here, as the model's forward casts by
        itself."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(
        self,
        cache_enabled: bool | None = True,  # noqa: ARG002 transformers' signature
    ) -> AbstractContextManager[object]:
        """The same, under its older name."""
        return nullcontext()

    def _counts(self) -> bool:
        """Whether losses are told the step's supervised tokens: the rule of transformers."""
        told = bool(self.compute_loss_func) or self.model_accepts_loss_kwargs
        return told and parts.takes_count(self.compute_loss)

    def _divided(self, count: Any) -> bool:
        """Whether a loss that was told this count comes divided for the whole step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return self._counts() and (count is not None or bool(self.compute_loss_func))

    def _objective(self) -> Objective:
        """The loss of this model, found out once, and again where another takes its place."""
        arguments, own = self._settings, vars(self).get("compute_loss")
        names = ("label_smoothing_factor", "layout", "token_budget", "recompute", "memory_limit")
        asked = tuple(vars(arguments)[name] for name in names)
        made_for = (self.model, self.compute_loss_func, own, self.data_collator, *asked)
        if self._objective_of is None or self._objective_of[0] != made_for:
            self._objective_of = made_for, self._make_objective()
        return self._objective_of[1]

    def _make_objective(self) -> Objective:
        counting = self._counts()

        def compute_loss(
            model: nn.Module, inputs: Any, *, count: int | None, outputs: bool
        ) -> tuple[Tensor, Any]:
            given: dict[str, Any] = {"return_outputs": True} if outputs else {}
            if counting:
                number = None if count is None else torch.tensor(count, device=self._device)
                given["num_items_in_batch"] = number
            # prediction_step has entered it already
            with nullcontext() if outputs else self.compute_loss_context_manager():
                made = self.compute_loss(model, inputs, **given)
            return made if isinstance(made, tuple) else (made, None)

        overrides = self._overrides()
        replaced = overrides.any_of("compute_loss", "compute_loss_func")
        plain = not replaced and base.is_plain_causal(self.model)
        padded = parts.objective(
            self.model,
            compute_loss,
            arguments=self._settings,
            plain=plain,
            divided=self._divided,
            precision=self._precision,
        )
        self._packing = packing.choose(
            self.model,
            arguments=self._settings,
            precision=self._precision,
            rows=packing.Rows(self.data_collator, self._first_row, self.train_dataset),
            plain=plain,
            replaced=overrides.of_step,
        )
        return objectives.by_documents(self._packing.runner, padded, drawn=self._packing.drawn)

    def _first_row(self) -> Any:
        """A batch of the training set's first row; None of a stream, which must not be begun."""
        rows = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if isinstance(rows, dict) or not loader.length_of(rows):
            return None
        collate = parts.columns_kept(self.data_collator, self.model, arguments=self._settings)
        return collate([rows[0]])

    @property
    def _device(self) -> torch.device:
        return self._precision.device

    # ---- optimiser -----------------------------------------------------------------------------

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make `optimizer` and `lr_scheduler`, where there are none."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make `optimizer` where there is none: `optim`, or `optimizer_cls_and_kwargs`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            given = self.optimizer_cls_and_kwargs
            made_by = parts.recipe(self._settings, given, model=trained)
            if self._overrides().any_of("get_optimizer_cls_and_kwargs"):
                made_by = Recipe(*self.get_optimizer_cls_and_kwargs(self.args, trained))
            self._optimizer_notice = made_by.notice
            self.optimizer = parts.optimizer(
                trained,
                made_by,
                arguments=self._settings,
                decayed=self.get_decay_parameter_names(trained),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make `lr_scheduler` where there is none."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = compat.make_scheduler(
                chosen, self._settings, total_steps=num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: Any,
        model: nn.Module | None = None,  # noqa: ARG004 transformers' signature
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """Class and keyword arguments of the optimiser that `args` name."""
        ours = args if isinstance(args, TrainingArguments) else compat.from_transformers(args)
        made_by = parts.recipe(ours, None)
        return made_by.kind, made_by.options

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that take weight decay: all but biases and those of norms."""
        return optim.decayed_names(model)

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self._made_optimizer().param_groups]

    def get_optimizer_group(self, param: Any = None) -> Any:
        """The group that holds `param`; without it, the parameters of each group."""
        groups = self._made_optimizer().param_groups
        for group in groups if param is not None else ():
            if any(held is param for held in group["params"]):
                return group
        return [group["params"] for group in groups]

    def _made_optimizer(self) -> Any:
        if self.optimizer is None:
            raise ConfigError(
                "Trainer optimizer is None: training has not made one yet.",
                fix="Call trainer.create_optimizer() first.",
            )
        return self.optimizer

    def get_num_trainable_parameters(self) -> int:
        """How many parameters are trained."""
        return adapters.trainable_share(self.model)[0]

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss (nats per supervised token) and metrics on a set, logged and told to callbacks.

        Args:
            eval_dataset: A set, the name of one of the trainer's, a dict of sets; None: its own.
            ignore_keys: Outputs of the model that are no predictions.

        Returns:
            `{prefix}_loss`, what `compute_metrics` returns, `_runtime` (seconds),
            `_samples_per_second`, `_steps_per_second` and `epoch`; for a dict of sets, each under
            `{prefix}_{name}`.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            merged: dict[str, float] = {}
            for name, part in chosen.items():
                merged |= self.evaluate(
                    eval_dataset=name if eval_dataset is None else part,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=f"{metric_key_prefix}_{name}",
                )
            return merged
        batches, began = self.get_eval_dataloader(chosen), time.time()
        output = self.evaluation_loop(
            batches,
            description="Evaluation",
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        if not {*(output.metrics or {})} - {f"{metric_key_prefix}_model_preparation_time"}:
            names = " or ".join(self.label_names) or "loss"
            self.observers.say(f"the evaluation set has no {names}: nothing is measured but speed")
        metrics = self._with_speed(output, metric_key_prefix, began=began)
        self.log(metrics)
        self._callbacks.fire("on_evaluate", metrics=metrics)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """(predictions, label_ids, metrics) of a set, with labels or without; numpy arrays, padded
        with -100 where batches differ in width."""
        batches, began = self.get_test_dataloader(test_dataset), time.time()
        output = self.evaluation_loop(
            batches,
            description="Prediction",
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        metrics = self._with_speed(output, metric_key_prefix, began=began)
        self._callbacks.fire("on_predict", metrics=metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: Iterable[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """(predictions, label_ids, metrics, num_samples) of the batches of `dataloader`. Nothing
        but sums is kept where only the loss is wanted."""
        arguments = self._settings
        loss_only = arguments.prediction_loss_only
        loss_only = loss_only if prediction_loss_only is None else prediction_loss_only
        gathered = Gathered(
            arguments,
            self.compute_metrics,
            self.preprocess_logits_for_metrics,
            main_input=base.main_input(self.model),
            keeps=description == "Prediction",
        )
        self._callbacks.shown(eval_dataloader=dataloader)
        self._show_progress()

        def after_batch(predicted: Predicted) -> None:
            if not loss_only:
                gathered(predicted)
            self._signals.poll()
            self._callbacks.fire("on_prediction_step")

        if self._objective_of is None:
            began = time.time()
            self._objective()
            self.model_preparation_time = round(time.time() - began, 4)
        measured = self._measured(
            dataloader, loss_only=loss_only, ignore_keys=ignore_keys, keep=after_batch
        )
        if measured.loss is not None:
            name, occasion = metric_key_prefix, "asked"
            self.observers.tell(evaluated(measured, self.state, name=name, occasion=occasion))
        computed = gathered.metrics()
        if self.model_preparation_time is not None:
            computed["model_preparation_time"] = self.model_preparation_time
        metrics = metrics_of(measured, computed, prefix=metric_key_prefix)
        rows = loader.rows_of(dataloader)
        arrays = gathered.arrays("predictions"), gathered.arrays("label_ids")
        return EvalLoopOutput(*arrays, metrics, measured.examples if rows is None else rows)

    def _measured(
        self,
        batches: Iterable[Any],
        *,
        loss_only: bool,
        keep: Callable[[Predicted], None],
        ignore_keys: list[str] | None = None,
    ) -> Evaluation:
        shifted, overrides = self._objective().shifted, self._overrides()
        theirs = overrides.any_of("prediction_step", "get_eval_dataloader", "get_test_dataloader")

        def predict(batch: MicroBatch) -> tuple[Tensor | None, Any, Any, Tensor | None]:
            if batch.documents:
                measured = self._objective().measure(self.model, batch.to(self._device))
                return measured.loss, None, None, measured.each
            self._each = None
            made = self.prediction_step(
                self.model, batch.inputs, loss_only, ignore_keys=ignore_keys
            )
            return *made, None if overrides.any_of("prediction_step") else self._each

        model, laid = self.model, Packing() if theirs or not loss_only else self._packing
        # predictions are kept where they are made: every process makes them all
        joint = nullcontext() if loss_only else self._world.jointly(alike=True)
        with optim.resting(self.optimizer), base.without_cache(model), measuring(model), joint:
            try:
                return evaluate(
                    parts.deafened(batches),
                    lay_out=partial(laid.lay_out_read, shifted=shifted),
                    predict=predict,
                    room=self._reads,
                    step=self.state.global_step,
                    keep=keep,
                    world=self._world if loss_only else ALONE,
                )
            except Full as full:
                # a run is saved first
                raise (full if self._running else full.explained()) from None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(mean loss, predictions, labels) of one batch, each None where there is none."""
        objective = self._objective()
        (batch,) = as_given([inputs], shifted=objective.shifted)
        inputs = self._prepare_inputs(inputs)
        labels = tuple(inputs.get(name) for name in self.label_names)
        has_labels = bool(labels) and all(label is not None for label in labels)
        asked = not labels and self._overrides().any_of("compute_loss", "compute_loss_func")
        casting = self._precision.forwards(model)
        with torch.no_grad(), casting, self.compute_loss_context_manager():
            if has_labels or asked:
                measured = objective.measure(model, batch.to(self.accelerator.device))
                loss, outputs = measured.loss.detach().mean(), measured.outputs
                self._each = measured.each
            else:
                outputs = model(**inputs)
                loss = None if labels else objectives.loss_among(outputs)
        if prediction_loss_only:
            return loss, None, None
        ignored = base.outputs_ignored(model) if ignore_keys is None else ignore_keys
        predictions = objectives.predictions_of(
            outputs, ignored=ignored, with_loss=loss is not None
        )
        return (
            loss,
            predictions,
            (labels[0] if len(labels) == 1 else labels) if has_labels else None,
        )

    def _with_speed(self, output: EvalLoopOutput, prefix: str, *, began: float) -> dict[str, float]:
        size = self._settings.eval_batch_size
        speed = parts.speed_of(prefix, began, examples=output.num_samples or 0, batch_size=size)
        return {**(output.metrics or {}), **speed}
