"""Sizes from a configuration alone, held against the models that transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.test_packing import CONFIGS, model_of

from lorafit.errors import ModelError
from lorafit.model import base, shape

MORE = {
    "llama, biased and untied": lambda: transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, head_dim=16, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "qwen3, no head_dim said": lambda: transformers.Qwen3Config(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97,
    ),
    "phi3, not known here": lambda: transformers.OlmoConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=97,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_every_parameter_is_counted(name: str, tmp_path: Path) -> None:
    """Read from the file that transformers writes, which leaves out what is usual."""
    config = (CONFIGS.get(name) or MORE[name])()
    config.save_pretrained(tmp_path)
    found = shape.of(shape.read(str(tmp_path)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    norms = 2 * found.hidden * found.layers + found.hidden if found.is_estimated else 0
    assert found.parameters - norms == model.num_parameters()  # Olmo's norms have no weights
    assert found.is_estimated == (name not in CONFIGS and "not known" in name)
    assert base.shape_of(model) == found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_is_counted(name: str) -> None:
    model = model_of(name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert base.shape_of(model).adapted(["all-linear"], 4)[0] == trained


def test_some_modules_alone() -> None:
    found = base.shape_of(model_of("llama"))
    q, v = found.matrices[0], found.matrices[2]
    each = q.outputs + q.inputs + v.outputs + v.inputs
    assert found.adapted(["q_proj", "v_proj"], 8) == (found.layers * 8 * each, 16)


def test_a_window_and_norms_of_heads_are_seen() -> None:
    assert base.shape_of(model_of("mistral")).has_window
    assert base.shape_of(model_of("qwen3")).has_head_norms
    assert not base.shape_of(model_of("llama")).has_window


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral"),
    "an encoder": ({"model_type": "t5", "is_encoder_decoder": True}, "t5"),
    "no sizes": ({"model_type": "mamba"}, "hidden_size=None"),
    "a text for a number": ({"model_type": "llama", "hidden_size": "64"}, "hidden_size='64'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_dense_decoder_is_refused_by_name(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(ModelError, match=said):
        shape.of(config)


def test_a_folder_needs_nothing_but_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        shape.read(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert round(shape.of(shape.read(str(tmp_path))).parameters / 1e6, 1) == 124.4
    with pytest.raises(ModelError, match="could not be had from the Hub"):
        shape.read("nobody/such-a-model")


def test_the_text_half_of_a_larger_model_is_read() -> None:
    text = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
            "num_attention_heads": 2, "head_dim": 4}  # fmt: skip
    assert shape.of({"model_type": "whole", "text_config": text}).kind == "qwen3"
