"""The same run through transformers' Trainer and through lorafit's, and how far they differ.

`python -m tests.parity.side_by_side [FILE]` prints the largest differences of every case, beside
what transformers' Trainer differs from itself when it only splits the same batch otherwise.
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lorafit
from lorafit.model import adapters

LOGGED = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class Case:
    """One setting; `rows` leaves a last short accumulation window."""

    model: str
    accumulation: int
    schedule: str
    batch: int = 2
    rows: int = 21

    def __str__(self) -> str:
        return f"{self.model}-{self.accumulation}-{self.schedule}"


CASES = [
    Case("llama", 1, "linear"),
    Case("llama", 4, "cosine"),
    Case("llama", 8, "linear", rows=39),
    Case("qwen3", 1, "linear"),
    Case("qwen3", 4, "linear"),
    Case("qwen3", 8, "cosine", rows=39),
    Case("gpt2", 1, "cosine"),
    Case("gpt2", 4, "linear"),
    Case("gpt2", 8, "linear", rows=39),
    Case("gemma", 1, "linear"),
    Case("gemma", 4, "cosine"),
    Case("gemma", 8, "linear", rows=39),
]


@dataclass(frozen=True)
class Outcome:
    """A run's log, and its adapter as trained."""

    log: list[dict[str, float]]
    adapter: dict[str, Tensor]

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.log if name in entry]


def make_model(name: str, folder: Path) -> nn.Module:
    """A pretrained tiny Llama, or a random small model of another architecture, with LoRA."""
    torch.manual_seed(0)
    if name == "llama":
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        base = transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[name]())
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, config)


SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "gemma": lambda: transformers.GemmaConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def rows(count: int, vocabulary: int = 97) -> list[dict[str, list[int]]]:
    """Examples of unequal length, the first part of each unsupervised."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        length = int(torch.randint(8, 33, (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


def collate(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right padding; the same for both."""
    width = max(len(row["input_ids"]) for row in features)
    pad = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in features])
        for name, fill in pad.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in features]
    )
    return batch


def options(case: Case, folder: str, **more: Any) -> dict[str, Any]:
    """The arguments both are given."""
    return {
        "output_dir": folder, "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation, "num_train_epochs": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": case.schedule, "warmup_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "max_grad_norm": 0.5, "use_cpu": True, "seed": 3, **more,
    }  # fmt: skip


def run(case: Case, model: nn.Module, *, ours: bool, **more: Any) -> Outcome:
    """Train a copy of `model`; its log and adapter."""
    library: Any = lorafit if ours else transformers
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = library.Trainer(
            model=model,
            args=library.TrainingArguments(**options(case, folder, **more)),
            train_dataset=rows(case.rows),
            data_collator=collate,
        )
        trainer.train()
    state = {name: value.clone() for name, value in adapters.adapter_state(model).items()}
    return Outcome(trainer.state.log_history, state)


def resplit(case: Case) -> dict[str, int]:
    """The same examples of a step in micro-batches of one."""
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": case.batch * case.accumulation,
    }


@dataclass(frozen=True)
class Difference:
    """Largest relative differences over a run; `adapter` in norm over all tensors."""

    loss: float
    grad_norm: float
    learning_rate: float
    adapter: float


def difference(a: Outcome, b: Outcome) -> Difference:
    """How far `b` is from `a`."""

    def largest(name: str) -> float:
        pairs = zip(a.logged(name), b.logged(name), strict=True)
        return max(abs(x - y) / max(abs(x), 1e-12) for x, y in pairs)

    apart = sum(float((a.adapter[n] - b.adapter[n]).double().norm() ** 2) for n in a.adapter)
    whole = sum(float(a.adapter[n].double().norm() ** 2) for n in a.adapter)
    return Difference(*(largest(name) for name in LOGGED), adapter=(apart / whole) ** 0.5)


def differences(folder: Path) -> Iterator[tuple[Case, Difference, Difference]]:
    """For each case: lorafit from transformers, and transformers from itself, split otherwise."""
    for case in CASES:
        model = make_model(case.model, folder)
        theirs = run(case, model, ours=False)
        ours = run(case, model, ours=True)
        split = run(case, model, ours=False, **resplit(case))
        yield case, difference(theirs, ours), difference(theirs, split)


def table(folder: Path) -> Iterator[str]:
    """The lines of the table."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    yield f"{versions}, fp32, one CPU thread"
    yield "largest relative difference over two epochs: loss, gradient norm, adapter (in norm)"
    yield f"{'':18} {'lorafit from Trainer':>28}   {'Trainer from itself, resplit':>28}"
    for case, ours, theirs in differences(folder):
        shown = "   ".join(
            f"{d.loss:8.1e}  {d.grad_norm:8.1e}  {d.adapter:8.1e}" for d in (ours, theirs)
        )
        yield f"{case!s:18} {shown}"


if __name__ == "__main__":
    from tests.conftest import shared_folder

    torch.set_num_threads(1)
    lines = list(table(shared_folder() / "models" / "stories260K"))
    print("\n".join(["", *lines]))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
