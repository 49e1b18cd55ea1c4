"""The command line as a careless newcomer uses it: every mistake ends in one clear message.

Run in this process through typer's runner; what must hold of a fresh process (signals, imports) is
run in one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from lorafit import cli, config, job, packing
from lorafit.errors import ConfigError
from lorafit.run import store


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty short questions."""
    file = tmp_path / "rows.jsonl"
    lines = (json.dumps({"question": f"Who is {n}?", "answer": f"A cat, {n}."}) for n in range(20))
    file.write_text("\n".join(lines))
    return file


QUICK = ("--max-steps", 2, "--per-device-train-batch-size", 1, "--lora-r", 2, "--max-eval-rows", 4)


def test_train_then_generate(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = invoke("train", "--model", tiny_llama, "--data", rows, "--output-dir", out, *QUICK)
    assert done.exit_code == 0, done.output
    assert "4 per step (1 x 4 accumulated x 1 process)" in done.output
    assert "lorafit generate --adapter" in done.output
    held = {path.name for path in out.iterdir()}
    assert held >= {
        "config.yaml", "journal.jsonl", "adapter_model.safetensors", "adapter_config.json",
        "tokenizer.json", "README.md", "lorafit.json",
    }  # fmt: skip
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["max_steps"] == 2 and resolved["lora_r"] == 2 and resolved["lora_alpha"] == 32
    events = [json.loads(line)["event"] for line in (out / "journal.jsonl").open()]
    assert events.count("StepEnd") == 2 and "Evaluated" in events and events[-1] == "RunEnded"
    contract = json.loads((out / "lorafit.json").read_text())
    assert contract["shape"] == "chat" and contract["stop_ids"] and contract["base"]

    page = (out / "report.html").read_text()
    assert "finished after step 2" in page
    assert "DataAudited" in events and "rows.jsonl: 20 rows" in page
    (out / "report.html").unlink()
    told = invoke("report", out)
    assert told.exit_code == 0 and "too few points to say" in told.output
    assert (out / "report.html").read_text() and str(out / "report.html") in told.output

    answered = invoke(
        "generate", "--adapter", out, "--prompt", "Who is 3?", "--max-new-tokens", 5, "--compare"
    )
    assert answered.exit_code == 0, answered.output
    assert "base:" in answered.output and "tuned:" in answered.output


@pytest.mark.parametrize("go", [True, False])
def test_practice_tells_by_its_exit_code(
    go: bool, tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does is tests/test_practice.py's; here the flags, and that --promote trains."""
    asked: list[bool] = []

    def practise(_: job.Job, *, find_lr: bool = False) -> Any:
        asked.append(find_lr)
        return SimpleNamespace(go=go)

    monkeypatch.setattr(job.Job, "practise", practise)
    where = ("--model", tiny_llama, "--data", rows, "--output-dir", tmp_path / "run")
    done = invoke("practice", *where, "--promote", "--find-lr", *QUICK)
    assert done.exit_code == (0 if go else 1), done.output
    assert asked == [True] and (tmp_path / "run" / "adapter_model.safetensors").exists() == go


def test_flags_win_over_the_file(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_llama}\ndata: {rows}\nmax_steps: 9\nlora_r: 3\n")
    out = tmp_path / "run"
    done = invoke("train", file, "--output-dir", out, *QUICK)
    assert done.exit_code == 0, done.output
    written = (out / "config.yaml").read_text()
    assert yaml.safe_load(written)["max_steps"] == 2
    assert "--max-steps" in written and "run.yaml:2" in written


MISTAKES = {
    "missing file": (("--data", "{tmp}/none.jsonl"), "none.jsonl: this file does not exist"),
    "empty file": (("--data", "{tmp}/empty.jsonl"), "empty.jsonl: this data set is empty"),
    "broken row": (("--data", "{tmp}/broken.jsonl"), "broken.jsonl:2"),
    "row without its field": (("--data", "{tmp}/field.jsonl"), "field.jsonl:2: this row has no"),
    "no such model": (("--model", "{tmp}/nope"), "There is no folder"),
    "folder that is no model": (("--model", "{tmp}"), "is not a model: it has no config.json"),
    "no such module": (("--lora-target-modules", "q_prj"), "Did you mean q_proj?"),
    "folder that is a file": (("--output-dir", "{tmp}/rows.jsonl/run"), "rows.jsonl is a file"),
    "folder that holds a run": (("--output-dir", "{tmp}/held"), "already holds a run"),
    "nonsense value": (("--learning-rate", "-1"), "learning_rate=-1.0 is below 0"),
    "nothing to evaluate on": (("--eval-share", "0"), "holds nothing back"),
    "fp16 on a CPU": (("--fp16", "--use-cpu"), "fp16=True needs a CUDA device"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_message_and_leave_nothing(
    name: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"')
    (tmp_path / "field.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n')
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / store.JOURNAL).write_text("")
    before = sorted(tmp_path.rglob("*"))
    given, message = MISTAKES[name]
    usual = {"--model": tiny_llama, "--data": rows, "--output-dir": tmp_path / "run"}
    words = [str(word).format(tmp=tmp_path) for word in given]
    for flag, value in usual.items():
        if flag not in words:
            words += [flag, str(value)]
    done = invoke("train", *words, *QUICK)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_flags_and_keys_name_the_nearest(tmp_path: Path) -> None:
    flag = invoke("train", "--learning-rat", "1")
    assert flag.exit_code == 2 and "--learning-rate" in flag.output
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: b\nlearning_rat: 1e-4\n")
    key = invoke("train", file)
    assert key.exit_code == 2 and "run.yaml:3" in key.output
    assert "Did you mean learning_rate?" in key.output


def test_generate_refuses_what_is_no_adapter(tmp_path: Path) -> None:
    done = invoke("generate", "--adapter", tmp_path, "--prompt", "hello")
    assert done.exit_code == 2 and "is no adapter" in done.output


def test_report_names_what_holds_no_run(tmp_path: Path) -> None:
    done = invoke("report", tmp_path)
    assert done.exit_code == 2 and "holds no run that can be read" in done.output
    assert not list(tmp_path.iterdir())


def test_evaluation_can_be_turned_off(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    off = ("--eval-share", 0, "--eval-strategy", "no")
    done = invoke("train", "--model", tiny_llama, "--data", rows, "--output-dir", out, *off, *QUICK)
    assert done.exit_code == 0, done.output
    assert "Evaluated" not in (out / "journal.jsonl").read_text()


def test_overwrite_replaces_a_run_by_the_same_bits(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    words = ("train", "--model", tiny_llama, "--data", rows, "--output-dir", tmp_path / "run")
    assert invoke(*words, *QUICK).exit_code == 0
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    again = invoke(*words, *QUICK, "--overwrite")
    assert again.exit_code == 0, again.output
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").open()]
    assert events.count("RunStarted") == 1
    assert adapter.read_bytes() == before


def test_ctrl_c_saves_and_the_printed_command_resumes(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "lorafit", "train", "--model", str(tiny_llama), "--data", str(rows),
        "--output-dir", str(out), "--max-steps", "400", "--lora-r", "2", "--eval-strategy", "no",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = out / "journal.jsonl"
    while not (journal.exists() and "StepEnd" in journal.read_text()):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in said
    resume = next(line for line in said.splitlines() if line.startswith("Resume: "))
    assert resume.startswith("Resume: lorafit train --model")
    saved, _ = store.newest(out)
    assert saved is not None
    step = int(saved.name.removeprefix("checkpoint-"))
    words = [*command[3:], "--max-steps", str(step + 2), "--resume-from-checkpoint", "auto"]
    settings, told = (out / "config.yaml").read_bytes(), journal.read_bytes()
    refused = invoke(*words)
    assert refused.exit_code == 2 and f"max_steps={step + 2} (was 400)" in refused.output
    assert (out / "config.yaml").read_bytes() == settings and journal.read_bytes() == told
    done = invoke(*words, "--accept")
    assert done.exit_code == 0, done.output
    assert (out / "config.yaml").read_bytes() != settings
    steps = [json.loads(line) for line in journal.open()]
    assert [e["step"] for e in steps if e["event"] == "StepEnd"] == list(range(1, step + 3))


def test_a_mistake_is_said_once_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("train", "--model", "/nope", "--data", "/nope", "--learning-rate", "-1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, said in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", number)
        done = invoke(*wrong)
        assert done.exit_code == 2 and ("learning_rate" in done.output) == said
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert not cli._is_told_elsewhere(ConfigError("many is no number"))


@pytest.mark.parametrize("words", [["--resume-from-checkpoint", "auto"], ["--overwrite"], []])
def test_the_command_that_resumes_is_whole(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafit", "train", *words, "run file.yaml"])
    said = "lorafit train 'run file.yaml' --resume-from-checkpoint=auto"
    assert cli._resume_command() == said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli._resume_command() == f"torchrun --nproc-per-node=... -m {said}"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_while_data_is_read_leaves_in_good_order(
    tiny_llama: Path, tmp_path: Path, number: int, code: int
) -> None:
    command = [sys.executable, "-m", "lorafit", "train", "--model", str(tiny_llama)]
    command += ["--data", "-", "--output-dir", str(tmp_path / "run")]
    running = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    used, before = 0.0, -1.0
    while used < 1 or used > before:  # imports are done, and it waits for rows
        time.sleep(0.4)
        before, used = used, sum(psutil.Process(running.pid).cpu_times()[:2])
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == code
    assert "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("while_importing", ["typer", "transformers"])
def test_ctrl_c_while_packages_are_imported_is_one_line(
    while_importing: str, tmp_path: Path
) -> None:
    code = f"""
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {while_importing!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.argv = ["lorafit", "train", "--model={tmp_path}", "--data=x.jsonl", "--output-dir={tmp_path}/r"]
runpy.run_module("lorafit", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


def test_check_tells_what_would_hurt_to_people_and_machines(
    tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    rows.write_text(rows.read_text().replace("A cat", ":cat: [b]A cat[/b]"))
    clean = invoke("check", "--model", tiny_llama, "--data", rows)
    assert clean.exit_code == 0, clean.output
    assert ":cat: [b]A cat[/b], " in clean.output and "Nothing was found" in clean.output
    hurt = invoke("check", "--model", tiny_llama, "--data", rows, "--eval-data", rows, "--json")
    assert hurt.exit_code == 1
    report = json.loads(hurt.stdout)
    assert report["shared"] == 20 and report["harms"] and report["train"]["examples"] == 20
    rows.write_text('{"question": "Who?"')
    broken = invoke("check", "--model", tiny_llama, "--data", rows)
    assert broken.exit_code == 2 and "rows.jsonl:1:20: this is not valid JSON" in broken.output


def test_check_needs_no_torch(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    words = ["lorafit", "check", "--model", str(tiny_llama), "--data", str(rows)]
    code = f"import sys; sys.argv = {words}; from lorafit import cli\n" + (
        "try: cli.main()\nfinally: print([name for name in ('torch', 'peft', 'datasets') "
        "if sys.modules.get(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LORAFIT_CACHE": str(tmp_path / "cache")},
    )
    assert done.stdout.splitlines()[-2:] == ["Nothing was found that would hurt.", "[]"]
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("verb", ["train", "practice"])
def test_what_cannot_fit_ends_before_weights_are_read(
    verb: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)  # the shared one cannot be written to
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    words = (verb, "--model", folder, "--data", rows, "--output-dir", tmp_path / "run", "--use-cpu")
    tight = invoke(*words, "--memory-limit", "50MB", *QUICK)
    assert tight.exit_code == 2 and "(memory_limit=50MB)" in tight.output, tight.output
    assert "This run does not fit" in tight.output and "More memory:" in tight.output
    for more in (
        ("--memory-limit", "8GB"),
        ("--memory-limit", "50MB", "--layout", "as_given"),
        ("--memory-limit", "50MB", "--token-budget", 128, "--recompute", "layer"),
    ):
        later = invoke(*words, *more, *QUICK)
        assert later.exit_code == 2 and "cannot be read" in later.output, later.output
    assert not (tmp_path / "run").exists()


def test_a_shape_that_is_not_known_is_refused_by_nobody_too_soon(tmp_path: Path) -> None:
    told = {"model": str(tmp_path), "data": "-", "memory_limit": "50MB", "use_cpu": True}
    settings = config.load(None, told)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 4}))
    packing.check_fits(settings, [])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match="This run does not fit"):
        packing.check_fits(settings, [{"input_ids": [1, 2]}])


def test_a_base_that_lies_quantised_is_planned_so(tmp_path: Path) -> None:
    """As much as `--quantize` plans of one that does not."""

    def planned(how: dict[str, Any], *more: object) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | how))
        words = ("--model", tmp_path, "--device", "cpu", "--memory-limit", "8GB", "--json")
        return json.loads(invoke("plan", *words, *more).output)["plan"]

    four = {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
    eight = {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}
    assert planned(four) == planned({}, "--quantize", "nf4") != planned({})
    assert planned(eight) == planned({}, "--quantize", "int8") != planned(four)


CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_plan_needs_a_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    told = invoke("plan", "--model", tmp_path, "--memory-limit", "8GB", "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "134.5 million numbers" in told.output and "of 8.00 GB (memory_limit=8GB)" in told.output
    asked = ("plan", "--model", tmp_path, "--device", "cuda", "--memory-limit", "24GB", "--json")
    report = json.loads(invoke(*asked).stdout)
    assert report["plan"]["tokens"] == 16384 and report["products"] == "bfloat16"
    assert report["fits"] and report["levels"][0]["longest"] > 16384
    long = invoke(*asked[:-1], "--max-length", "2000000")
    assert long.exit_code == 2 and "--max-length" in long.output and "2,000,000" in long.output


@pytest.mark.parametrize("limit", ["-1", "0", "lots", "120%"])
def test_nonsense_limits_are_refused_at_once(limit: str, tmp_path: Path) -> None:
    done = invoke("plan", "--model", tmp_path, "--memory-limit", limit)
    assert done.exit_code == 2 and f"memory_limit='{limit}'" in done.output


def test_plan_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["lorafit", "plan", "--model", str(tmp_path), "--bf16"]
    code = (
        f"import sys; sys.argv = {words}; from lorafit import cli\n"
        "try: cli.main()\nfinally: print([name for name in ('torch', 'transformers', 'peft', "
        "'datasets', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
