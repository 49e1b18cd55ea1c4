"""First losses against float32: what the examples of a row's first step truly cost."""

from collections.abc import Callable
from pathlib import Path

import environments
import measure
from comparison import Row
from examples import Examples
from peers.protocol import Job


def compare_losses(
    rows: list[Row], data: Examples, model: Callable[[str], Path], *, device: str, kept: Path,
    limit_s: float = 900,
) -> None:  # fmt: skip
    """Fill in `reference` of rows that have readings, in nats per supervised token.

    Args:
        model: The folder of the base in a number format.
        kept: Folder for logs.

    Raises:
        RuntimeError: the reference could not be computed; with the reason.
    """
    known: dict[tuple[str, int], tuple[float, int]] = {}
    for row in rows:
        if row.reference is not None or not row.readings:
            continue
        dtype, wanted = row.contender.dtype, row.readings[0].examples
        if missing := sorted({number for number in wanted if (dtype, number) not in known}):
            job = Job(
                model=str(model(dtype)), data=str(data.path), examples=len(data.lengths),
                dtype=dtype, device=device, knobs={"numbers": missing},
            )  # fmt: skip
            here = environments.here("reference")
            run = measure.run("run_reference.py", here, job, kept=kept, limit_s=limit_s)
            if run.error:
                raise RuntimeError(f"the float32 reference failed: {run.error}")
            for event in run.of("scored"):
                known[dtype, event["example"]] = event["nats"], event["targets"]
        scores = [known[dtype, number] for number in wanted]
        row.reference = sum(nats for nats, _ in scores) / sum(count for _, count in scores)
