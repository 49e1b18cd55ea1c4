"""Training values that do not go together, in words.

Owns the rules over several knobs at once, most of them transformers' own. Gets values by name,
each of the right type already; knows nothing of where they came from.
"""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from lorafit import amounts


def clashes(values: Mapping[str, Any]) -> list[str]:
    """A line for each rule that the training values break; empty if they can be run."""
    keeps_best = values["load_best_model_at_end"] or values["save_strategy"] == "best"
    best = clashes_of_best(values) if keeps_best else []
    return [*_general(values), *_of_steps(values), *best]


def _general(v: Mapping[str, Any]) -> Iterator[str]:
    if v["bf16"] and v["fp16"]:
        yield "bf16 and fp16 are both on: leave one."
    if v["lr_scheduler_type"] == "reduce_lr_on_plateau" and v["eval_strategy"] == "no":
        yield "lr_scheduler_type='reduce_lr_on_plateau' needs evaluations: set eval_strategy."
    if v["num_train_epochs"] == 0 and v["max_steps"] <= 0:
        yield "num_train_epochs is 0 and max_steps is not set: nothing would be trained."
    if _broken(v["warmup_steps"]):
        yield f"warmup_steps={v['warmup_steps']!r} is above 1 and not whole."
    wrong = "" if v["memory_limit"] is None else amounts.complaint(v["memory_limit"])
    if wrong:
        yield f"memory_limit={v['memory_limit']!r:.80} {wrong}."
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if v[name] and not v["dataloader_num_workers"]:
            yield f"{name} needs dataloader_num_workers above 0."
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        if not isinstance(v[name], dict | NoneType):
            yield f"{name}={v[name]!r} is not a mapping."


def _of_steps(v: Mapping[str, Any]) -> Iterator[str]:
    for what in ("logging", "eval", "save"):
        steps = v[f"{what}_steps"]
        if v[f"{what}_strategy"] == "steps" and not steps:
            yield f"{what}_strategy='steps' needs {what}_steps above 0."
        elif v[f"{what}_strategy"] == "steps" and _broken(steps):
            yield f"{what}_steps={steps!r} is above 1 and not whole."


def _broken(steps: float) -> bool:
    return steps > 1 and steps != int(steps)


def clashes_of_best(values: Mapping[str, Any]) -> list[str]:
    """Why the best adapter could not be had at the end: every save must meet an evaluation."""
    evaluate, save = values["eval_strategy"], values["save_strategy"]
    rule = "load_best_model_at_end needs"
    if evaluate == "no":
        wants = "save_strategy='best' needs" if save == "best" else rule
        return [f"{wants} evaluations: set eval_strategy to 'epoch' or 'steps'."]
    if save not in (evaluate, "best"):
        return [f"{rule} eval_strategy={evaluate!r} and save_strategy={save!r} to be the same."]
    if save == "steps" and not _multiple(values["save_steps"], values["eval_steps"]):
        return [
            f"{rule} save_steps={values['save_steps']!r} to be a multiple of "
            f"eval_steps={values['eval_steps']!r}."
        ]
    return []


def _multiple(many: float, one: float) -> bool:
    # Parts of a run are compared in millionths, as transformers does: 0.3 % 0.1 is not 0.
    alike = (many < 1) == (one < 1)
    return alike and round(many * 1e6) % max(1, round(one * 1e6)) == 0
