"""How a run's examples are laid out: end to end where the law can hold, as given where it cannot.

Owns the reasons. A run is packed if its loss is plain causal cross entropy, its collator is one
that is known to make each row by itself, nobody has replaced a part of the step, and the model is
proven to keep documents apart (model/documents.py). Decides once, before a run; knows no loop.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.data.collate import DataCollatorForLanguageModeling, PadCollator
from lorafit.engine import graph, memory
from lorafit.engine.layout import MicroBatch, as_given, is_plain, packed
from lorafit.engine.precision import Precision, products
from lorafit.model import base, lora, quantised
from lorafit.model.documents import Leaks, Runner, States, runner
from lorafit.model.fused import Decoder
from lorafit.model.lora import Drawn

OURS = (PadCollator, DataCollatorForLanguageModeling)
TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a micro-batch where nobody says: a layer's rows lie within a CPU's last cache; a GPU
gets as many as its memory holds, this many at most."""


@dataclass(frozen=True)
class Packing:
    """How examples are laid out.

    Attributes:
        runner: Runs them end to end; None where they are run as given.
        budget: Tokens of a micro-batch.
        seed: Of LoRA's dropout by counters; None where torch draws it.
        drawn: The counters of the micro-batch that is run.
        notices: Lines for a person: why not, or what runs the layers.
    """

    runner: Runner | None = None
    budget: int = 0
    seed: int | None = None
    drawn: Drawn = field(default_factory=Drawn)
    notices: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """Its name."""
        return "packed" if self.runner else "as_given"

    def lay_out(self, batches: Sequence[Any], step: int, *, shifted: bool) -> list[MicroBatch]:
        """The micro-batches of step number `step`."""
        draw = None if self.seed is None else (self.seed, step)
        if self.runner is None:
            return as_given(batches, shifted=shifted, draw=draw)
        return packed(batches, budget=self.budget, draw=draw)


def choose(
    model: nn.Module,
    *,
    arguments: TrainingArguments,
    precision: Precision,
    collator: Any,
    first: Callable[[], Any],
    plain: bool,
    replaced: Collection[str],
) -> Packing:
    """The layout that `arguments` ask for, if it can be had.

    Args:
        collator: The user's.
        first: Gives a batch of one row of the training set; None for a stream.
        plain: Whether the loss is plain causal cross entropy.
        replaced: The methods of the step that the user has replaced.
    """
    why = _of_data(collator, first=first, replaced=replaced)
    seed = arguments.seed if not why and lora.drops(model) else None
    if arguments.layout == "as_given":
        return Packing(seed=seed, notices=_idle(arguments, packed=False, fused=False))
    why = why or _of_model(model, arguments, plain=plain)
    drawn, dtype = Drawn(), torch.float32
    try:
        if why:
            raise Leaks(why)
        dtype = products(precision, base.weights_dtype(model))
        found = runner(
            model,
            autocast=precision.autocast,
            dtype=dtype,
            drawn=drawn,
            recompute=_recompute(arguments, model),
            smoothing=float(arguments.label_smoothing_factor),
            faster=partial(_replaying, arguments=arguments, model=model),
        )
        if not found.fused and _recompute(arguments, model) == "layer":
            raise Leaks("layers that run again in backward would look for documents in vain")
    except Leaks as leak:
        said = f"micro-batches are run as given: {leak}"
        return Packing(seed=seed, notices=(said, *_idle(arguments, packed=False, fused=False)))
    notices = (found.said, *_idle(arguments, packed=True, fused=found.fused))
    copied = found.fused and not quantised.packed(model)
    if copied and precision.dtype is None and dtype != base.weights_dtype(model):
        notices = (*notices, _EMULATED)
    budget = _budget(model, dtype, arguments=arguments, fused=found.fused)
    return Packing(found, budget, seed, drawn, notices)


def _replaying(decoder: Decoder, *, arguments: TrainingArguments, model: nn.Module) -> States:
    """Graphs of it, where the host would be what takes the time."""
    halves = (torch.bfloat16, torch.float16)
    if arguments.device.type != "cuda" or decoder.dtype not in halves or not graph.wanted():
        return decoder
    if decoder.recompute == "layer" or quantised.packed(model):  # not tried on a GPU
        return decoder
    shape = memory.Shape(**base.shape_of(model, decoder.dtype))
    per_token = memory.kept_bytes(shape, recompute=decoder.recompute)
    return graph.Replaying(decoder, per_token=per_token)


_EMULATED = (
    "16-bit weights on a processor that does not multiply 16 bits itself: products run in fp32, on "
    "copies of the projections"
)


def _idle(arguments: TrainingArguments, *, packed: bool, fused: bool) -> tuple[str, ...]:
    """A line for each argument that was given and acts on nothing in this run."""
    recompute = (
        f"recompute={arguments.recompute!r} acts on fused layers alone; gradient_checkpointing "
        "lets any model make its layers again"
    )
    budget = "token_budget acts where examples are packed"
    said = {
        recompute: arguments.recompute not in ("auto", "none") and not fused,
        budget: arguments.token_budget is not None and not packed,
    }
    return tuple(line for line, idle in said.items() if idle)


def _budget(
    model: nn.Module, dtype: torch.dtype, *, arguments: TrainingArguments, fused: bool
) -> int:
    """Tokens of a micro-batch: as asked for, else on a GPU no more than its free memory holds."""
    device = arguments.device
    if arguments.token_budget or device.type != "cuda":
        return arguments.token_budget or TOKENS["cpu"]
    shape = memory.Shape(**base.shape_of(model, dtype))
    kept = memory.kept_bytes(shape, recompute=_recompute(arguments, model))
    free, _ = torch.cuda.mem_get_info(device)
    return memory.token_budget(
        free, kept * (1 if fused else memory.OWN_FORWARD), most=TOKENS["cuda"]
    )


def _recompute(arguments: TrainingArguments, model: nn.Module) -> str:
    asked = arguments.recompute
    again = arguments.gradient_checkpointing or base.recomputes(model)
    return ("layer" if again else "none") if asked == "auto" else asked


def _of_data(collator: Any, *, first: Callable[[], Any], replaced: Collection[str]) -> str:
    """Why rows cannot be laid end to end; empty if they can."""
    if replaced:
        return f"{', '.join(sorted(replaced))} is yours"
    if type(collator) not in OURS and not compat.makes_rows_alone(collator):
        name = compat.name_of(collator)
        return f"what {name} makes of a row may depend on the rows beside it"
    try:
        batch = first()
    except Exception as error:  # whatever it is, it is said where the row is read to be trained on
        return f"the first row cannot be read ({type(error).__name__})"
    return "" if batch is None or is_plain(batch) else "rows hold more than ids, mask and labels"


def _of_model(model: nn.Module, arguments: TrainingArguments, *, plain: bool) -> str:
    """Why the law cannot hold for this model and these arguments; empty if it may."""
    if not plain:
        return "the model's loss is not plain causal cross entropy"
    reasons = {
        "a module's forward is watched": base.is_watched(model),
        "the adapter works above the base": lora.passes_through_peft(model),
        "the rotary embedding follows the batch": base.rotary_follows_batch(model),
        "the base drops activations by itself": lora.base_drops(model),
        "NEFTune draws its noise by batch": bool(arguments.neftune_noise_alpha),
        "torch_compile compiles the model's own forward": arguments.torch_compile,
        "Metal has no attention over documents": arguments.device.type == "mps",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
