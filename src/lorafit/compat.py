"""Door to transformers for everything that is not a model: its arguments, schedules, seeds.

Owns the conversion of `TrainingArguments` in both directions. Which names are honoured is
`lorafit.names`' business; callbacks are `run/callbacks.py`'s. transformers is imported when a
function is called, never before.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from lorafit.arguments import TrainingArguments
from lorafit.names import ALIASES, NO_OPS, REFUSED
from lorafit.panel import plain

if TYPE_CHECKING:
    import transformers
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

SETTLED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "output_dir": ("trainer_output",),
        "report_to": ([],),
        "debug": ([],),
        "disable_tqdm": (False,),
        "activation_checkpointing": (False,),
        "gradient_checkpointing": (False,),
        "do_eval": (True,),
        "dataloader_multiprocessing_context": ("fork",),
        "torch_compile_backend": ("inductor",),
        "fsdp_config": (
            {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False},
        ),
    }
)
"""What transformers' constructor makes of fields that nobody set; lorafit derives its own."""


def from_transformers(args: "transformers.TrainingArguments") -> TrainingArguments:
    """lorafit's arguments for transformers'; what differs from a default there counts as set.

    Fields that a user's subclass added are carried over as plain attributes.

    Raises:
        ConfigError: `args` asks for something that is not honoured.
    """
    given: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    known = {*TrainingArguments.knobs, *ALIASES, *NO_OPS, *REFUSED}
    for field in fields(args):
        value = plain(getattr(args, field.name))
        if field.name not in known:
            extra[field.name] = value
        elif not _is_default(field.name, value, default=_default(field)):
            given[field.name] = value
    made = TrainingArguments(**given)
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _is_default(name: str, value: Any, *, default: Any) -> bool:
    if name == "accelerator_config" and is_dataclass(value):
        return value == type(value)()  # type: ignore[operator]
    return value == plain(default) or value in SETTLED.get(name, ())


def to_transformers(args: TrainingArguments) -> "transformers.TrainingArguments":
    """transformers' arguments with the same values, for callbacks that read them.

    Its constructor is not run: that would set up accelerate's process state, move the current
    CUDA device and refuse `bf16` on a CPU. What it derives is filled in here.
    """
    import transformers

    made = object.__new__(transformers.TrainingArguments)
    kinds = get_type_hints(transformers.TrainingArguments)
    values = {field.name: _default(field) for field in fields(made)}
    values |= {name: value for name, value in args.to_dict().items() if name in values}
    for new, alias in ALIASES.items():
        if new in values and not alias.old:
            values[new] = values[alias.to]
    values |= {name: _as_enum(value, kinds[name]) for name, value in values.items()}
    derived = {
        "debug": [],
        "disable_tqdm": bool(args.disable_tqdm),
        "distributed_state": None,
        "deepspeed_plugin": None,
        "fsdp_plugin_args": None,
        "mixed_precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "no",
        "_n_gpu": args.n_gpu,
        "_setup_devices": args.device,
    }
    own = {n: value for n, value in vars(args).items() if n not in args.knobs and n[0] != "_"}
    vars(made).update(own | values | derived)
    return made


def _as_enum(value: Any, kind: Any) -> Any:
    enums = (arm for arm in get_args(kind) if isinstance(arm, type) and issubclass(arm, Enum))
    enum = next(enums, None)
    return enum(value) if enum and isinstance(value, str) else value


def adafactor_class() -> "type[Optimizer]":
    """transformers' Adafactor."""
    from transformers.optimization import Adafactor

    return Adafactor


def make_scheduler(
    optimizer: "Optimizer", args: TrainingArguments, *, total_steps: int
) -> "LRScheduler":
    """transformers' schedule for `lr_scheduler_type` over `total_steps` optimiser steps.

    `reduce_lr_on_plateau` is stepped with the metric after an evaluation, the others after
    each step.
    """
    from transformers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
    )


def default_collator(processing_class: Any) -> Any:
    """The collator that transformers' Trainer takes where none is given."""
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def makes_rows_alone(collator: Any) -> bool:
    """Whether `collator` is one of transformers' that makes of each row what it would make of it
    alone, padding aside; a subclass may do anything."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding
    from transformers.data import data_collator as collators

    alone = (
        DataCollatorWithPadding,
        collators.DataCollatorForSeq2Seq,
        collators.DataCollatorWithFlattening,
        collators.DefaultDataCollator,
    )
    if type(collator) is DataCollatorForLanguageModeling:
        return not collator.mlm
    return type(collator) in alone or collator is collators.default_data_collator


def name_of(function: Any) -> str:
    """What a person knows a function or an instance by."""
    return getattr(function, "__name__", type(function).__name__)


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch as transformers does; `deterministic` asks CUDA for it too."""
    import transformers
    from transformers.trainer_utils import enable_full_determinism

    enable_full_determinism(seed) if deterministic else transformers.set_seed(seed)


def label_smoother(factor: float) -> Any:
    """transformers' `LabelSmoother`: (outputs, labels, shift_labels) -> loss."""
    from transformers.trainer_pt_utils import LabelSmoother

    return LabelSmoother(epsilon=factor)


def align_special_tokens(model: Any, processing_class: Any) -> None:
    """Let the model's configuration name the tokenizer's special tokens, as transformers' Trainer
    does before training: padding, beginning and end of text."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, trainer_utils

    align = vars(trainer_utils).get("align_special_tokens")  # not in every release
    beneath = getattr(model, "get_base_model", lambda: model)()
    known = isinstance(beneath, PreTrainedModel)
    if align and known and isinstance(processing_class, PreTrainedTokenizerBase):
        align(beneath, processing_class)


def eval_prediction(parts: Mapping[str, Any]) -> Any:
    """transformers' `EvalPrediction`: predictions, label_ids; inputs and losses where given."""
    from transformers import EvalPrediction

    wanted = ("predictions", "label_ids", "inputs", "losses")
    return EvalPrediction(**{name: parts.get(name) for name in wanted})  # type: ignore[arg-type]


def eval_container(*, joined: bool) -> Any:
    """transformers' container of an evaluation's tensors, joined or as a list of batches."""
    from transformers.trainer_pt_utils import EvalLoopContainer

    return EvalLoopContainer(joined, padding_index=-100)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` with Python's numbers for numpy's and torch's scalars."""
    from transformers.trainer_utils import denumpify_detensorize

    return denumpify_detensorize(dict(metrics))  # type: ignore[return-value]


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' readable form of a run's metrics: rounded, times as h:mm:ss."""
    from transformers.trainer_pt_utils import metrics_format

    return metrics_format(dict(metrics))


def log_metrics(trainer: Any, split: str, *, metrics: Mapping[str, Any]) -> None:
    """Print metrics as transformers does."""
    from transformers.trainer_pt_utils import log_metrics

    log_metrics(trainer, split, dict(metrics))


def save_metrics(trainer: Any, split: str, *, metrics: Mapping[str, Any], combined: bool) -> None:
    """Write `{split}_results.json` and `all_results.json` as transformers does."""
    from transformers.trainer_pt_utils import save_metrics

    save_metrics(trainer, split, dict(metrics), combined=combined)


def tokenizer_of(collator: Any) -> Any:
    """The tokenizer that a collator holds, as transformers' collators do; None without one."""
    return getattr(collator, "processing_class", None) or getattr(collator, "tokenizer", None)
