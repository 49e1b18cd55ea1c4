"""A million short rows through the data room: seconds and peak memory, made and found again.

`python benchmarks/million.py TOKENIZER [ROWS]` writes questions and answers of about thirty tokens
to a temporary jsonl file and runs these over it, each of which prints a line of JSON: `alone`
reads, writes, tokenises and keeps in one process, `make` by a process for each core; `again` finds
the examples again and audits them; `index` takes 10,000 examples by number, in no order. Memory is
the peak of resident bytes of the process, what transformers takes without any data (`idle`) beside
it; for `alone` and `make` also the peak of what all processes hold together, shared pages once.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
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
    from lorafit.run.workers import spread

    tokenizer = tokens.load_tokenizer(name)
    line: dict[str, object] = {"what": what, "idle_mb": peak()}
    if what != "idle":
        maker = sets.Maker(
            DataArguments(data=file),
            tokenizer,
            identity=tokens.tokenizer_identity(tokenizer),
            limit=None,
            spread=map if what == "alone" else spread,
        )
        together: list[int] = []
        threading.Thread(target=watch, args=[together], daemon=True).start()
        began = time.perf_counter()
        made = sets.make(maker, seed=0)
        line |= {"together_mb": max(together, default=0)} if what in ("alone", "make") else {}
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


def watch(together: list[int]) -> None:
    """Note every half second what this process and its children hold, in megabytes."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        held = 0
        for number in (str(os.getpid()), *children):
            try:
                pages = Path(f"/proc/{number}/smaps_rollup").read_text().split("Pss:")[1]
            except (OSError, IndexError):  # it has just ended
                continue
            held += int(pages.split()[0]) // 1024
        together.append(held)
        time.sleep(0.5)


def main(name: str, rows: int = 1_000_000) -> None:
    """Write the rows and measure."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORAFIT_CACHE"] = f"{folder}/cache"
        file = Path(folder) / "rows.jsonl"
        write(file, rows)
        for what in ("idle", "alone", "make", "again", "index"):
            if what == "make":  # not found again
                shutil.rmtree(os.environ["LORAFIT_CACHE"])
            subprocess.run([sys.executable, __file__, what, name, str(file)], check=True)


if __name__ == "__main__":
    if sys.argv[1] in ("idle", "alone", "make", "again", "index"):
        measure(*sys.argv[1:4])
    else:
        main(sys.argv[1], *(int(number) for number in sys.argv[2:3]))
