"""The examples that are trained on: token ids and labels, the same for every peer.

`gsm8k` is real: grade-school problems read from the folder that LORAFIT_SHARED names, tokenised
by Qwen2.5's tokenizer, ids taken modulo the vocabulary of the model measured. `d1` to `d4` are
synthetic: lengths after instruction data, after chats, all 2,048 and all 512; ids uniform, seed 0.
d3 and d4 have no padding to win. Id 0 is padding and 1 the end; neither occurs elsewhere.
"""

import json
import os
import random
from dataclasses import dataclass
from math import log
from pathlib import Path

PAD, END, FIRST_ID, IGNORE = 0, 1, 2, -100
LONGEST = 2048
SETS = ("gsm8k", "d1", "d2", "d3", "d4")
# median length, spread of its logarithm, supervised share: of the log-normal sets
_DRAWN = {"d1": (110, 0.75, 0.6), "d2": (450, 0.9, 0.4)}
_FIXED = {"d3": 2048, "d4": 512}


class NoDataError(Exception):
    """The set cannot be had here; says what is missing."""


@dataclass(frozen=True)
class Examples:
    """A file of examples and what is in it."""

    name: str
    path: Path
    lengths: tuple[int, ...]
    supervised: tuple[int, ...]

    @property
    def mean_length(self) -> float:
        """Tokens per example."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def mean_context(self) -> float:
        """sum(length^2) / sum(length)."""
        return sum(length**2 for length in self.lengths) / sum(self.lengths)

    @property
    def share(self) -> float:
        """Supervised tokens per token."""
        return sum(self.supervised) / sum(self.lengths)


def for_steps(
    name: str,
    root: Path,
    *,
    vocabulary: int,
    steps: int,
    per_step: int | None = 16,
    step_tokens: int = 4096,
    supervised: bool = False,
) -> tuple[Examples, int]:
    """The examples of a run, and how many make a step: `per_step`, or about `step_tokens` tokens.

    The number is 1, 2 or a multiple of 4, so that micro-batches of 2 and of 4 make the same step.

    Raises:
        NoDataError: as `make`.
    """
    first = make(name, root, vocabulary=vocabulary, count=500, supervised=supervised)
    each = per_step or max(1, round(step_tokens / first.mean_length))
    each = each - each % 4 if each > 3 else min(each, 2)
    count = each * steps
    return make(name, root, vocabulary=vocabulary, count=count, supervised=supervised), each


def make(name: str, root: Path, *, vocabulary: int, count: int, supervised: bool) -> Examples:
    """The first `count` examples of a set as a file of JSON lines; made once.

    Args:
        supervised: Loss on answers only; else on every token, as most scripts do.

    Raises:
        NoDataError: GSM8K without LORAFIT_SHARED.
    """
    label = "answers" if supervised else "all"
    path = root / "data" / f"{name}-{vocabulary}-{label}-{count}.jsonl"
    if not path.exists():
        rows = _gsm8k(count, vocabulary) if name == "gsm8k" else _synthetic(name, count, vocabulary)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for ids, prompt in rows:
                learned = [IGNORE] * prompt + ids[prompt:] if supervised else ids
                file.write(json.dumps({"input_ids": ids, "labels": learned}) + "\n")
    kept = [json.loads(line) for line in path.open()]
    targets = (sum(label != IGNORE for label in row["labels"][1:]) for row in kept)
    return Examples(name, path, tuple(len(row["input_ids"]) for row in kept), tuple(targets))


def _synthetic(name: str, count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    chance = random.Random(f"{name}-0")
    rows: list[tuple[list[int], int]] = []
    for _ in range(count):
        length, share = _FIXED.get(name, 0), 1.0
        if name in _DRAWN:
            median, spread, share = _DRAWN[name]
            length = min(max(round(chance.lognormvariate(log(median), spread)), 16), LONGEST)
        ids = [chance.randrange(FIRST_ID, vocabulary) for _ in range(length)]
        rows.append((ids, round(length * (1 - share))))
    return rows


def _gsm8k(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    from tokenizers import Tokenizer

    if not (shared := os.environ.get("LORAFIT_SHARED")):
        raise NoDataError("gsm8k is read from the folder that LORAFIT_SHARED names; it is not set")
    tokenizer = Tokenizer.from_file(f"{shared}/tokenizers/qwen2.5/tokenizer.json")

    def ids(text: str) -> list[int]:
        return [
            FIRST_ID + number % (vocabulary - FIRST_ID) for number in tokenizer.encode(text).ids
        ]

    rows: list[tuple[list[int], int]] = []
    with Path(shared, "data/gsm8k/train.jsonl").open() as file:
        for line, _ in zip(file, range(count), strict=False):
            row = json.loads(line)
            prompt = ids(f"Question: {row['question']}\nAnswer:")
            rows.append(([*prompt, *ids(f" {row['answer']}"), END], len(prompt)))
    return rows
