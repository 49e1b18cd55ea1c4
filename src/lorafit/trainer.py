"""Trainer: the transformers-shaped face of lorafit, and the loop.

Assembles model, data, engine and observers; decides when to log, evaluate, save and stop. Computes
nothing itself (the engine does) and draws nothing (observers do). The loop is `_epoch`.
"""

import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorafit import compat, parts
from lorafit.arguments import TrainingArguments
from lorafit.engine import objective as objectives
from lorafit.engine import precision, world
from lorafit.engine.evaluation import Evaluation
from lorafit.engine.layout import as_given
from lorafit.engine.objective import Objective
from lorafit.errors import ConfigError, TrainingInterrupted
from lorafit.events import Saved
from lorafit.model import adapters, base
from lorafit.model.card import model_card
from lorafit.model.noise import noisy_embeddings
from lorafit.run import checkpoint, store
from lorafit.run.callbacks import Callbacks, TrainOutput, set_verbosity
from lorafit.run.checkpoint import Kept
from lorafit.run.console import Console
from lorafit.run.journal import Journal
from lorafit.run.observers import Observers, evaluated
from lorafit.run.progress import Progress, TooManySkipped
from lorafit.run.signals import Asked, Signals, listening
from lorafit.session import Session, Watch


class Trainer:
    """Fine-tunes `model` on `train_dataset`; takes what transformers' Trainer takes.

    Args:
        model: A transformers model (with a PEFT adapter or not), or any module whose forward
            returns a loss.
        args: lorafit's `TrainingArguments` or transformers'.
        data_collator: A list of rows -> a batch.
        train_dataset: Map-style, iterable, or a list of dicts.
        eval_dataset: The same, or a dict of named ones. Given without `eval_strategy`, it is read
            before, during and after training, within 5% of the run's cost.
        processing_class: The tokenizer, saved beside the adapter (`tokenizer` in older scripts).

    Raises:
        ConfigError: with every complaint about `args`, or where something cannot be trained.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        tokenizer: Any = None,
    ) -> None:
        world.check_alone()
        given = TrainingArguments("trainer_output") if args is None else args
        ours = isinstance(given, TrainingArguments)
        self.args: TrainingArguments = given if ours else compat.from_transformers(given)
        complaints = self.args.check()
        if complaints:
            raise ConfigError("\n".join(complaints))
        if self.args.log_level != "passive":
            set_verbosity(self.args.get_process_log_level())
        compat.set_seed(self.args.seed, deterministic=self.args.full_determinism)
        if (model is None) == (model_init is None):
            raise ConfigError(
                "Trainer takes either a model or model_init, exactly one of them.",
                fix="Trainer(model=...) or Trainer(model_init=lambda: ...).",
            )
        if compute_metrics is not None:
            raise ConfigError(
                "compute_metrics is not called by this version: evaluation keeps the loss alone.",
                fix="Leave it out, and compute metrics from the adapter after training.",
            )
        self.model_init = model_init
        made = model_init() if model_init else model
        assert made is not None
        self.model: nn.Module = base.place(made, self.args.device)
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.data_collator = data_collator or compat.default_collator(self.processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_loss_func = compute_loss_func
        self.optimizer, self.lr_scheduler = optimizers
        self.label_names = base.label_names(self.model, self.args.label_names)
        self.contract: dict[str, Any] = {}
        self.observers = Observers([Console(live=self.args.disable_tqdm is not True)])
        self.resume_command = "trainer.train(resume_from_checkpoint=True)"
        self._given_optimizers = optimizers
        self._signals = Signals()
        self._precision = precision.choose(self.args, self.args.device)
        self._callbacks = Callbacks(
            compat.to_transformers(self.args) if ours else given,
            callbacks or (),
            model=self.model,
            processing_class=self.processing_class,
        )

    # ---- what scripts read and call ------------------------------------------------------------

    @property
    def state(self) -> Any:
        """transformers' `TrainerState`: global_step, epoch, log_history, best_metric, ..."""
        return self._callbacks.state

    @property
    def control(self) -> Any:
        """transformers' `TrainerControl`."""
        return self._callbacks.control

    @property
    def callback_handler(self) -> Any:
        """transformers' `CallbackHandler`."""
        return self._callbacks.handler

    def add_callback(self, callback: Any) -> None:
        """Add a `TrainerCallback`, class or instance."""
        self._callbacks.handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it; None where it was not there."""
        return self._callbacks.handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback."""
        self._callbacks.handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this process writes files: always, in one process."""
        return True

    is_local_process_zero = is_world_process_zero

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,  # noqa: ARG002 only the loss is kept
    ) -> TrainOutput:
        """Train to the end, or to where a callback, a signal or non-finite steps stop it.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of `output_dir`, a path,
                or "auto", which starts afresh where there is none.

        Returns:
            (global_step, training_loss, metrics), as transformers'.

        Raises:
            KeyboardInterrupt: SIGINT, after saving. TrainingInterrupted: SIGTERM, after saving.
            NonFiniteError: `max_nonfinite_steps` steps in a row could not be applied.
        """
        if trial is not None:
            raise ConfigError(
                "Trainer.train(trial=...) belongs to hyperparameter_search, which lorafit leaves "
                "out.",
                fix="Run one training per setting; each is a process of its own.",
            )
        output = Path(self.args.output_dir)
        kept, skipped = checkpoint.to_resume(output, resume_from_checkpoint)
        if self.model_init is not None:
            compat.set_seed(self.args.seed, deterministic=self.args.full_determinism)
            self.model = base.place(self.model_init(), self.args.device)
        run = self._begin(kept, skipped)
        with (
            closing(run.engine.updater),
            self.observers.writing(Journal(output, resumed_at=run.position.step if kept else None)),
            listening(run.signals),
            base.without_cache(self.model),
            noisy_embeddings(self.model, self.args.neftune_noise_alpha),
        ):
            return self._run(run)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss (nats per supervised token) on `eval_dataset`, logged and told to callbacks.

        Returns:
            `{prefix}_loss`, `_runtime` (seconds), `_samples_per_second`, `_steps_per_second` and
            `epoch`; for a dict of sets, each under `{prefix}_{name}`.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if chosen is None:
            raise ConfigError(
                "Trainer.evaluate: there is no evaluation set.",
                fix="Trainer(..., eval_dataset=...) or trainer.evaluate(eval_dataset=...).",
            )
        if isinstance(chosen, dict):
            merged: dict[str, float] = {}
            for name, part in chosen.items():
                merged |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        measured = self._measure(chosen, after_batch=self._after_evaluated_batch)
        self.observers.tell(
            evaluated(measured, self.state, name=metric_key_prefix, occasion="asked")
        )
        metrics = parts.metrics_of(
            measured, prefix=metric_key_prefix, batch_size=self.args.per_device_eval_batch_size
        )
        self.log(metrics)
        self._callbacks.fire("on_evaluate", metrics=metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Append `logs` to `state.log_history` and tell callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._callbacks.fire("on_log", logs=logs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The module's own loss of one batch; override it for another.

        Args:
            num_items_in_batch: Supervised tokens of the whole optimiser step; a loss that divides
                by it is exact under accumulation. None in evaluation.

        Returns:
            A scalar, or (scalar, outputs) with `return_outputs`.
        """
        accepts = num_items_in_batch is not None and base.accepts_count(self.model)
        loss, outputs = objectives.own_loss(
            model,
            inputs,
            function=self.compute_loss_func,
            count=num_items_in_batch,
            passed_on=accepts,
        )
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (the whole model without one), tokenizer, card and contract."""
        folder = store.make_folder(Path(output_dir or self.args.output_dir))
        metrics = {"step": self.state.global_step, **parts.last_evaluation(self.state.log_history)}
        contract = {"base": base.identity(self.model), "metrics": metrics, **self.contract}
        adapters.save_adapter(
            self.model,
            folder,
            tokenizer=self.processing_class,
            contract=contract,
            card=model_card(contract),
        )
        self.observers.tell(Saved(str(folder), self.state.global_step, store.bytes_of(folder)))

    def save_state(self) -> None:
        """Write trainer_state.json to `output_dir`."""
        folder = store.make_folder(Path(self.args.output_dir))
        self._callbacks.keep_state(str(folder / "trainer_state.json"))

    # ---- the loop ------------------------------------------------------------------------------

    def _run(self, run: Session) -> TrainOutput:
        self.observers.say(*run.notices)
        self.observers.tell(run.started_event(self.args, parts.examples_of(self.train_dataset)))
        self._callbacks.fire("on_train_begin")
        try:
            if self.args.eval_on_start:
                self.evaluate()
            self._act(run)  # a reading, or the evaluation that an interrupted run was at
            for epoch in range(run.position.epoch, run.plan.epochs):
                self._epoch(run, epoch)
                if self.control.should_training_stop:
                    break
            self.observers.tell(*run.progress.read())
        except Asked as asked:
            self._interrupted(run, asked)
        except TooManySkipped as too_many:
            self.observers.tell(*too_many.events)
            self.observers.tell(run.ended_event("non-finite"))
            raise
        finally:
            self._signals = Signals()
        return self._finish(run)

    def _epoch(self, run: Session, epoch: int) -> None:
        """Step through what is left of `epoch`; after each step do what is due."""
        self._callbacks.fire("on_epoch_begin")
        for step in run.steps(epoch):
            self._callbacks.fire("on_step_begin")
            result = run.engine.step(run.layout(step.batches), Watch(self._callbacks, run.signals))
            run.finish_step(result, examples=step.examples)
            self._callbacks.moved(run.position.step, run.epoch(), seen=run.progress)
            self.observers.tell(*run.progress.overdue())
            self._callbacks.fire("on_step_end")
            self._act(run)
            run.signals.poll()
            if self._callbacks.says_stop():
                break
        self._callbacks.fire("on_epoch_end")
        run.finish_epoch(stopped=self.control.should_training_stop)
        self._act(run)

    def _act(self, run: Session) -> None:
        """What the callbacks' control asks for; a reading that is due."""
        if self._callbacks.asks():
            self._do_as_asked(run)
        if run.reading_is_due():
            self._take_reading(run)

    def _do_as_asked(self, run: Session) -> None:
        """Log, evaluate, save, with the numbers of every step so far."""
        self.observers.tell(*run.progress.read())
        if self.control.should_log:
            self._log_window(run)
        if self.control.should_evaluate:
            self._evaluate_in_run(run)
        if self.control.should_save:
            self._save_checkpoint(run, whole=not self.args.save_only_model)
            self._callbacks.fire("on_save")

    def _log_window(self, run: Session) -> None:
        logged = run.progress.logged()
        if logged is None:
            return
        self.observers.tell(logged)
        self.log(
            {
                "loss": logged.loss,
                "grad_norm": logged.gradient_norm,
                "learning_rate": logged.learning_rate,
            }
        )

    def _evaluate_in_run(self, run: Session) -> None:
        """Evaluate; remember what is best, and move a schedule that follows the metric."""
        metrics = self.evaluate()
        if self.args.metric_for_best_model is None and self.args.save_strategy != "best":
            return
        value, state = parts.deciding_metric(self.args, metrics), self.state
        if isinstance(run.engine.schedule, ReduceLROnPlateau):
            run.engine.schedule.step(value)
        best = parts.is_better(value, state.best_metric, greater=self.args.greater_is_better)
        if best:
            state.best_metric, state.best_global_step = value, state.global_step
        if self.args.save_strategy == "best":
            self.control.should_save = best

    def _take_reading(self, run: Session) -> None:
        """The readings that a script gets by passing an evaluation set alone: journal and terminal
        see them, `log_history`, callbacks and random state do not."""
        run.read_at.add(run.position.step)
        chosen = parts.subset(self.eval_dataset, run.readings.examples, seed=self.args.seed)
        with checkpoint.random_state_kept():
            measured = self._measure(chosen, after_batch=run.signals.poll)
        self.observers.tell(evaluated(measured, self.state, name="eval", occasion="reading"))

    def _measure(self, dataset: Any, *, after_batch: Callable[[], None]) -> Evaluation:
        return parts.measure(
            self.model,
            dataset,
            collate=self.data_collator,
            arguments=self.args,
            objective=self._objective(),
            precision=self._precision,
            after_batch=after_batch,
        )

    def _after_evaluated_batch(self) -> None:
        self._signals.poll()
        self._callbacks.fire("on_prediction_step")

    # ---- beginning, saving, ending -------------------------------------------------------------

    def _begin(self, kept: Kept | None, skipped: Sequence[str]) -> Session:
        """The run's parts, at its start or at the position of the checkpoint `kept`."""
        if self.train_dataset is None:
            raise ConfigError(
                "Trainer.train: there is no training set.", fix="Trainer(..., train_dataset=...)."
            )
        collate = parts.columns_kept(self.data_collator, self.model, arguments=self.args)
        steps = parts.training_loader(self.train_dataset, collate, arguments=self.args)
        plan = parts.plan(self.args, steps)
        objective = self._objective()
        engine, notice = parts.engine(
            self.model,
            objective,
            arguments=self.args,
            precision=self._precision,
            steps=plan.steps,
            given=self._given_optimizers,
        )
        self.optimizer, self.lr_scheduler = engine.updater.optimizer, engine.schedule
        self._callbacks.begin(
            max_steps=plan.steps, epochs=plan.epochs, batch_size=self.args.train_batch_size
        )
        self._callbacks.shown(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            train_dataloader=steps,
        )
        run = Session(
            plan=plan,
            engine=engine,
            loader=steps,
            layout=partial(as_given, shifted=objective.shifted, labels=self.label_names),
            progress=Progress(limit=self.args.max_nonfinite_steps),
            readings=parts.readings(
                plan, self.args, train=self.train_dataset, held_out=self.eval_dataset
            ),
            empty_cache_steps=self.args.torch_empty_cache_steps,
        )
        self._signals, resumed = run.signals, ""
        if kept is not None:
            run.resume(kept, self.model)
            self._callbacks.resume(str(kept.folder / "trainer_state.json"))
            resumed = f"resuming {kept.folder} at step {run.position.step}"
        said = (*skipped, resumed, *self.args.notices, self._precision.notice, notice)
        run.notices = (*said, run.readings.notice)
        return run

    def _save_checkpoint(self, run: Session, *, whole: bool) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{run.position.step}"
        if self.state.best_global_step == run.position.step:
            self.state.best_model_checkpoint = str(folder)

        def write_files(partial: Path) -> None:
            adapters.save_adapter(self.model, partial, tokenizer=self.processing_class)
            self._callbacks.keep_state(str(partial / "trainer_state.json"))

        size = run.save(folder, write_files, whole=whole)
        self.observers.tell(Saved(str(folder), run.position.step, size))
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            kept = {Path(best)} if best else set[Path]()
            store.rotate(folder.parent, keep=self.args.save_total_limit, protected=kept)

    def _interrupted(self, run: Session, asked: Asked) -> None:
        """Save at the last finished step, say how to resume, and raise."""
        run.abandon_step()
        self.observers.tell(*run.progress.read())
        if run.saved_at != run.position.step:
            self._save_checkpoint(run, whole=True)
        message = run.farewell(str(asked), resume=f"Resume: {self.resume_command}")
        self.observers.tell(run.ended_event("interrupted"))
        if asked.number == signal.SIGINT:
            raise KeyboardInterrupt(message) from None
        raise TrainingInterrupted(message) from None

    def _finish(self, run: Session) -> TrainOutput:
        metrics = run.metrics(examples_per_step=self.args.effective_batch_size)
        metrics["total_flos"] = self.state.total_flos
        self.log(metrics)
        restored = ""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            restored = str(self.state.best_model_checkpoint)
            adapters.load_adapter_state(self.model, adapters.read_adapter_state(Path(restored)))
        self._callbacks.fire("on_train_end")
        stopped = run.position.step < run.plan.steps
        reason = "stopped" if stopped else "finished"
        self.observers.tell(run.ended_event(reason, restored=restored))
        return TrainOutput(run.position.step, run.progress.mean_loss, metrics)

    # ---- small parts ---------------------------------------------------------------------------

    def _objective(self) -> Objective:
        overridden: parts.Overridden = "compute_loss_func" if self.compute_loss_func else ""
        if type(self).compute_loss is not Trainer.compute_loss:
            overridden = "compute_loss"
        counting = parts.takes_count(self.compute_loss)

        def compute_loss(
            model: nn.Module, inputs: dict[str, Any], *, count: int | None
        ) -> tuple[Tensor, Any]:
            given = {"num_items_in_batch": count} if counting else {}
            made = self.compute_loss(model, inputs, return_outputs=True, **given)
            return made if isinstance(made, tuple) else (made, None)

        return parts.objective(
            self.model,
            compute_loss,
            arguments=self.args,
            overridden=overridden,
            counting=counting,
        )
