"""Llama's layers by the kernels: where a micro-batch writes, and what it is filled up with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.parity.side_by_side import SMALL
from torch import Tensor

from lorafit.kernels import products
from lorafit.kernels.attention import Documents
from lorafit.kernels.lora import Counters
from lorafit.kernels.products import is_own
from lorafit.model.fused import RECOMPUTE, Decoder

LENGTHS = ((9, 17, 4), (25,), (3, 2), (11, 30))
"""Documents of micro-batches: of fewer tokens, and of more, than those before."""


def model(dropout: float = 0.0, targets: Any = "all-linear") -> Any:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    lora = LoraConfig(
        r=4,
        target_modules=targets,
        init_lora_weights=False,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def run(decoder: Decoder, lengths: tuple[int, ...], *, drops: bool = False) -> Tensor:
    """What the layers make of seeded tokens."""
    tokens = sum(lengths)
    ids = torch.randint(60, (tokens,), generator=torch.Generator().manual_seed(tokens))
    places = torch.cat([torch.arange(length) for length in lengths])
    counters = Counters(ids, places) if drops else None
    made = decoder.run(ids, places, documents=Documents.on(ids.device, lengths), counters=counters)
    return made[:tokens]


def gradients(decoder: Decoder, out: Tensor) -> list[Tensor]:
    out.square().sum().backward()
    made = [factor.grad for factor in decoder.factors() if factor.grad is not None]
    for factor in decoder.factors():
        factor.grad = None
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", RECOMPUTE)
def test_places_change_no_bit(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batch after micro-batch in the same memory, an evaluation between forward and
    backward."""
    decoder = Decoder(model(), dtype, recompute=level)
    found = []
    for lengths in LENGTHS:
        out = run(decoder, lengths)
        with torch.no_grad():
            seen = run(decoder, (40, 20))[:5].clone()
        found.append((out.detach().clone(), seen, *gradients(decoder, out)))
    monkeypatch.setattr(Decoder, "_room", lambda *_: None)
    for lengths, (out, seen, *grads) in zip(LENGTHS, found, strict=True):
        plain = run(decoder, lengths)
        assert torch.equal(plain, out)
        assert all(map(torch.equal, gradients(decoder, plain), grads))
        with torch.no_grad():
            assert torch.equal(run(decoder, (40, 20))[:5], seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drops", [False, True])
def test_a_document_is_the_same_to_the_bit_wherever_it_lies(
    drops: bool, dtype: torch.dtype
) -> None:
    if not is_own(torch.empty(0), dtype):
        pytest.skip("torch multiplies here: equal to rounding (tests/test_packing.py)")
    decoder = Decoder(model(0.3 * drops).to(dtype), dtype)
    lengths = (9, 70, 200)
    ids = torch.randint(60, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(length) for length in lengths])
    counters = Counters(ids // 60 + 7, places) if drops else None
    given = {"documents": Documents(lengths), "counters": counters}
    together = decoder.run(ids, places, **given)[9:79].detach().clone()
    counters = Counters(counters.keys_T[9:79], places[9:79]) if counters else None
    given = {"documents": Documents((70,)), "counters": counters}
    assert torch.equal(decoder.run(ids[9:79], places[9:79], **given), together)


@pytest.mark.parametrize("drops", [False, True])
def test_layers_without_an_adapter_among_others(
    drops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of no columns and no depth, by whoever multiplies, and beside float64."""
    found = []
    for dtype, own in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        if not own:
            monkeypatch.setattr(products, "_is_own", lambda _: False)
        decoder = Decoder(model(0.3 * drops, ["q_proj", "v_proj", "down_proj"]).to(dtype), dtype)
        out = run(decoder, (40, 21), drops=drops)
        found.append([out.detach(), *gradients(decoder, out)])
        monkeypatch.undo()
    exact, *others = found
    for other in others:
        pairs = zip(exact, other, strict=True)
        assert max(float((a - b).norm() / a.norm()) for a, b in pairs) < 1e-5


def test_memory_is_asked_for_once() -> None:
    decoder = Decoder(model(), torch.float32)
    gradients(decoder, run(decoder, (30, 20)))
    places = {place.data_ptr() for place in decoder._rooms._places.values()}
    for lengths in LENGTHS:
        gradients(decoder, run(decoder, lengths))
        assert {place.data_ptr() for place in decoder._rooms._places.values()} == places
    decoder.forget()
    assert not decoder._rooms._places


def test_files_of_weights_are_not_held(tmp_path: Path) -> None:
    """q, k, v and gate, up lie side by side now; the pages of their file count no second time."""
    model().base_model.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    maps, ids = Path("/proc/self/maps"), torch.arange(9)[None]
    if not maps.exists():
        pytest.skip("this system does not say what is mapped")
    assert str(tmp_path) in maps.read_text(), "else there is nothing to be seen here"
    before = loaded(ids).logits.detach()
    Decoder(get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM")), torch.float32)
    assert str(tmp_path) not in maps.read_text()
    assert torch.equal(loaded(ids).logits, before)


def test_training_does_not_hold_what_an_evaluation_took() -> None:
    decoder = Decoder(model(), torch.float32)
    held = []
    for _ in range(2):
        gradients(decoder, run(decoder, (30, 20)))
        held.append(sum(place.nbytes for place in decoder._rooms._places.values()))
        with torch.no_grad():
            run(decoder, (900,))
    assert held[0] == held[1]


def test_a_graph_whose_memory_was_taken_fails() -> None:
    decoder = Decoder(model(), torch.float32)
    first = run(decoder, (5, 6))
    run(decoder, (7,))
    with pytest.raises(RuntimeError, match="after the forward of the next"):
        first.sum().backward()


@pytest.mark.parametrize("drops", [False, True])
def test_tokens_that_fill_up_change_nothing(drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.model.fused.spare", lambda x, _: -len(x) % 32)
    decoder = Decoder(model(0.3 if drops else 0.0), torch.float64)
    filled = []
    for lengths in LENGTHS:
        out = run(decoder, lengths, drops=drops)
        filled.append((out.detach().clone(), gradients(decoder, out)))
    monkeypatch.setattr("lorafit.model.fused.spare", lambda *_: 0)
    for lengths, (out, grads) in zip(LENGTHS, filled, strict=True):
        plain = run(decoder, lengths, drops=drops)
        torch.testing.assert_close(plain, out, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(decoder, plain), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
