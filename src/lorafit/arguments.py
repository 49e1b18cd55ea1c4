"""Every knob, once: default, recipe, unit, range and help of model, data and training arguments.

Owns the three panels and what their values mean together. Inert: constructing one touches no
device, file or variable (`TrainingArguments.device` alone looks at the machine, when asked).
Command line options, YAML keys and docs/arguments.md are made from here.
"""

import json
import logging
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from lorafit.clashes import clashes, clashes_of_best
from lorafit.panel import Panel, fits, knob, panel, parsed
from lorafit.processes import OfProcesses

if TYPE_CHECKING:
    import torch

OPTIMISERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "adafactor", "sgd", "lion_32bit", "lion_8bit", "paged_lion_32bit",
    "paged_lion_8bit",
)  # fmt: skip
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay", "reduce_lr_on_plateau",
)  # fmt: skip
LOG_LEVELS = ("passive", "debug", "info", "warning", "error", "critical", "detail")
SHAPES = (
    "auto", "messages", "conversations", "instruction", "question", "completion", "text", "tokens",
)  # fmt: skip
INTERVALS = ("no", "steps", "epoch")
FROM_0, FROM_1, PART = (0, None), (1, None), (0, 1)
PYTHON_ONLY = "Python only"
"""The group of knobs that only a script can use; the command line does not list them."""

OFTEN = 0.05
"""Part of a run: how often it is read where somebody wants to know when it begins to memorise."""
ONCE = "This time only"
"""The group of knobs that are said for one run and belong to no configuration file of it."""
NOT_IN_FILES = ("trust_remote_code",)
"""What nobody agrees to by using a file that somebody else wrote."""

_model, _adapter = partial(knob, group="Model"), partial(knob, group="Adapter")
_data, _rows = partial(knob, group="Data"), partial(knob, group="Lengths")
_length, _rate = partial(knob, group="Length and batch"), partial(knob, group="Learning rate")
_optim, _loss = partial(knob, group="Optimiser"), partial(knob, group="Loss")
_speed, _order = partial(knob, group="Precision and speed"), partial(knob, group="Order and seeds")
_log, _eval = partial(knob, group="Log"), partial(knob, group="Evaluate")
_save, _loader = partial(knob, group="Save and resume"), partial(knob, group="Reading ahead")
_script, _once = partial(knob, group=PYTHON_ONLY), partial(knob, group=ONCE)


@panel
class ModelArguments(Panel):
    """The base model and the adapter that is trained on it."""

    model: str = _model("", "Base model: a folder, or a name on the Hugging Face Hub.")
    revision: str = _model("", "Branch, tag or commit of a base from the Hub.")
    dtype: str = _model(
        "auto",
        "Number format of the base; auto: as it was saved.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = _model(
        "", "Load the base's linear layers in 4 or 8 bits (bitsandbytes); empty: as they are.",
        choices=("", "nf4", "int8"),
    )  # fmt: skip
    attn_implementation: str = _model("", "Attention as transformers names it; empty: its choice.")
    trust_remote_code: str = _model(
        "", "Hub repository (org/name) whose Python code may run to load the base; empty: none."
    )
    lora_r: int = _adapter(8, "Rank of the adapter.", recipe=16, span=FROM_1)
    lora_alpha: int = _adapter(
        8, "The adapter's output is multiplied by alpha / r.", recipe=32, span=FROM_1
    )
    lora_dropout: float = _adapter(0.0, "Share of the adapter's inputs dropped.", span=PART)
    lora_target_modules: str | list[str] = _adapter(
        "all-linear", "Layers that get an adapter: all-linear, or names with commas between."
    )
    use_rslora: bool = _adapter(False, "Scale by alpha / sqrt(r) instead (rsLoRA).")
    use_dora: bool = _adapter(False, "Train magnitude and direction apart (DoRA); slower.")
    modules_to_save: list[str] | None = _adapter(
        None, "Modules trained in full and saved with the adapter."
    )

    def check(self) -> list[str]:
        """Every complaint about the values, one line each; empty if they can be run."""
        return [*_missing("model", self.model), *super().check()]


@panel
class DataArguments(Panel):
    """The examples, and what is done with them before training."""

    data: str = _data(
        "",
        "Training data: jsonl, json, csv, txt or parquet files with commas between, a folder of "
        "them, a name on the Hub (owner/name, or owner/name:configuration), or - for standard "
        "input.",
    )
    data_weights: str | list[str] | None = _data(
        None, "How often each of several is learned in an epoch, such as 1,0.5; none: once."
    )
    eval_data: str = _data("", "Evaluation data; empty: some rows of the training data.")
    eval_split: str = _data(
        "",
        "Split that is evaluated, of --eval-data or else of --data; empty: --eval-data's "
        "validation, test or train, the first that it has.",
    )
    eval_share: float = _data(
        0.1, "Part of the data held back to evaluate, at most 1000 rows; 0: none.", span=PART
    )
    split: str = _data("train", "Which split of --data is trained on; a single file has none.")
    shape: str = _data("auto", "How a row is laid out; auto looks at its fields.", choices=SHAPES)
    prompt_field: str = _data("", "The row's field that holds the prompt; empty: by shape.")
    answer_field: str = _data("", "The row's field that holds the answer; empty: by shape.")
    supervise: str = _data(
        "answers",
        "Which tokens carry loss: the assistant's answers, its last answer, every turn but the "
        "system's, or all.",
        choices=("answers", "last", "turns", "all"),
    )
    skip_bad_rows: bool = _data(False, "Leave out rows that cannot be used, and count them.")
    max_rows: int = _data(0, "Train on at most so many; 0: all.", unit="rows", span=FROM_0)
    max_eval_rows: int = _data(0, "Evaluate on at most so many; 0: all.", unit="rows", span=FROM_0)
    max_length: int = _rows(
        0, "Longest example; 0: as long as data and model have it.", unit="tokens", span=FROM_0
    )
    truncation: str = _rows(
        "cut_tail",
        "What is done with a longer example; how many there were is said.",
        choices=("error", "drop", "cut_prompt", "cut_tail"),
    )

    def check(self) -> list[str]:
        """Every complaint about the values, one line each; empty if they can be run."""
        return [*_missing("data", self.data), *super().check()]


@parsed
@panel
class TrainingArguments(Panel, OfProcesses):
    """How to train: transformers' names, meanings and defaults (5.23).

    `TrainingArguments(...)` has transformers' defaults, `TrainingArguments.recipe(...)` those of
    the command line. Old names are translated or accepted with a line in `notices`; a name that
    is not honoured raises ConfigError, an unknown one UnknownNameError. Values are looked at by
    `check()`, not by the constructor. `report_to` is a list once constructed.
    """

    output_dir: str = knob("trainer_output", "Folder that the run is written to.", group="Output")

    per_device_train_batch_size: int = _length(
        8, "Examples of a micro-batch, per device.", recipe=4, unit="rows", span=FROM_1
    )
    gradient_accumulation_steps: int = _length(
        1, "Micro-batches per step; times their size: the effective batch.", recipe=4, span=FROM_1
    )
    num_train_epochs: float = _length(3.0, "Passes over the data.", unit="epochs", span=FROM_0)
    max_steps: int = _length(-1, "Length of the run if above 0, whatever the epochs.", unit="steps")
    layout: str = _length(
        "packed", "How a step's examples are laid out: end to end, or as the micro-batches say; "
        "never what it learns.", choices=("packed", "as_given"),
    )  # fmt: skip
    token_budget: int | None = _length(
        None, "Tokens laid end to end at a time; none: what fits, 1024 at most on a CPU.",
        unit="tokens", span=FROM_1,
    )  # fmt: skip
    max_nonfinite_steps: int = _length(
        3, "Stop after so many non-finite ones in a row.", unit="steps", span=FROM_1
    )

    learning_rate: float = _rate(5e-5, "Highest learning rate.", recipe=2e-4, span=FROM_0)
    lr_scheduler_type: str = _rate(
        "linear", "Course of the learning rate.", recipe="cosine", choices=SCHEDULES
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = _rate(
        None, 'More about the course, such as {"num_cycles": 2}.'
    )
    warmup_steps: float = _rate(
        0, "Rise from 0 first; below 1: part of the run.", recipe=0.03, unit="steps", span=FROM_0
    )

    optim: str = _optim("adamw_torch_fused", "Optimiser.", choices=OPTIMISERS)
    optim_args: str | None = _optim(None, "More for the optimiser, such as betas=(0.9,0.95).")
    weight_decay: float = _optim(0.0, "Decay of weights that are no norm or bias.", span=FROM_0)
    adam_beta1: float = _optim(0.9, "Decay of Adam's first moment.", span=PART)
    adam_beta2: float = _optim(0.999, "Decay of Adam's second moment.", span=PART)
    adam_epsilon: float = _optim(1e-8, "Added to Adam's denominator.", span=FROM_0)
    loraplus_lr_ratio: float | None = _optim(
        None, "Learning rate of LoRA's B over that of its A (LoRA+, about 16); none: the same.",
        span=FROM_0,
    )  # fmt: skip
    max_grad_norm: float = _optim(1.0, "Longest gradient; 0: any.", span=FROM_0)

    label_smoothing_factor: float = _loss(
        0.0, "Part of a target spread over all tokens.", span=PART
    )
    neftune_noise_alpha: float | None = _loss(
        None, "Noise added to embeddings in training (NEFTune, 5 to 15).", span=FROM_0
    )

    bf16: bool = _speed(False, "Matrix products in bfloat16 where that is native.", recipe=True)
    fp16: bool = _speed(False, "Matrix products in float16, scaled; CUDA only.")
    tf32: bool | None = _speed(None, "TensorFloat-32 matrix products on CUDA; none: torch's way.")
    use_cpu: bool = _speed(False, "Train on the CPU even where there is a GPU.")
    gradient_checkpointing: bool = _speed(
        False, "Recompute activations in backward: less memory, slower."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = _speed(
        None, 'More for torch.utils.checkpoint, such as {"use_reentrant": false}.'
    )
    memory_limit: str | int | None = _speed(
        None,
        "Memory that the run may take, such as 8GB or a share with a per cent sign, of the "
        "GPU where it trains there; none: what container and machine leave.",
    )
    recompute: str = _speed(
        "auto", "What backward makes again of fused layers, to keep less: nothing, gate and up, "
        "also q, k and v, or all; auto: nothing if that fits, or all with gradient_checkpointing.",
        choices=("auto", "none", "mlp", "half", "layer"),
    )  # fmt: skip
    torch_compile: bool = _speed(False, "Compile the model with torch.compile.")
    torch_compile_backend: str | None = _speed(None, "torch.compile's backend.")
    torch_compile_mode: str | None = _speed(None, "torch.compile's mode.")
    torch_empty_cache_steps: int | None = _speed(
        None, "Hand cached GPU memory back every so many.", unit="steps", span=FROM_1
    )

    seed: int = _order(42, "Decides all that is random.", span=FROM_0)
    data_seed: int | None = _order(None, "Decides the order of examples; none: seed.", span=FROM_0)
    full_determinism: bool = _order(False, "Bit-identical runs on CUDA too; slower.")
    train_sampling_strategy: str = _order(
        "random", "Order of the examples.", choices=("random", "sequential", "group_by_length")
    )

    logging_strategy: str = _log("steps", "When the loss is logged.", choices=INTERVALS)
    logging_steps: float = _log(
        500, "Log so often; below 1: part of the run.", recipe=10, unit="steps", span=FROM_0
    )
    logging_first_step: bool = _log(False, "Log the first step too.")
    log_level: str = _log("passive", "How much lorafit says.", choices=LOG_LEVELS)
    disable_tqdm: bool | None = _log(None, "No live progress; none: only in a terminal.")
    report_to: str | list[str] = _log("none", "Trackers to report to: none, all, or names.")
    run_name: str | None = _log(None, "The run's name in trackers.")
    project: str = _log("huggingface", "The project's name in Trackio.")
    trackio_space_id: str | None = _log(None, "The Space that Trackio writes to.")
    include_num_input_tokens_seen: str | bool = _log(
        "no", "Count the tokens seen.", choices=("no", "all", "non_padding")
    )

    eval_strategy: str = _eval("no", "When to evaluate.", recipe="epoch", choices=INTERVALS)
    eval_steps: float | None = _eval(
        None, "Evaluate so often; none: logging_steps; below 1: part of the run.", unit="steps",
        span=FROM_0,
    )  # fmt: skip
    eval_delay: float = _eval(0, "Evaluate no earlier.", unit="epochs or steps", span=FROM_0)
    eval_on_start: bool = _eval(False, "Evaluate before the first step.")
    per_device_eval_batch_size: int = _eval(
        8, "Examples at once, per device.", unit="rows", span=FROM_1
    )
    load_best_model_at_end: bool = _eval(False, "End with the best adapter.", recipe=True)
    stop_when_memorising: bool = _eval(
        False, "Stop where it begins to memorise; end with the best adapter."
    )
    memorising_patience: int = _eval(1, "Evaluations in a row that find it so.", span=FROM_1)
    show_samples: int = _eval(0, "Answers shown at each evaluation.", span=FROM_0)
    metric_for_best_model: str | None = _eval(None, "What best means; none: the loss.")
    greater_is_better: bool | None = _eval(None, "Whether more is better; none: unless a loss.")

    save_strategy: str = _save(
        "steps", "When to save.", recipe="epoch", choices=(*INTERVALS, "best")
    )
    save_steps: float = _save(
        500, "Save so often; below 1: part of the run.", unit="steps", span=FROM_0
    )
    save_total_limit: int | None = _save(
        None, "Checkpoints kept, the best one always; none: all.", recipe=2, span=FROM_1
    )
    save_only_model: bool = _save(False, "Save the adapter alone: the run cannot be resumed.")
    dataloader_num_workers: int = _loader(0, "Processes that read ahead.", span=FROM_0)
    dataloader_prefetch_factor: int | None = _loader(
        None, "Micro-batches each reads ahead.", span=FROM_1
    )
    dataloader_persistent_workers: bool = _loader(False, "Keep the processes from epoch to epoch.")
    dataloader_pin_memory: bool = _loader(True, "Read into memory that a GPU can copy from.")
    dataloader_drop_last: bool = _loader(False, "Leave out a last micro-batch that is not full.")

    resume_from_checkpoint: str | None = _once(None, "Folder of the checkpoint to go on from.")
    accept: bool = _once(
        True, "Resume although something differs that changes the run; what it is, is said.",
        recipe=False,
    )  # fmt: skip
    overwrite: bool = _once(False, "On the command line, train into a folder that holds a run.")

    length_column_name: str = _script("length", "Column that group_by_length takes lengths from.")
    remove_unused_columns: bool = _script(True, "Drop columns that forward does not take.")
    label_names: list[str] | None = _script(None, "Names of the inputs that are labels.")
    prediction_loss_only: bool = _script(False, "Evaluate the loss alone, without predictions.")
    include_for_metrics: list[str] = _script([], "What compute_metrics gets too: inputs, loss.")
    batch_eval_metrics: bool = _script(False, "Call compute_metrics on each micro-batch.")
    eval_do_concat_batches: bool = _script(True, "Join predictions; else a list of micro-batches.")
    eval_accumulation_steps: int | None = _script(
        None, "Move predictions to the CPU every so many.", unit="micro-batches", span=FROM_1
    )
    do_train: bool = _script(False, "For the script's own use.")
    do_eval: bool = _script(False, "For the script's own use.")
    do_predict: bool = _script(False, "For the script's own use.")

    @classmethod
    def recipe(cls, **given: Any) -> Self:
        """The command line's values for what is not `given`; they yield where they would clash."""
        return cls.from_recipe(given)

    @classmethod
    def from_recipe(cls, given: Mapping[str, Any]) -> Self:
        """`recipe(**given)`."""
        made = super().from_recipe(given)
        state, was_set = vars(made), made.was_set
        evaluate, save = was_set("eval_strategy"), was_set("save_strategy")
        if evaluate and not save and made.eval_strategy != "no":
            state["save_strategy"] = made.eval_strategy
        elif save and not evaluate and made.save_strategy in ("steps", "epoch"):
            state["eval_strategy"] = made.save_strategy
        elif not (evaluate or save) and (was_set("eval_steps") or was_set("save_steps")):
            state["eval_strategy"] = state["save_strategy"] = "steps"
        elif not (evaluate or save) and made.stop_when_memorising:
            state["eval_strategy"] = state["save_strategy"] = "steps"
            made.eval_steps = OFTEN
        if was_set("save_steps") and not was_set("eval_steps"):
            made.eval_steps = made.save_steps
        made.settle()
        if not was_set("save_steps") and made.eval_strategy == "steps":
            state["save_steps"] = made.eval_steps
        if not was_set("eval_on_start"):
            state["eval_on_start"] = made.eval_strategy != "no"
        if not was_set("load_best_model_at_end"):
            state["load_best_model_at_end"] = not clashes_of_best(state)
        state["bf16"] = made.bf16 and (was_set("bf16") or not made.fp16)
        made.settle()
        return made

    def settle(self) -> None:
        """Fill in what transformers derives from other values; a value that was set stays."""
        state, was_set = vars(self), self.was_set
        folder = state["output_dir"]
        if folder is None or isinstance(folder, str | os.PathLike):
            # As transformers does: scripts join file names to it, and `~` is no folder.
            state["output_dir"] = os.path.expanduser(folder or "trainer_output")
        state["report_to"] = _names(self.report_to)
        state["lr_scheduler_kwargs"] = _mapping(self.lr_scheduler_kwargs)
        state["gradient_checkpointing_kwargs"] = _mapping(self.gradient_checkpointing_kwargs)
        if isinstance(self.include_num_input_tokens_seen, bool):
            counted = "all" if self.include_num_input_tokens_seen else "no"
            state["include_num_input_tokens_seen"] = counted
        if not self.eval_steps or not was_set("eval_steps"):
            state["eval_steps"] = self.logging_steps if self.eval_strategy == "steps" else None
        if not self.metric_for_best_model or not was_set("metric_for_best_model"):
            plateau = self.lr_scheduler_type == "reduce_lr_on_plateau"
            state["metric_for_best_model"] = (
                "loss" if self.load_best_model_at_end or plateau else None
            )
        if not was_set("greater_is_better"):
            metric = self.metric_for_best_model
            state["greater_is_better"] = not str(metric).endswith("loss") if metric else None
        state["do_eval"] = self.do_eval or self.eval_strategy != "no"
        if self.torch_compile_backend or self.torch_compile_mode:
            state["torch_compile"] = True

    def check(self) -> list[str]:
        """Every complaint about the values, one line each; empty if they can be run.

        Combinations are looked at once every value is of its type.
        """
        complaints, state = super().check(), vars(self)
        if all(fits(state[name], knob.kind) for name, knob in self.knobs.items()):
            complaints += clashes(state)
        return complaints

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up in a run of so many."""
        return in_steps(self.warmup_steps, num_training_steps)

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimiser step: per device x accumulation x processes."""
        batches = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batches * self.world_size

    @property
    def train_batch_size(self) -> int:
        """Examples per training micro-batch on this process."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Examples per evaluation micro-batch on this process."""
        return self.per_device_eval_batch_size

    @property
    def device(self) -> "torch.device":
        """The device of this process: a CUDA device of its own, else MPS, else the CPU."""
        import torch

        if not self.use_cpu and torch.cuda.is_available():
            return torch.device("cuda", self.local_process_index)
        if not self.use_cpu and torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")

    @property
    def n_gpu(self) -> int:
        """GPUs that this process uses: 0 or 1."""
        return int(self.device.type != "cpu")

    def get_process_log_level(self) -> int:
        """`log_level` as Python's logging counts it; passive is a warning's."""
        named = {"passive": logging.WARNING, "detail": logging.DEBUG}
        return named.get(self.log_level) or logging.getLevelNamesMapping()[self.log_level.upper()]

    @contextmanager
    def main_process_first(
        self,
        local: bool = True,  # noqa: ARG002 (transformers' signature)
        desc: str = "work",  # noqa: ARG002
    ) -> Generator[None]:
        """transformers' context in which the first process runs ahead, of all machines'."""
        from lorafit import world

        with world.join(self.device).first_ahead():
            yield

    def to_dict(self) -> dict[str, Any]:
        """Every knob and its value."""
        return asdict(self)

    def to_json_string(self) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """`to_dict()` and the batch sizes, all values plain ones: what trackers store."""
        sizes = {"train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        everything = {**self.to_dict(), **sizes}
        return {k: v if isinstance(v, bool | int | float | str) else str(v)
                for k, v in everything.items()}  # fmt: skip


PANELS: Final[tuple[type[Panel], ...]] = (ModelArguments, DataArguments, TrainingArguments)
"""The control panel; no two of its knobs have the same name."""


def in_steps(steps: float, total: int) -> int:
    """`steps` of a run of `total`: below 1 it is a part of the run, rounded up."""
    return int(steps) if steps >= 1 else math.ceil(total * steps)


def _missing(name: str, value: str) -> list[str]:
    return [] if value else [f"{name} is missing."]


def _names(given: str | list[str] | None) -> list[str]:
    listed = [given] if isinstance(given, str) else given or []
    return [] if listed in ([""], ["none"]) else listed


def _mapping(given: Any) -> Any:
    """The mapping that a JSON text holds; anything else as it is, for `check` to complain about."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given
