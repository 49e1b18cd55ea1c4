"""Face: what scripts read and call of transformers' Trainer, but for the work itself.

Owns the model with its arguments, data, callbacks and observers, and answers under transformers'
names: state, control, accelerator, logs, files. `Hooks` adds what subclasses override, `Trainer`
the loop.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit import compat, parts, world
from lorafit.arguments import TrainingArguments
from lorafit.engine import optim, precision
from lorafit.engine.room import Room
from lorafit.errors import ConfigError
from lorafit.events import Saved
from lorafit.model import adapters, base, identity
from lorafit.model.card import model_card
from lorafit.run import lock, store
from lorafit.run.accelerator import Accelerator
from lorafit.run.callbacks import Callbacks, set_verbosity, speed_metrics
from lorafit.run.console import Console
from lorafit.run.metrics import last_evaluation
from lorafit.run.observers import Observers
from lorafit.run.progress import BadWeights
from lorafit.run.signals import Signals
from lorafit.session import Session


class Face:
    """See `Trainer`, whose arguments these are."""

    is_model_parallel = is_deepspeed_enabled = is_fsdp_enabled = False
    place_model_on_device = True
    deepspeed = hp_search_backend = hp_name = None
    is_in_train = _created_lr_scheduler = False
    _optimizer_notice, _initial_num_input_tokens_seen = "", 0
    _running: Session | None = None
    _held: str | None = None
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.args = TrainingArguments("trainer_output") if args is None else args
        settings = self._checked_settings()
        self._world = world.join(settings.device)
        if settings.log_level != "passive":
            set_verbosity(settings.get_process_log_level())
        compat.set_seed(settings.seed, deterministic=settings.full_determinism)
        parts.check_given(
            settings,
            model=model,
            model_init=model_init,
            optimizers=optimizers,
            kind=optimizer_cls_and_kwargs,
            sets=(train_dataset, eval_dataset),
        )
        self.model_init = model_init
        made = model if model is not None else self.call_model_init()
        self.model: nn.Module = base.place(made, settings.device)
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.data_collator = data_collator or compat.default_collator(self.processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.model_accepts_loss_kwargs = base.accepts_count(self.model)
        self.label_names = list(base.label_names(self.model, settings.label_names))
        self.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
        self.contract, self.panels = dict[str, Any](), dict[str, Any]()
        self.resume_command = "trainer.train(resume_from_checkpoint=True)"
        self._console, self._signals = Console(live=settings.disable_tqdm is not True), Signals()
        self.observers = Observers([self._console] if self._world.is_first else ())
        self._reads = Room(divides=True, tell=self.observers.tell, doing="evaluation")
        self._precision = precision.choose(settings, settings.device)
        store.make_folder(Path(settings.output_dir))
        order_seed = parts.order_seed(settings)
        self.accelerator = Accelerator(self._precision, self._world, seed=order_seed)
        self._eval_loaders: dict[str, Any] = {}
        self._callbacks = Callbacks(
            self._callback_arguments(),
            callbacks or (),
            model=self.model,
            processing_class=self.processing_class,
        )

    # ---- arguments, state, callbacks -----------------------------------------------------------

    @property
    def _settings(self) -> TrainingArguments:
        """`args` as lorafit's own, as they are now."""
        if isinstance(self.args, TrainingArguments):
            return self.args
        return compat.from_transformers(self.args)

    def _checked_settings(self) -> TrainingArguments:
        settings = self._settings
        complaints = settings.check()
        if complaints:
            raise ConfigError(complaints)
        return settings

    def _callback_arguments(self) -> Any:
        if isinstance(self.args, TrainingArguments):
            return compat.to_transformers(self.args)
        return self.args

    @property
    def state(self) -> Any:
        """transformers' `TrainerState`: global_step, epoch, log_history, best_metric, ..."""
        return self._callbacks.state

    @state.setter
    def state(self, state: Any) -> None:
        self._callbacks.state = state

    @property
    def control(self) -> Any:
        """transformers' `TrainerControl`."""
        return self._callbacks.control

    @control.setter
    def control(self, control: Any) -> None:
        self._callbacks.control = control

    @property
    def callback_handler(self) -> Any:
        """transformers' `CallbackHandler`."""
        return self._callbacks.handler

    @property
    def tokenizer(self) -> Any:
        """`processing_class`, under its older name."""
        return self.processing_class

    @property
    def model_wrapped(self) -> nn.Module:
        """The model: nothing is wrapped around it."""
        return self.model

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
        """Whether this process writes files and talks: the first of all."""
        return self._world.is_first

    def is_local_process_zero(self) -> bool:
        """Whether it is the first of this machine."""
        return self._settings.local_process_index == 0

    # What overrides copied from transformers read.

    @property
    def _train_batch_size(self) -> int:
        return self._settings.train_batch_size

    @property
    def can_return_loss(self) -> bool:
        """Whether the model returns a loss without labels where it is asked for one."""
        return "return_loss" in base.forward_names(self.model)

    @property
    def label_smoother(self) -> Any:
        """transformers' label smoothing, where `label_smoothing_factor` asks for it."""
        factor = self._settings.label_smoothing_factor
        return compat.label_smoother(factor) if factor else None

    def _get_learning_rate(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    def _get_collator_with_removed_columns(
        self,
        data_collator: Callable[[list[Any]], Any],
        description: str | None = None,  # noqa: ARG002 transformers' signature
    ) -> Callable[[list[Any]], Any]:
        return parts.columns_kept(data_collator, self.model, arguments=self._settings)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:  # noqa: ARG002
        if not self._settings.remove_unused_columns:
            return dataset
        kept = base.forward_names(self.model, self._settings.label_names)
        return dataset.remove_columns([n for n in dataset.column_names if n not in kept])

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002
        return str(self._settings.output_dir)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, which may take the trial: None here."""
        assert self.model_init is not None
        return self.model_init(*[trial][: parts.needed(self.model_init)])

    def _show_progress(self) -> None:
        """Let the console show progress, unless its callback was taken out."""
        if not self._world.is_first:
            return
        shows = self._console in self.observers
        if shows and not self._callbacks.draws():
            self.observers.remove(self._console)
        elif self._callbacks.draws() and not shows:
            self.observers.insert(0, self._console)

    @contextmanager
    def holding_output(self) -> Generator[None]:
        """Inside, no other trainer writes into `output_dir`; may be nested. What writers that were
        killed left half done there is finished or undone.

        Raises:
            OutputError: another trainer does, which is named; or it cannot be written.
        """
        if self._held is not None:
            yield
            return
        folder = store.make_folder(Path(self._settings.output_dir))
        with lock.held(folder) if self._world.is_first else nullcontext("") as self._held:
            try:
                if self._world.is_first:
                    store.tidy(folder)
                self._world.wait()  # what the others read there is tidied
                yield
            finally:
                self._held = None

    # ---- logs and files ------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append `logs` to `state.log_history` and tell callbacks.

        Args:
            start_time: When the run began, for its tokens per second where tokens are counted.
        """
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self._settings.include_num_input_tokens_seen != "no":
            seen = self.state.num_input_tokens_seen
            logs["num_input_tokens_seen"] = seen
            if start_time is not None:
                new = seen - self._initial_num_input_tokens_seen
                logs |= speed_metrics("train", start_time, num_tokens=new)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._callbacks.fire("on_log", logs=logs)

    def metrics_format(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """`metrics` rounded and times as h:mm:ss, for people."""
        return compat.metrics_format(metrics)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print `metrics` of "train", "eval" or "test"."""
        compat.log_metrics(self, split, metrics=metrics)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write `{split}_results.json`, and into `all_results.json` if `combined`."""
        store.make_folder(Path(self._settings.output_dir))
        compat.save_metrics(self, split, metrics=metrics, combined=combined)

    def save_state(self) -> None:
        """Write trainer_state.json to `output_dir`; the first process does, as of all files."""
        if not self._world.is_first:
            return
        folder = store.make_folder(Path(self._settings.output_dir))
        self._callbacks.keep_state(folder / "trainer_state.json")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (the whole model without one), tokenizer, card, contract, arguments."""
        if _internal_call:
            self._save(output_dir)
            return
        self._check_finite()  # before anything is made
        if not self._world.is_first:
            return
        folder = Path(output_dir or self._settings.output_dir)
        with store.whole_files(folder) as partial:
            self._save(str(partial))
            size = store.bytes_of(partial)
        self.observers.tell(Saved(str(folder), self.state.global_step, size))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        # By the name and parameters that subclasses know.
        self._check_finite()
        folder = store.make_folder(Path(output_dir or self._settings.output_dir))
        contract = self._contract()
        adapters.save_adapter(
            self.model,
            folder,
            tokenizer=self.processing_class or compat.tokenizer_of(self.data_collator),
            contract=contract,
            card=model_card(contract),
        )
        store.write_json(folder / "training_args.json", self._settings.to_sanitized_dict())

    def _check_finite(self) -> None:
        """Nothing, if the trained weights are worth saving; raises NonFiniteError."""
        bad = optim.not_finite(self.model)
        if bad:
            raise BadWeights(base.some(bad))

    def _contract(self) -> dict[str, Any]:
        metrics = {"step": self.state.global_step, **last_evaluation(self.state.log_history)}
        return {"base": identity.described(self.model), "metrics": metrics, **self.contract}

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,  # noqa: ARG002 of one data set's loader
    ) -> None:
        """Write the model card, README.md, to `output_dir`: the run's facts and what is given."""
        if not self._world.is_first:
            return
        about = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "base_model": finetuned_from,
            "pipeline_tag": tasks,
            "datasets": dataset_tags or dataset,
        }
        folder = store.make_folder(Path(self._settings.output_dir))
        card = model_card(self._contract(), about=about)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = None,  # noqa: ARG002 transformers' signature
        blocking: bool = True,  # noqa: ARG002
        token: str | None = None,  # noqa: ARG002
        revision: str | None = None,  # noqa: ARG002
    ) -> NoReturn:
        """Refused: lorafit uploads nothing."""
        raise ConfigError(
            "Trainer.push_to_hub: lorafit uploads nothing.",
            fix="Save it and upload the folder: trainer.save_model('adapter'); huggingface_hub."
            "upload_folder(folder_path='adapter', repo_id=...).",
        )

    def hyperparameter_search(
        self,
        hp_space: Any = None,  # noqa: ARG002 transformers' signature
        compute_objective: Any = None,  # noqa: ARG002
        n_trials: int = 20,  # noqa: ARG002
        direction: Any = "minimize",  # noqa: ARG002
        backend: Any = None,  # noqa: ARG002
        hp_name: Any = None,  # noqa: ARG002
    ) -> NoReturn:
        """Refused: one training per process and setting."""
        raise ConfigError(
            "Trainer.hyperparameter_search belongs to a search service, which lorafit leaves out.",
            fix="Run one training per setting, or let optuna call a function that makes a Trainer.",
        )
