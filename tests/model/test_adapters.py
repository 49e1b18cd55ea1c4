"""Adapters: attached as asked, saved as peft reads them, loaded whole or not at all."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import adapters, base, tokens

IDS = torch.arange(3, 27).view(2, 12)
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def stories(shared: Path) -> str:
    return str(shared / "models" / "stories260K")


def arguments(stories: str, **changes: object) -> ModelArguments:
    return ModelArguments(model=stories, lora_r=4, lora_alpha=8, **changes)


def adapted(stories: str, **changes: object) -> PeftModel:
    """The real base with an adapter whose every tensor is away from its initial value."""
    given = arguments(stories, **changes)
    torch.manual_seed(0)
    model = adapters.attach(base.load_model(given), given)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fresh_peft(stories: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), folder).eval()


# ---- attaching ---------------------------------------------------------------------------------


def test_all_linear_layers_but_the_head_get_an_adapter(stories: str) -> None:
    model = adapted(stories)
    with_adapter = {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert with_adapter == set(LAYERS)
    trainable, total = adapters.trainable_share(model)
    assert (trainable, total) == model.get_nb_trainable_parameters()
    assert adapters.trainable_share(model.get_base_model())[1] == total


@pytest.mark.parametrize("targets", ["q_proj, v_proj", ["q_proj", "v_proj"]])
def test_targets_by_name(stories: str, targets: object) -> None:
    model = adapted(stories, lora_target_modules=targets)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", ["q_pro", "q_proj,q_pro"])
def test_a_target_that_does_not_exist_names_those_that_do(stories: str, targets: str) -> None:
    with pytest.raises(ModelError) as caught:
        adapted(stories, lora_target_modules=targets)
    said = str(caught.value)
    assert "no module q_pro. Did you mean q_proj?" in said
    assert "down_proj, gate_proj, k_proj" in said
    assert "all-linear" in said


def test_a_module_to_save_that_does_not_exist(stories: str) -> None:
    with pytest.raises(ModelError, match="no module embeds"):
        adapted(stories, modules_to_save=["embeds"])


def test_a_module_that_cannot_carry_lora(stories: str) -> None:
    with pytest.raises(ModelError, match=r"LoRA cannot be attached.*\n.*q_proj"):
        adapted(stories, lora_target_modules="input_layernorm")


def test_a_half_precision_base_gets_float32_adapters(stories: str) -> None:
    model = adapted(stories, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_gpt2s_transposed_layers_without_a_warning() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapters.attach(AutoModelForCausalLM.from_config(config), ModelArguments())
    assert model.peft_config["default"].fan_in_fan_out
    assert logits(model).shape == (2, 12, 96)


# ---- the base alone ----------------------------------------------------------------------------


def test_without_adapter_is_the_base(stories: str) -> None:
    model, plain = adapted(stories), base.load_model(arguments(stories))
    before = logits(model)
    with adapters.without_adapter(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, logits(plain))
    with adapters.without_adapter(plain):
        pass


# ---- saved for peft ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"use_dora": True, "use_rslora": True},
        {"lora_target_modules": "q_proj,embed_tokens"},
        {"modules_to_save": ["norm"]},
    ],
)
def test_peft_gives_the_same_logits(stories: str, tmp_path: Path, changes: dict) -> None:
    model = adapted(stories, **changes)
    adapters.save_adapter(model, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(stories, dtype=changes.get("dtype", "auto"))
    assert torch.equal(logits(PeftModel.from_pretrained(half, tmp_path).eval()), logits(model))
    tuned = adapters.load_tuned(tmp_path, dtype=changes.get("dtype", "auto"))
    assert torch.equal(logits(tuned.model), logits(model))


def test_files_are_those_that_peft_writes(stories: str, tmp_path: Path) -> None:
    for task in ("CAUSAL_LM", None):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(stories),
            LoraConfig(task_type=task, target_modules=["q_proj"]),
        )
        ours, theirs = tmp_path / f"ours-{task}", tmp_path / f"theirs-{task}"
        adapters.save_adapter(model, ours)
        model.save_pretrained(str(theirs), save_embedding_layers=False)
        assert [
            json.loads((folder / adapters.ADAPTER_CONFIG).read_text()) for folder in (ours, theirs)
        ].count(json.loads((theirs / adapters.ADAPTER_CONFIG).read_text())) == 2
        written = [(folder / adapters.ADAPTER).read_bytes() for folder in (ours, theirs)]
        assert written[0] == written[1]
        assert model.peft_config["default"].inference_mode is False


def test_transformers_loads_it_too(stories: str, tmp_path: Path) -> None:
    model = adapted(stories)
    adapters.save_adapter(model, tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_adapter_of_another_name_lies_where_peft_has_it(stories: str, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(stories),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
        adapter_name="mine",
    ).eval()
    adapters.save_adapter(model, tmp_path)
    assert torch.equal(logits(fresh_peft(stories, tmp_path / "mine")), logits(model))
    assert torch.equal(logits(adapters.load_tuned(tmp_path, base=stories).model), logits(model))


def test_several_adapters_are_saved_and_the_active_one_is_restored(
    stories: str, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(stories), config).eval()
    before = logits(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    after = logits(model)
    adapters.save_adapter(model, tmp_path)
    assert torch.equal(logits(fresh_peft(stories, tmp_path)), before)
    assert torch.equal(logits(fresh_peft(stories, tmp_path / "other")), after)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.requires_grad else 1)
    assert not torch.equal(logits(model), after)
    adapters.restore(model, tmp_path)
    assert torch.equal(logits(model), after)


def test_an_adapter_that_transformers_attached_is_restored(stories: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(stories).eval()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained = logits(model)
    adapters.save_adapter(model, tmp_path)
    assert torch.equal(logits(fresh_peft(stories, tmp_path)), trained)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).zero_()
    assert not torch.equal(logits(model), trained)
    adapters.restore(model, tmp_path)
    assert torch.equal(logits(model), trained)


def test_a_resized_vocabulary_travels_with_the_adapter(stories: str, tmp_path: Path) -> None:
    given = arguments(stories)
    plain = base.load_model(given)
    plain.resize_token_embeddings(520, mean_resizing=False)
    model = adapters.attach(plain, given).eval()
    adapters.save_adapter(model, tmp_path)
    tuned = adapters.load_tuned(tmp_path).model
    assert tuned.get_input_embeddings().weight.shape[0] == 520
    assert torch.equal(logits(tuned), logits(model))


def test_what_the_user_unfroze_is_saved_and_loaded(stories: str, tmp_path: Path) -> None:
    model = adapted(stories)
    norm = model.get_base_model().model.norm.weight.requires_grad_()
    norm.data.mul_(2)
    adapters.save_adapter(model, tmp_path)
    assert torch.equal(logits(adapters.load_tuned(tmp_path).model), logits(model))
    assert torch.equal(logits(fresh_peft(stories, tmp_path)), logits(model))


def test_tokenizer_contract_and_card(stories: str, tmp_path: Path) -> None:
    tokenizer = tokens.load_tokenizer(stories)
    tokenizer.chat_template = "{{ messages[0].content }}"
    contract = {"base": {"name": stories}, "note": "ça va"}
    adapters.save_adapter(
        adapted(stories), tmp_path, tokenizer=tokenizer, contract=contract, card="# A card\n"
    )
    assert (tmp_path / "README.md").read_text() == "# A card\n"
    tuned = adapters.load_tuned(tmp_path)
    assert tuned.contract == contract == adapters.read_contract(tmp_path)
    assert tuned.tokenizer.chat_template == tokenizer.chat_template
    assert adapters.read_contract(tmp_path / "elsewhere") == {}
    (tmp_path / adapters.CONTRACT).write_text("[")
    with pytest.raises(ModelError, match=r"lorafit.json cannot be read"):
        adapters.read_contract(tmp_path)


# ---- loading is strict -------------------------------------------------------------------------


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    tensors = {key: value.clone() for key, value in tensors.items()}
    match how:
        case "missing":
            del tensors[name]
        case "unknown":
            tensors["base_model.model.lm_heed.lora_A.weight"] = torch.zeros(2, 2)
        case "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        case "finite":
            tensors[name].view(-1)[3] = torch.nan
    return tensors


FAULTS = [
    ("missing", r"layers.0.mlp.down_proj.lora_A.weight missing"),
    ("unknown", r"lm_heed.lora_A.weight unknown to this model"),
    ("shape", r"lora_A.weight \[3, 172\] for \[4, 172\] of another shape"),
    ("finite", r"lora_A.weight not finite"),
]


@pytest.mark.parametrize(("how", "said"), FAULTS)
def test_a_faulty_adapter_is_refused(stories: str, tmp_path: Path, how: str, said: str) -> None:
    adapters.save_adapter(adapted(stories), tmp_path)
    file = tmp_path / adapters.ADAPTER
    save_file(broken(dict(sorted(load_file(file).items())), how), file)
    with pytest.raises(ModelError, match=said):
        adapters.load_tuned(tmp_path)


@pytest.mark.parametrize("how", [how for how, _ in FAULTS])
def test_a_refused_state_changes_nothing(stories: str, how: str) -> None:
    model = adapted(stories)
    state = {name: tensor.clone() for name, tensor in adapters.adapter_state(model).items()}
    others = broken({name: tensor + 1 for name, tensor in state.items()}, how)
    with pytest.raises(ModelError):
        adapters.load_adapter_state(model, others)
    now = adapters.adapter_state(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_state_comes_back_bitwise(stories: str) -> None:
    model = adapted(stories, modules_to_save=["norm"])
    best = {name: tensor.clone() for name, tensor in adapters.adapter_state(model).items()}
    before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.equal(logits(model), before)
    adapters.load_adapter_state(model, best)
    assert torch.equal(logits(model), before)


def test_loading_leaves_the_random_generator_alone(stories: str, tmp_path: Path) -> None:
    adapters.save_adapter(adapted(stories), tmp_path)
    state = torch.get_rng_state()
    adapters.load_tuned(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_that_moved_is_asked_for(stories: str, tmp_path: Path) -> None:
    model = adapted(stories)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    adapters.save_adapter(model, tmp_path)
    with pytest.raises(ModelError, match=r"gone(.*\n)*.*--base FOLDER_OR_ID"):
        adapters.load_tuned(tmp_path)
    assert torch.equal(logits(adapters.load_tuned(tmp_path, base=stories).model), logits(model))
    contract = {"base": {"path": stories}}
    adapters.save_adapter(model, tmp_path, contract=contract)
    assert torch.equal(logits(adapters.load_tuned(tmp_path).model), logits(model))


def test_another_base_does_not_fit(stories: str, tmp_path: Path) -> None:
    adapters.save_adapter(adapted(stories), tmp_path / "adapter")
    other = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"unknown to this model.*of another shape"):
        adapters.load_tuned(tmp_path / "adapter", base=str(tmp_path / "other"))


def test_what_is_no_adapter_is_refused(stories: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no adapter: it has no adapter_config.json"):
        adapters.load_tuned(Path(stories))
    adapters.save_adapter(adapted(stories), tmp_path)
    (tmp_path / adapters.ADAPTER).write_bytes(b"torn")
    with pytest.raises(ModelError, match="its weights cannot be read"):
        adapters.load_tuned(tmp_path)
    (tmp_path / adapters.ADAPTER).unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model.safetensors"):
        adapters.load_tuned(tmp_path)


# ---- modules without an adapter ----------------------------------------------------------------


class Tied(nn.Module):
    """A plain module with a tied weight, a frozen one, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.embed = nn.Embedding(6, 4)
        self.embed.weight = self.head.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_a_plain_module_comes_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other, theirs = Tied(), Tied(), Tied()
    model.norm.running_mean.fill_(3.0)
    assert set(adapters.adapter_state(model)) == {
        "head.weight", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    adapters.save_adapter(model, tmp_path)
    adapters.load_adapter_state(other, adapters.read_adapter_state(tmp_path))
    load_model(theirs, tmp_path / "model.safetensors")
    for loaded in (other, theirs):
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_whole_transformers_model_comes_back(stories: str, tmp_path: Path) -> None:
    model, other = (base.load_model(arguments(stories)) for _ in range(2))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    adapters.save_adapter(model, tmp_path)
    adapters.load_adapter_state(other, adapters.read_adapter_state(tmp_path))
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_module_that_loads_itself_is_asked_to(tmp_path: Path) -> None:
    class Grows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("seen", torch.empty(0))

        def load_state_dict(
            self, state_dict: Any, strict: bool = True, assign: bool = False
        ) -> Any:
            self.seen = state_dict["seen"].clone()
            return super().load_state_dict(state_dict, strict, assign)

    model, other = Grows(), Grows()
    model.seen = torch.ones(3)
    adapters.save_adapter(model, tmp_path)
    adapters.restore(other, tmp_path)
    assert torch.equal(other.seen, model.seen)
