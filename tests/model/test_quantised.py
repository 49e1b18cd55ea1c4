"""Bases in 4 and 8 bits: run, files and identity are as over the base in full; the law holds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tests.test_packing import CONFIGS, far, trained
from tests.tiny import adapter, arguments, numbers, plain, same
from torch import Tensor
from transformers import BitsAndBytesConfig

import lorafit
from lorafit.arguments import ModelArguments
from lorafit.data.collate import PadCollator
from lorafit.deploy import generate as deploy
from lorafit.errors import ConfigError, MissingPackageError, ModelError
from lorafit.kernels import lora
from lorafit.model import adapters, base, identity, quantised

pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "int8")
IDS = torch.arange(3, 23)[None]


def given(folder: Path | str, kind: str = "", **more: Any) -> ModelArguments:
    return ModelArguments(model=str(folder), quantize=kind, **more)


def adapted(folder: Path | str, kind: str = "", **more: Any) -> Any:
    torch.manual_seed(0)
    asked = given(folder, kind, **more)
    return adapters.attach(base.load_model(asked), asked)


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}


def resumed(folder: Path, model: Any, **more: Any) -> Any:
    """A trainer after the second half of the run in `folder`."""
    values = {"layout": "packed", "num_train_epochs": 2, "eval_strategy": "no", **SAVING}
    trainer = lorafit.Trainer(
        model=model, args=arguments(folder, **(values | more)), data_collator=PadCollator(0),
        train_dataset=plain(12), eval_dataset=plain(5),
    )  # fmt: skip
    trainer.train(str(folder / "checkpoint-3"))
    return trainer


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantised_and_nothing_else(kind: str, tiny_llama: Path) -> None:
    model, whole = adapted(tiny_llama, kind), adapted(tiny_llama)
    beneath = base.unwrap(model)
    assert len(quantised.packed(model)) == 5 * 7
    assert quantised.scheme(beneath) == kind and quantised.scheme(base.unwrap(whole)) == "none"
    assert {p.dtype for n, p in beneath.named_parameters() if "base_layer" not in n} == {
        torch.float32
    }
    assert type(beneath.lm_head) is torch.nn.Linear
    assert adapters.trainable_share(model) == adapters.trainable_share(whole)
    far_off = (logits(model) - logits(whole)).norm() / logits(whole).norm()
    assert 1e-4 < float(far_off) < (0.02 if kind == "int8" else 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_made_whole_as_bitsandbytes_does(kind: str, tiny_llama: Path) -> None:
    model = base.load_model(given(tiny_llama, kind)).train()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = quantised.whole(layer, torch.float32)
    assert torch.equal(layer(torch.eye(64)).T, weight), "its own product in training"
    plain_one = base.load_model(given(tiny_llama)).get_submodule("model.layers.0.mlp.up_proj")
    # half of the widest gap between values; half of 1 / 127
    step = 0.145 if kind == "nf4" else 0.004
    original: Any = plain_one.weight.detach()
    assert float((weight - original).abs().max() / original.abs().max()) < step
    joint = quantised.together([layer, layer], torch.float32)
    assert joint is not None and torch.equal(joint(), torch.cat([weight, weight]))
    layers = lora.Layers(joint, None, (172, 172), (None, lora.Adapter(2.0)))
    a, b = torch.randn(3, 64), torch.randn(172, 3)
    joined = lora.join(layers, (None, None, a, b))
    assert joined is not None and torch.equal(joined.b_OR[172:], b * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_takes_the_gradient_of_the_whole_weights(kind: str, tiny_llama: Path) -> None:
    model = base.load_model(given(tiny_llama, kind))
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    rows = torch.randn(2, 5, 64, requires_grad=True)
    with quantised.exactly(model):
        made = layer(rows)
    made.square().sum().backward()
    weight = quantised.whole(layer, torch.float32)
    again = rows.detach().clone().requires_grad_()
    (again @ weight.T).square().sum().backward()
    assert again.grad is not None and rows.grad is not None
    assert torch.allclose(rows.grad, again.grad, rtol=1e-5)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_layout_changes_nothing_over_a_quantised_base(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    # Adam makes rounding larger
    how: dict[str, Any] = {"token_budget": 40, "optim": "sgd", "num_train_epochs": 1}
    padded, laid = (
        trained(tmp_path, adapted(tiny_llama, kind), layout=layout, **how)
        for layout in ("as_given", "packed")
    )
    assert laid._packing.runner.fused and laid._packing.layout == "packed"
    loss, weights = far(padded, laid)
    assert loss < 1e-6 and weights < 1e-4
    before = laid.evaluate()["eval_loss"]
    laid._settings.per_device_eval_batch_size = 1
    assert laid.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_are_packed_by_their_own_forward(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS["gemma"]()).save_pretrained(tmp_path)
    padded, laid = (
        trained(tmp_path, adapted(tmp_path, kind), layout=layout, num_train_epochs=1)
        for layout in ("as_given", "packed")
    )
    assert laid._packing.layout == "packed" and not laid._packing.runner.fused
    loss, weights = far(padded, laid)
    assert loss < 1e-6 and weights < 1e-4


def test_a_resumed_run_is_the_same_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    straight = trained(tmp_path, adapted(tiny_llama, "int8"), **SAVING)
    again = resumed(tmp_path, adapted(tiny_llama, "int8"))
    assert again.state.global_step == 6
    assert numbers(again, "loss") == numbers(straight, "loss")
    assert same(adapter(straight), adapter(again))


def test_going_on_over_the_base_in_full_is_another_run(tiny_llama: Path, tmp_path: Path) -> None:
    trained(tmp_path, adapted(tiny_llama, "nf4"), **SAVING)
    with pytest.raises(ConfigError, match=r"base.quantisation='none' \(was 'nf4'\)") as refused:
        resumed(tmp_path, adapted(tiny_llama), accept=False)
    assert str(refused.value).count("was") == 2, "the numbers in its files are the same"
    assert resumed(tmp_path, adapted(tiny_llama)).state.global_step == 6


def test_a_quantised_base_is_told_by_its_files(tiny_llama: Path) -> None:
    models = [adapted(tiny_llama, kind) for kind in ("", *KINDS)]
    told = [identity.described(model) for model in models]
    assert [one.pop("quantisation") for one in told] == ["none", *KINDS]
    assert told[0] == told[1] == told[2]
    facts = [identity.identity(model) for model in models]
    assert len({one["fingerprint"] for one in facts}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_opens_over_the_base_as_it_was_trained(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "run", adapted(tiny_llama, kind), num_train_epochs=1)
    run.save_model(str(tmp_path / "adapter"))
    contract = json.loads((tmp_path / "adapter" / adapters.CONTRACT).read_text())
    assert contract["base"]["quantisation"] == kind
    tuned = adapters.load_tuned(tmp_path / "adapter")
    assert torch.equal(logits(tuned.model), logits(run.model))
    whole = adapters.load_tuned(tmp_path / "adapter", quantize="none")
    assert not quantised.packed(whole.model)
    difference = (logits(whole.model) - logits(run.model)).norm() / logits(run.model).norm()
    assert float(difference) < 0.2
    opened = deploy.open_adapter(str(tmp_path / "adapter"), quantize=kind)
    (answer,) = deploy.answer(opened, ["Once upon a"], sampling=deploy.Sampling(4))
    assert answer.tokens


def test_a_base_that_lies_quantised_is_recognised(tiny_llama: Path, tmp_path: Path) -> None:
    base.load_model(given(tiny_llama, "nf4")).save_pretrained(tmp_path)
    for asked in ("", "nf4"):
        model = adapted(tmp_path, asked)
        assert quantised.scheme(base.unwrap(model)) == "nf4"
    known = identity.described(model)
    assert known["fingerprint"] == identity.described(tmp_path)["fingerprint"]
    assert torch.equal(logits(model), logits(adapted(tiny_llama, "nf4")))
    with pytest.raises(ModelError, match=r"quantize='int8' asks for: nf4"):
        base.load_model(given(tmp_path, "int8"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("prepares", [False, True])
def test_a_script_that_quantises_for_itself(
    prepares: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """transformers and peft alone, as QLoRA's scripts are written."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config, use_safetensors=True
    )
    torch.manual_seed(0)
    loaded = prepare_model_for_kbit_training(loaded) if prepares else loaded
    model = get_peft_model(loaded, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    run = trained(tmp_path, model)
    assert run._packing.runner.fused
    losses = [loss for (loss,) in numbers(run, "loss")]
    assert losses[-1] < losses[0]
    run.save_model(str(tmp_path / "adapter"))
    assert quantised.packed(adapters.load_tuned(tmp_path / "adapter").model)


@pytest.mark.parametrize("layout", ["as_given", "packed"])
def test_layers_run_again_in_backward_change_nothing(
    layout: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Recomputation is switched on after the adapter, by checkpoints that are not reentrant."""
    how: dict[str, Any] = {"layout": layout, "num_train_epochs": 1}
    kept, again = (
        trained(tmp_path, adapted(tiny_llama, "nf4"), gradient_checkpointing=on, **how)
        for on in (False, True)
    )
    assert far(kept, again) == (0.0, 0.0)
    beneath = base.unwrap(again.model)
    assert base.recomputes(beneath) and not base.recomputes(kept.model)
    assert not beneath.get_input_embeddings()(IDS).requires_grad
    (how,) = {
        module._gradient_checkpointing_func.keywords["use_reentrant"]
        for module in beneath.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    }
    assert how is False


def test_weights_reordered_for_one_processor_are_put_back(tiny_llama: Path) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = base.load_model(given(tiny_llama, "nf4"))
    layer: Any = model.get_submodule("model.layers.0.self_attn.o_proj")
    before = quantised.whole(layer, torch.float32)
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    assert weight.quant_state.packing_format_for_cpu
    quantised.settle(model)
    assert not layer.support_avx512bf16_for_cpu
    after = quantised.whole(layer, torch.float32)  # its scales were bf16 meanwhile
    assert float((after - before).norm() / before.norm()) < 5e-3


def test_bitsandbytes_is_imported_only_when_it_is_asked_for(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    adapted(tiny_llama)
    assert "bitsandbytes" not in sys.modules


def test_a_missing_package_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lorafit\[quant\]'"):
        base.load_model(given(tiny_llama, "nf4"))


def test_what_makes_no_sense_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="float16"):
        base.load_model(given(tiny_llama, "int8", dtype="float16"))
    with pytest.raises(ConfigError, match="on mps"):
        base.check_quantised(given(tiny_llama, "nf4"), base.Home(torch.device("mps")))
    assert given(tiny_llama, "fp8").check() == ["quantize='fp8' is not one of nf4, int8."]
    with pytest.raises(ModelError, match=r"modules_to_save: .*q_proj is quantised \(nf4\)"):
        adapted(tiny_llama, "nf4", modules_to_save=["q_proj"])
