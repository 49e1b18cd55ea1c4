"""An evaluation's numbers under transformers' names: its metrics, predictions, and what is best.

Gathers what was predicted, and asks the user's own functions about it. Knows no model and no run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.engine.evaluation import Evaluation, Predicted
from lorafit.errors import MissingMetricError


@dataclass
class Gathered:
    """What metrics and predictions are made of, gathered from each micro-batch: call it with one.

    Batches of unequal widths are joined by padding with -100 on the right (transformers' rule).

    Attributes:
        compute_metrics: Takes an `EvalPrediction`; with `batch_eval_metrics` also whether to return
            the result, which is asked for at the last micro-batch.
        preprocess: (predictions, labels) -> what is kept of the predictions.
        main_input: The name of the input that `include_for_metrics` means.
        keeps: Whether arrays are wanted; if not, metrics are computed batch by batch.
    """

    arguments: TrainingArguments
    compute_metrics: Callable[..., Mapping[str, Any] | None] | None
    preprocess: Callable[[Any, Any], Any] | None
    main_input: str
    keeps: bool
    _kept: dict[str, Any] = field(default_factory=dict)
    _metrics: Mapping[str, Any] | None = None
    _seen: int = 0

    def __call__(self, predicted: Predicted) -> None:
        """Keep what is wanted of one micro-batch."""
        batch, loss, logits, labels, _, last = predicted
        if logits is not None and self.preprocess is not None:
            logits = self.preprocess(logits, labels)
        wanted = self.arguments.include_for_metrics
        parts: dict[str, Any] = {
            "predictions": logits,
            "label_ids": labels,
            "inputs": batch.inputs[self.main_input] if "inputs" in wanted else None,
            "losses": loss.repeat(batch.rows) if loss is not None and "loss" in wanted else None,
        }
        by_batch = self.arguments.batch_eval_metrics and self.compute_metrics is not None
        if by_batch and logits is not None and labels is not None:
            assert self.compute_metrics is not None
            # one batch at a time the metrics see all inputs, else the main one: transformers' rule
            given = compat.eval_prediction(
                parts | {"inputs": batch.inputs if "inputs" in wanted else None}
            )
            self._metrics = self.compute_metrics(given, compute_result=last)
        if self.keeps or not by_batch:
            self._add(parts)

    def _add(self, parts: Mapping[str, Any]) -> None:
        self._seen += 1
        every = self.arguments.eval_accumulation_steps
        for name, part in parts.items():
            if part is not None:
                joined = self.arguments.eval_do_concat_batches
                kept = self._kept.setdefault(name, compat.eval_container(joined=joined))
                kept.add(part)
                if every and self._seen % every == 0:
                    kept.to_cpu_and_numpy()

    def arrays(self, name: str) -> Any:
        """The `predictions` or `label_ids` of the whole set in numpy; None where there are none."""
        return self._kept[name].get_arrays() if name in self._kept else None

    def metrics(self) -> dict[str, Any]:
        """What `compute_metrics` returns, in plain numbers; empty without it, or without labels."""
        parts = {name: self.arrays(name) for name in self._kept}
        ready = "predictions" in parts and "label_ids" in parts
        if self._metrics is None and self.compute_metrics is not None and ready:
            self._metrics = self.compute_metrics(compat.eval_prediction(parts))
        return compat.plain_metrics(self._metrics or {})


def metrics_of(measured: Evaluation, computed: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    """An evaluation under transformers' names: its loss, if it has one, and what is computed."""
    loss = {} if measured.loss is None else {f"{prefix}_loss": measured.loss}
    mark = f"{prefix}_"
    named = {key if key.startswith(mark) else mark + key: computed[key] for key in computed}
    return named | loss


def deciding_metric(arguments: TrainingArguments, metrics: Mapping[str, float]) -> float:
    """The value of `metric_for_best_model`.

    Raises:
        MissingMetricError: it is not among `metrics`.
    """
    name = arguments.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise MissingMetricError(
            f"metric_for_best_model={name!r} is not among the metrics: {', '.join(metrics)}.",
            fix="Name one of them.",
        )
    return metrics[name]


def is_better(value: float, best: float | None, *, greater: bool | None) -> bool:
    """Whether a metric beats the best so far; what is not finite never does."""
    if not math.isfinite(value):
        return False
    return best is None or (value > best if greater else value < best)


def last_evaluation(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last `eval_loss` that was logged; empty where there is none."""
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {"eval_loss": losses[-1]} if losses else {}
