"""A causal model on documents lying end to end: its own forward or the kernels', its proof.

`runner` chooses, and proves what it chose on two short documents before a run depends on it: packed
they must give the logits that each gives alone by the model's own forward, and neither may see the
other. Knows no loss beyond nats, no data and no optimiser.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorafit.kernels.attention import Documents
from lorafit.kernels.cross_entropy import Head, linear_nats, linear_nats_each
from lorafit.kernels.elementwise import accumulating
from lorafit.kernels.lora import Counters
from lorafit.model.base import attending_by_documents, is_hooked, undisturbed, unwrap
from lorafit.model.fused import Decoder, Unfit
from lorafit.model.lora import Drawn
from lorafit.model.quantised import exactly, settle

Autocast = Callable[[], AbstractContextManager[object]]


class States(Protocol):
    """Token ids and positions [T] -> the normed hidden states of the tokens `rows_N`, [N, D]."""

    def __call__(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        rows_N: Tensor,
        counters: Counters | None,
    ) -> Tensor: ...


def _nothing() -> None:
    """What a model's own forward holds."""


@dataclass(frozen=True)
class Runner:
    """How a model is run on documents.

    Attributes:
        states: Up to the head.
        nats: (states [N, D], targets [N]) -> their nats summed, with a graph.
        each: The same for each target, without one: [N].
        fused: Whether the kernels run the layers.
        said: A line about the choice and its proof.
        keep_less: Makes backward keep less from now on; its name, empty where nothing is left.
        forget: Hands back what is held between micro-batches.
    """

    states: States
    nats: Callable[[Tensor, Tensor], Tensor]
    each: Callable[[Tensor, Tensor], Tensor]
    fused: bool
    said: str
    keep_less: Callable[[], str] = str
    forget: Callable[[], None] = _nothing


class Faster(States, Protocol):
    """Runs a decoder, and holds something for it."""

    def forget(self) -> None:
        """Hand back what is held between micro-batches."""
        ...


class Leaks(Exception):
    """Packed documents do not give what each gives alone; the message says how far off."""


def runner(
    model: nn.Module,
    *,
    autocast: Autocast,
    dtype: torch.dtype,
    drawn: Drawn,
    recompute: str = "none",
    smoothing: float = 0.0,
    faster: Callable[[Decoder], Faster] | None = None,
) -> Runner:
    """The fastest way to run `model` that is proven.

    Args:
        autocast: The context of the model's own forward.
        dtype: Of matrix products.
        drawn: Where the model's own LoRA dropouts look for their counters.
        recompute: See `fused.RECOMPUTE`; the model's own forward knows its own way.
        smoothing: Label smoothing, in training only.
        faster: Makes of proven kernels a way to run them.

    Raises:
        Leaks: neither way is exact.
    """
    settle(model)
    base = unwrap(model)
    head = _Head(base, dtype, smoothing=smoothing, autocast=autocast)
    own = _OwnForward(model, autocast=autocast, drawn=drawn)
    why = ""
    try:
        fused = Decoder(model, dtype, recompute=recompute)
        error = prove(model, fused, logits=head.logits, autocast=autocast)
        said = f"layers run fused: largest error of a logit {error:.1e} of the largest"
        quick = faster(fused) if faster else fused
        return Runner(
            _Either(quick, own), head.nats, head.each, fused=True, said=said,
            keep_less=fused.keep_less, forget=quick.forget,
        )  # fmt: skip
    except (Unfit, Leaks) as unfit:
        why = str(unfit)
    error = prove(model, own, logits=head.logits, autocast=autocast)
    said = f"layers run by the model's own forward, as {why}; error {error:.1e}"
    return Runner(own, head.nats, head.each, fused=False, said=said)


@dataclass(frozen=True)
class _Either:
    """The kernels, or the model's own forward while it is something that they cannot run, such as a
    model whose adapter is merged for the moment."""

    fused: States
    own: "_OwnForward"

    def __call__(self, *tokens: Tensor, **how: Any) -> Tensor:
        try:
            return self.fused(*tokens, **how)
        except Unfit:
            return self.own(*tokens, **how)


class _OwnForward:
    """The model's own decoder, attention told where documents lie."""

    def __init__(self, model: nn.Module, *, autocast: Autocast, drawn: Drawn) -> None:
        self.base, self.autocast, self.drawn = unwrap(model), autocast, drawn

    def __call__(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        rows_N: Tensor,
        counters: Counters | None,
    ) -> Tensor:
        self.drawn.counters = counters
        with self.autocast(), exactly(self.base), attending_by_documents(self.base, documents):
            made = self.base.get_decoder()(
                input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False
            )
        return made[0][0][rows_N]


class _Head:
    """The output layer: frozen and plain, so that its loss is one node; or any other, which runs as
    it is, a few rows at a time, each computed again in backward."""

    def __init__(
        self, base: Any, dtype: torch.dtype, *, smoothing: float, autocast: Autocast
    ) -> None:
        self.module: nn.Module = base.get_output_embeddings()
        self.autocast, self.smoothing, self.dtype = autocast, smoothing, dtype
        self.softcap = getattr(base.config, "final_logit_softcapping", None) or 0.0
        hooked = is_hooked(self.module)
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        bare = type(self.module) is nn.Linear and self.module.bias is None
        self.plain = bare and not (hooked or trained)
        self._copy: tuple[Any, Tensor] | None = None

    def _frozen(self, *, smoothing: float = 0.0) -> Head:
        weight: Any = self.module.weight
        if weight.dtype == self.dtype:
            return Head(weight.detach(), self.softcap, smoothing)
        seen = (id(weight), weight.data_ptr(), weight._version)
        if self._copy is None or self._copy[0] != seen:
            self._copy = seen, weight.detach().to(self.dtype)
        return Head(self._copy[1], self.softcap, smoothing)

    def nats(self, states_ND: Tensor, targets_N: Tensor) -> Tensor:
        if self.plain:
            return linear_nats(states_ND, targets_N, head=self._frozen(smoothing=self.smoothing))
        total = states_ND.new_zeros((), dtype=accumulating(states_ND.dtype))
        for rows in zip(states_ND.split(_ROWS), targets_N.split(_ROWS), strict=True):
            total = total + checkpoint(self._some, *rows, use_reentrant=False)
        return total

    def each(self, states_ND: Tensor, targets_N: Tensor) -> Tensor:
        if self.plain:
            return linear_nats_each(states_ND, targets_N, head=self._frozen())
        parts = [
            functional.cross_entropy(self.logits(rows), targets, reduction="none")
            for rows, targets in zip(states_ND.split(_ROWS), targets_N.split(_ROWS), strict=True)
        ]
        return torch.cat(parts)

    def _some(self, states_ND: Tensor, targets_N: Tensor) -> Tensor:
        return functional.cross_entropy(
            self.logits(states_ND), targets_N, reduction="sum", label_smoothing=self.smoothing
        )

    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, V], float32 or wider."""
        if self.plain:
            logits_NV = functional.linear(states_ND.to(self.dtype), self._frozen().weight_VD)
        else:
            with self.autocast():
                logits_NV = self.module(states_ND)
        wide_NV = logits_NV.to(accumulating(logits_NV.dtype))
        return self.softcap * torch.tanh(wide_NV / self.softcap) if self.softcap else wide_NV


_ROWS = 256
"""Rows of a head that is trained or adapted at a time."""


@torch.no_grad()
def prove(
    model: nn.Module,
    states: States,
    *,
    logits: Callable[[Tensor], Tensor],
    autocast: Autocast,
) -> float:
    """The largest error of a logit, beside the largest logit, of two packed documents against each
    alone; adapters are given weights for it, as fresh ones are zero.

    Raises:
        Leaks: it is beyond rounding, a document's logits change with the other, or `states` fails.
    """
    base = unwrap(model)
    weight: Tensor = base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    first, second, other = (
        torch.randint(len(weight), (tokens,), generator=generator).to(weight.device)
        for tokens in (11, 14, 11)
    )
    try:
        with undisturbed(model), _stirred(model, generator):
            alone = torch.cat(
                [_own_logits(model, ids, autocast=autocast) for ids in (first, second)]
            )
            # on CUDA long documents are another kernel's
            ways = (True, False) if weight.is_cuda else (True,)
            made = [logits(_packed_states(states, (first, second), tiled=way)) for way in ways]
            beside = logits(_packed_states(states, (other, second)))
    except _FAILURES as error:
        raise Leaks(f"its forward does not take packed documents ({error})") from error
    leak = (made[0][len(first) :] - beside[len(first) :]).abs().max() / alone.abs().max()
    off = torch.stack([(packed - alone).abs().max() for packed in made])
    error = float(off.max() / alone.abs().max())
    with autocast():
        rounded = torch.is_autocast_enabled(weight.device.type) or weight.dtype in _HALVES
    if not error <= (_TOLERANCE_16 if rounded else _TOLERANCE) or not leak <= _LEAK:
        raise Leaks(f"packed documents are off by {error:.1e}, leaking {float(leak):.1e}")
    return error


_FAILURES = (
    *(Unfit, RuntimeError, TypeError, ValueError, LookupError, AttributeError),
    *(AssertionError, OSError),
)
"""What a forward that was not made for packed rows may raise."""

_HALVES = (torch.bfloat16, torch.float16)
_TOLERANCE, _TOLERANCE_16, _LEAK = 1e-5, 1e-1, 1e-6


def _packed_states(states: States, pair: tuple[Tensor, Tensor], *, tiled: bool = True) -> Tensor:
    ids, lengths = torch.cat(pair), tuple(map(len, pair))
    documents = Documents.on(ids.device, lengths)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
    return states(
        ids, positions, documents=documents if tiled else replace(documents, tiles=None),
        rows_N=torch.arange(len(ids), device=ids.device), counters=None,
    )  # fmt: skip


def _own_logits(model: nn.Module, ids: Tensor, *, autocast: Autocast) -> Tensor:
    with autocast(), exactly(model):
        made = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
    logits = made["logits"][0]
    return logits.to(accumulating(logits.dtype))


class _stirred:
    """Inside, adapters' B that are zero hold small numbers, so that a proof sees their path."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        named = model.named_parameters()
        self.fresh = [p for name, p in named if ".lora_B." in name and not p.any()]
        self.generator = generator

    def __enter__(self) -> None:
        for parameter in self.fresh:
            noise = torch.randn(parameter.shape, generator=self.generator) * 0.02
            parameter.copy_(noise.to(parameter))

    def __exit__(self, *_: object) -> None:
        for parameter in self.fresh:
            parameter.zero_()
