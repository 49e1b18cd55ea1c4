"""lorafit and its peers on one CUDA device.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes smollm2-135m --data d1,d3 --out results/gpu-small
    python benchmarks/gpu.py --only speed --minutes 9    what that allows, the most telling first
    python benchmarks/gpu.py --device cpu --smoke        does its logic run, without a GPU?

Needs torch, transformers and peft beside lorafit; TRL, Unsloth and Liger are measured where they
are installed in the same environment, and named where not. First equality: the packed layout and
the rows as given must train alike, in fp32 and in bf16. Then speed: base in bf16 with random
weights drawn on the device, no recomputation but where a row says so; rounds of fresh processes,
the same examples in every step for all but those grouped by length. lorafit as it comes is given a
step's examples and makes its own micro-batches; every other contender has the micro-batch that is
fastest in a sweep of tokens, from the largest down to the first that is slower, halved while memory
does not suffice. The steps that are not timed are many, as lorafit records a CUDA graph for each
size that it meets. One round of all goes before the second of any. While a run trains, the next
process loads its libraries and waits. MFU counts useful operations only (shapes.py) against the
rate of one large matrix product measured here, in this run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import contenders
import environments
import equality
import examples
import measure
import shapes
from comparison import HEADER, Reading, Row, machine, read, table, write
from contenders import Contender
from environments import CannotInstallError
from examples import Examples
from measure import Begun
from peers.protocol import Job
from reference import compare_losses
from shapes import Shape

HERE = Path(__file__).parent
PEERS = ("lorafit", "transformers", "trl", "unsloth")
FIRST = ("smollm2-135m", "qwen3-0.6b", "llama3.2-1b", "qwen3-1.7b")
SWEEP_WARM_UP, SWEEP_STEPS = 4, 6
LARGEST_FILE = 8e9  # bytes of weights that are written for a peer that reads them
LEAST_S = 15  # of what is left of --minutes, for a run to begin


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    rest = [name for name in shapes.SHAPES if name not in ("tiny", *FIRST)]
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", default=",".join((*FIRST, *rest)), help="the first four first")
    parser.add_argument("--data", default="d1,d3,d2,d4", help=f"of {','.join(examples.SETS)}")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--settings", default="", help="of the contenders by name; empty: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="that are timed")
    parser.add_argument("--warm-up", type=int, default=40, help="steps before them")
    parser.add_argument(
        "--others-warm-up", type=int, default=10, help="the same of all but lorafit"
    )
    parser.add_argument("--sweep", default="4096,8192,16384", help="tokens a micro-batch")
    parser.add_argument(
        "--per-step", type=int, default=0, help="examples; 0: one micro-batch of the largest sweep"
    )
    parser.add_argument("--supervised", action="store_true", help="loss on answers only")
    parser.add_argument("--only", choices=("equality", "speed"))
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON for lorafit's arguments")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a run")
    parser.add_argument("--minutes", type=float, default=0, help="of it all; 0: no limit")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shape, two short rounds")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.data, given.sweep = "tiny", "d1", "256,512"
        given.rounds, given.steps, given.warm_up = 2, 2, 1
        given.out = environments.cache() / "smoke-gpu"
    return given


def device_rate(shape: Shape, *, device: str, share: float) -> dict[str, Any]:
    """floor.py's word on this device, in a process of its own: the matrix rate, and the floor."""
    counts = "4096,16384" if device == "cuda" else "256"
    command = [sys.executable, HERE / "floor.py", "--shape", shape.name, "--device", device]
    command += ["--dtype", "bf16", "--tokens", counts, "--supervised", f"{share:.3f}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"floor.py failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


@dataclass
class Cell:
    """A shape on a set of examples.

    Attributes:
        batches: Examples of the micro-batches to try, the largest first.
        each: Examples of a step.
    """

    title: str
    shape: Shape
    data: Examples
    batches: list[int]
    each: int
    rows: list[Row] = field(default_factory=list)


class Benchmark:
    """One benchmark: what was asked for, where things lie, and what was measured so far."""

    def __init__(self, given: argparse.Namespace, kept: Path) -> None:
        self.given, self.kept = given, kept
        self.ends = time.monotonic() + 60 * given.minutes if given.minutes else float("inf")
        self.cells: list[Cell] = []
        self.equality: list[str] = []
        self.left_out: list[str] = []
        self.next: Begun | None = None
        self.rate = 0.0
        self.told: dict[str, Any] = machine() | {
            "device": _device(given.device),
            "run": f"{given.rounds} rounds of {given.steps} steps after {given.warm_up} untimed "
            f"(peers: {given.others_warm_up})",
            "labels": "answers" if given.supervised else "all tokens",
        }
        settings = [name for name in given.settings.split(",") if name]
        self.contenders = contenders.on_gpu(given.peers.split(","), settings, knobs=given.knobs)
        self.absent = {each.name: reason for each in self.contenders if (reason := _absent(each))}

    def run(self) -> None:
        """Equality, then speed: each round over all cells."""
        if self.given.only != "speed":
            tiny = self.given.smoke or self.given.device == "cpu"
            shape = shapes.SHAPES["tiny" if tiny else "smollm2-135m"]
            self.equality.append(
                equality.report(
                    shape, device=self.given.device, knobs=self.given.knobs, kept=self.kept
                )
            )
            print(self.equality[0], flush=True)
            self._write()
        if self.given.only == "equality":
            return
        try:
            self._rounds()
        finally:
            if self.next:
                self.next.end()

    def _rounds(self) -> None:
        given = self.given
        names = given.shapes.split(",")
        groups = [[n for n in names if n in FIRST], [n for n in names if n not in FIRST]]
        wanted = [(n, d) for group in groups for d in given.data.split(",") for n in group]
        for number in range(given.rounds):
            for place, (shape, data) in enumerate(wanted):
                if self._left() < LEAST_S:
                    self.left_out.append(f"{shape} {data} round {number + 1}")
                    continue
                if number == 0:
                    self._prepare(shapes.SHAPES[shape], data)
                self._round(self.cells[place], number)
        self._write()

    def _prepare(self, shape: Shape, name: str) -> None:
        """The next cell, and what its rows are read against."""
        data, batches, each = self._examples(shape, name)
        useful = shape.flops_per_token(mean_context=data.mean_context, supervised=data.share)
        title = f"{shape.name} {name}"
        self.told[title] = (
            f"{each} examples a step, {data.mean_length:.0f} tokens each, {useful / 1e9:.3f} GFLOP "
            "a token"
        )
        if not (self.rate and self.given.minutes):  # with a limit, once for all
            measured = device_rate(shape, device=self.given.device, share=data.share)
            self.rate = measured["matrix_rate"]
            self.told[title] += (
                f", matrix rate {self.rate / 1e12:.3f} TFLOP/s, products alone "
                f"{max(measured['tokens_per_second'].values()):,.0f} tokens/s"
            )
        cell = Cell(title, shape, data, batches, each)
        for contender in self.contenders:
            reason = self.absent.get(contender.name, "")
            if contender.reads_weights and shape.weight_bytes(contender.dtype) > LARGEST_FILE:
                reason = reason or "not measured: it reads weights from a file, too large a one"
            cell.rows.append(Row(title, contender, error=reason, floor=self.rate / useful))
        self.cells.append(cell)

    def _round(self, cell: Cell, number: int) -> None:
        """One reading of each row; in the first round its micro-batch is found."""
        rows = [row for row in cell.rows if (row.readings if number else not row.error)]
        order = [row.contender for row in rows]
        for row, following in zip(rows, [*order[1:], *order[:1]], strict=True):
            if self._left() < LEAST_S:
                self.left_out.append(f"{cell.title} {row.contender.setting} round {number + 1}")
            elif number:
                self._timed(row, cell, following)
            else:
                self._first(row, cell, following)
            self._write()
        if number == 0 and self._left() > LEAST_S:
            self._references(cell)
        print(self._table(cell), flush=True)
        self._write()

    def _first(self, row: Row, cell: Cell, following: Contender) -> None:
        contender, batches = row.contender, cell.batches
        if contender.peer == "lorafit" and not contender.knobs.get("layout"):
            batches = [cell.each]  # its micro-batches are its own affair
        batch = batches[0] if len(batches) == 1 else self._fastest(row, cell, batches)
        while batch:
            row.contender = _at(contender, batch)
            self._timed(row, cell, following)
            batch = 0 if row.readings or not _out_of_memory(row.error) else batch // 2

    def _fastest(self, row: Row, cell: Cell, batches: list[int]) -> int:
        """Examples of the micro-batch to measure at. An error is left to that measurement."""
        best, rate = 0, 0.0
        for batch in batches:
            trial = Row(cell.title, _at(row.contender, batch))
            found = self._measure(
                trial, cell, SWEEP_WARM_UP, SWEEP_STEPS, following=trial.contender
            )
            if not found and not _out_of_memory(trial.error):
                return batch
            if found and found.trained <= rate:
                break
            if found:
                best, rate = batch, found.trained
        return best or max(1, batches[-1] // 2)

    def _timed(self, row: Row, cell: Cell, following: Contender) -> None:
        """One more reading of the row, or its error."""
        warm_up, steps = self.given.warm_up, self.given.steps
        if row.contender.peer != "lorafit":  # which alone records graphs
            warm_up = min(warm_up, self.given.others_warm_up)
        reading = self._measure(row, cell, warm_up, steps, following=following)
        row.readings += [reading] if reading else []

    def _measure(
        self, row: Row, cell: Cell, warm_up: int, steps: int, *, following: Contender
    ) -> Reading | None:
        """A run of the row's contender; meanwhile the process that follows gets ready."""
        device, contender, kept = self.given.device, row.contender, self.kept
        warm_up, steps = min(warm_up, self.given.warm_up), min(steps, self.given.steps)
        begun, self.next = self._begun(contender.script), None
        home, end = environments.here(contender.peer), warm_up + steps
        try:
            model = self._model(cell.shape, contender)
            job = contender.job(model, cell.data, each=cell.each, steps=end, device=device)
            job = replace(job, synced=(1, warm_up, end), log_every=end)
            here = environments.here(following.peer)
            self.next = measure.begin(following.script, here, device=device, kept=kept)
            limit_s = min(self.given.limit, self._left())
            run = measure.run(contender.script, home, job, kept=kept, limit_s=limit_s, begun=begun)
            row.error = run.error
            if run.of("imported"):
                row.versions = run.of("imported")[0]["versions"]
            weights = cell.shape.weight_bytes(contender.dtype)
            return read(run, cell.data, weights=weights, warm_up=warm_up)
        except (OSError, LookupError, ValueError, RuntimeError) as error:
            # one peer's trouble is not another's
            row.error = f"{type(error).__name__}: {error}"
            return None

    def _begun(self, script: str) -> Begun | None:
        """The process that got ready, if it is the one that is wanted."""
        if self.next and (self.next.script != script or self.next.process.poll() is not None):
            self.next.end()
            self.next = None
        return self.next

    def _references(self, cell: Cell) -> None:
        limit_s = min(self.given.limit, self._left())
        try:
            compare_losses(
                cell.rows, cell.data, self._folder(cell.shape), device=self.given.device,
                kept=self.kept, limit_s=limit_s,
            )  # fmt: skip
        except RuntimeError as error:
            self.told[f"{cell.title} losses"] = str(error)

    def _examples(self, shape: Shape, name: str) -> tuple[Examples, list[int], int]:
        """The examples, the micro-batches to try, and how many examples make a step."""
        where = {"vocabulary": shape.vocabulary, "supervised": self.given.supervised}
        root, steps = environments.cache(), self.given.warm_up + self.given.steps
        data, _ = examples.for_steps(name, root, steps=steps, **where)
        sweep = [int(tokens) for tokens in self.given.sweep.split(",")]
        # powers of two, so that every micro-batch makes the same step
        sizes = {2 ** max(0, int(t / data.mean_length).bit_length() - 1) for t in sweep}
        batches = sorted(sizes, reverse=True)
        each = self.given.per_step or batches[0]
        batches = [batch for batch in batches if batch <= each and each % batch == 0] or [each]
        data, each = examples.for_steps(name, root, steps=steps, per_step=each, **where)
        return data, batches, each

    def _model(self, shape: Shape, contender: Contender) -> Path:
        """The folder that a contender's base is in."""
        folder = self._folder(shape)(contender.dtype)
        return self._written(folder, contender.dtype) if contender.reads_weights else folder

    def _folder(self, shape: Shape) -> Any:
        root = environments.cache()
        return lambda dtype: shapes.folder(shape, root, dtype=dtype, weights=False)

    def _written(self, folder: Path, dtype: str) -> Path:
        """The same model with the weights that the others draw, as a file.

        Raises:
            RuntimeError: they could not be written; with the reason.
        """
        device = self.given.device
        made = folder.with_name(f"{folder.name}-drawn-{device}")
        if (made / "complete").exists():
            return made
        shutil.copytree(folder, made, ignore=shutil.ignore_patterns("complete"), dirs_exist_ok=True)
        job = Job(str(folder), dtype=dtype, device=device, knobs={"folder": str(made)})
        here = environments.here("weights")
        if error := measure.run("run_weights.py", here, job, kept=self.kept).error:
            raise RuntimeError(f"the weights could not be written: {error}")
        (made / "complete").touch()
        return made

    def _left(self) -> float:
        return self.ends - time.monotonic()

    def _table(self, cell: Cell) -> str:
        header = tuple("MFU" if word == "of floor" else word for word in HEADER)
        return table(cell.title, cell.rows, header)

    def _write(self) -> None:
        left_out = {"left out, as the time was up": self.left_out} if self.left_out else {}
        rows = [row for cell in self.cells for row in cell.rows]
        tables = [*self.equality, *map(self._table, self.cells)]
        write(self.given.out, self.told | left_out, rows, tables)


def _absent(contender: Contender) -> str:
    """Why it cannot be measured here, if it cannot."""
    try:
        environments.here(contender.peer, *contender.needs)
    except CannotInstallError as error:
        return f"not measured: {error}"
    return ""


def _at(contender: Contender, batch: int) -> Contender:
    return replace(contender, batch=batch, setting=f"{contender.setting}, {batch} a batch")


def _out_of_memory(error: str) -> bool:
    return "out of memory" in error.lower() or "OutOfMemory" in error


def _device(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    """Measure, and say where the results are."""
    given = options()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as kept:
        Benchmark(given, Path(kept)).run()
    print(f"results: {given.out.with_suffix('.txt')}")


if __name__ == "__main__":
    main()
