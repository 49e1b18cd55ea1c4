"""Paths that no file can have, or that are not what is wanted: each works or is refused in words,
and what lies beside the output folder stays as it is."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafit import config, job
from lorafit.arguments import ModelArguments
from lorafit.data.parse import Faults
from lorafit.data.read import locate
from lorafit.errors import LorafitError
from lorafit.model import adapters, base, tokens
from lorafit.run import checkpoint, store
from tests import tiny

LATIN = os.fsdecode(b"caf\xe9")
PATHS = {
    "a NUL": "a\0b", "long": "x" * 300, "long in all": "/".join(["x" * 200] * 30), "a file": "file",
    "below a file": "file/x", "a dangling link": "dangling", "a loop": "loop",
    "below a loop": "loop/x", "a pipe": "pipe", "a device": "/dev/null", "below it": "/dev/null/x",
    "half a character": "\ud800", "not UTF-8": LATIN, "of the system": "/proc/x",
    "a user that is not": "~nosuch/x",
}  # fmt: skip
"""For whatever they are given."""
ODD = {"not ASCII": "caf\u00e9/\U0001f408", "dots": "beside/../new", "a line": "a\nb",
       "a flag": "-x", "blank": " ", "a link to a folder": "link"}  # fmt: skip
"""Under which a run can lie."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the paths lead; with a tree that nobody may touch, and no patience."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "x").write_text("mine")
    (tmp_path / "beside" / "checkpoint-1").mkdir()
    (tmp_path / "file").write_text("x")
    for link, to in (("dangling", "nowhere"), ("loop", "loop"), ("link", "elsewhere")):
        (tmp_path / link).symlink_to(to)
    (tmp_path / "elsewhere").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert sorted(path.name for path in (tmp_path / "beside").iterdir()) == ["checkpoint-1", "x"]
    assert (tmp_path / "beside" / "x").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "x"
    assert not list((tmp_path / "beside" / "checkpoint-1").iterdir())


def train(path: str) -> None:
    trainer = tiny.make(
        Path("x"), output_dir=path, save_strategy="steps", save_steps=1, max_steps=1
    )
    trainer.train()
    trainer.save_model(path)


def set_up(path: str) -> None:
    job.check_folder(config.load(None, {"model": "m", "data": "d", "output_dir": path}))


def resume(path: str) -> None:
    checkpoint.to_resume(Path("nothing"), path)


def read(path: str) -> None:
    list(locate(path).rows(Faults()))


def load(path: str) -> None:
    base.check_base(path)
    base.load_model(ModelArguments(model=path))


def load_tokenizer(path: str) -> None:
    tokens.load_tokenizer(path)


def load_adapter(path: str) -> None:
    adapters.load_tuned(Path(path))


def configure(path: str) -> None:
    config.load(Path(path), {})


@pytest.mark.parametrize(
    "use", [train, resume, read, load, load_tokenizer, load_adapter, configure],
    ids=lambda use: use.__name__,
)  # fmt: skip
def test_what_cannot_be_there_is_refused_in_words(home: Path, use: Callable[[str], None]) -> None:
    tolerated = {"a user that is not"} if use is train else set()  # a folder may be called so
    for name, path in PATHS.items():
        try:
            use(path)
        except LorafitError as error:
            refused = error
        else:
            refused = None
        assert (refused and refused.what and refused.fix) or name in tolerated, name
    assert not (home / "nowhere").exists()


def test_it_is_refused_before_anything_is_read() -> None:
    for path in ("a\0b", "x" * 300, "\ud800", "/dev/null/x"):
        with pytest.raises(LorafitError, match="cannot be made"):
            store.check_writable(Path(path))


@pytest.mark.parametrize("name", ODD)
def test_a_run_lies_wherever_a_file_may(home: Path, name: str) -> None:
    train(ODD[name])
    folder = home / ODD[name]
    lines = [json.loads(line) for line in (folder / store.JOURNAL).read_bytes().splitlines()]
    told = [line["path"] for line in lines if line["event"] == "Saved"]
    assert told == [str(Path(ODD[name]) / "checkpoint-1")]
    found, skipped = checkpoint.to_resume(Path(ODD[name]), True)
    assert found and found.state.position.step == 1 and not skipped
    assert adapters.read_contract(folder)


@pytest.mark.parametrize("name", [f"{LATIN}.jsonl", "a\nb\r.jsonl"])
def test_data_of_an_odd_name_is_trained_on(tiny_llama: Path, home: Path, name: str) -> None:
    rows = "".join(f'{{"question": "{n}?", "answer": "{n}."}}\n' for n in range(8))
    (home / name).write_text(rows)
    given = {"model": str(tiny_llama), "data": name, "output_dir": "run"}
    knobs = {"eval_share": 0, "eval_strategy": "no", "lora_r": 2, "max_steps": 1}
    folder = job.prepare(config.load(None, given | knobs)).run()
    assert adapters.read_contract(folder)["data"]["sources"]


@pytest.mark.parametrize(
    "name",
    ["org/../x", "..", "org/na me", "org/x;touch y", "org/$(touch y)", "http://evil/x", "org/x@v1",
     "-x", "org//x", "org/x/y", "\u202eorg/x", "org/\x1b[2J", "é" * 200, "a" * 5_000,
     "org/" + LATIN],
)  # fmt: skip
def test_a_hub_name_of_any_letters_is_refused_in_words(home: Path, name: str) -> None:
    for use in (load, load_tokenizer):
        with pytest.raises(LorafitError) as raised:
            use(name)
        assert raised.value.fix and all(map(str.isprintable, str(raised.value).split("\n")))
    assert not (home / "y").exists()


def test_a_folder_that_may_not_be_written_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write whatever its mode
    with pytest.raises(LorafitError, match="cannot be written: no permission"):
        set_up("new")
    assert not (home / "new").exists()
