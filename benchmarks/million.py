"""A million short rows through the data room: seconds and peak memory, made and found again.

`python benchmarks/million.py TOKENIZER [ROWS]` writes questions and answers of about thirty tokens
to a temporary jsonl file and runs three processes over it, each of which prints a line of JSON:
`make` reads, writes, tokenises and keeps; `again` finds the examples again and audits them;
`index` takes 10,000 examples by number, in no order. Memory is the peak of resident bytes of the
process, what torch and transformers take without any data (`idle`) beside it.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "red green blue seven eleven harbour letter window under quickly paper station".split()  # noqa: SIM905


def write(file: Path, rows: int) -> None:
    """Rows that are all different."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            said = " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))
            row = {"question": f"What is {number} of {said}?", "answer": f"{said}, {number % 977}."}
            out.write(json.dumps(row) + "\n")


def measure(what: str, name: str, file: str) -> None:
    """Print one line of what was asked."""
    from lorafit.arguments import DataArguments
    from lorafit.data import audit, sets
    from lorafit.model import tokens

    tokenizer = tokens.load_tokenizer(name)
    line: dict[str, object] = {"what": what, "idle_mb": peak()}
    if what != "idle":
        maker = sets.Maker(
            DataArguments(data=file),
            tokenizer,
            identity=tokens.tokenizer_identity(tokenizer),
            limit=None,
        )
        began = time.perf_counter()
        made = sets.make(maker, seed=0)
        line |= {"seconds": round(time.perf_counter() - began, 1), "examples": len(made.train)}
        began = time.perf_counter()
        if what == "index":
            draw = random.Random(1)
            for _ in range(10_000):
                made.train[draw.randrange(len(made.train))]
            line["microseconds_each"] = round((time.perf_counter() - began) * 100, 1)
        elif what == "again":
            audit.audit(made, tokenizer, batch_size=8)
            line["audit_seconds"] = round(time.perf_counter() - began, 1)
    sys.stdout.write(json.dumps(line | {"peak_mb": peak()}) + "\n")


def peak() -> int:
    """The most resident memory so far, in megabytes; children that have ended count too."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) // 1024


def main(name: str, rows: int = 1_000_000) -> None:
    """Write the rows and measure."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORAFIT_CACHE"] = f"{folder}/cache"
        file = Path(folder) / "rows.jsonl"
        write(file, rows)
        for what in ("idle", "make", "again", "index"):
            subprocess.run([sys.executable, __file__, what, name, str(file)], check=True)


if __name__ == "__main__":
    if sys.argv[1] in ("idle", "make", "again", "index"):
        measure(*sys.argv[1:4])
    else:
        main(sys.argv[1], *(int(number) for number in sys.argv[2:3]))
