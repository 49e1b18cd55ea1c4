"""Labels by attention mask; the same as transformers' collator wherever that one is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, BatchEncoding

from lorafit.data.collate import DataCollatorForLanguageModeling, PadCollator
from lorafit.errors import ConfigError, DataError

TEXTS = ["Once upon a time", "Hi", "The cat sat on the mat.<|im_end|>"]


def collator(tokenizer: Any, **options: Any) -> DataCollatorForLanguageModeling:
    return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False, **options)


class Ids:
    """The least of a tokenizer: padding 0, end-of-text 0 unless told otherwise."""

    def __init__(self, pad: int | None = 0, eos: int | None = 0, side: str = "right") -> None:
        self.pad_token_id, self.eos_token_id, self.padding_side = pad, eos, side


def labels(tokenizer: Any, *rows: Any) -> list[list[int]]:
    return collator(tokenizer)(list(rows))["labels"].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("form", ["encoding", "dict", "tensor", "beforehand"])
def test_agrees_with_transformers_where_padding_is_not_a_target(
    shared: Path, side: str, multiple: int | None, form: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5", padding_side=side)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    padding = {"padding": "max_length", "max_length": 13} if form == "beforehand" else {}
    rows = [tokenizer(text, **padding) for text in TEXTS]
    assert isinstance(rows[0], BatchEncoding)
    if form == "dict":
        rows = [dict(row) | {"weight": 0.5, "id": 3} for row in rows]
    if form == "tensor":
        rows = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    theirs = transformers.DataCollatorForLanguageModeling(
        tokenizer=tokenizer, mlm=False, pad_to_multiple_of=multiple
    )(rows)
    ours = collator(tokenizer, pad_to_multiple_of=multiple)(rows)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype


def test_bare_lists_agree_with_transformers(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5")
    rows = [tokenizer(text).input_ids for text in TEXTS]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)(rows)
    ours = collator(tokenizer)(rows)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["labels"], theirs["labels"])


def test_end_of_text_stays_a_target_where_it_also_pads(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/tinyllama-chat")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    rows = [tokenizer(text + tokenizer.eos_token) for text in ("Once upon a time", "Hi")]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)(rows)
    ours = collator(tokenizer)(rows)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert (theirs["labels"] == eos).sum() == 0  # transformers' model never learns to stop
    assert (ours["labels"] == eos).sum(dim=1).tolist() == [1, 1]
    differs = ours["labels"] != theirs["labels"]
    assert (ours["input_ids"][differs] == eos).all()


def test_a_tokenizer_without_padding_pads_with_end_of_text(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    assert tokenizer.pad_token_id is None
    batch = collator(tokenizer)([tokenizer("Hi there"), tokenizer("Hi")])
    assert batch["input_ids"][1].tolist() == [17250, tokenizer.eos_token_id]
    assert batch["labels"][1].tolist() == [17250, -100]


def test_given_labels_are_kept_but_under_padding() -> None:
    row = {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "labels": [1, -100, 6, 7]}
    batch = collator(Ids())([row, {"input_ids": [5], "attention_mask": [1]}])
    assert batch["labels"].tolist() == [[-100, -100, 6, -100], [5, -100, -100, -100]]
    assert batch["input_ids"].tolist() == [[0, 5, 6, 0], [5, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("tokenizer", "ids", "expected"),
    [
        (Ids(), [5, 6, 0], [5, 6, 0]),
        (Ids(), [5, 0, 6, 0, 0, 0], [5, 0, 6, 0, -100, -100]),
        (Ids(), [0, 5, 0, 0], [0, 5, 0, -100]),
        (Ids(pad=9), [5, 0, 9, 9], [5, 0, -100, -100]),
        (Ids(pad=9), [5, 9, 6], [5, 9, 6]),
        (Ids(pad=None), [5, 0, 0], [5, 0, -100]),
        (Ids(side="left"), [0, 0, 5, 6, 0], [-100, -100, 5, 6, 0]),
        (Ids(pad=9, side="left"), [9, 9, 5, 0], [-100, -100, 5, 0]),
        (Ids(), [0, 0], [0, -100]),
        (Ids(pad=9), [9, 9], [-100, -100]),
    ],
)
def test_without_a_mask_only_runs_of_padding_are_masked(
    tokenizer: Ids, ids: list[int], expected: list[int]
) -> None:
    for row in (ids, {"input_ids": ids}, {"input_ids": torch.tensor(ids)}):
        batch = collator(tokenizer)([row])
        assert batch["labels"].tolist() == [expected]
        assert batch["attention_mask"].tolist() == [[int(label != -100) for label in expected]]


def test_token_types_are_padded_and_other_numbers_stacked() -> None:
    rows = [
        {"input_ids": [5, 6], "token_type_ids": [1, 1], "special_tokens_mask": [0, 0], "w": [1.0]},
        {"input_ids": [5], "token_type_ids": [1], "special_tokens_mask": [0], "w": [2.0]},
    ]
    batch = collator(Ids())(rows)
    assert batch["token_type_ids"].tolist() == [[1, 1], [1, 0]]
    assert batch["w"].tolist() == [[1.0], [2.0]]
    assert "special_tokens_mask" not in batch


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [5], "text": "a"}], "field 'text' cannot be made a tensor"),
        ([{"input_ids": [5], "n": [1]}, {"input_ids": [5], "n": [1, 2]}], "field 'n' cannot"),
        ([{"input_ids": [5], "n": 1}, {"input_ids": [5]}], "field 'n' cannot"),
        ([{"input_ids": [5, 6], "labels": [5]}], r"input_ids of shape \[2\].*labels of \[1\]"),
        ([{"input_ids": [[5, 6]]}], r"input_ids of shape \[1, 2\]"),
    ],
)
def test_what_cannot_be_a_batch_is_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collator(Ids())(rows)


def test_what_is_not_causal_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="mlm=False"):
        DataCollatorForLanguageModeling(Ids())
    with pytest.raises(ConfigError, match="whole_word_mask"):
        DataCollatorForLanguageModeling(Ids(), mlm=False, whole_word_mask=True)
    with pytest.raises(ConfigError, match="return_tensors='np'"):
        DataCollatorForLanguageModeling(Ids(), mlm=False, return_tensors="np")
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text"):
        labels(Ids(pad=None, eos=None), [5])


def test_own_examples_are_never_taken_for_padding() -> None:
    rows = [{"input_ids": [5, 0, 0], "labels": [-100, 0, 0]}, {"input_ids": [5], "labels": [5]}]
    batch = PadCollator(0, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 0, 0, 0], [5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 0, -100], [5, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert PadCollator(9, side="left")(rows)["input_ids"].tolist() == [[5, 0, 0], [9, 9, 5]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
