"""lorafit fine-tunes small language models with LoRA on the machine you have.

The public names; each is loaded when it is first used, so that `import lorafit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.arguments import DataArguments, ModelArguments, TrainingArguments
    from lorafit.data.collate import DataCollatorForLanguageModeling
    from lorafit.errors import LorafitError, TrainingInterrupted, UsageError
    from lorafit.run.callbacks import (
        EarlyStoppingCallback,
        EvalPrediction,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
    from lorafit.trainer import Trainer

    __version__: str

_HOMES = {
    "DataArguments": "lorafit.arguments",
    "DataCollatorForLanguageModeling": "lorafit.data.collate",
    "EarlyStoppingCallback": "lorafit.run.callbacks",
    "EvalPrediction": "lorafit.run.callbacks",
    "LorafitError": "lorafit.errors",
    "ModelArguments": "lorafit.arguments",
    "Trainer": "lorafit.trainer",
    "TrainerCallback": "lorafit.run.callbacks",
    "TrainerControl": "lorafit.run.callbacks",
    "TrainerState": "lorafit.run.callbacks",
    "TrainingArguments": "lorafit.arguments",
    "TrainingInterrupted": "lorafit.errors",
    "UsageError": "lorafit.errors",
}

__all__ = [
    "DataArguments",
    "DataCollatorForLanguageModeling",
    "EarlyStoppingCallback",
    "EvalPrediction",
    "LorafitError",
    "ModelArguments",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "TrainingInterrupted",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # a tenth of a second, for whoever asks

        return version("lorafit")
    if name not in _HOMES:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
