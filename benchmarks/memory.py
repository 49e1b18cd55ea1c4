"""Is the memory plan right? What `lorafit plan` says, beside the peak of a run that is measured.

    python benchmarks/memory.py [SHAPE ...] [--tokens 1024] [--device cuda] [--jobs 4]
    python benchmarks/memory.py smollm2-135m --dtype bf16 --steps 4

Each run is a fresh process: LoRA of rank 16 on all projections. On the CPU in fp32 or bf16, random
weights in files, one optimiser step unless more are asked for; the peak is the process's resident
set (VmHWM), libraries and mapped files included; nothing is taken off it. On CUDA in bf16, weights
drawn there, three steps, so that graphs are recorded and replayed; the peak is that of torch's
allocator, and the process's own share is taken off the forecast. A shape whose plan does not fit
this machine is said, not run. Results: benchmarks/results/memory.txt and memory.json, in bf16
memory-bf16, with CUDA memory-cuda.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import environments
import shapes
from comparison import machine

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """What is trained on: `rows` examples of `length` tokens in one step."""

    name: str
    rows: int
    length: int
    recompute: str = "auto"


def settings(tokens: int) -> tuple[Setting, ...]:
    """One micro-batch of so many tokens; the same with layers made again; a document of twice as
    many, for which the plan chooses."""
    return (
        Setting("as it comes", 4, tokens // 4),
        Setting("layers made again", 4, tokens // 4, "layer"),
        Setting("a long document", 1, 2 * tokens),
    )


def run(
    shape: shapes.Shape, setting: Setting, *, root: Path, how: dict[str, object]
) -> dict[str, object]:
    """Forecast and peak in bytes, and what was chosen, of one fresh process."""
    on_gpu = how["device"] == "cuda"
    folder = shapes.folder(shape, root, dtype=str(how["dtype"]), weights=not on_gpu)
    told = {"model": str(folder), **asdict(setting), "vocabulary": shape.vocabulary, **how}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(told)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(told: dict[str, object]) -> None:
    """In the fresh process: plan from the configuration alone, then train one step."""
    from lorafit import config, forecast

    rows, length = int(str(told["rows"])), int(str(told["length"]))
    on_gpu, steps = told["device"] == "cuda", int(str(told["steps"]))
    flags = {
        "model": told["model"], "data": "-", "max_length": length, "recompute": told["recompute"],
        "use_cpu": not on_gpu, "bf16": told["dtype"] == "bf16", "eval_strategy": "no",
        "save_strategy": "no", "load_best_model_at_end": False,
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "max_steps": steps,
    }  # fmt: skip
    settings = config.load(None, flags)
    said = forecast.make(settings)

    import torch

    import lorafit
    from lorafit.data.collate import PadCollator
    from lorafit.model import adapters, base

    folder = Path(str(told["model"]))
    bare = shapes.drawn(folder, device="cuda") if on_gpu else base.load_model(settings.model)
    model = adapters.attach(bare, settings.model)
    generator = torch.Generator().manual_seed(0)
    most = int(str(told["vocabulary"]))
    ids = torch.randint(most, (rows * steps, length), generator=generator).tolist()
    settings.training.output_dir = tempfile.mkdtemp()
    trainer = lorafit.Trainer(
        model=model,
        args=settings.training,
        data_collator=PadCollator(0),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    before = resident("VmHWM")
    trainer.train()
    chosen, forecast_bytes = trainer._packing, said.plan.total
    peak = resident("VmHWM")
    if on_gpu:
        forecast_bytes -= said.plan.process
        before, peak = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    print(json.dumps({
        "forecast": forecast_bytes, "measured": peak, "reserved" if on_gpu else "loading": before,
        "tokens": chosen.budget, "made_again": chosen.recompute, "plan": asdict(said.plan),
    }))  # fmt: skip


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def line(point: dict[str, object]) -> str:
    """For the table."""
    begin = f"{point['shape']:<14}{point['name']:<19}{point['rows']:>3} x{point['length']:>6}  "
    if "error" in point:
        return f"{begin}not run: {point['error']}"
    forecast, measured = float(str(point["forecast"])), float(str(point["measured"]))
    off = f"{forecast / 1e9:>10.2f}{measured / 1e9:>10.2f}{forecast / measured - 1:>+9.1%}"
    return f"{begin}{point['made_again']:<12}{off}"


def main() -> None:
    """Measure, write, show; a run takes the place of an earlier one of the same setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=[*shapes.SHAPES])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="on a CPU; default: fp32")
    parser.add_argument("--steps", type=int, help="default: 3 on CUDA, 1 on a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--worker", type=json.loads)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    on_cpu = given.device == "cpu"
    dtype = given.dtype or "fp32" if on_cpu else "bf16"
    how = {"device": given.device, "dtype": dtype, "steps": given.steps or (1 if on_cpu else 3)}
    kind = ("memory" if dtype == "fp32" else "memory-bf16") if on_cpu else "memory-cuda"
    root, out = environments.cache(), given.out or HERE / "results" / kind
    told = machine() | {name: version(name) for name in ("torch", "transformers", "peft")}
    before = out.with_suffix(".json")
    kept = json.loads(before.read_text()) if before.exists() else {}
    points = {(p["shape"], p["name"]): p for p in kept.get("points", [])}
    asked = [(name, setting) for name in given.shapes for setting in settings(given.tokens)]

    def measured(name: str, setting: Setting) -> dict[str, object]:
        shape = shapes.SHAPES[name]
        if on_cpu and shape.weight_bytes(dtype) >= 0.5 * total_memory():
            return {"error": f"its weights in {dtype} are half of this machine"}
        return run(shape, setting, root=root, how=how)

    import transformers.models.auto  # noqa: F401  as threads may not load it at once

    with ThreadPoolExecutor(given.jobs) as pool:
        for (name, setting), found in zip(
            asked, pool.map(measured, *zip(*asked, strict=True)), strict=True
        ):
            point = {"shape": name, **asdict(setting), "steps": how["steps"], **found}
            points[name, setting.name] = point
            print(line(point), flush=True)
            write(out, told, [*points.values()])


def write(out: Path, told: dict[str, object], points: list[dict[str, object]]) -> None:
    """The table for people and everything for machines."""
    places = {name: place for place, name in enumerate(shapes.SHAPES)}
    points = sorted(points, key=lambda point: places[str(point["shape"])])
    head = (
        f"{'shape':<14}{'setting':<19}{'rows':>3} x tokens  {'made again':<12}{'forecast':>9}"
        f"{'measured':>10}      off"
    )
    said = [f"{key}: {value}" for key, value in told.items()]
    kind = "torch's allocator" if "cuda" in out.name else "resident memory"
    text = [*said, "", f"GB of {kind} at the peak", head, *map(line, points)]
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".txt").write_text("\n".join(text) + "\n")
    out.with_suffix(".json").write_text(json.dumps(told | {"points": points}, indent=1) + "\n")


def total_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main()
