"""The examples of one step -> micro-batches. Layout changes speed and memory, never the numbers.

Owns what a micro-batch is and how many supervised tokens it has, counted on the host before
anything moves to a device. `as_given` runs the user's own padded batches literally; `packed` lays
their examples end to end in micro-batches of a token budget. Knows neither models nor files.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import DataError
from lorafit.kernels.cross_entropy import IGNORE, supervised_tokens
from lorafit.world import ALONE, World


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward takes.

    Attributes:
        inputs: The model's keyword arguments, labels among them; or what a collator of the user's
            made for an override of theirs.
        supervised: Tokens that carry loss; 0 where there are no "labels" to count.
        tokens: Real tokens, padding left out.
        positions: Tokens with their padding: what the forward is run on.
        documents: Tokens of each example, where they lie end to end; then `inputs` are `input_ids`
            and `position_ids` [T], `rows`, the tokens that predict a supervised one, and `targets`,
            those supervised ones [N].
        examples: How many lie end to end, those without supervision that were left out included.
        drawn: The key of each token's example and its position there, where LoRA's dropout is
            made from them.
        places: Of each example that lies end to end, its place among those that were given.
    """

    inputs: Any
    supervised: int
    tokens: int
    positions: int
    documents: tuple[int, ...] = ()
    examples: int = 0
    drawn: tuple[Tensor, Tensor] | None = None
    places: tuple[int, ...] = ()

    @property
    def owners(self) -> Tensor:
        """Of each supervised token the example that it belongs to, [N]: its row, or its place."""
        if not self.documents:
            return (self.inputs["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
        ends = torch.tensor(self.documents).cumsum(0)
        numbers = torch.bucketize(self.inputs["rows"], ends, right=True)
        return torch.tensor(self.places)[numbers]

    @property
    def rows(self) -> int:
        """How many examples."""
        return self.examples or _rows(self.inputs)

    @property
    def divides(self) -> bool:
        """Whether it holds several examples that could run apart."""
        return len(self.documents) > 1 or (not self.documents and _has_rows(self.inputs))

    @property
    def has_labels(self) -> bool:
        """Whether there are labels to be supervised by, be they all masked."""
        return isinstance(self.inputs, Mapping) and not self.inputs.keys().isdisjoint(
            ("labels", "targets")
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with its inputs on `device`."""
        drawn = moved(self.drawn, device)
        return replace(self, inputs=moved(self.inputs, device), drawn=drawn)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples on `device`; copies are
    asynchronous, for which CUDA must find them in pinned memory: from any other it waits until the
    GPU has done all that was asked of it. Mappings are copied, as an override may change them."""

    def sent(tensor: Tensor) -> Tensor:
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        pins = plain and device.type == "cuda" and tensor.device.type == "cpu"
        home = tensor.contiguous().pin_memory() if pins else tensor  # an expanded one has none
        return home.to(device, non_blocking=True)

    return mapped(value, sent)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor inside its mappings, lists and tuples changed; types are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)({key: mapped(item, change) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def as_given(
    batches: Iterable[Any],
    *,
    shifted: bool,
    draw: tuple[int, int] | None = None,
    most: int = sys.maxsize,
    world: World = ALONE,
) -> list[MicroBatch]:
    """One micro-batch for each batch that the collator made, in its order; of every so many
    processes' batches one is this process's.

    Args:
        batches: Mappings, of tensors for the most part; what else a collator made goes through.
        shifted: Whether token t is predicted from t - 1, so that a row's first label is no target.
        draw: See `packed`.
        most: Positions of a micro-batch: a batch of more runs in several, by rows, padding and all,
            if it is rows of tensors.
    """
    numbered = [(n, part) for n, batch in enumerate(batches) for part in _by_rows(batch, most=most)]
    made = [_micro_batch(part, shifted=shifted) for _, part in numbered]
    if draw is not None and all(is_plain(batch.inputs) for batch in made):
        firsts = accumulate((_examples(batch) for batch in made), initial=0)
        made = [
            replace(batch, drawn=_drawn(batch, first, draw=draw))
            for batch, first in zip(made, firsts, strict=False)
        ]
    return [batch for (n, _), batch in zip(numbered, made, strict=True) if world.owns(n)]


def _by_rows(batch: Any, *, most: int) -> Iterator[Any]:
    """`batch` in parts of at most `most` positions, a row at least."""
    width = batch["input_ids"].shape[-1] if most < sys.maxsize and _has_rows(batch) else 0
    size = max(1, most // width) if width else 0
    if not size or size >= _rows(batch):
        yield batch
        return
    for first in range(0, _rows(batch), size):
        yield {name: tensor[first : first + size] for name, tensor in batch.items()}


def _has_rows(batch: Any) -> bool:
    """Whether `batch` is tensors of several rows each, ids [B, T] among them."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return False
    rows = _rows(batch)
    apart = all(isinstance(t, Tensor) and t.ndim and len(t) == rows for t in batch.values())
    return apart and rows > 1 and batch["input_ids"].ndim == 2


def _drawn(batch: MicroBatch, first: int, *, draw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Keys and positions of a batch that begins with the step's `first` example."""
    ids_BT = batch.inputs["input_ids"]
    numbers = range(first, first + _examples(batch))
    keys = torch.tensor([example_key(draw, number) for number in numbers])
    if "position_ids" in batch.inputs:  # flattened: a document begins where they are 0
        places = batch.inputs["position_ids"].flatten()
        return keys[(places == 0).cumsum(0) - 1], places
    mask_BT = batch.inputs.get("attention_mask", torch.ones_like(ids_BT))
    places_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return keys[:, None].expand_as(ids_BT).flatten(), places_BT.flatten()


def _examples(batch: MicroBatch) -> int:
    """Rows, or the documents of a flattened batch."""
    starts = batch.inputs.get("position_ids")
    return batch.rows if starts is None else int((starts == 0).sum())


def _rows(value: Any) -> int:
    """The length of the first tensor inside that has one; 0 without any."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    parts = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, Mapping | list | tuple)
    return next((rows for part in parts if (rows := _rows(part))), 0) if nested else 0


def _micro_batch(inputs: Any, *, shifted: bool) -> MicroBatch:
    named = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    tensors: dict[Any, Tensor] = {name: item for name, item in named if isinstance(item, Tensor)}
    none = torch.empty(0)
    ids = tensors.get("input_ids", none)
    return MicroBatch(
        inputs=inputs,
        supervised=supervised_tokens(tensors.get("labels", none), shifted=shifted),
        tokens=int(tensors.get("attention_mask", torch.ones_like(ids)).count_nonzero()),
        positions=ids.numel(),
    )


@dataclass(frozen=True, slots=True)
class Document:
    """A row without padding: its ids up to the last that predicts a supervised token, and what each
    of them predicts, int64 [T]. On those after it nothing depends; `tokens` counts them."""

    ids: Tensor
    targets: Tensor
    tokens: int


def packed(
    batches: Iterable[Mapping[str, Tensor]],
    *,
    budget: int,
    draw: tuple[int, int] | None = None,
    world: World = ALONE,
) -> list[MicroBatch]:
    """The examples of padded batches, end to end in micro-batches of at most `budget` tokens; those
    that are this process's, of nearly as many tokens as any other's.

    None is split: one that is longer has a micro-batch for itself. Best fit, long ones first
    (Johnson 1973), so that few tokens of the budget are left over; the same for the same lengths.
    An example without supervision is left out, unless none has any.

    Args:
        draw: Seed and number of the step, where its examples draw random numbers.
    """
    documents = [document for batch in batches for document in unpadded(batch)]
    kept = [place for place, document in enumerate(documents) if len(document.ids)]
    if not kept:
        kept, documents[0] = [0], _bare(documents[0])
    others = [d.tokens for place, d in enumerate(documents) if place not in kept]
    lengths = [len(documents[place].ids) for place in kept]
    if world.size > 1:
        own = fair(lengths, world.size)[world.number]
        kept, lengths = [kept[number] for number in own], [lengths[number] for number in own]
    bins = _even_bins(lengths, budget=budget) if kept else []
    made = []
    for members in bins:
        places = [kept[member] for member in members]
        batch = _end_to_end([documents[place] for place in places])
        keys = torch.tensor([example_key(draw, place) for place in places] if draw else [])
        drawn = _by_token(keys, batch) if draw else None
        made.append(replace(batch, drawn=drawn, places=tuple(places)))
    if not world.is_first:  # which counts those that are left out
        return made
    first, rest = made[0], made[1:]
    whole = replace(first, tokens=first.tokens + sum(others), examples=first.examples + len(others))
    return [whole, *rest]


def fair(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """The indices of each share, whose lengths add up to nearly the same: longest first, each to
    the share that has the least (Graham 1969)."""
    made, held = [list[int]() for _ in range(shares)], [0] * shares
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        least = held.index(min(held))
        made[least].append(index)
        held[least] += lengths[index]
    return [sorted(share) for share in made]


def example_key(draw: tuple[int, int], place: int) -> int:
    """32 bits that name an example of a step wherever it lies, for its random numbers; `place` is
    its place in the step's order."""
    seed, step = draw
    named = f"{seed} {step} {place}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=4).digest())


def _by_token(keys: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(batch.documents)
    return keys.repeat_interleave(lengths), batch.inputs["position_ids"]


_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What transformers' flattening collator adds: where documents begin, once more."""


def is_plain(batch: Any) -> bool:
    """Whether a batch holds what `unpadded` reads and nothing that a model would take besides."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        return False
    known = {"input_ids", "labels", "attention_mask"}
    flattened = "position_ids" in batch and "attention_mask" not in batch
    known |= {"position_ids", *_FLATTENED} if flattened else set()
    ids, labels = batch["input_ids"], batch["labels"]
    fits = batch.keys() <= known and ids.ndim == 2 and ids.shape == labels.shape
    return fits and (not flattened or _counts_documents(batch["position_ids"]))


def _counts_documents(positions_BT: Tensor) -> bool:
    """Whether positions count up from 0 and begin again at each document, as transformers reads
    rows without a mask."""
    rising = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    return bool((positions_BT[:, 0] == 0).all() and (rising | (positions_BT[:, 1:] == 0)).all())


def unpadded(batch: Mapping[str, Tensor]) -> Iterator[Document]:
    """The rows of a batch, cut to their attention mask; a flattened batch, whose documents begin
    where `position_ids` are 0, is cut there.

    Raises:
        DataError: a mask has holes, which no cut can mend, or the batch is not `is_plain`.
    """
    if not is_plain(batch):
        raise DataError(
            f"A batch holds {', '.join(map(str, batch))}, unlike the first row.",
            why="Only rows of ids, mask and labels can be laid end to end.",
            fix="Write layout='as_given' to run batches as your collator makes them.",
        )
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    mask_BT = batch.get("attention_mask")
    starts_BT = batch.get("position_ids") if mask_BT is None else None
    for row, (ids, labels) in enumerate(zip(ids_BT, labels_BT, strict=True)):
        if starts_BT is not None:
            sizes = _between((starts_BT[row] == 0).nonzero().flatten().tolist(), len(ids))
            yield from map(_example, ids.split(sizes), labels.split(sizes))
        elif mask_BT is None:
            yield _example(ids, labels)
        else:
            seen = mask_BT[row].nonzero().flatten()
            first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
            if len(seen) != last - first:
                raise _holes(row)
            yield _example(ids[first:last], labels[first:last])


def _holes(row: int) -> DataError:
    return DataError(
        f"Row {row} of a batch has an attention_mask with zeros between ones.",
        why="Examples are laid end to end without their padding, which may stand at the ends only.",
        fix="Write layout='as_given' to run batches as your collator makes them.",
    )


def _between(starts: list[int], length: int) -> list[int]:
    return [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]


def _example(ids: Tensor, labels: Tensor) -> Document:
    supervised = (labels[1:] != IGNORE).nonzero()
    end = int(supervised[-1]) + 1 if len(supervised) else 0
    return Document(ids[:end], labels[1 : end + 1], len(ids))


def _bare(document: Document) -> Document:
    """One token that predicts nothing: a step without supervision still has a gradient, of 0."""
    return Document(torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE), document.tokens)


def _even_bins(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """As few bins as best fit needs, none of them a small rest if it can be helped: a micro-batch
    of few tokens costs a processor more of its time for each."""
    bins = best_fit(lengths, budget=budget)
    mean = -(-sum(lengths) // len(bins))
    for room in (mean + (budget - mean) * part // 8 for part in range(1, 8) if mean < budget):
        if len(even := best_fit(lengths, budget=room)) == len(bins):
            return even
    return bins


def best_fit(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """The indices of each bin, whose lengths add up to `budget` at most, or one longer alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [bin for bin, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda bin: room[bin])
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(budget - lengths[index])
    return bins


def _end_to_end(documents: Sequence[Document]) -> MicroBatch:
    lengths = tuple(len(document.ids) for document in documents)
    targets = torch.cat([document.targets for document in documents])
    rows = (targets != IGNORE).nonzero().flatten()
    inputs = {
        "input_ids": torch.cat([document.ids for document in documents]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "rows": rows,
        "targets": targets[rows],
    }
    tokens = sum(document.tokens for document in documents)
    return MicroBatch(inputs, len(rows), tokens, sum(lengths), lengths, len(lengths))
