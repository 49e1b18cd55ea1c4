"""Does it train alike? Losses and final adapters of short runs against transformers' Trainer.

All runs start from one adapter and take the same examples in the same steps, so that whatever
differs is arithmetic: the order of sums, and in bf16 the rounding. The Trainer's own distance
from itself, when it only splits the same steps into other micro-batches, is the yardstick.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import environments
import examples
import measure
import shapes
from contenders import Contender
from peers.protocol import Job
from shapes import Shape

STEPS, EACH = 4, 16
TRAINER = Contender("transformers", "4 a batch", batch=4)
OTHERS = (
    Contender("transformers", "2 a batch", batch=2),
    Contender("lorafit", "as given, 4 a batch", batch=4, knobs={"layout": "as_given"}),
    Contender("lorafit", "as it comes, 4 a batch", batch=4),
    Contender("lorafit", "as it comes, 2 a batch", batch=2),
)


def report(shape: Shape, *, device: str, knobs: dict[str, Any], kept: Path) -> str:
    """A table for fp32 and bf16: the largest difference of a loss, and of A and B in norm."""
    lines = [f"equality, {shape.name} d1, {STEPS} steps: largest relative difference"]
    lines.append(f"{'':<40}{'loss':>10}{'A':>10}{'B':>10}   from transformers 4 a batch")
    root = environments.cache()
    data, _ = examples.for_steps(
        "d1", root, vocabulary=shape.vocabulary, steps=STEPS, per_step=EACH
    )
    for dtype in ("fp32", "bf16"):
        model = shapes.folder(shape, root, dtype=dtype, weights=False)

        def trained(contender: Contender, dtype: str = dtype, model: Path = model) -> Any:
            more = knobs if contender.peer == "lorafit" else {}
            chosen = replace(contender, dtype=dtype, knobs=more | contender.knobs)
            job = chosen.job(model, data, each=EACH, steps=STEPS, device=device)
            return _run(chosen, job, kept=kept)

        truth = trained(TRAINER)
        for contender in OTHERS:
            name, found = replace(contender, dtype=dtype).name, trained(contender)
            failed = next((each for each in (truth, found) if isinstance(each, str)), None)
            lines.append(f"{name:<40}" + (f"  {failed}" if failed else _distances(found, truth)))
    return "\n".join(lines)


def _run(contender: Contender, job: Job, *, kept: Path) -> tuple[dict[int, float], Any] | str:
    """Losses by step and the adapter's tensors, or why there are none."""
    from safetensors.torch import load_file

    folder = kept / contender.name.replace(" ", "-")
    job = replace(job, adapter=str(folder))
    home = environments.here(contender.peer)
    run = measure.run(contender.script, home, job, kept=kept)
    return run.error or (run.losses, load_file(folder / "adapter_model.safetensors"))


def _distances(found: Any, truth: Any) -> str:
    losses = max(abs(found[0][step] - loss) / loss for step, loss in truth[0].items())
    return f"{losses:>10.1e}{_apart(found, truth, 'lora_A'):>10.1e}" + (
        f"{_apart(found, truth, 'lora_B'):>10.1e}"
    )


def _apart(found: Any, truth: Any, kind: str) -> float:
    """The norm of the difference over the norm, all matrices of a kind taken together."""
    names = [name for name in truth[1] if kind in name]
    apart = sum((found[1][name] - truth[1][name]).float().square().sum() for name in names)
    whole = sum(truth[1][name].float().square().sum() for name in names)
    return float((apart / whole) ** 0.5)
