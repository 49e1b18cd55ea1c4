"""CUDA graphs of fused layers: forward and backward recorded once for a size, then replayed.

Small models on a GPU wait for the host, which takes longer to launch a pass than the GPU to run it;
a replay is one launch. A micro-batch is filled up to the next of a ladder of sizes by documents
from which nothing is predicted: no other document sees them and their gradients are exactly 0. A
size is recorded when it is met for the second time, so that a short run pays little. Gradients are
added up in tensors of their own, which become the parameters' `.grad`.
`LORAFIT_GRAPHS=0` leaves all this out.
"""

# torch's operations on lists of tensors have no public names
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorafit.kernels import tiles
from lorafit.kernels.attention import Documents
from lorafit.kernels.lora import Counters
from lorafit.model.fused import Decoder

LEAST, PARTS = 512, 8
"""The smallest size; sizes between two powers of two."""
MOST_GRAPHS = 64


@dataclass(frozen=True)
class Size:
    """What a graph is recorded for: tokens, documents, a bound on the longest, and whether
    attention takes them by tiles."""

    tokens: int
    documents: int
    longest: int
    tiled: bool

    @classmethod
    def holding(cls, lengths: Sequence[int]) -> "Size":
        """The smallest that holds documents of these lengths, and what fills it up. Documents and
        the bound are counted coarsely, so that sizes are few: an empty tile leaves at once."""
        tokens, longest = rung(sum(lengths)), power_of_four(max(lengths), least=512)
        filling = -(-(tokens - sum(lengths)) // longest)
        documents = power_of_four(len(lengths) + filling, least=32)
        return cls(tokens, documents, longest, tiles.wins(lengths))

    def filled(self, lengths: Sequence[int]) -> list[int]:
        """These lengths, then those of documents that fill up, then of empty ones."""
        left = self.tokens - sum(lengths)
        filling = [min(self.longest, left - at) for at in range(0, left, self.longest)]
        return [*lengths, *filling, *[0] * (self.documents - len(lengths) - len(filling))]

    def tables(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What attention reads of the filled documents, on the host: `starts` and `tiles`."""
        filled = self.filled(lengths)
        starts = torch.tensor(list(accumulate(filled, initial=0)), dtype=torch.int32)
        room = tiles.most(self.tokens, self.documents)
        return starts, tiles.table(filled, room) if self.tiled else None


def rung(tokens: int) -> int:
    """The smallest size of the ladder that holds so many: eighths between powers of two, so that
    at most a ninth of it is left over."""
    step = max(LEAST, power_of_two(tokens) // 2) // PARTS
    return max(LEAST, -(-tokens // step) * step)


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << max(0, number - 1).bit_length()


def power_of_four(number: int, *, least: int) -> int:
    """The smallest of `least`, 4 x `least`, 16 x `least`, ... that is no less."""
    return least if number <= least else power_of_four(number, least=4 * least)


def wanted() -> bool:
    """Whether nobody has asked for none."""
    return os.environ.get("LORAFIT_GRAPHS") != "0"


class Replaying:
    """Runs a decoder as `Decoder` itself does, by replaying where a graph can be had.

    Args:
        decoder: Fused, in 16 bits on CUDA, its layers not made again as a whole.
        per_token: Bytes that a token keeps for backward; a size that needs more than half of the
            memory that is free is never recorded.
    """

    def __init__(self, decoder: Decoder, *, per_token: int) -> None:
        self.decoder, self.per_token = decoder, per_token
        self._met: dict[Size, _Inputs] = {}
        self._graphs: dict[Size, _Graph] = {}
        self._sums: Sums | None = None
        self._signs: tuple[Any, ...] = ()
        self._pool: Any = None

    def __call__(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        rows_N: Tensor,
        counters: Counters | None,
    ) -> Tensor:
        """As `Decoder`."""
        given: Any = {"documents": documents, "counters": counters}
        if not torch.is_grad_enabled() or self.decoder.recompute == "layer":
            return self.decoder(ids_T, positions_T, rows_N=rows_N, **given)
        sums, size = self._summing(counters), Size.holding(documents.lengths)
        graph, inputs = self._graphs.get(size), self._met.get(size)
        if graph is None and not (sums.trained and self._fits(size)):
            return self.decoder(ids_T, positions_T, rows_N=rows_N, **given)
        if inputs is None:
            inputs = self._met[size] = _Inputs(size, ids_T.device, counted=counters is not None)
        elif graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = _Graph(self.decoder, inputs, sums=sums, pool=self._pool)
            self._graphs[size] = graph
        inputs.fill(ids_T, positions_T, **given)
        # what is met first runs as it will be recorded, so that nothing has to be loaded then
        x_TD = _Replay.apply(graph.anchor, graph) if graph else inputs.run(self.decoder)
        assert isinstance(x_TD, Tensor)
        return self.decoder.normed(x_TD, rows_N)

    def forget(self) -> None:
        """Hand back the memory of what was recorded."""
        self._signs, self._graphs, self._met, self._pool = (), {}, {}, None

    def _summing(self, counters: Counters | None) -> "Sums":
        """What gradients are added up in; all that was recorded is forgotten if the model is
        another than it was."""
        changes = self.decoder.refresh()
        trained = [factor for factor in self.decoder.factors() if factor.requires_grad]
        pointers = tuple((id(tensor), tensor.data_ptr()) for tensor in trained)
        signs = (changes, counters is None, pointers, self.decoder.recompute)
        if signs != self._signs or self._sums is None:
            self.forget()  # the pool too: of one whose graphs are gone nothing can be recorded
            self._signs, self._sums = signs, Sums(trained)
        return self._sums

    def _fits(self, size: Size) -> bool:
        if len(self._graphs) >= MOST_GRAPHS:
            return False
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        return 2 * size.tokens * self.per_token < free + unused


class Sums:
    """The gradients of some parameters, added up by graphs in tensors that stay."""

    def __init__(self, trained: list[Tensor]) -> None:
        self.trained = trained
        self.sums = [torch.zeros_like(tensor) for tensor in trained]

    def open(self) -> None:
        """Let them be the parameters' `.grad`, with what that held."""
        fresh = [s for p, s in zip(self.trained, self.sums, strict=True) if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, total in zip(self.trained, self.sums, strict=True):
            if parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total

    def close(self) -> None:
        """Tell whoever waits for gradients, as autograd would."""
        for parameter in self.trained:
            hooks = parameter._post_accumulate_grad_hooks
            for hook in list(hooks.values()) if hooks else ():
                hook(parameter)


class _Inputs:
    """A micro-batch of one size, in tensors that stay: `fill`, then `run`."""

    def __init__(self, size: Size, device: torch.device, *, counted: bool) -> None:
        self.size = size
        self.ids_T, self.positions_T, *counters = (
            torch.zeros(size.tokens, dtype=torch.int64, device=device)
            for _ in range(4 if counted else 2)
        )
        self.counters = Counters(*counters) if counted else None
        starts, table = (x if x is None else x.to(device) for x in size.tables([]))
        self.documents = Documents((), starts, size.longest, table)

    def fill(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        counters: Counters | None,
    ) -> None:
        """Take a micro-batch."""
        given = [(self.ids_T, ids_T), (self.positions_T, positions_T)]
        if self.counters and counters:
            given.append((self.counters.keys_T, counters.keys_T))
            given.append((self.counters.places_T, counters.places_T))
        for into, tensor in given:
            into[: len(tensor)].copy_(tensor)
            into[len(tensor) :].zero_()
        recorded = self.documents.starts, self.documents.tiles
        for into, table in zip(recorded, self.size.tables(documents.lengths), strict=True):
            if into is not None and table is not None:
                into.copy_(table, non_blocking=True)

    def run(self, decoder: Decoder) -> Tensor:
        """What the layers make of it and of what fills it up, [T, D]."""
        return decoder.run(
            self.ids_T, self.positions_T, documents=self.documents, counters=self.counters
        )


class _Graph:
    """The layers recorded for inputs of one size, which were run before."""

    def __init__(self, decoder: Decoder, inputs: _Inputs, *, sums: Sums, pool: Any) -> None:
        self.sums, self.inputs = sums, inputs
        self.anchor = torch.zeros((), device=inputs.ids_T.device, requires_grad=True)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode="thread_local"):
            x_TD = inputs.run(decoder)
        self.dx_TD = torch.empty_like(x_TD)
        with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode="thread_local"):
            made = torch.autograd.grad(x_TD, sums.trained, self.dx_TD)
            torch._foreach_add_(sums.sums, list(made))
        self.x_TD = x_TD.detach()

    def forward(self) -> Tensor:
        """What the layers make of it, [T, D]; valid until the next micro-batch."""
        self.forward_graph.replay()
        return self.x_TD.detach()

    def backward(self, dx_TD: Tensor) -> None:
        """Add the gradients to the parameters' own."""
        self.dx_TD.copy_(dx_TD)
        self.sums.open()
        self.backward_graph.replay()
        self.sums.close()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph) -> Tensor:  # noqa: ARG004
        ctx.graph = graph
        return graph.forward()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.graph.backward(grads[0])
        return None, None
