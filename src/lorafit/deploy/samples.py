"""What an adapter answers to the first prompts of a data set, beside what was expected.

For people who watch a run; measures nothing. Knows no run.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorafit.data.loader import length_of
from lorafit.data.shapes import IGNORE
from lorafit.deploy.generate import GREEDY, Sampling, go_on
from lorafit.events import Sampled
from lorafit.model import base

SHORT = Sampling(max_new_tokens=128)
"""An answer is looked at and not used."""


def answers(
    model: Any,
    rows: Any,
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    tokenizer: Any,
    stops: Sequence[int] | None,
    count: int,
    step: int,
) -> list[Sampled]:
    """The answers of `model` to the prompts of the first `count` rows that have one, the likeliest
    token each time; modes and random state are as before afterwards.

    Args:
        rows: A map-style set, or several by name, of which the first is taken.
        collator: Makes a batch with "input_ids" and "labels" of a row.
        stops: Ids that end an answer; None: those of the model or the tokenizer.
        step: Where the run stands.

    Raises:
        ValueError: there is no tokenizer, or the rows are a stream.
    """
    rows = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
    length = length_of(rows)
    if tokenizer is None or length is None:
        raise ValueError("they need a processing_class and an evaluation set that is no stream")
    stops = stops or base.stop_ids(model, tokenizer)
    batches = (collator([rows[number]]) for number in range(length))
    asked = (parted(*row) for batch in batches for row in unpadded(batch))
    made: list[Sampled] = []
    for prompt, expected in islice((pair for pair in asked if len(pair[1])), count):
        new, _ = answer(model, prompt, stops=stops, sampling=SHORT)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, new, expected)]
        made.append(Sampled(step, *(text.strip() for text in texts)))
    return made


def answer(
    model: Any, prompt: Tensor, *, stops: Sequence[int], sampling: Sampling = GREEDY
) -> tuple[list[int], bool]:
    """The ids that `model` goes on with after `prompt` [T], up to a stop id; and whether there was
    one."""
    with torch.no_grad(), base.undisturbed(model):
        (new,) = go_on(model, [prompt.tolist()], stops=stops, sampling=sampling)
    end = next((at for at, token in enumerate(new) if token in stops), None)
    return new[:end], end is not None


def parted(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The ids [T] before the first answer of a row, and that answer; where nothing comes before it
    the first third is asked."""
    learned = (labels != IGNORE).nonzero().flatten().tolist()
    if not learned:
        return ids, ids[:0]
    start = learned[0] or max(1, len(ids) // 3)
    end = next((at for at in range(start, len(ids)) if labels[at] == IGNORE), len(ids))
    return ids[:start], ids[start:end]


def unpadded(batch: Mapping[str, Any]) -> Generator[tuple[Tensor, Tensor]]:
    """Ids and labels [T] of each row of a batch, without padding."""
    ids_BT, labels_BT = batch["input_ids"], batch["labels"]
    masks_BT = batch.get("attention_mask", torch.ones_like(ids_BT))
    for ids, labels, mask in zip(ids_BT, labels_BT, masks_BT, strict=True):
        yield ids[mask.bool()], labels[mask.bool()]
