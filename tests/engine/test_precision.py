"""What the precision knobs ask for, and what this hardware gives."""

import pytest
import torch

from lorafit.arguments import TrainingArguments
from lorafit.engine import precision
from lorafit.errors import ConfigError

CPU = torch.device("cpu")


def product(chosen: precision.Precision) -> torch.dtype:
    with chosen.autocast():
        return torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype


def test_full_precision_by_default() -> None:
    chosen = precision.choose(TrainingArguments("out"), CPU)
    assert (chosen.dtype, chosen.notice, str(chosen)) == (None, "", "fp32")
    assert product(chosen) == torch.float32 and not chosen.scaler.is_enabled()


@pytest.mark.parametrize("native", [True, False])
def test_bf16_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: native)
    chosen = precision.choose(TrainingArguments("out", bf16=True), CPU)
    assert product(chosen) == (torch.bfloat16 if native else torch.float32)
    assert str(chosen) == ("bf16 products" if native else "fp32")
    assert ("native on this CPU" if native else "runs in fp32") in chosen.notice
    assert not chosen.scaler.is_enabled()


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ConfigError, match="this run is on cpu"):
        precision.choose(TrainingArguments("out", fp16=True), CPU)


@pytest.mark.parametrize("bf16", [True, False])
def test_tf32_without_cuda_is_said_to_do_nothing(bf16: bool) -> None:
    chosen = precision.choose(TrainingArguments("out", tf32=True, bf16=bf16), CPU)
    assert chosen.notice.endswith("tf32 does nothing on cpu: only CUDA has it")
    assert chosen.notice.startswith("bf16: ") is bf16
    assert precision.choose(TrainingArguments("out", tf32=False), CPU).notice == ""


@pytest.mark.parametrize(("generation", "said"), [(8, ""), (7, "none before Ampere")])
def test_tf32_is_set_on_cuda(monkeypatch: pytest.MonkeyPatch, generation: int, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (generation, 0))
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        for wanted in (False, True):
            notice = precision._set_tf32(wanted, torch.device("cuda"))
            assert (products.allow_tf32, convolutions.allow_tf32) == (wanted, wanted)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
    assert said in notice and bool(notice) is bool(said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp16_is_scaled() -> None:
    chosen = precision.choose(TrainingArguments("out", fp16=True), torch.device("cuda"))
    assert chosen.dtype == torch.float16 and chosen.scaler.is_enabled()
