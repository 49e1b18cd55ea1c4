"""What has changed since a checkpoint was written, and what that means for going on from it.

Owns the class of every knob and of every other fact about a run. Compares flat mappings of plain
values; does not know where they come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lorafit.errors import ConfigError

HARMLESS: Final = (
    "output_dir", "resume_from_checkpoint", "overwrite", "accept", "max_nonfinite_steps",
    "trust_remote_code", "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "include_num_input_tokens_seen", "per_device_eval_batch_size", "save_strategy", "save_steps",
    "save_total_limit", "save_only_model", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "dataloader_pin_memory", "torch_empty_cache_steps",
    "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches", "include_for_metrics",
    "eval_accumulation_steps", "memory_limit", "show_samples", "do_train", "do_eval", "do_predict",
)  # fmt: skip
"""Knobs that no number of the run depends on."""

ROUNDING: Final = (
    "layout", "token_budget", "attn_implementation", "use_cpu", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "recompute", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "full_determinism",
)  # fmt: skip
"""Knobs that change how the same numbers are computed: the curve goes on, its last bits may not."""

CHANGES: Final = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "loraplus_lr_ratio", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16",
    "fp16", "tf32", "seed", "data_seed", "train_sampling_strategy", "length_column_name",
    "dataloader_drop_last", "remove_unused_columns", "label_names", "supervise", "eval_data",
    "eval_split", "max_eval_rows", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "stop_when_memorising", "memorising_patience",
)  # fmt: skip
"""Knobs that make it another run: it learns otherwise, or another adapter is the best."""

SHOWN: Final = {
    "data": (
        "data", "data_weights", "eval_share", "split", "shape", "prompt_field", "answer_field",
        "skip_bad_rows", "max_rows", "max_length", "truncation",
    ),
    "base": ("model", "revision", "dtype", "quantize"),
    "adapter": (
        "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora",
        "modules_to_save",
    ),
    "step": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "optimizer": ("optim",),
}  # fmt: skip
"""Knobs that are not compared themselves, but what they make, under the fact's name."""

FACTS: Final = {
    "machine": "rounding",
    "versions": "rounding",
    "laid_out": "rounding",
    "data": "changes",
    "template": "changes",
    "base": "changes",
    "adapter": "changes",
    "step": "changes",
    "base.name": "harmless",
    "base.path": "harmless",
    "base.model_type": "impossible",
    "base.parameters": "impossible",
    "optimizer": "impossible",
    "optimizer.state": "changes",
}
"""What a run is compared by besides its knobs -> the class of a difference; the longer name, with a
part of the fact, goes first."""


@dataclass(frozen=True)
class Changes:
    """What differs and matters, one `name=value (was value)` each, by class."""

    rounding: tuple[str, ...]
    changes: tuple[str, ...]
    impossible: tuple[str, ...]


def said(kept: Mapping[str, Any], now: Mapping[str, Any], *, accepted: bool) -> list[str]:
    """A line for each class of differences that there are.

    Raises:
        ConfigError: the run cannot go on with them, or would be another and that is not `accepted`.
    """
    found, hint = since(kept, now), _step_kept(kept, now)
    if found.impossible:
        raise ConfigError(
            f"The checkpoint's run cannot go on with {', '.join(found.impossible)}.",
            why="Its weights and its optimiser's state belong to the other.",
            fix="Put that back, or train afresh into another folder.",
        )
    if found.changes and not accepted:
        raise ConfigError(
            ["The checkpoint was made by another run:", *(f"  {line}" for line in found.changes)],
            why="Going on would be neither that run nor this one.",
            fix=[
                "Put these back, or go on all the same: --accept (accept=True in Python).",
                *([hint] if hint else []),
            ],
        )
    lines = {
        "changes the run and differs from the checkpoint's: ": found.changes,
        "goes on to rounding, not bit for bit: ": found.rounding,
    }
    told = [line + ", ".join(which) for line, which in lines.items() if which]
    return [*told, *([hint] if hint else [])]


def _step_kept(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a step keeps its examples over another number of processes; empty where it does."""
    names = "step.examples", "machine.processes", "per_device_train_batch_size"
    if not all(type(kept.get(n)) is type(now.get(n)) is int and now[n] for n in names):
        return ""
    (wanted, before, _), (found, processes, batch) = (
        [facts[name] for name in names] for facts in (kept, now)
    )
    accumulated, rest = divmod(wanted, processes * batch)
    if before == processes or wanted == found or rest:
        return ""
    many = "1 process" if processes == 1 else f"{processes} processes"
    return f"gradient_accumulation_steps={accumulated} keeps {wanted} examples a step with {many}"


def since(kept: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The differences between what a checkpoint was `kept` with and what is there `now`.

    Both are flat: knobs by name, parts of facts as `fact.part`. What either does not know (None, or
    no such name) is not compared.
    """
    found: dict[str, list[str]] = {"rounding": [], "changes": [], "impossible": []}
    for name, value in now.items():
        kind, was = class_of(name), kept.get(name)
        if kind in found and value is not None and was is not None and value != was:
            found[kind].append(f"{name}={_short(value)} (was {_short(was)})")
    return Changes(**{kind: tuple(lines) for kind, lines in found.items()})


def class_of(name: str) -> str:
    """harmless, rounding, changes or impossible; what nobody has classed changes the run."""
    if name in HARMLESS or any(name in knobs for knobs in SHOWN.values()):
        return "harmless"
    if name in ROUNDING:
        return "rounding"
    return FACTS.get(name) or FACTS.get(name.partition(".")[0], "changes")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
