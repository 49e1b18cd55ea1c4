"""The embedded base: small, whole, loadable, and consistent about where an answer ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import lorafit.errors

ASSETS = Path(lorafit.errors.__file__).parent / "assets"
BASE = ASSETS / "base"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does os.path.join do?"},
    {"role": "assistant", "content": "Join paths."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_folder_is_at_most_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in BASE.rglob("*")) <= 8_000_000


def test_the_weights_are_finite_bf16_of_three_to_four_million_parameters() -> None:
    with safe_open(BASE / "model.safetensors", "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
        assert {part.get_dtype() for part in slices} == {"BF16"}
        count = sum(torch.Size(part.get_shape()).numel() for part in slices)
    assert 3_000_000 <= count <= 3_900_000
    assert all(tensor.isfinite().all() for tensor in load_file(BASE / "model.safetensors").values())


def test_it_loads_and_predicts_its_own_language_better_than_chance(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = tokenizer("def __init__(self, name):\n        self.name = name\n", return_tensors="pt")
    with torch.no_grad():
        loss = model(**ids, labels=ids["input_ids"]).loss
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings >= 512
    assert len(tokenizer) == model.config.vocab_size
    assert loss < 4.0  # chance is ln 3072 = 8.0


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn {'a': x[1:]}  # é\n\n",
        "  HTTPServer_2\r\n",
        "日本語 🙂",
        "a   b\n\n\n  c",
    ],
)
def test_the_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_renders_all_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|system|>\nBe brief.<|endoftext|>\n"
        "<|user|>\nWhat does os.path.join do?<|endoftext|>\n"
        "<|assistant|>\nJoin paths.<|endoftext|>\n"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|endoftext|>\n<|assistant|>\n")


def test_what_ends_a_turn_is_what_stops_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    stop = json.loads((BASE / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((BASE / "config.json").read_text())
    assert stop == config["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == config["pad_token_id"] != stop
    turn = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer(turn)["input_ids"].count(stop) == len(CHAT)
    markers = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
    assert len({*markers, stop, tokenizer.pad_token_id}) == 5


def test_the_loss_curve_lies_beside_it_and_falls() -> None:
    stages = json.loads((ASSETS / "base_training.json").read_text())["stages"]
    first, last = stages[0]["curve"][0], stages[-1]["curve"][-1]
    assert last["held_out_nats"] < 0.6 * first["held_out_nats"]
    assert last["held_out_bits_per_byte"] < 1.7
