"""Who is measured, and with which settings. A row of a table each; owns no measuring.

Each peer has the matched setting (the file's order, 2 examples a micro-batch, padded, no
recomputation) and its best known one where that is another.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples import Examples
from peers.protocol import Job

PACKED_ROW = 1024


@dataclass(frozen=True)
class Contender:
    """One peer with its settings.

    Attributes:
        core: Measured in fp32 too where bf16 is native; the others there in bf16 alone.
    """

    peer: str
    setting: str
    dtype: str = "bf16"
    batch: int = 2
    order: str = "sequential"
    collate: str = "pad"
    compile: bool = False
    core: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.peer} {self.setting} {self.dtype}"

    @property
    def script(self) -> str:
        """Its runner."""
        return f"run_{self.peer}.py"

    def job(self, model: Path, examples: Examples, *, each: int, steps: int, device: str) -> Job:
        """The run: `steps` of `each` examples, whatever the micro-batches."""
        batch = min(self.batch, each)
        parts, knobs = each // batch, dict(self.knobs)
        if self.collate == "pack":
            row = max(PACKED_ROW, *examples.lengths)
            batch, parts = 1, max(1, round(each * examples.mean_length / row))
            knobs["max_length"] = row
        return Job(
            model=str(model), data=str(examples.path), examples=len(examples.lengths),
            dtype=self.dtype, batch=batch, accumulation=parts, steps=steps, device=device,
            order=self.order, collate=self.collate, compile=self.compile, knobs=knobs,
        )  # fmt: skip


GROUPED = {"batch": 4, "order": "group_by_length"}
ON_CPU = (
    Contender("lorafit", "as it comes", core=True),
    Contender("lorafit", "as given", core=True, knobs={"layout": "as_given"}),
    Contender("transformers", "2 a batch", core=True),
    Contender("transformers", "4 a batch, grouped", **GROUPED),
    Contender("transformers", "2 a batch, flattened", collate="flatten"),
    Contender("trl", "2 a batch"),
    Contender("trl", "packed", collate="pack"),
    Contender("unsloth", "2 a batch"),
    Contender("unsloth", "4 a batch, grouped", **GROUPED),
    Contender("unsloth", "4 a batch, grouped, compiled", compile=True, **GROUPED),
    Contender("litgpt", "2 a batch"),
    Contender("mlx", "2 a batch"),
)


def on_cpu(
    peers: list[str], dtypes: list[str], *, core: bool, knobs: dict[str, Any]
) -> list[Contender]:
    """The rows for a CPU.

    Args:
        core: In fp32 the core rows alone.
        knobs: More settings for lorafit's rows.
    """
    return [
        replace(each, dtype=dtype, knobs=each.knobs | (knobs if each.peer == "lorafit" else {}))
        for dtype in dtypes
        for each in ON_CPU
        if each.peer in peers and (dtype == "bf16" or each.core or not core)
    ]
