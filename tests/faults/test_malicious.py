"""Artefacts that were made to do harm: each refused by name, under a hook that no act passes by.

The corpus is read in one child process, where an audit hook ends it at the first command, foreign
import, connection or opened canary.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import adapters, base

Harm = Callable[[Path], object]


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def setting(**given: Any) -> Harm:
    def change(folder: Path) -> None:
        file = folder / adapters.ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | given))

    return change


def base_setting(file: str = "config.json", **given: Any) -> Harm:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | given))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def changed(folder: Path) -> None:
        held = {k: v.clone() for k, v in load_file(folder / adapters.ADAPTER).items()}
        change(held)
        save_file(held, folder / adapters.ADAPTER)

    return changed


def header(text: str, length: int | None = None) -> Harm:
    data = text.encode()
    size = len(data) if length is None else length
    return lambda folder: (folder / adapters.ADAPTER).write_bytes(struct.pack("<Q", size) + data)


def pickled(name: str, *, alone: bool = True) -> Harm:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / "canary")))
        if alone:
            (folder / adapters.ADAPTER).unlink(missing_ok=True)
            (folder / "model.safetensors").unlink(missing_ok=True)

    return make


def link(name: str, to: str) -> Harm:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return make


def pipe(name: str) -> Harm:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


NINE = '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
TWICE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2
ADAPTERS: dict[str, tuple[Harm, str]] = {
    "megatron_core": (setting(megatron_core="os"), "megatron_core='os' names code"),
    "megatron_config": (setting(megatron_config={"a": 1}), "megatron_config={'a': 1} names code"),
    "auto_mapping": (
        setting(auto_mapping={"base_model_class": "x", "parent_library": "canary_module"}),
        "auto_mapping=",
    ),
    "parent_library": (setting(parent_library="canary_module"), "parent_library='canary_module'"),
    "auto_map": (setting(auto_map={"AutoModel": "m.C"}), "auto_map="),
    "attention": (
        setting(_attn_implementation_internal="org/kernel"),
        "_attn_implementation_internal=",
    ),
    "tokenizer_kwargs": (setting(tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    "unknown": (setting(lora_alfa=3), "no setting lora_alfa. Did you mean lora_alpha"),
    "alpha NaN": (setting(lora_alpha=float("nan")), "lora_alpha=nan is not above 0"),
    "alpha 1e30": (setting(lora_alpha=1e30), "lora_alpha=1e+30 is not above 0"),
    "alpha text": (setting(lora_alpha="8"), "lora_alpha='8' is not a number"),
    "alpha pattern": (setting(alpha_pattern={"q_proj": float("inf")}), "alpha_pattern="),
    "r 0": (setting(r=0), "r=0 is not between 1"),
    "r huge": (setting(r=10**9), "r=1000000000 is not between 1"),
    "r beyond": (setting(r=8_000), "says rank 8,000"),
    "rank pattern": (setting(rank_pattern={"q_proj": -1}), "rank_pattern="),
    "replication": (setting(layer_replication=[[0, 2000]]), "layer_replication="),
    "pissa": (setting(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base"),
    "corda": (setting(corda_config={"cache_file": "x.pt"}), "corda_config="),
    "other kind": (setting(peft_type="PREFIX_TUNING"), "holds a 'PREFIX_TUNING' adapter"),
    "slow pattern": (setting(target_modules="(([a-z_.0-9])+)+!"), "takes more than"),
    "broken pattern": (setting(target_modules="(("), "it is no pattern"),
    "twice": (
        lambda f: (f / adapters.ADAPTER_CONFIG).write_text('{"peft_type":"LORA","r":1,"r":2}'),
        "the key 'r' stands twice",
    ),
    "deep": (
        lambda f: (f / adapters.ADAPTER_CONFIG).write_text('{"r":' * 90_000),
        "nested too deeply",
    ),
    "large": (
        lambda f: (f / adapters.ADAPTER_CONFIG).write_text('{"r":1}' + " " * 17_000_000),
        "larger than 16 MB",
    ),
    "missing": (tensors(lambda t: t.pop(next(iter(t)))), "missing"),
    "all missing": (tensors(dict.clear), "says rank 4"),
    "extra": (tensors(lambda t: t.update(x=torch.zeros(8))), "x unknown to this model"),
    "not finite": (tensors(lambda t: next(iter(t.values())).fill_(torch.nan)), "not finite"),
    "header twice": (header(TWICE[:-1] + "}" + "\0" * 8), "weights cannot be read"),
    "header huge": (header("{}", 2**63), "a header of"),
    "header large": (header("{" + " " * 17_000_000), "a header of"),
    "header outside": (
        header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), "lies outside",
    ),
    "header of other bytes": (
        header(NINE + "0000", len(NINE)), "other bytes than its shape says",
    ),
    "header of no bytes": (
        header(NINE.replace("[9]", f"[0, {2**63}]").replace("4]", "0]")), "other bytes than",
    ),
    "pickle .bin": (pickled("adapter_model.bin"), "only pickled weights: .*adapter_model.bin"),
    "pickle .pt": (pickled("adapter_model.pt"), "only pickled weights"),
    "pickle .pth": (pickled("adapter_model.pth"), "only pickled weights"),
    "config outside": (link(adapters.ADAPTER_CONFIG, "/etc/passwd"), "a link that leads out"),
    "weights outside": (link(adapters.ADAPTER, "../../canary"), "a link that leads out"),
    "device": (link("tokenizer.json", "/dev/zero"), "a link that leads out"),
    "config pipe": (pipe(adapters.ADAPTER_CONFIG), "a pipe or a device"),
    "weights pipe": (pipe(adapters.ADAPTER), "a pipe or a device"),
    "tokenizer pipe": (pipe("tokenizer.json"), "a pipe or a device"),
    "contract": (
        lambda f: (f / adapters.CONTRACT).write_text('{"stop_ids": ["x"]}'),
        "stop_ids is of another kind",
    ),
    "contract base": (
        lambda f: (f / adapters.CONTRACT).write_text('{"base": {"path": 3}}'),
        "base.path is of another kind",
    ),
}  # fmt: skip
CODE = {"AutoConfig": "canary_module.C", "AutoModelForCausalLM": "canary_module.M"}
BASES: dict[str, tuple[Harm, str]] = {
    "code": (base_setting(model_type="strange", auto_map=CODE), "never run"),
    "code of another": (
        base_setting(model_type="strange", auto_map={"AutoConfig": "org/evil--m.C"}),
        "--trust-remote-code org/evil",
    ),
    "tokenizer code": (
        base_setting(
            "tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["m.T"]}
        ),
        "Python code of its own",
    ),
    "nested code": (base_setting(text_config={"auto_map": CODE}), "text_config.auto_map="),
    "nested trust": (base_setting(sub={"trust_remote_code": True}), "sub.trust_remote_code=True"),
    "attention": (
        base_setting(_attn_implementation_internal="org/kernel"),
        "_attn_implementation_internal='org/kernel'",
    ),
    "kernel": (base_setting(attn_implementation="org/kernel"), "attn_implementation='org/kernel'"),
    "weights by name": (base_setting(transformers_weights="evil.bin"), "transformers_weights="),
    "layers": (base_setting(num_hidden_layers=2**31), "asks for 2,147,483,648 layers"),
    "deep settings": (
        lambda f: (f / "generation_config.json").write_text('{"a":' * 90 + "1" + "}" * 90),
        "nested too deeply",
    ),
    "pickle": (pickled("pytorch_model.bin"), "only pickled weights: pytorch_model.bin"),
    "index": (
        lambda f: (f / base.INDEX).write_text('{"weight_map": {"a": "../canary.safetensors"}}'),
        r"\.\./canary.safetensors not found",
    ),
    "index of nothing": (lambda f: (f / base.INDEX).write_text("[]"), "cannot be read"),
    "link": (link("model.safetensors", "/etc/passwd"), "a link that leads out"),
    "pipe": (pipe("generation_config.json"), "a pipe or a device"),
    "tokenizer link": (link("tokenizer.json", "/dev/zero"), "a link that leads out"),
}  # fmt: skip

CHILD = """
import json, os, sys
from pathlib import Path
folders, canary = json.load(sys.stdin)
import peft, torch, transformers
from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import adapters, base, tokens
known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
armed = False
def watch(event, given):
    if not armed:
        return
    told = None
    acts = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")
    if event in acts or event == "pickle.find_class":
        told = (event, given)
    elif event == "subprocess.Popen" and "-I" not in given[1]:
        told = (event, given)
    elif event == "import" and "canary" in str(given[0]):
        told = (event, given)
    elif event == "open" and ("canary" in (name := str(given[0])) or name == "/etc/passwd"
                              or name.endswith((".bin", ".pt", ".pth", "/zero"))):
        told = (event, given)
    if told:
        os.write(1, ("HARM " + repr(told)[:300] + "\\n").encode())
        os._exit(3)
sys.addaudithook(watch)
for kind, name, folder, over in folders:
    armed = True
    try:
        if kind == "adapter":
            adapters.load_tuned(Path(folder), base=over)
        else:
            base.load_model(ModelArguments(model=folder))
            tokens.load_tokenizer(folder)
        said = "LOADED"
    except ModelError as error:
        said = str(error)
    except BaseException as error:
        said = f"RAISED {type(error).__name__}: {error}"[:300]
    armed = False
    print(json.dumps([kind, name, said]), flush=True)
"""


@pytest.fixture(scope="session")
def verdicts(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What the child said of each artefact; "" where it never came to it."""
    home = tmp_path_factory.mktemp("corpus")
    stories = shared / "models" / "stories260K"
    (home / "canary").write_text("x")
    folders = []
    given = ModelArguments(model=str(stories), lora_r=4, lora_alpha=8)
    made = adapters.attach(base.load_model(given), given)
    for kind, corpus in (("adapter", ADAPTERS), ("base", BASES)):
        for number, (name, (harm, _)) in enumerate(corpus.items()):
            folder = home / f"{kind}{number}"
            if kind == "adapter":
                adapters.save_adapter(made, folder)
            else:
                folder.mkdir()
                for file in stories.iterdir():
                    (folder / file.name).write_bytes(file.read_bytes())
            (folder / "canary_module.py").write_text("open('canary')")
            harm(folder)
            folders.append([kind, name, str(folder), str(stories)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD)],
        input=json.dumps([folders, str(home / "canary")]),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    said = {(k, n): s for k, n, s in (json.loads(line) for line in lines if line.startswith("["))}
    harm = [line for line in lines if line.startswith("HARM")]
    assert not harm, harm
    assert done.returncode == 0, done.stderr[-2000:]
    assert (home / "canary").read_text() == "x"
    return said


@pytest.mark.parametrize(
    ("kind", "name"), [("adapter", name) for name in ADAPTERS] + [("base", name) for name in BASES]
)
def test_each_is_refused_by_name(
    verdicts: dict[tuple[str, str], str], kind: str, name: str
) -> None:
    said = verdicts[kind, name]
    expected = (ADAPTERS if kind == "adapter" else BASES)[name][1]
    found = re.search(expected, said) or expected in said
    assert not said.startswith(("LOADED", "RAISED")) and found, said


def test_code_that_is_not_needed_is_left_alone(shared: Path, tmp_path: Path) -> None:
    for file in (shared / "models" / "stories260K").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    base_setting(auto_map=CODE)(tmp_path)
    (tmp_path / "canary_module.py").write_text("raise SystemExit('run')")
    assert base.load_model(ModelArguments(model=str(tmp_path))).config.model_type == "llama"
    with pytest.raises(ModelError, match="never run"):
        base.load_model(ModelArguments(model=str(tmp_path), trust_remote_code=str(tmp_path)))
