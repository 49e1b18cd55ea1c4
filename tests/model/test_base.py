"""Bases: what is refused before loading, what is quiet, and what is known of loss and forward."""

import json
import logging
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import adapters, base, identity, tokens

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def build(name: str, **changes: object) -> nn.Module:
    """A random model, its configuration changed by `changes`."""
    torch.manual_seed(0)
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | changes)
    return AutoModelForCausalLM.from_config(config)


class Doubled(LlamaForCausalLM):
    """Declares the causal loss, and does otherwise."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss * 2
        return out


class RowByRow(LlamaForCausalLM):
    """Weighs rows, not tokens, alike."""

    def forward(self, input_ids, attention_mask, labels):
        rows = zip(input_ids.split(1), attention_mask.split(1), labels.split(1), strict=True)
        outs = [super(RowByRow, self).forward(i, a, labels=label) for i, a, label in rows]
        loss = torch.stack([out.loss for out in outs]).mean()
        return {"loss": loss, "logits": torch.cat([out.logits for out in outs])}


class Regression(nn.Module):
    """A plain module that knows only a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, label_value=None):
        return {"loss": (self.linear(x) - label_value).square().mean()}


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture
def copied(stories: Path, tmp_path: Path) -> Path:
    """The real model's files, writable."""
    folder = tmp_path / "models" / "stories260K"
    folder.mkdir(parents=True)
    for file in stories.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(name: object) -> str:
    with pytest.raises(ModelError) as caught:
        base.load_model(ModelArguments(model=str(name)))
    return str(caught.value)


# ---- loading -----------------------------------------------------------------------------------


def test_the_checkpoints_own_dtype_and_another(stories: Path) -> None:
    assert base.load_model(ModelArguments(model=str(stories))).dtype == torch.float32
    half = base.load_model(ModelArguments(model=str(stories), dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_loading_is_quiet_and_leaves_verbosity_alone(stories: Path, capfd) -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    base.load_model(ModelArguments(model=str(stories)))
    tokens.load_tokenizer(str(stories))
    assert capfd.readouterr() == ("", "")
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    assert before[0] < logging.CRITICAL


def test_a_folder_that_does_not_exist_names_its_neighbour(copied: Path) -> None:
    said = refused(copied.parent / "stories260k")
    assert "There is no folder" in said
    assert "Did you mean stories260K?" in said


def test_no_name_is_not_the_working_directory(copied: Path, monkeypatch) -> None:
    monkeypatch.chdir(copied)
    assert "No model is named" in refused("")


def test_a_file_is_not_a_model(copied: Path) -> None:
    assert f"Give the folder: {copied}" in refused(copied / "config.json")


def test_a_folder_without_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    said = refused(copied)
    assert "no config.json" in said
    assert "tokenizer.json" in said


def test_a_folder_without_weights_names_what_is_there(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    said = refused(copied)
    assert "no weights" in said
    assert "tokenizer.json" in said


def test_pickled_weights_are_refused_with_the_reason(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    said = refused(copied)
    assert "pytorch_model.bin" in said
    assert "CVE-2025-32434" in said
    assert "safetensors" in said


def test_a_missing_shard_is_named(copied: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (copied / base.INDEX).write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors not found" in refused(copied)


def test_a_torn_file_is_said_in_words(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"The model in {copied} cannot be read" in refused(copied)


def test_weights_that_lack_a_tensor_are_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert "lack model.layers.3.mlp.up_proj.weight" in refused(copied)


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    said = refused(tmp_path)
    assert "LoRA adapter over org/base" in said
    assert f"--adapter {tmp_path}" in said


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
    ],
)
def test_other_kinds_of_model_are_refused(model, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    assert "not a causal language model" in refused(tmp_path)


def test_a_hub_name_while_offline() -> None:
    said = refused("nobody-at-all/no-such-model")
    assert "hf download nobody-at-all/no-such-model" in said
    assert "or give a folder" in said
    with pytest.raises(ModelError, match="no tokenizer of that name"):
        tokens.load_tokenizer("nobody-at-all/no-such-model")


# ---- identity ----------------------------------------------------------------------------------


def test_identity_notices_another_shape_and_not_another_place(copied: Path, stories: Path) -> None:
    ours, theirs = identity.described(copied), identity.described(stories)
    assert ours["headers_sha256"] == theirs["headers_sha256"]
    assert ours["path"] != theirs["path"]
    build("llama").save_pretrained(copied)
    assert identity.described(copied)["headers_sha256"] != theirs["headers_sha256"]


def test_identity_of_a_loaded_model_is_that_of_its_folder(stories: Path) -> None:
    model = base.load_model(ModelArguments(model=str(stories)))
    known = identity.described(model)
    assert known == identity.described(stories)
    assert known["parameters"] == 260_032
    assert identity.described(build("gpt2"))["headers_sha256"] is None


# ---- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_models_are_plain(name: str) -> None:
    model = build(name)
    assert base.is_plain_causal(model)
    assert base.declares_causal_loss(model)
    assert base.accepts_count(model)


def test_a_half_precision_base_under_an_adapter_is_plain(stories: Path) -> None:
    given = ModelArguments(model=str(stories), dtype="bfloat16", lora_dropout=0.1)
    model = adapters.attach(base.load_model(given), given).train()
    assert base.is_plain_causal(model)


def test_a_balance_loss_is_no_sum_over_tokens() -> None:
    model = build("mixtral", output_router_logits=True)
    assert not base.is_plain_causal(model)
    assert base.declares_causal_loss(model)
    assert base.accepts_count(model)
    assert not base.causal_loss_matches(model, torch.device("cpu"))


@pytest.mark.parametrize("otherwise", [Doubled, RowByRow])
def test_a_forward_that_does_otherwise_is_found_out(otherwise: type[LlamaForCausalLM]) -> None:
    model = otherwise(CONFIGS["llama"])
    assert not base.causal_loss_matches(model, torch.device("cpu"))
    assert not base.is_plain_causal(model)


def test_a_replaced_loss_function_is_noticed() -> None:
    model = build("llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    assert not base.is_plain_causal(model)


def test_a_plain_module_knows_only_a_mean() -> None:
    model = Regression()
    assert not base.is_plain_causal(model)
    assert not base.accepts_count(model)
    assert not base.declares_causal_loss(model)


def test_the_probe_leaves_no_trace() -> None:
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert base.causal_loss_matches(model, torch.device("cpu"))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "given"), [("llama", None), ("gpt2", ["labels", "weights"])])
def test_columns_are_those_that_transformers_keeps(model: str, given, tmp_path: Path) -> None:
    ours = build(model)
    theirs = Trainer(ours, TrainingArguments(str(tmp_path), label_names=given, use_cpu=True))
    theirs._set_signature_columns_if_needed()
    assert set(base.forward_names(ours, given)) == set(theirs._signature_columns)
    assert list(base.label_names(ours, given)) == theirs.label_names
    assert base.accepts_count(ours) == theirs.model_accepts_loss_kwargs


def test_columns_of_a_plain_module() -> None:
    assert base.label_names(Regression()) == ("label_value",)
    assert base.forward_names(Regression()) == ("x", "label_value", "label", "label_ids")


# ---- training mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputing_changes_no_gradient_and_keeps_less(name: str) -> None:
    ids = torch.arange(24).view(2, 12)

    def gradients(recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
        model = build(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        # As under an adapter: the embedding is frozen, so its output needs no gradient.
        model.get_input_embeddings().requires_grad_(False)
        if recompute:
            base.enable_recompute(model)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, kept

    (plain, all_kept), (again, less_kept) = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert less_kept < all_kept


def test_recompute_asks_for_no_gradient_of_the_embedding() -> None:
    model = build("llama").requires_grad_(False)
    base.enable_recompute(model)
    assert not model.get_input_embeddings()(torch.tensor([[1]])).requires_grad


def test_a_module_that_cannot_recompute_says_so() -> None:
    with pytest.raises(ModelError, match="Regression cannot recompute"):
        base.enable_recompute(Regression())


def test_the_cache_is_off_inside_and_as_before_after() -> None:
    model = build("llama")
    model.config.use_cache = True
    with base.without_cache(model):
        assert model.config.use_cache is False
    assert model.config.use_cache is True
    with suppress(KeyboardInterrupt), base.without_cache(model):
        raise KeyboardInterrupt
    assert model.config.use_cache is True
    with base.without_cache(Regression()):
        pass


def test_a_resized_vocabulary_is_noticed(stories: Path) -> None:
    model = base.load_model(ModelArguments(model=str(stories)))
    assert not base.vocabulary_resized(model)
    model.resize_token_embeddings(520, mean_resizing=False)
    assert base.vocabulary_resized(model)
    for name in ("", "/no/such/folder", "nobody/no-such-model"):
        model.name_or_path = name
        assert not base.vocabulary_resized(model)
