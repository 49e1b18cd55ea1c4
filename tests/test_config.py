"""YAML and flags -> panels: who set what, every complaint with its place, strict reading."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies

from lorafit import config
from lorafit.errors import ConfigError, UnknownNameError

NEEDED = {"model": "m", "data": "d.jsonl"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def test_flags_win_over_the_file_and_the_file_over_the_recipe(write: Any) -> None:
    path = write("model: m\ndata: d\nlearning_rate: 1e-4\nmax_steps: 30\n")
    made = config.load(path, {"max_steps": "40", "lora_target_modules": "q_proj,v_proj"})
    assert made.training.learning_rate == 1e-4 and made.training.max_steps == 40
    assert made.model.lora_target_modules == "q_proj,v_proj" and made.model.lora_r == 16
    assert made.origin["learning_rate"] == f"{path}:3"
    assert made.origin["max_steps"] == "--max-steps"
    assert made.origin["lora_r"] == "recipe"
    assert made.origin["adam_beta1"] == "default"
    assert made.origin["metric_for_best_model"] == "follows from others"
    assert made.training.explicit == {"learning_rate", "max_steps"}


def test_flags_alone_are_enough() -> None:
    made = config.load(None, NEEDED)
    assert (made.model.model, made.data.data) == ("m", "d.jsonl")
    assert made.training.check() == []


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_steps", "7", 7),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "3", 3),
        ("bf16", "false", False),
        ("bf16", False, False),
        ("tf32", "null", None),
        ("label_names", "a, b", ["a", "b"]),
        ("label_names", "[a, b]", ["a", "b"]),
        ("model", "123", "123"),
        ("run_name", "null", "null"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("report_to", "none", []),
    ],
)
def test_flags_are_texts_or_values(name: str, text: Any, value: Any) -> None:
    made = config.load(None, {**NEEDED, name: text})
    assert {**vars(made.model), **vars(made.training)}[name] == value


def test_an_old_name_in_the_file_gives_way_to_a_flag(write: Any) -> None:
    path = write("model: m\ndata: d\nwarmup_ratio: 0.1\nuse_liger_kernel: true\n")
    made = config.load(path, {"warmup_steps": 0})
    assert made.training.warmup_steps == 0
    assert [notice.partition(": ")[0] for notice in made.notices] == [f"{path}:3", f"{path}:4"]
    assert config.load(path, {}).origin["warmup_steps"] == f"{path}:3"


def test_no_is_a_word_not_false(write: Any) -> None:
    made = config.load(write("eval_strategy: no\nreport_to: [no]\n"), NEEDED)
    assert made.training.eval_strategy == "no" and made.training.was_set("eval_strategy")
    assert made.training.report_to == ["no"]


def test_all_complaints_at_once_each_with_its_place(write: Any) -> None:
    path = write(
        "# a comment\nlearning_rat: 1\nmax_steps: '3'\nwarmup_ratio: 0.1\nwarmup_steps: 3\n"
        "push_to_hub: true\nfp16: true\nbf16: yes\nmodel: [3]\nseed: 010\n"
    )
    with pytest.raises(UnknownNameError) as raised:
        config.load(path, {"optim": "x", "fp16": "true", "bf16": "true"})
    lines = raised.value.what.splitlines()
    for start in (
        f"{path}:2: There is no argument learning_rat. Did you mean learning_rate?",
        f"{path}:3: max_steps='3' is not a whole number.",
        f"{path}:5: warmup_steps is set in {path}:4 already.",
        f"{path}:6: push_to_hub=True is not honoured here. lorafit uploads nothing.",
        f"{path}:8: bf16='yes' is not true or false.",
        f"{path}:9: model=[3] is not a text.",
        f"{path}:10: seed='010' is not a whole number",
        "--optim: optim='x' is not one of",
        "data is missing.",
    ):
        assert [line for line in lines if line.startswith(start)], start
    # A knob whose value was thrown out is not complained about again.
    assert not [line for line in lines if line.startswith(("model is missing", "bf16 and"))]
    with pytest.raises(ConfigError) as known:
        config.load(None, {**NEEDED, "seed": -1})
    assert not isinstance(known.value, UnknownNameError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "is not a mapping"),
        ("just words\n", "is not a mapping"),
        ("seed: 1\nseed: 1\n", ":2: seed is set on line 1 already"),
        ("{seed: 1, seed: 1}\n", ":1: seed is set on line 1 already"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", ":3: a is set on line 2 already"),
        ("model: &m x\ndata: *m\n", ":1: anchors and aliases"),
        ("model: !!python/object/apply:os.getcwd []\n", ":1: the tag "),
        ("model: [1\n", "run.yaml:2: "),
        ("a: " + "[" * 50 + "]" * 50, "nested too deeply"),
        ("--- \nseed: 1\n---\nseed: 2\n", "document"),
        ("model: \x07\n", "special characters"),
        (b"model: \xff\n", "not UTF-8"),
        ("model: " + "x" * 100_001, "larger than 0.1 MB"),
        ("seed: " + "9" * 5_000, ":1: a number of more digits"),
        ("seed: !!int '0x'\n", ":1: the tag tag:yaml.org,2002:int is not read"),
        ("a: 1\n? [b]\n: 2\n", ":2: a name is one word or a few"),
        ("? " + "x" * 2_000 + "\n: 2\n", ":1: a name is one word or a few"),
    ],
)
def test_a_file_that_is_not_a_configuration(write: Any, text: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(write(text), {})
    assert "run.yaml" in raised.value.what and said in raised.value.what
    assert raised.value.fix


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / name, {})


@pytest.mark.parametrize("value", ["org/evil", "true", "[org/evil]"])
def test_no_file_lets_a_strangers_code_run(write: Any, value: str) -> None:
    path = write(f"model: org/evil\ntrust_remote_code: {value}\n")
    with pytest.raises(ConfigError) as raised:
        config.load(path, {**NEEDED, "trust_remote_code": "org/mine"})
    assert raised.value.what == f"{path}:2: trust_remote_code is not read from a file."
    assert raised.value.why and "--trust-remote-code ORG/REPO" in raised.value.fix
    made = config.load(write("trust_remote_code: ''\n"), {**NEEDED, "trust_remote_code": "o/r"})
    assert made.model.trust_remote_code == "o/r" and "trust_remote" not in config.dump(made)


def test_sections_are_not_read(write: Any) -> None:
    with pytest.raises(UnknownNameError, match="training"):
        config.load(write("training:\n  seed: 1\n"), NEEDED)


def test_what_is_written_reads_back(write: Any) -> None:
    flags: dict[str, Any] = {
        "learning_rate": 1e-7, "lr_scheduler_kwargs": {"num_cycles": 2, "kind": "no"},
        "label_names": ["labels", "1e-4", "null"], "eval_steps": 50, "run_name": "a: b # c",
        "overwrite": True,
    }  # fmt: skip
    made = config.load(None, {**NEEDED, **flags})
    text = config.dump(made)
    again = config.load(write(text), {"overwrite": True})
    assert (again.model, again.data, again.training) == (made.model, made.data, made.training)
    assert "learning_rate: 1.0e-07  # --learning-rate\n" in text
    assert "lora_r: 16  # recipe\n" in text
    assert "overwrite" not in text
    # Other readers of YAML agree about what it says.
    assert yaml.safe_load(text)["include_num_input_tokens_seen"] == "no"


@settings(max_examples=60, deadline=None)
@given(name=strategies.text(strategies.characters(codec="utf-8"), max_size=12))
def test_any_text_survives_the_round_trip(name: str, tmp_path_factory: Any) -> None:
    made = config.load(None, {**NEEDED, "run_name": name})
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(config.dump(made), encoding="utf-8")
    assert config.load(path, {}).training.run_name == name


# ---- whatever a stranger writes ------------------------------------------------------------------

NAMES = strategies.sampled_from(
    ["seed", "max_steps", "learning_rate", "bf16", "label_names", "sed"]
)
SNIPPETS = strategies.sampled_from(
    [": ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "? ", "<<: ", "| \n ", "'",
     '"', "> ", "#", "---\n", "...\n", "%YAML 1.1\n", "no", "on", "12:30", "1e-4", "0x1f", "010",
     ".inf", ".nan", "1e999", "9" * 330, "9" * 4_400, "null", "~", "true", "\t", "\\x1b", "\x85",
     "\u2028", "\ufeff", "=", "@"]
)  # fmt: skip
TEXTS = strategies.lists(NAMES | SNIPPETS | strategies.text(max_size=4), max_size=30).map("".join)
WRITTEN = TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | strategies.binary(
    max_size=60
)


def _loads_or_complains(content: bytes, folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_bytes(content)
    complaint: ConfigError | None = None
    try:
        config.load(path, NEEDED)
    except ConfigError as error:
        complaint = error
    if complaint:
        lines = str(complaint).split("\n")
        assert "c.yaml" in complaint.what and all(map(str.isprintable, lines))


@settings(max_examples=250, deadline=None)
@given(content=WRITTEN)
def test_any_file_is_a_configuration_or_a_complaint(content: bytes, tmp_path_factory: Any) -> None:
    _loads_or_complains(content, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(content=WRITTEN)
def test_very_many_files_are_too(content: bytes, tmp_path_factory: Any) -> None:
    _loads_or_complains(content, tmp_path_factory.getbasetemp())


@settings(max_examples=150, deadline=None)
@given(name=NAMES, text=TEXTS)
def test_any_flag_is_a_value_or_a_complaint(name: str, text: str) -> None:
    with suppress(ConfigError):
        config.load(None, {**NEEDED, name: text})


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="a pipe or a device, not a file"):
            config.load(path, {})


@pytest.mark.parametrize(
    "name", ["learning_rate", "seed", "weight_decay", "max_steps", "eval_steps"]
)
def test_a_number_beyond_all_floats_is_a_complaint(write: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f":1: {name}=999.*not finite"):
        config.load(write(f"{name}: {'9' * 400}\n"), NEEDED)
