"""How a run's examples are laid out: end to end where the law can hold, as given where it cannot.

Owns the reasons. A run is packed if its loss is plain causal cross entropy, its collator is one
that is known to make each row by itself, nobody has replaced a part of the step, and the model is
proven to keep documents apart (model/documents.py). Decides once, before a run; knows no loop.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafit import compat, forecast
from lorafit.arguments import TrainingArguments
from lorafit.config import Settings
from lorafit.data.cache import Chosen
from lorafit.data.collate import DataCollatorForLanguageModeling, PadCollator
from lorafit.engine import graph, limits, memory
from lorafit.engine.layout import MicroBatch, as_given, is_plain, packed
from lorafit.engine.limits import Limit
from lorafit.engine.memory import Work
from lorafit.engine.precision import Precision, native_bf16, products
from lorafit.engine.room import Room
from lorafit.errors import ConfigError, ModelError
from lorafit.events import OutOfMemory
from lorafit.model import base, lora, quantised
from lorafit.model.documents import Faster, Leaks, Runner, runner
from lorafit.model.fused import Decoder
from lorafit.model.lora import Drawn
from lorafit.world import ALONE, World

OURS = (PadCollator, DataCollatorForLanguageModeling)


@dataclass(frozen=True)
class Rows:
    """The user's `collator`, a batch that it makes of the `first` row (None of a stream, which must
    not be begun), and the set that is trained on, if any."""

    collator: Any
    first: Callable[[], Any]
    training: Any = None


@dataclass(frozen=True)
class Packing:
    """How examples are laid out.

    Attributes:
        runner: Runs them end to end; None where they are run as given.
        budget: Tokens of a micro-batch.
        recompute: What backward makes again.
        seed: Of LoRA's dropout by counters; None where torch draws it.
        drawn: The counters of the micro-batch that is run.
        notices: Lines for a person: why not, or what runs the layers.
        per_token: Bytes that a token keeps for backward; 0: not known.
        planned: Bytes of the whole run at its peak; 0: not known.
    """

    runner: Runner | None = None
    budget: int = 0
    recompute: str = "none"
    seed: int | None = None
    drawn: Drawn = field(default_factory=Drawn)
    notices: tuple[str, ...] = ()
    per_token: int = 0
    planned: int = 0

    @property
    def layout(self) -> str:
        """Its name."""
        return "packed" if self.runner else "as_given"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch at most."""
        return self.budget if self.runner else sys.maxsize

    def room(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        divides: bool,
        tell: Callable[[OutOfMemory], None],
    ) -> Room:
        """How much of a step runs at a time. A limit that is passed before it begins is not
        watched: the plan has said that it is too much."""
        limits.forget_peak()
        limit = resident_limit(arguments)
        return Room(
            most=self.tokens,
            divides=divides,
            keep_less=partial(self.keep_less, model),
            forget=self.forget,
            tell=tell,
            limit=limit if limit > limits.peak() else 0,
            per_token=self.per_token,
        )

    def keep_less(self, model: nn.Module) -> str:
        """Let backward keep less from now on; what it makes again, empty where nothing is left."""
        if self.runner is not None:
            return self.runner.keep_less()
        return base.recompute_more(model)

    def forget(self) -> None:
        """Hand back what is held between micro-batches."""
        if self.runner is not None:
            self.runner.forget()

    def lay_out(
        self, batches: Sequence[Any], tokens: int, *, step: int, shifted: bool, world: World = ALONE
    ) -> list[MicroBatch]:
        """This process's micro-batches of step number `step`, of so many tokens at most."""
        draw = None if self.seed is None else (self.seed, step)
        if self.runner is None:
            return as_given(batches, shifted=shifted, draw=draw, most=tokens, world=world)
        return packed(batches, budget=tokens, draw=draw, world=world)

    def lay_out_read(self, batch: Any, tokens: int, *, shifted: bool) -> list[MicroBatch]:
        """The micro-batches of a batch that is evaluated."""
        if self.runner is not None and is_plain(batch):
            return packed([batch], budget=tokens)
        return as_given([batch], shifted=shifted, most=tokens)


def choose(
    model: nn.Module,
    *,
    arguments: TrainingArguments,
    precision: Precision,
    rows: Rows,
    plain: bool,
    replaced: Collection[str],
) -> Packing:
    """The layout that `arguments` ask for, if it can be had.

    Args:
        plain: Whether the loss is plain causal cross entropy.
        replaced: The methods of the step that the user has replaced.

    Raises:
        ConfigError: the run fits into memory in no way; with what would.
    """
    why = _of_data(rows, replaced=replaced)
    seed = arguments.seed if not why and lora.drops(model) else None
    if arguments.layout == "as_given":
        return Packing(seed=seed, notices=_idle(arguments, packed=False, fused=False))
    why = why or _of_model(model, arguments, plain=plain)
    drawn, dtype = Drawn(), torch.float32
    try:
        if why:
            raise Leaks(why)
        dtype = products(precision, base.weights_dtype(model))
        decide = partial(_decided, model, dtype, arguments=arguments, rows=rows)
        decided = decide(fused=True)
        found = runner(
            model,
            autocast=precision.autocast,
            dtype=dtype,
            drawn=drawn,
            recompute=decided.recompute,
            smoothing=float(arguments.label_smoothing_factor),
            faster=partial(_replaying, arguments=arguments, per_token=decided.per_token),
        )
        decided = decided if found.fused else decide(fused=False)
        if not found.fused and decided.recompute == "layer":
            raise Leaks("layers that run again in backward would look for documents in vain")
    except Leaks as leak:
        said = f"micro-batches are run as given: {leak}"
        return Packing(seed=seed, notices=(said, *_idle(arguments, packed=False, fused=False)))
    notices = (found.said, *_idle(arguments, packed=True, fused=found.fused))
    copied = found.fused and not quantised.packed(model)
    if copied and precision.dtype is None and dtype != base.weights_dtype(model):
        notices = (*notices, _EMULATED)
    notices = (*notices, *decided.notices)
    return Packing(
        runner=found,
        budget=decided.tokens,
        recompute=decided.recompute,
        seed=seed,
        drawn=drawn,
        notices=notices,
        per_token=decided.per_token,
        planned=decided.planned,
    )


def _replaying(decoder: Decoder, *, arguments: TrainingArguments, per_token: int) -> Faster:
    """Graphs of it, where the host would be what takes the time."""
    halves = (torch.bfloat16, torch.float16)
    if arguments.device.type != "cuda" or decoder.dtype not in halves or not graph.wanted():
        return decoder
    if decoder.recompute == "layer" or quantised.packed(decoder.decoder):  # not tried on a GPU
        return decoder
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


# ---- how much at a time --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decided:
    """Tokens of a micro-batch, what backward makes again; what a token keeps, and the whole run at
    its peak, in bytes."""

    tokens: int
    recompute: str
    per_token: int
    planned: int
    notices: tuple[str, ...] = ()


def _decided(
    model: nn.Module, dtype: torch.dtype, *, arguments: TrainingArguments, rows: Rows, fused: bool
) -> _Decided:
    """What is asked for; for the rest the fastest that the memory plan finds to fit."""
    asked = forecast.asked(arguments) or ("layer" if base.recomputes(model) else "")
    try:
        work = _work(model, dtype, arguments=arguments, rows=rows, fused=fused)
    except ModelError as unknown:
        tokens = arguments.token_budget or memory.TOKENS["cpu"]
        return _Decided(tokens, asked or "none", 0, 0, (f"memory is not planned: {unknown.what}",))
    limit, held = _limit(arguments)
    try:
        plan = memory.choose(work, limit, held=held, tokens=arguments.token_budget, recompute=asked)
    except ConfigError:
        if rows.training is not None:
            raise
        plan = memory.plan(work, tokens=memory.LEAST[work.device], recompute="layer")
    said = (memory.notice(plan, limit, held=held),)
    if not memory.fits(plan, limit, held=held):
        said = (*said, "this is more than fits; leave token_budget and recompute out, and what "
                "does is chosen", *limit.holders)  # fmt: skip
    planned = memory.peak(plan, held)
    return _Decided(plan.tokens, plan.recompute, plan.per_token, planned, said)


def _work(
    model: nn.Module, dtype: torch.dtype, *, arguments: TrainingArguments, rows: Rows, fused: bool
) -> Work:
    shape, device = base.shape_of(model), arguments.device.type
    weights = base.weights_dtype(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = shape.adapted(["all-linear"], 1)
    return Work(
        shape,
        device=device,
        weights=str(weights).removeprefix("torch."),
        products=str(dtype).removeprefix("torch."),
        quantised=quantised.scheme(model) if quantised.packed(model) else "",
        trained=trained,
        ranks=trained * each[1] // each[0],  # as if all projections had the same rank
        optim=arguments.optim,
        is_fused=fused,
        compiles=device == "cpu" and limits.has_tiles(),
        longest=int(lengths_of(rows.training).max(initial=0)),
        examples=arguments.effective_batch_size,
        evaluated=forecast.evaluated(arguments),
    )


def lengths_of(rows: Any) -> np.ndarray:
    """Tokens of each example, where that is known without making it; else empty."""
    if isinstance(rows, Chosen):
        return rows.lengths
    known = isinstance(rows, list) and all(isinstance(r, dict) and "input_ids" in r for r in rows)
    return np.array([len(row["input_ids"]) for row in rows] if known else [], np.int64)


def resident_limit(arguments: TrainingArguments) -> int:
    """Bytes of resident memory that a run on a CPU may have; 0 elsewhere, where an allocator says
    when there is no more."""
    return _limit(arguments)[0].bytes if arguments.device.type == "cpu" else 0


def free_bytes(arguments: TrainingArguments) -> int:
    """Bytes that may be held besides, where weights are loaded and where the run trains."""
    wanted = arguments.memory_limit if arguments.device.type == "cpu" else None
    here = limits.here("cpu", wanted).bytes - limits.resident()
    if arguments.device.type != "cuda":
        return here
    return min(here, torch.cuda.mem_get_info(arguments.device)[0])


def _limit(arguments: TrainingArguments) -> tuple[Limit, int]:
    """The most that this process may hold where it trains, and what it holds."""
    device, wanted = arguments.device, arguments.memory_limit
    if device.type != "cuda":
        return limits.here(device.type, wanted), limits.resident()
    seen, (free, total) = limits.first_gpu(), torch.cuda.mem_get_info(device)
    may = free + torch.cuda.memory_reserved(device) + memory.PROCESS["cuda"]
    holders = seen.holders if seen else ()
    gpu = limits.Gpu(torch.cuda.get_device_name(device), total, may, 8.0, holders)
    return limits.here("cuda", wanted, gpu=gpu), torch.cuda.memory_allocated(device)


def check_fits(settings: Settings, rows: Any) -> None:
    """Nothing, unless a run over `rows` can fit in no way: that can be said of the configuration
    alone, before minutes go by in which weights are loaded. In doubt nothing is said: what is
    planned of the model itself comes later. Of a run as given nothing is planned at all.

    Raises:
        ConfigError: with what would fit.
    """
    arguments, device = settings.training, settings.training.device
    if arguments.layout == "as_given" or device.type not in memory.LEAST:
        return
    longest = int(lengths_of(rows).max(initial=0))
    try:
        work = forecast.work_of(settings, device.type, native=native_bf16(device), longest=longest)
    except ModelError:  # said where the model itself is planned
        return
    limit, _ = _limit(arguments)
    least = memory.plan(
        replace(work, evaluated=0), tokens=memory.LEAST[device.type], recompute="layer"
    )
    if not memory.fits(least, limit):
        asked = forecast.asked(arguments)
        memory.choose(work, limit, tokens=arguments.token_budget, recompute=asked)


# ---- what stands in the way ----------------------------------------------------------------------


def _of_data(rows: Rows, *, replaced: Collection[str]) -> str:
    """Why rows cannot be laid end to end; empty if they can."""
    collator = rows.collator
    if replaced:
        return f"{', '.join(sorted(replaced))} is yours"
    if type(collator) not in OURS and not compat.makes_rows_alone(collator):
        name = compat.name_of(collator)
        return f"what {name} makes of a row may depend on the rows beside it"
    try:
        batch = rows.first()
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
