"""lorafit and its peers on this CPU, side by side.

    make bench                                       all peers on gsm8k, d1 and d3; hours
    python benchmarks/cpu.py --smoke                 a tiny model, one round: does it all run?
    python benchmarks/cpu.py --peers lorafit,transformers --data gsm8k,d1 --rounds 5

Each measurement is a fresh process, the peers take turns within a round, and the floor (the matrix
products alone, floor.py) is measured in each round too. The same weights, token ids, adapter
rank, optimiser and examples per step for all; what cannot be the same stands in the runner's own
docstring. The first step's loss is held against float32 on the same weights and examples. A peer
that cannot be installed or fails keeps its row, with the reason. Results go to
benchmarks/results/cpu.json and cpu.txt after each round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import contenders
import environments
import examples
import measure
import shapes
from comparison import Row, machine, read, table, write
from environments import CannotInstallError, Environment
from examples import Examples, NoDataError
from reference import compare_losses

HERE = Path(__file__).parent
PEERS = tuple(environments.PACKAGES)
# d2, d3 and d4 in steps of 16 would take minutes each; these hold as many tokens as two of d3
STEP_TOKENS, IN_TOKENS = 4096, ("d2", "d3", "d4")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--data", default="gsm8k,d1,d3", help=f"of {','.join(examples.SETS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first is not timed")
    parser.add_argument("--per-step", type=int, default=16, help="examples")
    parser.add_argument("--shape", default="smollm2-135m", choices=shapes.SHAPES)
    parser.add_argument("--dtypes", default="", help="bf16,fp32; those this CPU has natively")
    parser.add_argument(
        "--match", choices=("mixed", "examples", "tokens"), default="mixed",
        help=f"steps of --per-step examples, or {STEP_TOKENS:,} tokens; mixed: these for d2 to d4",
    )  # fmt: skip
    parser.add_argument("--supervised", action="store_true", help="loss on answers only")
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON for lorafit's arguments")
    parser.add_argument("--limit", type=float, default=900, help="seconds of a run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu")
    parser.add_argument("--here", action="store_true", help="peers of this environment, as it is")
    parser.add_argument("--settings", default="", help="names with ; between; empty: all")
    parser.add_argument("--smoke", action="store_true", help="tiny shape, one round of two steps")
    given = parser.parse_args()
    if given.smoke:
        given.shape, given.rounds, given.steps = "tiny", 1, 2
        given.data = "gsm8k,d1" if os.environ.get("LORAFIT_SHARED") else "d1"
        given.out = environments.cache() / "smoke-cpu"
    return given


def native() -> list[str]:
    """Number formats that this CPU multiplies in; bf16 where it is emulated is far slower."""
    has = machine()["instructions"]
    return ["bf16", "fp32"] if {"avx512_bf16", "amx_bf16"} & set(has) else ["fp32"]


def homes(peers: list[str], *, here: bool) -> dict[str, Environment | str]:
    """Each peer's environment, or why there is none.

    Args:
        here: Take what is installed beside this script, where there is no package index.
    """
    found: dict[str, Environment | str] = {}
    for peer in peers:
        try:
            found[peer] = (
                environments.here(peer, peer, "torch", "transformers", "peft")
                if here
                else environments.environment(peer)
            )
        except CannotInstallError as error:
            found[peer] = f"cannot be installed: {error}"
    return found


def floor(shape: str, dtype: str, share: float) -> float:
    """Tokens per second of the matrix products alone, at the best micro-batch, in a process."""
    command = [sys.executable, HERE / "floor.py", "--shape", shape, "--dtype", dtype]
    command += ["--device", "cpu", "--supervised", f"{share:.3f}"]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(measure.threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    return max(json.loads(done.stdout)["tokens_per_second"].values())


class Benchmark:
    """One benchmark: what was asked for, where things lie, and the rows so far."""

    def __init__(self, given: argparse.Namespace, kept: Path) -> None:
        self.given, self.kept = given, kept
        self.dtypes = given.dtypes.split(",") if given.dtypes else native()
        self.shape = shapes.SHAPES[given.shape]
        self.homes = homes(given.peers.split(","), here=given.here)
        self.rows: list[Row] = []
        self.floors: dict[tuple[str, str], list[float]] = {}
        self.told: dict[str, Any] = machine() | {
            "model": f"{given.shape}, random weights, LoRA r=16 alpha=32 on all linears",
            "run": f"{given.rounds} rounds of {given.steps} steps, medians",
            "labels": "answers" if given.supervised else "all tokens",
        }
        if "bf16" not in self.dtypes:
            self.told["bf16"] = "not measured: this CPU has no native bf16, or it was not asked for"

    def run(self) -> None:
        """Every set of examples, one after the other."""
        for name in self.given.data.split(","):
            in_tokens = name in IN_TOKENS if self.given.match == "mixed" else (
                self.given.match == "tokens"
            )  # fmt: skip
            try:
                data, each = examples.for_steps(
                    name, environments.cache(), vocabulary=self.shape.vocabulary,
                    steps=self.given.steps, per_step=None if in_tokens else self.given.per_step,
                    step_tokens=STEP_TOKENS, supervised=self.given.supervised,
                )  # fmt: skip
            except NoDataError as error:
                self.told[name] = f"not measured: {error}"
                continue
            self.told[name] = (
                f"{each} examples a step, {data.mean_length:.0f} tokens each, "
                f"{data.share:.0%} supervised"
            )
            self._rounds(data, each)
        self._write()

    def _rounds(self, data: Examples, each: int) -> None:
        asked = contenders.on_cpu(
            self.given.peers.split(","), self.dtypes,
            core="bf16" in self.dtypes, knobs=self.given.knobs,
        )  # fmt: skip
        wanted = [name for name in self.given.settings.split(";") if name]
        rows = [Row(data.name, each) for each in asked if not wanted or each.setting in wanted]
        self.rows += rows
        for number in range(self.given.rounds):
            for dtype in self.dtypes:
                rate = floor(self.given.shape, dtype, data.share)
                self.floors.setdefault((data.name, dtype), []).append(rate)
            for row in rows:
                if row.error:
                    continue
                self._measure(row, data, each)
                shown = f"{row.readings[-1].trained:,.1f} tokens/s" if row.readings else row.error
                print(f"{data.name} round {number + 1}: {row.contender.name}: {shown}", flush=True)
            for row in rows:
                row.floor = median(self.floors[data.name, row.contender.dtype])
            compare_losses(rows, data, self._model, device="cpu", kept=self.kept)
            self._write()

    def _measure(self, row: Row, data: Examples, each: int) -> None:
        home = self.homes[row.contender.peer]
        if isinstance(home, str):
            row.error = home
            return
        model = self._model(row.contender.dtype)
        job = row.contender.job(model, data, each=each, steps=self.given.steps, device="cpu")
        run = measure.run(row.contender.script, home, job, kept=self.kept, limit_s=self.given.limit)
        row.error = run.error
        if run.of("imported"):
            row.versions = run.of("imported")[0]["versions"]
        if reading := read(run, data, weights=self.shape.weight_bytes(row.contender.dtype)):
            row.readings.append(reading)

    def _model(self, dtype: str) -> Path:
        return shapes.folder(self.shape, environments.cache(), dtype=dtype, weights=True)

    def _write(self) -> None:
        write(self.given.out, self.told, self.rows, list(self._tables()))

    def _tables(self) -> Iterator[str]:
        for name in dict.fromkeys(row.data for row in self.rows):
            yield table(name, [row for row in self.rows if row.data == name])
        yield "\n".join(
            f"floor, {name} {dtype}: {median(rates):,.1f} tokens/s "
            f"[{min(rates):,.1f}-{max(rates):,.1f}]"
            for (name, dtype), rates in self.floors.items()
        )


def main() -> None:
    """Measure, and show the table."""
    given = options()
    with tempfile.TemporaryDirectory() as kept:
        Benchmark(given, Path(kept)).run()
    print(given.out.with_suffix(".txt").read_text())


if __name__ == "__main__":
    main()
