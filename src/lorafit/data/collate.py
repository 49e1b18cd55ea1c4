"""A list of rows -> a padded batch. Owns padding, and which tokens of a batch carry loss.

Labels are masked where the attention mask is 0 and never where an id equals the padding id, so a
padding token that is also the end-of-text token (most tokenizers of base models) erases nothing.
Knows neither models nor files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorafit.errors import ConfigError, DataError
from lorafit.kernels.cross_entropy import IGNORE

# what tokenizers return beside the ids and no causal model takes; transformers' collator drops them
_UNUSED = ("special_tokens_mask", "offset_mapping")
_FILL = {"attention_mask": 0, "labels": IGNORE, "token_type_ids": 0}


class PaddingTokenizer(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills short rows; end-of-text stands in for it."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """End-of-text."""
        ...

    @property
    def padding_side(self) -> str:
        """ "right" or "left"."""
        ...


@dataclass(frozen=True, slots=True)
class PadCollator:
    """Pads lorafit's own examples, which hold no padding of their own.

    Attributes:
        pad_id: Fills `input_ids`; any id serves, as its label is -100 and its mask 0.
        side: "right" or "left".
        multiple_of: The batch's length is rounded up to a multiple of this.
    """

    pad_id: int
    side: str = "right"
    multiple_of: int = 1

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 [rows, longest row]."""
        rows = [_row(row["input_ids"], mask=None, labels=row["labels"]) for row in features]
        return _padded(rows, pad_id=self.pad_id, side=self.side, multiple_of=self.multiple_of)


@dataclass
class DataCollatorForLanguageModeling:
    """transformers' collator of the same name for causal models, with labels by attention mask.

    Takes what transformers' does: mappings with `input_ids` and perhaps `attention_mask`, `labels`
    and other fields, or bare lists of ids; lists, arrays or tensors. Rows are padded on the
    tokenizer's `padding_side`. Rows padded beforehand keep their length and are masked. Departs
    from transformers' in three points:

    - An end-of-text target stays one where the padding id is end-of-text too.
    - A row without `attention_mask` is masked on its trailing run of padding only, of which a first
      end-of-text is kept (and on a leading run, if `padding_side` is "left").
    - `labels` that come with a row are kept, but for those under padding.

    Attributes:
        tokenizer: Gives the padding id and side. Without a padding token end-of-text pads.
        mlm: Must be False; True, transformers' default, is refused.
        pad_to_multiple_of: The batch's length is rounded up to a multiple of this.
        return_tensors: "pt".
        mlm_probability: As whole_word_mask, mask_replace_prob, random_replace_prob and seed, only
            of use with mlm=True; here so that calls written for transformers' collator run.
    """

    tokenizer: PaddingTokenizer
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float | None = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is not causal language modelling in torch tensors.

        Raises:
            ConfigError: `mlm` or `whole_word_mask` is true, or `return_tensors` is not "pt".
        """
        if self.mlm or self.whole_word_mask:
            raise ConfigError(
                f"DataCollatorForLanguageModeling(mlm={self.mlm}, whole_word_mask="
                f"{self.whole_word_mask}) is masked language modelling.",
                why="lorafit trains causal models, which predict each next token.",
                fix="Write DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False).",
            )
        if self.return_tensors != "pt":
            raise ConfigError(
                f"return_tensors={self.return_tensors!r}: lorafit trains with torch.",
                fix="Leave it out, or write return_tensors='pt'.",
            )

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """The rows as one batch.

        Returns:
            `input_ids`, `attention_mask` and `labels` (unshifted, -100 where masked), each int64
            [rows, longest row], and every other field that the rows have, stacked.

        Raises:
            DataError: a field of which no tensor can be made.
        """
        maps = [row if isinstance(row, Mapping) else {"input_ids": row} for row in features]
        side = self.tokenizer.padding_side
        pad_id, eos_id = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        pad_id = eos_id if pad_id is None else pad_id
        if pad_id is None:
            raise ConfigError(
                "This tokenizer has neither a padding nor an end-of-text token.",
                fix="Set tokenizer.pad_token to any token of its vocabulary: it is never learned.",
            )
        rows = []
        for row in maps:
            mask = row.get("attention_mask")
            if mask is None:
                ids = torch.as_tensor(row["input_ids"])
                mask = _mask_of(ids, pad_id, keeps_first=pad_id == eos_id, side=side)
            rows.append(_row(row["input_ids"], mask=mask, labels=row.get("labels")))
            if "token_type_ids" in row:
                rows[-1]["token_type_ids"] = torch.as_tensor(row["token_type_ids"])
        others = [name for name in maps[0] if name not in ("input_ids", *_FILL, *_UNUSED)]
        batch = {name: _stacked(name, [row.get(name) for row in maps]) for name in others}
        multiple_of = self.pad_to_multiple_of or 1
        return _padded(rows, pad_id=pad_id, side=side, multiple_of=multiple_of) | batch


def _row(ids: Any, *, mask: Any, labels: Any) -> dict[str, Tensor]:
    """The three as int64 tensors of one length; labels are the ids where there are none."""
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    seen = torch.ones_like(tokens) if mask is None else torch.as_tensor(mask, dtype=torch.int64)
    targets = tokens if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    if not (tokens.ndim == 1 and tokens.shape == seen.shape == targets.shape):
        raise DataError(
            f"A row has input_ids of shape {list(tokens.shape)}, attention_mask of "
            f"{list(seen.shape)} and labels of {list(targets.shape)}.",
            why="A row is one list of ids, with as many mask values and labels.",
            fix="Correct the function that tokenises the rows.",
        )
    return {
        "input_ids": tokens,
        "attention_mask": seen,
        "labels": targets.masked_fill(seen == 0, IGNORE),
    }


def _mask_of(ids: Tensor, pad_id: int, *, keeps_first: bool, side: str) -> Tensor:
    """The mask of a row that came without one: 0 on the padding at its end, or at its beginning."""
    real = (ids != pad_id).nonzero().flatten().tolist()
    first, last = (real[0], real[-1] + 1) if real else (0, 0)
    mask = torch.zeros_like(ids)
    mask[first if side == "left" else 0 : last + keeps_first] = 1
    return mask


def _padded(
    rows: Sequence[Mapping[str, Tensor]], *, pad_id: int, side: str, multiple_of: int
) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    longest += -longest % multiple_of
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        batch[name] = torch.full((len(rows), longest), _FILL.get(name, pad_id))
        for number, row in enumerate(rows):
            start = longest - len(row[name]) if side == "left" else 0
            batch[name][number, start : start + len(row[name])] = row[name]
    return batch


def _stacked(name: str, values: list[Any]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The field {name!r} cannot be made a tensor: {error}",
            why="A batch holds numbers, as many for each row.",
            fix=f"Drop it before training: dataset.remove_columns({name!r}).",
        ) from error
