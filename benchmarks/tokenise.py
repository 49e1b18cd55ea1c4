"""Examples per second: lorafit's data room against `datasets.map` with the same tokenizer.

`python benchmarks/tokenise.py TOKENIZER FILE.jsonl [REPEATS]` writes questions and answers as
chats, each way in turn, and prints a line of JSON for each pair. `map` renders each conversation
once and tokenises it in batches: ids alone. lorafit also renders the prompt of each answer, proves
where the answer begins, labels it, and keeps the examples on disk; what it costs to find those is
`again_s`. Ratios are of one run, as these machines are shared.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from lorafit.arguments import DataArguments
from lorafit.data import sets
from lorafit.model import tokens

datasets.disable_progress_bars()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def mapped(tokenizer: object, file: str, folder: str) -> int:
    """Examples that `datasets.map` makes of the file, in a fresh cache."""
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)

    def ids(batch: dict[str, list[str]]) -> dict[str, object]:
        texts = [
            tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
                tokenize=False,
            )
            for q, a in zip(batch["question"], batch["answer"], strict=True)
        ]
        return tokenizer(texts, add_special_tokens=False)  # type: ignore[operator]

    return len(rows.map(ids, batched=True, remove_columns=rows.column_names))


def main(name: str, file: str, repeats: int = 3) -> None:
    """Print the pairs."""
    tokenizer = tokens.load_tokenizer(name)
    plain = AutoTokenizer.from_pretrained(name)
    identity = tokens.tokenizer_identity(tokenizer)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LORAFIT_CACHE"] = folder
            arguments = DataArguments(data=file, eval_share=0.0)
            maker = sets.Maker(arguments, tokenizer, identity=identity, limit=None)
            made = [0]

            def ours(maker: sets.Maker = maker, made: list[int] = made) -> None:
                made[0] = len(sets.make(maker, seed=0).train)

            theirs = seconds(lambda folder=folder: mapped(plain, file, folder))
            first, again = seconds(ours), seconds(ours)
            line = {
                "file": Path(file).name, "examples": made[0], "map_s": round(theirs, 2),
                "lorafit_s": round(first, 2), "again_s": round(again, 2),
                "ratio": round(theirs / first, 2),
            }  # fmt: skip
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(number) for number in sys.argv[3:4]))
