"""The same base under other files is the same; another of the same shape is not."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import adapters, base, identity


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def loaded(folder: Path) -> torch.nn.Module:
    return base.load_model(ModelArguments(model=str(folder)))


def test_files_cut_otherwise_and_tensors_in_memory_are_the_same_base(
    stories: Path, tmp_path: Path
) -> None:
    model = loaded(stories)
    known = identity.described(model)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = identity.described(tmp_path)
    assert again["fingerprint"] == known["fingerprint"]
    assert again["files_sha256"] != known["files_sha256"]
    assert identity.described(loaded(tmp_path))["fingerprint"] == known["fingerprint"]
    model.config._name_or_path = model.name_or_path = ""
    assert identity.described(model)["files_sha256"] is None
    assert identity.described(model)["fingerprint"] == known["fingerprint"]


def test_a_name_without_its_numbers_is_another_base(stories: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stories))
    assert model.name_or_path == str(stories)
    known = [identity.described(one)["fingerprint"] for one in (model, loaded(stories))]
    assert known[0] and known[1] and known[0] != known[1]


def test_an_adapter_leaves_the_identity_alone(stories: Path) -> None:
    given = ModelArguments(model=str(stories), lora_r=4, modules_to_save=["norm"])
    before = identity.described(loaded(stories))["fingerprint"]
    model = adapters.attach(loaded(stories), given)
    assert identity.identity(model)["fingerprint"] == before
    model.get_base_model().config._name_or_path = model.get_base_model().name_or_path = ""
    assert identity.identity(model)["fingerprint"] == before


def test_what_is_kept_follows_the_file(stories: Path, tmp_path: Path) -> None:
    model = loaded(stories)
    model.save_pretrained(tmp_path)
    before, file = identity.described(tmp_path), tmp_path / "model.safetensors"
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    about = file.stat()
    model.save_pretrained(tmp_path)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_size == about.st_size
    after = identity.described(tmp_path)
    assert after["fingerprint"] != before["fingerprint"]
    assert after["files_sha256"] != before["files_sha256"]


def test_an_adapter_over_another_base_is_refused_and_may_be_accepted(
    stories: Path, tmp_path: Path
) -> None:
    given = ModelArguments(model=str(stories), lora_r=4)
    model = adapters.attach(loaded(stories), given)
    contract = json.loads(json.dumps({"base": identity.described(model)}))
    adapters.save_adapter(model, tmp_path / "a", contract=contract)
    assert adapters.load_tuned(tmp_path / "a")
    other = loaded(stories)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.01)
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(
        ModelError, match=r"another base than .*numbers in its tensors(.|\n)*--accept"
    ):
        adapters.load_tuned(tmp_path / "a", base=str(tmp_path / "b"))
    for file in stories.glob("token*"):
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    assert adapters.load_tuned(tmp_path / "a", base=str(tmp_path / "b"), accept=True)


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "a\0b", "x" * 300, ".."])
def test_an_adapters_name_is_no_path(stories: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be saved"):
        adapters._home(tmp_path, name)
