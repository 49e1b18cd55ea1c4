"""Trainer: transformers' Trainer, and the loop.

Assembles a run of model, data, engine and observers; decides when to log, evaluate, save and stop.
Computes nothing itself (the engine does) and draws nothing (observers do). What else scripts read,
call and override is `Face`'s. The loop is `_epoch`.
"""

import math
import signal
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorafit import compat, parts
from lorafit.data.loader import length_of
from lorafit.deploy import samples
from lorafit.engine import optim
from lorafit.engine.evaluation import Readings
from lorafit.engine.layout import MicroBatch
from lorafit.engine.objective import Whole
from lorafit.engine.room import Full
from lorafit.errors import ConfigError, ElsewhereError, TrainingInterrupted
from lorafit.events import PROBE, Evaluated, Sampled
from lorafit.keeping import Keeping
from lorafit.model import adapters, base
from lorafit.model.lora import counting_dropout
from lorafit.model.noise import noisy_embeddings
from lorafit.parts import START
from lorafit.processes import Asked
from lorafit.rehearsal import ALONE, Helpers, rehearse
from lorafit.run import checkpoint, journal, record, store, workers
from lorafit.run.callbacks import TrainOutput
from lorafit.run.checkpoint import Kept
from lorafit.run.console import show_practice
from lorafit.run.journal import Journal
from lorafit.run.metrics import deciding_metric, is_better
from lorafit.run.observers import evaluated
from lorafit.run.practice import PRACTICE, PRACTICE_PAGE, Practice
from lorafit.run.progress import Ended, Progress
from lorafit.run.report import render_practice
from lorafit.run.signals import Signals, listening
from lorafit.session import Session, Watch
from lorafit.world import idle_gpus


class Trainer(Keeping):
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
        model_init: Makes the model, afresh for each `train()`.
        compute_loss_func: (outputs, labels, num_items_in_batch) -> loss.
        compute_metrics: An `EvalPrediction` -> numbers by name.
        callbacks: `TrainerCallback`s, classes or instances.
        optimizers: An optimiser and a schedule of your own, each or none.
        optimizer_cls_and_kwargs: How to make the optimiser, instead of `optim`.
        preprocess_logits_for_metrics: (predictions, labels) -> what is kept of the predictions.

    Raises:
        ConfigError: with every complaint about `args`, or where something cannot be trained.
    """

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end, or to where a callback, a signal or non-finite steps stop it.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of `output_dir`, a path,
                or "auto", which starts afresh where there is none.
            ignore_keys_for_eval: Outputs of the model that are no predictions.

        Returns:
            (global_step, training_loss, metrics), as transformers'.

        Raises:
            KeyboardInterrupt: SIGINT, after saving. TrainingInterrupted: SIGTERM, after saving.
            NonFiniteError: `max_nonfinite_steps` steps in a row could not be applied.
        """
        if trial is not None:
            self.hyperparameter_search()
        with self.holding_output(), listening(Signals()) as self._signals:
            try:
                return self._train(resume_from_checkpoint, keys=ignore_keys_for_eval)
            finally:
                self._signals, self._running, self.is_in_train = Signals(), None, False

    def practice(self, helpers: Helpers = ALONE, *, find_lr: bool = False) -> Practice:
        """Try the whole path on a few hundred rows, and say whether to start the full run: see
        `run.practice`. Model, optimiser and random state are as before afterwards.

        Args:
            helpers: What the command line adds: another process, a second copy of the base.
            find_lr: Make the learning rate's range test too, with a plot and a suggestion.

        Returns:
            The findings; `go` is False where one of them says to change something first. They are
            shown, and written to practice.json and practice.html in `output_dir`.

        Raises:
            ConfigError: the training set cannot be counted, or several processes were started.
            KeyboardInterrupt, TrainingInterrupted: as `train`; nothing of a practice run is kept.
        """
        if self._world.size > 1:
            raise ConfigError(
                f"A practice run is one process's; {self._world.size} were started.",
                fix="Start it without torchrun; its forecast is that of one process.",
            )
        with self.holding_output():
            found = rehearse(self, helpers, find_lr=find_lr)
            folder = Path(self._settings.output_dir)
            store.write_json(folder / PRACTICE, found.as_dict())
            store.write_whole(folder / PRACTICE_PAGE, render_practice(found).encode())
        show_practice(found)
        return found

    def _train(self, wanted: bool | str | None, *, keys: list[str] | None) -> TrainOutput:
        arguments = self._checked_settings()
        self._callbacks.arguments = self._callback_arguments()
        output = Path(arguments.output_dir)
        kept, skipped = checkpoint.to_resume(output, wanted)
        if wanted and not kept and self._world.is_first:
            journal.forget_unsaved(output)
        if self.model_init is not None:
            compat.set_seed(arguments.seed, deterministic=arguments.full_determinism)
            self.model = base.place(self.call_model_init(), arguments.device)
            self.optimizer = self.lr_scheduler = None
        compat.align_special_tokens(self.model, self.processing_class)
        run = self._running = self._begin(kept)
        run.ignore_keys, run.made_with = keys, self._made_with()
        self._check_alike(run)
        self._initial_num_input_tokens_seen = 0
        with closing(run.engine.updater):
            resumed = self._resume(run, kept) if kept else []
            run.notices = (*skipped, *resumed, *run.notices, self._held or "")
            if self._world.is_first:
                store.check_space(output, run.bytes_to_come())
                run.journal = Journal(
                    output, resumed=(kept.folder, kept.state.journal) if kept else None
                )
            self._tidy(run, kept)
            with (
                workers.naming_the_killed(lambda: f"Then go on: {self.resume_command}"),
                self._observing(run),
                self._telling_of_bad_numbers(run),
                base.without_cache(self.model),
                noisy_embeddings(self.model, arguments.neftune_noise_alpha),
                counting_dropout(self.model, self._packing.drawn),
            ):
                return self._run(run)

    # ---- the loop ------------------------------------------------------------------------------

    def _run(self, run: Session) -> TrainOutput:
        self._show_progress()
        self.observers.say(*run.notices)
        self.observers.tell(run.started_event(length_of(self.train_dataset)))
        self._callbacks.fire("on_train_begin")
        self.is_in_train = True
        try:
            with run.taken_up():
                run.poll()
                if run.arguments.eval_on_start and not run.position.step:
                    self._evaluated(run)
                    self._take_reading(run, PROBE)
                    self._look(run)
                self._act(run)  # a reading, or the evaluation that an interrupted run was at
            for epoch in range(run.position.epoch, run.plan.epochs):
                self._epoch(run, epoch)
                if self.control.should_training_stop:
                    break
            self.observers.tell(*run.progress.read())
        except Asked as asked:
            self._interrupted(run, asked)
        except Full as full:
            self._out_of_memory(run, full)
        except ElsewhereError as error:
            self._left_alone(run, error)
        finally:
            self._signals, self._running, self.is_in_train = Signals(), None, False
            self._console.stop()
            self._packing.forget()
        return self._finish(run)

    def _epoch(self, run: Session, epoch: int) -> None:
        """Step through what is left of `epoch`; after each step do what is due."""
        self._callbacks.fire("on_epoch_begin")
        for step in run.steps(epoch):
            self._callbacks.fire("on_step_begin")
            run.finish_step(run.take(step), of=step)
            self._callbacks.moved(run.position.step, run.epoch(), seen=run.progress)
            self.observers.tell(*run.progress.overdue())
            self._callbacks.fire("on_step_end")
            self._act(run)
            run.poll()
            if self._callbacks.says_stop():
                break
        self._close_epoch(run)

    def _close_epoch(self, run: Session) -> None:
        said = run.exhausted()
        self.observers.say(said)
        self._callbacks.end_epoch(stop=bool(said))
        run.finish_epoch(stopped=self.control.should_training_stop)
        self._act(run)

    def _act(self, run: Session) -> None:
        """What the callbacks' control asks for; a reading that is due."""
        asked = run.agree(self.control)
        if asked:
            self._do_as_asked(run)
        due = run.reading_is_due()
        if due:
            self._read_unasked(run)
        if asked or due:  # callbacks were told, and may ask for more
            run.agree(self.control)

    def _do_as_asked(self, run: Session) -> None:
        """Log, evaluate, save, with the numbers of every step so far."""
        self.observers.tell(*run.progress.read())
        if self.control.should_log:
            self._log_window(run)
            run.agree(self.control)
        if self.control.should_evaluate:
            self._evaluate_in_run(run)
            self._take_reading(run, PROBE)
            self._look(run)
            run.agree(self.control)
        asked, due = run.save_is_asked(), self.control.should_save
        if due:
            self._save_checkpoint(self.model, None)
        if asked and run.saved_at != run.position.step:
            self._keep(run, whole=True)
        if due or asked:
            self._callbacks.fire("on_save")

    def _read_unasked(self, run: Session) -> None:
        self._take_reading(run, "eval", PROBE)
        self._look(run)
        if self.control.should_save:
            self._do_as_asked(run)

    def _log_window(self, run: Session) -> None:
        logged = run.progress.logged()
        if logged is None:
            return
        self.observers.tell(logged, run.memory_peak())
        self.log(
            {
                "loss": logged.loss,
                "grad_norm": logged.gradient_norm,
                "learning_rate": logged.learning_rate,
            },
            run.started,
        )

    def _evaluate_in_run(self, run: Session) -> None:
        """Evaluate; remember what is best, and move a schedule that follows the metric."""
        arguments, schedule = run.arguments, run.engine.schedule
        metrics = self._evaluated(run)
        decides = arguments.metric_for_best_model or arguments.save_strategy == "best"
        if not (decides or isinstance(schedule, ReduceLROnPlateau)):
            return
        value = self._world.first(lambda: float(deciding_metric(arguments, metrics)))
        state = self.state
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(value)
        if not decides:
            return
        if state.best_metric is None:  # from here on patience counts, whatever comes first
            state.best_metric = -math.inf if arguments.greater_is_better else math.inf
        best = is_better(value, state.best_metric, greater=arguments.greater_is_better)
        if best:
            state.best_metric, state.best_global_step = value, state.global_step
        if arguments.save_strategy == "best":
            self.control.should_save = best

    def _evaluated(self, run: Session) -> dict[str, float]:
        before = checkpoint.random_state()
        try:
            metrics = self.evaluate(ignore_keys=run.ignore_keys)
        except Asked:  # it is evaluated again from here
            checkpoint.set_random_state(before)
            raise
        if self._world.size > 1:  # each has drawn what its share needs
            checkpoint.set_random_state(before)
        return metrics

    def _look(self, run: Session) -> None:
        """After a reading: what the adapter answers; whether it is the best so far, and is kept;
        whether the run has begun to memorise, and ends."""
        self.observers.tell(*self._answers(run))
        if not run.arguments.stop_when_memorising:
            return
        here = run.position.step
        run.lowest, verdict = self._world.first(lambda: self._judged(run))
        self.control.should_save |= bool(here and run.lowest == here)
        if verdict:
            self.observers.say(f"stopping: {verdict}")
            self.control.should_training_stop = True

    def _judged(self, run: Session) -> tuple[int | None, str]:
        """The step of the best reading, and the verdict where it is that the run memorises."""
        told = record.read(Path(run.arguments.output_dir))
        over = told.memorises(run.arguments.memorising_patience)
        return told.verdict.best, str(told.verdict) if over else ""

    def _answers(self, run: Session) -> list[Sampled]:
        """To the first prompts of the evaluation set, as many as are asked for."""
        if not run.samples:
            return []
        try:
            with optim.resting(self.optimizer), checkpoint.random_state_kept():
                if not self._world.is_first:
                    return []
                return samples.answers(
                    self.model,
                    self.eval_dataset,
                    collator=self.data_collator,
                    tokenizer=self.processing_class,
                    stops=self.contract.get("stop_ids"),
                    count=run.samples,
                    step=run.position.step,
                )
        except Exception as error:  # whatever it is, the run goes on
            run.samples = 0
            self.observers.say(f"answers cannot be shown, left out: {error}")
            return []

    def _take_reading(self, run: Session, *names: str) -> None:
        """The readings that a script gets by passing an evaluation set alone, and those of training
        examples beside any evaluation: journal and terminal see them, `log_history`, callbacks and
        random state do not."""
        step, count = run.position.step, run.readings.examples
        fresh = step not in run.read_at
        run.read_at.add(step)
        if not (count and fresh and self._world.first(lambda: run.cost.allows(step))):
            return
        began, told = time.monotonic(), list[Evaluated]()
        try:
            with checkpoint.random_state_kept():
                for name in names:
                    rows = self.train_dataset if name == PROBE else self.eval_dataset
                    told.append(self._read(run, rows, name=name))
        except Asked:
            run.read_at.discard(step)
            raise
        except Exception as error:  # nobody asked for it: whatever it is, the run goes on
            run.readings = Readings(frozenset(), 0)
            self.observers.say(f"loss cannot be read by itself, left out: {error}")
            return
        run.cost.add(step, time.monotonic() - began)
        self.observers.tell(*told, run.memory_peak())

    def _read(self, run: Session, rows: Any, *, name: str) -> Evaluated:
        """A reading of as many of `rows` as were planned, always the same ones."""
        chosen = parts.subset(rows, run.readings.examples, seed=run.arguments.seed)
        batches = self.get_test_dataloader(chosen)
        measured = self._measured(batches, loss_only=True, keep=lambda _: run.signals.poll())
        return evaluated(measured, self.state, name=name, occasion="reading")

    # ---- beginning, saving, ending -------------------------------------------------------------

    def _begin(self, kept: Kept | None) -> Session:
        """The run's parts, at its start or at the position of the checkpoint `kept`."""
        arguments, overrides = self._settings, self._overrides()
        batches = self.get_train_dataloader()
        steps = parts.steps_of(batches, arguments)
        plan = parts.plan(arguments, steps, done=kept.state.position if kept else START)
        objective = self._objective()
        self.model.zero_grad()  # of a backward before this run, or of a run that failed
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer_and_scheduler(plan.steps)
        own = overrides.any_of(*parts.STEPPING)
        divides = objective.divides and not own
        self._reads.forget = self._packing.forget
        room = self._packing.room(self.model, arguments, divides=divides, tell=self.observers.tell)
        engine = parts.engine(
            self.model,
            objective,
            arguments=arguments,
            precision=self._precision,
            updater=(self.optimizer, self.lr_scheduler),
            run_part=self._run_training_step if own else None,
            world=self._world,
        )
        self._callbacks.begin(
            max_steps=plan.steps, epochs=plan.epochs, batch_size=arguments.train_batch_size
        )
        self._callbacks.shown(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            train_dataloader=batches,
        )
        readings = parts.readings(
            plan, arguments, train=self.train_dataset, held_out=self.eval_dataset,
            overrides=overrides,
        )  # fmt: skip
        run = Session(
            arguments=arguments,
            plan=plan,
            engine=engine,
            loader=steps,
            watch=Watch(self._callbacks, self._signals, engine.updater, room, self._world),
            say=self.observers.say,
            layout=partial(self._packing.lay_out, shifted=objective.shifted, world=self._world),
            laid_out=self._packing.layout,
            progress=Progress(arguments.max_nonfinite_steps, self._precision.settling),
            readings=readings,
            samples=arguments.show_samples,
            planned=self._packing.planned,
        )
        run.notices = (
            *arguments.notices,
            self._precision.notice,
            idle_gpus(arguments.device),
            self._optimizer_notice,
            *overrides.notices,
            *self._packing.notices,
            run.readings.notice,
        )
        return run

    def _run_training_step(self, batch: MicroBatch, whole: Whole) -> Tensor:
        """An overridden `training_step` in the engine's place."""
        self.current_gradient_accumulation_steps = whole.batches
        count = torch.tensor(whole.supervised, device=self._device) if whole.supervised else None
        counted = (count if self._counts() else None,)
        given = counted if parts.takes_third(self.training_step) else ()
        return self.training_step(self.model, batch.inputs, *given).detach()

    @contextmanager
    def _telling_of_bad_numbers(self, run: Session) -> Generator[None]:
        """Wherever numbers are read or saved: where they are not finite, the run may end so."""
        try:
            yield
        except Ended as bad:
            self.observers.tell(*bad.events, run.ended_event("non-finite"))
            raise

    def _interrupted(self, run: Session, asked: Asked) -> None:
        """Save at the last finished step, say how to resume, and raise."""
        run.abandon_step()
        self.observers.tell(*run.progress.read())
        if run.saved_at != run.position.step:
            self._keep(run, whole=True)
        with suppress(ElsewhereError):  # who ends before the first has saved takes it along
            self._world.wait()
        message = run.farewell(str(asked), resume=f"Resume: {self.resume_command}")
        self.observers.tell(run.ended_event("interrupted"))
        if asked.number == signal.SIGINT:
            raise KeyboardInterrupt(message) from None
        raise TrainingInterrupted(message.splitlines()) from None

    def _out_of_memory(self, run: Session, full: Full) -> NoReturn:
        """Save at the last finished step, unless the update was cut short, and raise."""
        run.abandon_step()
        self.observers.tell(*run.progress.read())
        if not full.committed and run.position.step and run.saved_at != run.position.step:
            self._keep(run, whole=True)
        self.observers.tell(run.ended_event("out-of-memory"))
        stopped = f"Training stopped at step {run.position.step} of {run.plan.steps}; "
        kept = f"{run.saved_in or 'no checkpoint'} is whole and the last."
        raise full.explained(after=[stopped + kept, f"Resume: {self.resume_command}"]) from full

    def _finish(self, run: Session) -> TrainOutput:
        metrics = {**run.metrics(), "total_flos": self.state.total_flos}
        self.log(metrics)
        if run.arguments.load_best_model_at_end or run.arguments.stop_when_memorising:
            self._world.wait()  # until the first has saved it
        best = self._best(run)
        if best:
            adapters.restore(self.model, best)
        self._check_finite()
        self._callbacks.fire("on_train_end")
        stopped = run.position.step < run.plan.steps
        reason = "stopped" if stopped else "finished"
        self.observers.tell(run.ended_event(reason, restored=str(best or "")))
        return TrainOutput(run.position.step, run.progress.mean_loss, metrics)
