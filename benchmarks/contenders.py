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
        needs: Packages that it needs beside the benchmark, where it has no environment of its own.
        reads_weights: It wants them in a file; the others can draw them on their device.
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
    needs: tuple[str, ...] = ()
    reads_weights: bool = False

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

LIGER = {"use_liger_kernel": True}
TRL = ("trl", "datasets")
UNSLOTH: dict[str, Any] = {
    "needs": ("unsloth", "unsloth_zoo", "bitsandbytes", *TRL), "reads_weights": True,
}  # fmt: skip
# The most telling first: what comes last is what a short run leaves out.
ON_GPU = (
    Contender("lorafit", "as it comes"),
    Contender("transformers", "flattened", collate="flatten"),
    Contender(
        "transformers", "flattened Liger", collate="flatten", knobs=LIGER, needs=("liger_kernel",)
    ),
    Contender("unsloth", "as it comes", collate="flatten", **UNSLOTH),
    Contender("trl", "padding-free", collate="flatten", needs=TRL),
    Contender(
        "trl", "padding-free Liger", collate="flatten", knobs=LIGER, needs=(*TRL, "liger_kernel")
    ),
    Contender(
        "transformers", "grouped Liger", order="group_by_length", knobs=LIGER,
        needs=("liger_kernel",),
    ),
    Contender(
        "unsloth", "as it comes recomputed", collate="flatten",
        knobs={"use_gradient_checkpointing": "unsloth"}, **UNSLOTH,
    ),
    Contender("transformers", "grouped", order="group_by_length"),
    Contender("unsloth", "padded compiled", **UNSLOTH),
    Contender("transformers", "padded"),
    Contender("lorafit", "as given", knobs={"layout": "as_given"}),
)  # fmt: skip


def on_gpu(peers: list[str], settings: list[str], *, knobs: dict[str, Any]) -> list[Contender]:
    """The rows for a GPU.

    Args:
        settings: Of these names alone; empty: all.
        knobs: More settings for lorafit's rows.
    """
    return [
        replace(each, knobs=each.knobs | (knobs if each.peer == "lorafit" else {}))
        for each in ON_GPU
        if each.peer in peers and (not settings or each.setting in settings)
    ]


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
