"""Memory that the layers of a micro-batch write to, on a CPU, held from one to the next.

What a layer keeps for backward would else be asked for and given back some three hundred times a
micro-batch, in sizes that change with its tokens: the C library's heap grows by the holes between,
by half of what is kept after a few steps, and Linux hands out zeroed pages anew (docs/memory.md).
Here each kind of tensor has one place for all layers, as large as the most tokens yet that were
trained on; an evaluation's places go when training goes on. A graph whose places were written to
again fails in its backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

STEP = 256
"""Places are for a multiple of so many tokens; what is not touched costs no memory."""


class Rooms:
    """The places of a decoder.

    Args:
        layers: How many it has.
    """

    def __init__(self, layers: int) -> None:
        self.turn = 0
        self._layers, self._own, self._lent = layers, 0, 0
        self._places: dict[tuple[str, bool], Tensor] = {}

    def begin(self, tokens: int, *, keeps: bool) -> None:
        """A micro-batch of so many tokens is about to run.

        Args:
            keeps: For backward, so that no older one's is to come.
        """
        self.turn += keeps
        needed = -(-tokens // STEP) * STEP
        if keeps:
            if needed > self._own:
                self._drop(own=True)
            needed = self._own = max(needed, self._own)
        if needed > self._lent or (keeps and needed < self._lent):
            self._drop(own=False)
            self._lent = needed

    def clear(self) -> None:
        """Give it all back."""
        self._places.clear()
        self._own = self._lent = 0

    def _drop(self, *, own: bool) -> None:
        self._places = {key: place for key, place in self._places.items() if key[1] != own}

    def take(self, name: str, shape: Sequence[int], *, dtype: torch.dtype, layer: int) -> Tensor:
        """A contiguous tensor, whatever it holds. `shape[0]` is tokens.

        Args:
            layer: Whose it is; -1: all layers take the same, one after the other.
        """
        width, own = prod(shape[1:]), layer >= 0
        place = self._places.get((name, own))
        if place is None or place.dtype != dtype or place.shape[1] < shape[0] * width:
            size = (self._layers, self._own * width) if own else (1, self._lent * width)
            place = self._places[name, own] = torch.empty(size, dtype=dtype)
        # .data: torch would take a write to one layer's part for a write to all
        return place[layer, : shape[0] * width].view(*shape).data


@dataclass(frozen=True)
class Room:
    """A layer's part of them.

    Attributes:
        layer: Its number, for the rows that it gives to the next; -1 where these are lent too.
        keeps: Its number, for what its backward needs; -1 where that is made again or not needed.
        turn: Of the micro-batch.
    """

    rooms: Rooms
    layer: int
    keeps: int
    turn: int

    def check(self) -> None:
        """Raises RuntimeError where another micro-batch's forward has run since."""
        if self.turn != self.rooms.turn:
            raise RuntimeError("backward of a micro-batch after the forward of the next")

    def given(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """The layer's result."""
        return self.rooms.take("given", shape, dtype=dtype, layer=self.layer)

    def kept(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype, until_backward: bool = True
    ) -> Tensor:
        """What backward needs, unless it makes that again."""
        layer = self.keeps if until_backward else -1
        return self.rooms.take(name, shape, dtype=dtype, layer=layer)

    def lent(self, name: str, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """What the layer needs no longer than its forward."""
        return self.rooms.take(name, shape, dtype=dtype, layer=-1)
