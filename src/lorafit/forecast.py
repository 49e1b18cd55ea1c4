"""Settings -> the memory plan of their run, and how it reads. No weight is read.

Imports neither torch nor transformers, so that `lorafit plan` answers at once. What is trained is
read from a configuration here, from the model itself in packing.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorafit.amounts import shown
from lorafit.arguments import TrainingArguments
from lorafit.config import Settings
from lorafit.engine import limits, memory
from lorafit.engine.limits import Limit
from lorafit.engine.memory import Plan, Work
from lorafit.model import shape


@dataclass(frozen=True)
class Forecast:
    """A plan, what it is of, and the limit it is held against."""

    model: str
    work: Work
    limit: Limit
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return memory.fits(self.plan, self.limit)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain values; bytes throughout."""
        parts = asdict(self.plan) | {"start": self.plan.start, "total": self.plan.total}
        return {
            "model": self.model,
            "shape": asdict(self.work.shape) | {"parameters": self.work.shape.parameters},
            "device": self.work.device,
            "weights": self.work.weights,
            "products": self.work.products,
            "limit": asdict(self.limit),
            "fits": self.fits,
            "plan": parts,
            "levels": memory.levels(self.work, self.plan, limit=self.limit),
        }

    def lines(self) -> list[str]:
        """For people: what takes how much, then each recompute level."""
        kind, work = self.work.shape.kind, self.work
        made = [
            f"{self.model}: {kind}, {work.products} products on {work.device}, "
            f"{self.plan.tokens:,} tokens at a time, {memory.AGAIN[self.plan.recompute]}",
            "",
            *(
                f"{name:<70}{much:>12}"
                for name, much in memory.table(work, self.plan, limit=self.limit)
            ),
            "",
            f"{'made again':<34}{'a token':>12}{'all':>12}  {'longest example that fits':<26}",
        ]
        for row in memory.levels(work, self.plan, limit=self.limit):
            longest = f"{row['longest']:,} tokens" if row["longest"] else "none"
            said = memory.AGAIN[row["recompute"]].removesuffix(" made again")
            sizes = f"{shown(row['per_token']):>12}{shown(row['total']):>12}"
            made.append(f"{said:<34}{sizes}  {longest}")
        if not self.fits:
            made += ["", "It does not fit:", *memory.advice(work, self.plan, limit=self.limit)]
        if work.shape.is_estimated:
            made += ["", f"{kind} is not known here: it is taken as built like Llama, run by its "
                     f"own forward, which keeps {memory.OWN_FORWARD} times as much."]  # fmt: skip
        return [*made, *self.limit.holders]


def make(settings: Settings, device: str = "") -> Forecast:
    """The plan of the run that `settings` ask for.

    Args:
        device: "cpu" or "cuda"; empty: the one that training would take.

    Raises:
        UsageError: the model's sizes cannot be had, or nothing fits.
    """
    training, chosen = settings.training, settings.model
    gpu = None if training.use_cpu or device == "cpu" else limits.first_gpu()
    home = device or ("cuda" if gpu else "cpu")
    work = work_of(settings, home, native=limits.multiplies_bf16(home, gpu))
    limit = limits.here(home, training.memory_limit, gpu=gpu)
    made = memory.choose(work, limit, tokens=training.token_budget, recompute=asked(training))
    return Forecast(chosen.model, work, limit, made)


def asked(training: TrainingArguments) -> str:
    """The recompute level that somebody asks for; empty where it is to be chosen."""
    if training.recompute != "auto":
        return training.recompute
    return "layer" if training.gradient_checkpointing else ""


def work_of(settings: Settings, device: str, *, native: bool, longest: int = 0) -> Work:
    """What `settings` ask for, as far as memory asks; read from the configuration alone.

    Args:
        native: Whether the device multiplies bfloat16 itself.
        longest: Tokens of the longest example; 0: unknown, and taken to be `max_length`.

    Raises:
        ModelError: the model's sizes cannot be had.
    """
    model, training = settings.model, settings.training
    told = shape.read(model.model, revision=model.revision)
    sizes, quantised = shape.of(told), model.quantize or _quantised(told)
    targets = model.lora_target_modules
    names = [targets] if isinstance(targets, str) else list(targets)
    trained, ranks = sizes.adapted(names, model.lora_r)
    whole = {"lm_head", "embed_tokens"} & set(model.modules_to_save or [])
    weights = sizes.dtype if model.dtype == "auto" else model.dtype
    wanted = "bfloat16" if training.bf16 and native else "float16" if training.fp16 else ""
    return Work(
        sizes,
        device=device,
        weights=weights,
        products=memory.products(weights, wanted=wanted, device=device, native=native),
        trained=trained + sizes.table * len(whole),
        ranks=ranks,
        optim=training.optim,
        is_fused=sizes.is_fused and not (model.use_dora or whole),
        compiles=device == "cpu" and limits.has_tiles(),
        quantised=quantised,
        longest=longest or settings.data.max_length,
        examples=training.effective_batch_size,
        evaluated=evaluated(training),
    )


def _quantised(told: Mapping[str, Any]) -> str:
    """nf4 or int8, where the files are so already; else empty."""
    how = told.get("quantization_config") or {}
    return "nf4" if how.get("load_in_4bit") else "int8" if how.get("load_in_8bit") else ""


def evaluated(training: TrainingArguments) -> int:
    """Examples of an evaluation's micro-batch; 0: there is none."""
    return 0 if training.eval_strategy == "no" else training.per_device_eval_batch_size
