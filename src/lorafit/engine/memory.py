"""Bytes before a run: the plan, and the choice of token budget and recompute level from it.

Arithmetic on sizes alone; imports no torch. What a kernel keeps is docs/numerics.md's, what is for
a moment beside it is read from the kernels; docs/memory.md has every term and how far off the sum
was. Knows neither files nor the machine.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from lorafit.amounts import shown
from lorafit.engine.limits import Limit
from lorafit.errors import ConfigError
from lorafit.model.shape import Shape

LEVELS = ("none", "mlp", "half", "layer")
"""fused.RECOMPUTE: what backward makes again, from nothing to the whole layer."""

AGAIN: Final = MappingProxyType(
    {"none": "nothing made again", "mlp": "gate and up made again",
     "half": "q, k, v, gate and up made again", "layer": "layers made again"}
)  # fmt: skip

OWN_FORWARD = 4
"""A model's own forward is taken to keep so many times as much: of transformers' Llama with PEFT,
autograd saves 1.8 times as much in fp32 and 2.8 to 3.3 in bf16, and there are other models."""

MARGIN = 0.9
"""A plan is held to fit if it takes no more of the limit: forecasts are right to a tenth."""

TOKENS: Final = MappingProxyType({"cpu": 1024, "cuda": 16384})
"""Tokens of a micro-batch where memory is ample: a layer's rows lie within a CPU's last cache."""
LEAST: Final = MappingProxyType({"cpu": 128, "cuda": 256})

CHUNK: Final = MappingProxyType({"cpu": 24 << 20, "cuda": 256 << 20})
"""cross_entropy.CHUNK."""
BLOCK = 256
"""attention.BLOCK."""

PROCESS: Final = MappingProxyType({"cpu": 445_000_000, "cuda": 550_000_000})
"""On a CPU Python with torch, transformers and PEFT, as measured with the CPU build of torch 2.13;
on CUDA the context with the libraries' workspace, which torch's allocator does not see."""

COMPILED = 100_000_000
"""In 16 bits, where oneDNN multiplies: what it keeps of products that it compiled for some sizes of
micro-batches, 20 MB for each of four to eight (products.ROWS)."""

_BYTES: Final = MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1.0, "nf4": 4.127 / 8}
)
"""Of a number; nf4 with double quantisation: 4 bits, and 0.127 for the scales of blocks."""

_STATE: Final = MappingProxyType({"sgd": 0.0, "adafactor": 0.4, "lion_32bit": 4.0, "lion_8bit": 1.1,
                                  "adamw_8bit": 2.1, "adamw_bnb_8bit": 2.1})  # fmt: skip
"""An optimiser's bytes for a trained number, where they are not Adam's 8."""


@dataclass(frozen=True)
class Work:
    """What is trained how, as far as memory asks.

    Attributes:
        device: "cpu" or "cuda".
        weights, products: Number formats of the base and of matrix products.
        quantised: "nf4" or "int8", where projections are held so.
        trained: Numbers that are trained, 4 bytes each.
        ranks: Numbers of x·A of a token in a layer.
        is_fused: Whether the kernels run the layers.
        compiles: Whether oneDNN multiplies what is in 16 bits.
        longest: Tokens of the longest example; 0: unknown.
        examples: Of a step, all micro-batches together; 0: unknown.
        evaluated: Examples of an evaluation's micro-batch; 0: there is none.
    """

    shape: Shape
    device: str = "cpu"
    weights: str = "float32"
    products: str = "float32"
    quantised: str = ""
    trained: int = 0
    ranks: int = 0
    optim: str = "adamw_torch_fused"
    is_fused: bool = True
    compiles: bool = False
    longest: int = 0
    examples: int = 0
    evaluated: int = 8

    @property
    def number(self) -> int:
        """Bytes of a number in matrix products; `stream` of one in the residual stream."""
        return int(_BYTES[self.products])

    @property
    def stream(self) -> int:
        """Bytes of a number in the residual stream."""
        return int(_BYTES[self.weights])


@dataclass(frozen=True)
class Plan:
    """Bytes of a run, each part; what it is laid out as.

    Attributes:
        tokens: Of a micro-batch: the budget.
        placed: Of the largest micro-batch: the budget, the whole step, or the longest example.
        per_token: What a token keeps until backward has passed.
        process: The process and its libraries, with the products that these compile.
        base: As loaded; `copies` are its projections in another format.
        activations: All that the largest micro-batch keeps.
        passing: What is there besides for a moment, of a layer or of the loss.
        evaluation: What the largest micro-batch of an evaluation takes in place of both.
        graphs: Buffers of CUDA graphs.
    """

    tokens: int
    recompute: str
    placed: int
    per_token: int
    process: int
    base: int
    copies: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    passing: int
    evaluation: int
    graphs: int

    @property
    def start(self) -> int:
        """Before the first step: process, base, copies, adapter."""
        return self.process + self.base + self.copies + self.adapter

    @property
    def total(self) -> int:
        """The peak."""
        training = self.gradients + self.activations + self.passing + self.graphs
        return self.start + self.optimiser + max(training, self.evaluation)


# ---- the terms -----------------------------------------------------------------------------------


def products(weights: str, *, wanted: str, device: str, native: bool) -> str:
    """The format of matrix products, by the rule of precision.products.

    Args:
        wanted: What bf16 or fp16 asks for, if the device has it; else empty.
        native: Whether the device multiplies bfloat16 itself.
    """
    if wanted:
        return wanted
    emulated = device == "cpu" and not (weights == "bfloat16" and native)
    return "float32" if weights in ("bfloat16", "float16") and emulated else weights


def kept_bytes(work: Work, recompute: str = "none") -> int:
    """What one token keeps over all layers until backward has passed, in bytes."""
    shape, p = work.shape, work.number
    if not work.is_fused:
        whole = kept_bytes(replace(work, is_fused=True)) * OWN_FORWARD
        again = shape.layers * shape.hidden * work.stream
        return again if recompute == "layer" else whole
    rows = 2 * shape.hidden * work.stream
    attention = shape.queries * p + 4 * shape.heads  # with a log sum a head
    heads = (shape.queries + 2 * shape.keys) * p
    mlp = 2 * shape.feed_forward * p
    low = work.ranks * p / max(1, len(shape.matrices))  # x·A of one of the projections
    kept = {
        "none": rows + attention + heads + mlp + 7 * low,
        "mlp": rows + attention + heads + 5 * low,
        "half": rows + attention + 2 * low,
        "layer": shape.hidden * work.stream,
    }
    return int(shape.layers * kept[recompute])


def _passing(work: Work, placed: int, *, recompute: str) -> int:
    """What is there for a moment beside what is kept, at the worst: the loss of all tokens, or one
    layer going backward, or forward again."""
    shape, p, s = work.shape, work.number, work.stream
    ends = 4 * shape.hidden * s * placed  # last rows, those of them with loss, normed, gradient
    loss = _chunk(work, placed) + 4 * shape.hidden * 4 * placed
    rows = 2 * shape.hidden * (s + p)
    mlp = rows + 2 * shape.feed_forward * p
    attention = rows + (shape.queries + 2 * (shape.queries + 2 * shape.keys)) * p
    if shape.has_head_norms:
        attention += (2 * shape.queries + 2 * shape.keys) * p
    again = {"none": 0, "mlp": 2 * shape.feed_forward * p}.get(
        recompute, (2 * shape.feed_forward + shape.queries + 2 * shape.keys) * p
    )
    if recompute == "layer":
        again = kept_bytes(work, "none") // shape.layers
    layer = max(mlp, attention) + again
    whole = max((m.numbers for m in shape.matrices), default=0) * p if work.quantised else 0
    return ends + max(loss, layer * placed + _scores(work, placed) + whole)


def _scores(work: Work, placed: int) -> int:
    """Scores and their gradients of a block of queries, where attention goes block by block."""
    full = work.products == "float32"
    by_blocks = full if work.device == "cuda" else not full or work.shape.has_window
    if not by_blocks:
        return 0
    return 2 * work.shape.heads * BLOCK * (work.longest or placed) * work.number


def _chunk(work: Work, tokens: int) -> int:
    """The logits that are there at a time, of so many tokens."""
    row = work.shape.vocabulary * work.number
    return min(tokens, max(64, CHUNK[work.device] // row)) * row


def _evaluation(work: Work, placed: int) -> int:
    """The largest micro-batch of an evaluation, whose examples lie end to end and keep nothing."""
    if not work.evaluated:
        return 0
    shape, p, s = work.shape, work.number, work.stream
    tokens = work.evaluated * (work.longest or placed // work.evaluated)
    layer = 2 * shape.hidden * (s + p) + 3 * shape.feed_forward * p
    return tokens * (layer + 2 * shape.hidden * s) + _chunk(work, tokens) + _scores(work, placed)


def base_bytes(work: Work) -> int:
    """The base as it is loaded."""
    shape, number = work.shape, work.stream
    whole = shape.parameters * number
    return whole + int(shape.projections * (_BYTES.get(work.quantised, number) - number))


def _copies(work: Work) -> int:
    """What the fused layers hold besides: all projections and the head, where products have another
    format than the base."""
    if work.quantised or not work.is_fused or work.products == work.weights:
        return 0
    return (work.shape.projections + work.shape.table) * work.number


def plan(work: Work, *, tokens: int, recompute: str) -> Plan:
    """The bytes of a run that takes `tokens` at a time."""
    whole = work.examples * work.longest or tokens  # a step may be smaller than the budget
    placed = max(min(tokens, whole), work.longest)
    kept = kept_bytes(work, recompute)
    # a few sizes of the ladder (graph.py) are met; each has its rows in and out, and four numbers
    halves = work.number == 2
    sizes = 4 if work.device == "cuda" and halves and recompute != "layer" else 0
    name = work.optim.removeprefix("paged_")
    return Plan(
        tokens=tokens,
        recompute=recompute,
        placed=placed,
        per_token=kept,
        process=PROCESS[work.device] + (COMPILED if work.compiles and halves else 0),
        base=base_bytes(work),
        copies=_copies(work),
        adapter=4 * work.trained,
        gradients=4 * work.trained,
        optimiser=int(_STATE.get(name, 8) * work.trained),
        activations=kept * placed,
        passing=_passing(work, placed, recompute=recompute),
        evaluation=_evaluation(work, placed),
        graphs=sizes * placed * (2 * work.shape.hidden * work.stream + 32),
    )


def calibrated(made: Plan, peak: int) -> Plan:
    """The plan with what a token keeps corrected by a probe.

    Args:
        peak: Bytes above the start that forward and backward of `made.placed` tokens took.
    """
    kept = max(0, peak - made.gradients - made.passing)
    return replace(made, activations=kept, per_token=-(-kept // made.placed))


# ---- the choice ----------------------------------------------------------------------------------


def choose(
    work: Work, limit: Limit, *, held: int = 0, tokens: int | None = None, recompute: str = ""
) -> Plan:
    """The fastest plan that fits within `limit`.

    Args:
        held: Bytes that the process holds already, base and adapter among them, where that is
            known: no less is taken for the start of the run.
        tokens, recompute: Those that the user asks for: taken as they are, whether they fit or not.

    Raises:
        ConfigError: nothing does; with what would.
    """
    made = [
        plan(work, tokens=budget, recompute=level)
        for budget, level in sorted(
            _candidates(work, tokens=tokens, recompute=recompute), key=_slowness
        )
    ]
    fitting = (one for one in made if fits(one, limit, held=held))
    found = next(fitting, None)
    if found is None and not (tokens or recompute):
        raise ConfigError(
            f"This run does not fit: at the least it takes {shown(peak(made[-1], held))}, "
            f"{shown(peak(made[-1], held) - limit.bytes * MARGIN)} more than {MARGIN:.0%} of "
            f"{shown(limit.bytes)} ({limit.why}).",
            why=["It would be stopped in the middle: by an out-of-memory error, or by the system.",
                 *limit.holders],
            fix=[*advice(work, made[-1], limit=limit)],
        )  # fmt: skip
    return found or made[-1]


def fits(made: Plan, limit: Limit, *, held: int = 0) -> bool:
    """Whether it does, with a margin."""
    return peak(made, held) <= limit.bytes * MARGIN


def peak(made: Plan, held: int) -> int:
    """The plan's total; more, where the process holds more than it says before the first step."""
    return made.total + max(0, held + made.copies - made.start)


def _candidates(work: Work, *, tokens: int | None, recompute: str) -> Iterator[tuple[int, str]]:
    levels = [recompute] if recompute else LEVELS
    if not work.is_fused:  # a model's own forward keeps all, or makes whole layers again
        levels = ["layer" if recompute == "layer" else "none"]
    most, least = TOKENS[work.device], LEAST[work.device]
    halved = [most >> times for times in range(most.bit_length()) if most >> times >= least]
    for level in levels:
        for budget in [tokens] if tokens else halved:
            yield budget, level


def _slowness(candidate: tuple[int, str]) -> float:
    """How long a token takes, beside one of 1,024 with nothing made again. Halving the budget costs
    15% (1,415 tokens a second became 1,198), above 1,024 next to nothing; what is made again costs
    its products."""
    tokens, level = candidate
    halvings = max(0, 11 - tokens.bit_length())
    again = {"none": 1.0, "mlp": 1.15, "half": 1.2, "layer": 1.3}[level]
    return again * (1 + 0.15 * halvings) * (1 + 0.001 * (20 - tokens.bit_length()))


def longest_that_fits(work: Work, limit: Limit, *, recompute: str) -> int:
    """Tokens of the longest example that can be trained on; 0: none, as nothing else fits."""

    def fitting(tokens: int) -> bool:
        longer = replace(work, longest=tokens)
        return fits(plan(longer, tokens=LEAST[work.device], recompute=recompute), limit)

    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def advice(work: Work, made: Plan, *, limit: Limit) -> Iterator[str]:
    """Lines about what would fit, with numbers; something always can."""
    level = made.recompute
    length = longest_that_fits(work, limit, recompute=level)
    if length:
        yield (
            f"Shorter examples: {length:,} tokens fit (--max-length {length}), "
            f"{work.longest:,} is the longest here."
        )
    small = replace(work, quantised="nf4")
    if not work.quantised and fits(plan(small, tokens=made.tokens, recompute=level), limit):
        saved = base_bytes(work) + _copies(work) - base_bytes(small)
        yield f"A base in 4 bits takes {shown(saved)} less (--quantize nf4)."
    room = limit.bytes * MARGIN - (made.total - made.base - made.copies)
    each = (made.base + made.copies) / work.shape.parameters
    if room > 0:
        yield f"A smaller model: up to {room / each / 1e6:,.0f} million parameters fit."
    yield f"More memory: {shown(made.total / MARGIN)} is enough, where the limit is yours to raise."
    yield f"To try it all the same, say how: --token-budget {made.tokens} --recompute {level}."


# ---- for people ----------------------------------------------------------------------------------


def notice(made: Plan, limit: Limit, *, held: int = 0) -> str:
    """The plan in one line."""
    placed = f", the longest example {made.placed:,} alone" if made.placed > made.tokens else ""
    return (
        f"memory: {peak(made, held) / 1e9:.1f} of {limit.bytes / 1e9:.1f} GB planned "
        f"({limit.why}); {made.tokens:,} tokens at a time{placed}, {AGAIN[made.recompute]}"
    )


def table(work: Work, made: Plan, *, limit: Limit) -> list[tuple[str, str]]:
    """What takes how much, row by row."""
    names = {
        "process": "process and libraries" if work.device == "cpu" else "CUDA's context",
        "base": f"base, {work.shape.parameters / 1e6:,.1f} million numbers, "
        f"{work.quantised or work.weights}",
        "copies": "copies of projections, side by side or in the products' format",
        "adapter": f"adapter, {work.trained / 1e6:,.1f} million numbers",
        "optimiser": f"state of {work.optim}",
        "gradients": "gradients",
        "activations": f"kept for backward: {made.placed:,} tokens of {shown(made.per_token)}",
        "passing": "for a moment besides",
        "graphs": "buffers of CUDA graphs",
    }
    parts = asdict(made)
    rows = [(text, shown(parts[name])) for name, text in names.items() if parts[name]]
    if made.evaluation:
        rows.append(("an evaluation, in place of what a step takes", shown(made.evaluation)))
    return [*rows, ("all", f"{shown(made.total)} of {shown(limit.bytes)} ({limit.why})")]


def levels(work: Work, made: Plan, *, limit: Limit) -> list[dict[str, Any]]:
    """For each recompute level: bytes of a token, the peak at the plan's budget, whether it fits,
    and the longest example that does."""
    return [
        {
            "recompute": level,
            "per_token": kept_bytes(work, level),
            "total": (one := plan(work, tokens=made.tokens, recompute=level)).total,
            "fits": fits(one, limit),
            "longest": longest_that_fits(work, limit, recompute=level),
        }
        for level in (LEVELS if work.is_fused else ("none",))
    ]
