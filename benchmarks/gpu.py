"""lorafit against transformers' Trainer with PEFT on one CUDA device.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes smollm2-135m --data d1,d3 --out results/gpu-small
    python benchmarks/gpu.py --device cpu --smoke    does its logic run, without a GPU?

Needs torch, transformers and peft beside lorafit; peers that are not installed are named. First
equality: the packed layout and the rows as given must train alike, in fp32 and in bf16. Then
speed: base in bf16 with random weights drawn on the device, SDPA, no recomputation; for each
contender the micro-batch that is fastest in a sweep of tokens, then interleaved rounds of fresh
processes at it, the same examples in every step for all. MFU counts useful operations only
(shapes.py) against the rate of one large matrix product measured here, in this run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import environments
import equality
import examples
import measure
import shapes
from comparison import HEADER, Reading, Row, machine, read, table, write
from contenders import Contender
from environments import CannotInstallError
from examples import Examples
from reference import compare_losses
from shapes import Shape

HERE = Path(__file__).parent
CONTENDERS = (
    Contender("lorafit", "as it comes"),
    Contender("lorafit", "as given", knobs={"layout": "as_given"}),
    Contender("transformers", "padded"),
    Contender("transformers", "grouped", order="group_by_length"),
    Contender("transformers", "flattened", collate="flatten"),
)
ABSENT = ("trl", "unsloth", "liger_kernel", "flash_attn")
SWEEP_STEPS = 6


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    real = [name for name in shapes.SHAPES if name != "tiny"]
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", default=",".join(real))
    parser.add_argument("--data", default="d1,d2,d3,d4", help=f"of {','.join(examples.SETS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not timed")
    parser.add_argument("--sweep", default="4096,8192,16384,32768", help="tokens a micro-batch")
    parser.add_argument(
        "--per-step", type=int, default=0, help="examples; 0: one micro-batch of the largest sweep"
    )
    parser.add_argument("--supervised", action="store_true", help="loss on answers only")
    parser.add_argument("--only", choices=("equality", "speed"))
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON for lorafit's arguments")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a run")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shape, one short round")
    given = parser.parse_args()
    if given.smoke:
        given.shapes, given.data, given.sweep = "tiny", "d1", "512"
        given.rounds, given.steps, given.warm_up = 1, 3, 1
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


class Benchmark:
    """One benchmark: what was asked for, where things lie, and the rows so far."""

    def __init__(self, given: argparse.Namespace, kept: Path) -> None:
        self.given, self.kept = given, kept
        self.rows: list[Row] = []
        self.tables: list[str] = []
        self.told: dict[str, Any] = machine() | {
            "device": _device(given.device),
            "run": f"{given.rounds} rounds of {given.steps} steps, {given.warm_up} untimed",
            "labels": "answers" if given.supervised else "all tokens",
        }
        for name in ABSENT:
            try:
                environments.here(name, name)
                self.told[name] = "installed, not measured: this script has no runner for it here"
            except CannotInstallError as error:
                self.told[name] = f"not measured: {error}"

    def run(self) -> None:
        """Equality, then speed, shape by shape."""
        if self.given.only != "speed":
            tiny = self.given.smoke or self.given.device == "cpu"
            shape = shapes.SHAPES["tiny" if tiny else "smollm2-135m"]
            self.tables.append(
                equality.report(
                    shape, device=self.given.device, knobs=self.given.knobs, kept=self.kept
                )
            )
            print(self.tables[0], flush=True)
            self._write()
        if self.given.only == "equality":
            return
        for name in self.given.shapes.split(","):
            for data in self.given.data.split(","):
                self._compare(shapes.SHAPES[name], data)

    def _compare(self, shape: Shape, name: str) -> None:
        data, batches, each = self._examples(shape, name)
        measured = device_rate(shape, device=self.given.device, share=data.share)
        useful = shape.flops_per_token(mean_context=data.mean_context, supervised=data.share)
        title = f"{shape.name} {name}"
        self.told[title] = (
            f"{each} examples a step, {data.mean_length:.0f} tokens each, {useful / 1e9:.3f} GFLOP "
            f"a token, matrix rate {measured['matrix_rate'] / 1e12:.3f} TFLOP/s, products alone "
            f"{max(measured['tokens_per_second'].values()):,.0f} tokens/s"
        )
        knobs = self.given.knobs
        rows = [
            self._swept(replace(c, knobs=knobs | c.knobs if c.peer == "lorafit" else c.knobs),
                        batches, shape, data, each, title)
            for c in CONTENDERS
        ]  # fmt: skip
        self.rows += rows
        for _ in range(self.given.rounds):
            for row in rows:
                if not row.error:
                    reading = self._measure(row, shape, data, each, self.given.steps)
                    row.readings += [reading] if reading else []
        for row in rows:
            row.floor = measured["matrix_rate"] / useful
        model = self._models(shape)
        compare_losses(rows, data, model, device=self.given.device, kept=self.kept)
        header = tuple("MFU" if word == "of floor" else word for word in HEADER)
        self.tables.append(table(title, rows, header))
        print(self.tables[-1], flush=True)
        self._write()

    def _examples(self, shape: Shape, name: str) -> tuple[Examples, list[int], int]:
        """The examples, the micro-batches to try, and how many examples make a step."""
        where = {"vocabulary": shape.vocabulary, "supervised": self.given.supervised}
        root, steps = environments.cache(), self.given.steps
        data, _ = examples.for_steps(name, root, steps=steps, **where)
        sweep = [int(tokens) for tokens in self.given.sweep.split(",")]
        # powers of two, so that every micro-batch makes the same step
        batches = sorted({2 ** max(0, int(t / data.mean_length).bit_length() - 1) for t in sweep})
        each = self.given.per_step or batches[-1]
        batches = [batch for batch in batches if batch <= each and each % batch == 0] or [each]
        data, each = examples.for_steps(name, root, steps=steps, per_step=each, **where)
        return data, batches, each

    def _swept(
        self, contender: Contender, batches: list[int], shape: Shape, data: Examples, each: int,
        title: str,
    ) -> Row:  # fmt: skip
        """The contender's row at its fastest micro-batch; with the last error if none ran."""
        found: dict[float, Contender] = {}
        error = ""
        for batch in batches:
            trial = replace(contender, batch=batch, setting=f"{contender.setting}, {batch} a batch")
            row = Row(title, trial)
            steps = min(SWEEP_STEPS, self.given.steps)
            if reading := self._measure(row, shape, data, each, steps):
                found[reading.trained] = trial
            error = row.error or error
        if found:
            return Row(title, found[max(found)])
        return Row(title, contender, error=error or "no step could be timed")

    def _measure(
        self, row: Row, shape: Shape, data: Examples, each: int, steps: int
    ) -> Reading | None:
        device, contender = self.given.device, row.contender
        warm_up = min(self.given.warm_up, steps // 2)
        model = self._models(shape)(contender.dtype)
        job = contender.job(model, data, each=each, steps=steps, device=device)
        job = replace(job, synced=(1, warm_up, steps), log_every=steps)
        home = environments.here(contender.peer)
        run = measure.run(contender.script, home, job, kept=self.kept, limit_s=self.given.limit)
        row.error = run.error
        if run.of("imported"):
            row.versions = run.of("imported")[0]["versions"]
        return read(run, data, weights=shape.weight_bytes(contender.dtype), warm_up=warm_up)

    def _models(self, shape: Shape) -> Any:
        root = environments.cache()
        return lambda dtype: shapes.folder(shape, root, dtype=dtype, weights=False)

    def _write(self) -> None:
        write(self.given.out, self.told, self.rows, self.tables)


def _device(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    """Measure, and say where the results are."""
    given = options()
    with tempfile.TemporaryDirectory() as kept:
        Benchmark(given, Path(kept)).run()
    print(f"results: {given.out.with_suffix('.txt')}")


if __name__ == "__main__":
    main()
