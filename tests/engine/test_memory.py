"""The plan: what a token keeps, against what backward is seen to keep; what fits, the choice."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_packing import model_of, trained
from tests.tiny import plain

from lorafit import packing
from lorafit.arguments import TrainingArguments
from lorafit.engine import limits, memory, precision
from lorafit.engine.limits import Limit
from lorafit.engine.memory import Work, choose, kept_bytes, plan
from lorafit.errors import ConfigError
from lorafit.kernels import attention, cross_entropy
from lorafit.kernels.attention import Documents
from lorafit.model import base, documents, fused, shape
from lorafit.model.lora import Drawn

T = 64
SMOLLM2 = shape.of(
    {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
     "tie_word_embeddings": True}
)  # fmt: skip
WORK = Work(SMOLLM2, trained=4_884_480, ranks=112)
AMPLE = Limit(10**12, "the machine's free memory")


def kept(model: Any, recompute: str) -> int:
    """Bytes a token that autograd is seen to keep, each tensor once, weights and head left out."""
    found = documents.runner(
        model, autocast=precision.Precision(torch.device("cpu")).autocast, dtype=torch.float32,
        drawn=Drawn(), recompute=recompute,
    )  # fmt: skip
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) and tensor.shape[0] % T == 0:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    ids = torch.arange(T) % 97
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = found.states(
            ids, torch.arange(T), documents=Documents((T,)), rows_N=torch.arange(4), counters=None
        )
    assert states.requires_grad
    return sum(sizes.values()) // T


@pytest.mark.parametrize("level", ["none", "mlp", "half"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_is_what_backward_keeps(name: str, level: str) -> None:
    """To the number, but for the log sums' layout and a last norm."""
    model = model_of(name)
    found = base.shape_of(model)
    work = Work(found, ranks=found.adapted(["all-linear"], 4)[1])
    assert kept(model, level) == pytest.approx(kept_bytes(work, level), rel=0.12)


def test_smollm2_keeps_what_was_calculated() -> None:
    """339 KiB a token in bf16, 159 without gate and up (set A and A'), x·A not counted there."""
    half = Work(SMOLLM2, weights="bfloat16", products="bfloat16")
    assert round(kept_bytes(half) / 1024) == 339
    assert round(kept_bytes(half, "mlp") / 1024) == 159


def test_numbers_of_the_kernels_are_theirs() -> None:
    assert dict(memory.CHUNK) == cross_entropy.CHUNK
    assert memory.BLOCK == attention.BLOCK and memory.LEVELS == fused.RECOMPUTE


def test_products_are_those_of_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    cases = product(names, (None, torch.bfloat16), (True, False), ("cpu", "cuda"))
    for weights, wanted, native, device in cases:
        monkeypatch.setattr(precision, "native_bf16", lambda _, native=native: native)
        asked = precision.Precision(torch.device(device), wanted)
        theirs = precision.products(asked, names[weights])
        ours = memory.products(
            weights, wanted="bfloat16" if wanted else "", device=device, native=native
        )
        assert names[ours] == theirs


# ---- the choice


def test_the_fastest_that_fits_is_chosen() -> None:
    found = choose(WORK, AMPLE)
    assert (found.tokens, found.recompute) == (1024, "none")
    assert choose(replace(WORK, device="cuda"), AMPLE).tokens == 16384
    seen = set[tuple[int, str]]()
    before = found.total
    for megabytes in range(2200, 1300, -20):
        limit = Limit(megabytes * 10**6, "a test")
        one = choose(WORK, limit)
        assert memory.fits(one, limit) and one.total <= before
        seen.add((one.tokens, one.recompute))
        before = one.total
    assert len(seen) > 3


def test_a_document_longer_than_the_budget_decides() -> None:
    long = replace(WORK, longest=8000, evaluated=0)
    assert plan(long, tokens=1024, recompute="none").placed == 8000
    short_of = plan(long, tokens=1024, recompute="none").total
    found = choose(long, Limit(short_of, "a test"))
    assert found.recompute != "none" and found.placed == 8000


def test_a_step_may_be_smaller_than_the_budget() -> None:
    few = replace(WORK, longest=100, examples=4)
    assert plan(few, tokens=1024, recompute="none").placed == 400
    assert plan(few, tokens=256, recompute="none").placed == 256


def test_what_cannot_fit_says_what_would() -> None:
    long = replace(WORK, longest=100_000)
    with pytest.raises(ConfigError) as raised:
        choose(long, Limit(2 * 10**9, "memory_limit=2GB", ("python (process 7) holds 1.00 GB",)))
    said = str(raised.value)
    assert "more than 90% of 2.00 GB (memory_limit=2GB)" in said and "process 7" in said
    length = int(said.partition("--max-length ")[2].partition(")")[0])
    fitting = choose(replace(long, longest=length), Limit(2 * 10**9, ""))
    assert fitting.placed == length
    with pytest.raises(ConfigError, match="million parameters fit"):
        choose(WORK, Limit(10**9, "a test"))


def test_what_is_asked_for_is_taken() -> None:
    small = Limit(10**9, "a test")
    assert choose(WORK, small, tokens=777, recompute="mlp").tokens == 777
    assert choose(WORK, small, tokens=777).recompute == "layer"
    assert choose(WORK, AMPLE, recompute="half").recompute == "half"


def test_what_is_held_already_counts() -> None:
    limit = Limit(4 * 10**9, "a test")
    assert choose(WORK, limit).recompute == "none"
    assert choose(WORK, limit, held=2_900_000_000).recompute != "none"


def test_longer_examples_fit_where_more_is_made_again() -> None:
    lengths = [
        memory.longest_that_fits(WORK, Limit(8 * 10**9, ""), recompute=level)
        for level in memory.LEVELS
    ]
    assert lengths == sorted(lengths) and 0 < lengths[0] < lengths[-1]
    assert memory.longest_that_fits(WORK, Limit(10**9, ""), recompute="none") == 0


def test_quantised_bases_and_optimisers_are_smaller() -> None:
    nf4 = replace(WORK, quantised="nf4")
    saved = plan(WORK, tokens=1024, recompute="none").base - memory.base_bytes(nf4)
    assert saved == pytest.approx(SMOLLM2.projections * (4 - 4.127 / 8), rel=1e-6)
    state = [
        plan(replace(WORK, optim=name), tokens=1, recompute="none").optimiser / WORK.trained
        for name in ("adamw_torch_fused", "paged_adamw_8bit", "lion_32bit", "sgd")
    ]
    assert state == pytest.approx([8, 2.1, 4, 0], rel=1e-4)


def test_copies_are_counted() -> None:
    """Of a base in 16 bits on a processor without them: all projections and the head, in fp32."""
    emulated = plan(replace(WORK, weights="bfloat16"), tokens=1, recompute="none")
    assert emulated.copies == 4 * (SMOLLM2.projections + SMOLLM2.table)
    assert emulated.base == 2 * SMOLLM2.parameters
    assert plan(WORK, tokens=1, recompute="none").copies == 0


# ---- a run


def test_a_run_is_laid_out_by_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ample = trained(tmp_path, model_of("llama"))
    assert (ample._packing.budget, ample._packing.recompute) == (1024, "none")
    said = ample._packing.notices[-1]
    assert said.startswith("memory: ") and said.endswith("at a time, nothing made again")
    monkeypatch.setattr(limits, "resident", lambda: 0)
    rows = packing.Rows(None, lambda: None, ample.train_dataset)
    work = packing._work(ample.model, torch.float32, arguments=ample.args, rows=rows, fused=True)
    need = plan(work, tokens=1024, recompute="none").total - 1000
    tight = trained(tmp_path, model_of("llama"), memory_limit=int(need / memory.MARGIN))
    assert tight._packing.budget < 1024 or tight._packing.recompute != "none"
    assert tight._packing.runner.states.fused.recompute == tight._packing.recompute
    with pytest.raises(ConfigError, match="does not fit"):
        trained(tmp_path, model_of("llama"), memory_limit="100MB")


def test_asking_for_too_much_is_warned_about(tmp_path: Path) -> None:
    made = trained(tmp_path, model_of("llama"), memory_limit="100MB", token_budget=40)
    assert made._packing.budget == 40
    assert "more than fits" in made._packing.notices[-1]


def test_the_longest_example_is_known_where_it_costs_nothing() -> None:
    known = packing.lengths_of(plain(3)).tolist()
    assert known == [len(row["input_ids"]) for row in plain(3)]
    assert packing.lengths_of(iter(())).tolist() == packing.lengths_of([1, 2]).tolist() == []


def test_what_no_plan_is_made_of_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "_FAMILIES", {})
    monkeypatch.setattr(shape, "_SPARSE", ("num_hidden_layers",))
    made = trained(tmp_path, model_of("llama"))
    assert made._packing.notices[-1].startswith("memory is not planned: The memory of a llama")
    assert made._packing.budget == 1024


def test_a_gpu_gets_what_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10**8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    limit, held = packing._limit(TrainingArguments("out"))
    assert limit.bytes == 4 * 10**9 + memory.PROCESS["cuda"] and held == 10**8
    assert choose(replace(WORK, device="cuda"), limit, held=held).tokens < 16384
