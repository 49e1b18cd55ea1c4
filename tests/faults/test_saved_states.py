"""A checkpoint that says something else than was saved, its manifest right or not: the run goes on,
or one error for people says why not. No other exception, no crash, no wait."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from lorafit.errors import LorafitError
from lorafit.run import checkpoint, store
from tests import tiny
from tests.faults import spoil

FILES: dict[str, strategies.SearchStrategy[spoil.Change]] = {
    "run_state.json": spoil.changes_of_json(),
    "trainer_state.json": spoil.changes_of_json(),
    "run_state.safetensors": spoil.changes_of_tensors(),
    "adapter_model.safetensors": spoil.changes_of_tensors(),
    store.MANIFEST: spoil.changes_of_json(),
}
ANY_FILE = strategies.sampled_from(list(FILES)).flatmap(
    lambda name: strategies.tuples(strategies.just(name), FILES[name])
)
EXAMPLES: dict[str, Any] = {
    "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture],
}  # fmt: skip


def train(folder: Path, resume: Any = None) -> None:
    tiny.make(
        folder, model=tiny.llama(dropout=0.1), save_strategy="steps", save_steps=1, max_steps=2,
        lr_scheduler_type="cosine", eval_dataset=tiny.plain(2), eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True,
    ).train(resume_from_checkpoint=resume)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder)
    shutil.rmtree(folder / "checkpoint-2")
    return folder


def copied(saved: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(saved, to)
    return to / "checkpoint-1"


def change(folder: Path, name: str, how: spoil.Change, *, sealed: bool) -> bool:
    """Spoil a file of a checkpoint; whether it is another now."""
    file = folder / name
    before = file.read_bytes()
    file.write_bytes(spoil.spoilt(before, how))
    if sealed and name != store.MANIFEST:
        spoil.reseal(folder)
    return file.read_bytes() != before


def goes_on_or_says_why(output: Path) -> None:
    with suppress(LorafitError):
        train(output, resume=True)


# What was found: each crashed, hung or ended in another exception once


def of_state(*path: Any, to: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / checkpoint.STATE
        tree = json.loads(file.read_text())
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        file.write_text(json.dumps(tree))

    return make


def of_trainer(**parts: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "trainer_state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))

    return make


def of_tensors(*how: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / checkpoint.TENSORS
        file.write_bytes(spoil.spoilt(file.read_bytes(), how))  # type: ignore[arg-type]

    return make


def text(content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / checkpoint.STATE).write_text(content)

    return make


MOMENTS = ("optimizer", "state", "integer keys", "0")
FOUND: dict[str, tuple[Callable[[Path], None], str]] = {
    "NumPy's position": (of_state("random_state", "numpy", 2, to=10**9), "lies outside its state"),
    "Python's words": (of_state("random_state", "python", 1, to=["x"] * 625), "cannot be read"),
    "torch's generator": (
        of_state("random_state", "torch", to="tensor:random_state.numpy.1"), "cannot be read",
    ),
    "nested": (text('{"a":' * 60_000), "nested too deeply"),
    "nested less": (text('{"a":' * 500 + "1" + "}" * 500), "nested too deeply"),
    "a step beyond": (of_state("position", "step", to=10**40), "a count is none"),
    "a negative journal": (of_state("journal", to=-5), "a count is none"),
    "readings": (of_state("read_at", to=[[]]), "a count is none"),
    "no moments": (of_state(*MOMENTS, to={"step": 1.0}), "missing or has another shape"),
    "other moments": (
        of_state(*MOMENTS, "exp_avg", to="tensor:random_state.torch"), "another shape",
    ),
    "steps of the optimiser": (
        of_state(*MOMENTS, "step", to="tensor:random_state.torch"), "does not fit",
    ),
    "a rate": (of_state("optimizer", "param_groups", 0, "lr", to="x"), "does not fit"),
    "a rate that is none": (
        of_state("optimizer", "param_groups", 0, "lr", to=float("nan")), "a learning rate of nan",
    ),
    "a method": (of_state("schedule", "get_lr", to=1), "the schedule is another's"),
    "a kind": (of_state("schedule", "last_epoch", to="x"), "the schedule is another's"),
    "sums": (of_state("sums", "total_loss", to="x"), "the sums is another's"),
    "a log": (of_trainer(log_history=5), "is not the state of a run"),
    "entries": (of_trainer(log_history=[1]), "is not the state of a run"),
    "callbacks": (of_trainer(stateful_callbacks=5), "is not the state of a run"),
    "the best": (of_trainer(best_model_checkpoint=7), "is not the state of a run"),
    "a metric": (of_trainer(best_metric="x"), "is not the state of a run"),
    "numbers": (of_tensors("header", 0, ("deep", 3, 90_000)), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_in_words(saved: Path, tmp_path: Path, name: str) -> None:
    spoils, said = FOUND[name]
    folder = copied(saved, tmp_path / "run")
    spoils(folder)
    spoil.reseal(folder)
    with pytest.raises(LorafitError) as raised:
        train(tmp_path / "run", resume=True)
    assert said in str(raised.value) and raised.value.fix, str(raised.value)


def test_state_that_the_manifest_does_not_name_is_not_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "run")
    described = json.loads((folder / store.MANIFEST).read_text())
    del described["files"][checkpoint.STATE], described["sha256"]
    (folder / store.MANIFEST).write_text(store.sealed(described))
    assert "does not name run_state.json" in checkpoint.fault(folder)


# Whatever it is


@settings(max_examples=40, **EXAMPLES)
@given(how=ANY_FILE, sealed=strategies.booleans())
def test_any_content_is_a_state_or_skipped(
    saved: Path, tmp_path: Path, how: tuple[str, spoil.Change], sealed: bool
) -> None:
    folder = copied(saved, tmp_path / "run")
    changed = change(folder, *how, sealed=sealed)
    why = checkpoint.fault(folder)
    assert why.isprintable() or not why
    if changed and not (sealed and how[0] != store.MANIFEST):
        assert why
    if why:
        assert checkpoint.to_resume(folder.parent, "auto") == (
            None,
            [f"{folder.name} skipped: {why}"],
        )


@pytest.mark.slow
@settings(max_examples=600, **EXAMPLES)
@given(how=ANY_FILE)
def test_any_content_goes_on_or_says_why(
    saved: Path, tmp_path: Path, how: tuple[str, spoil.Change]
) -> None:
    change(copied(saved, tmp_path / "run"), *how, sealed=True)
    goes_on_or_says_why(tmp_path / "run")


def flips(folder: Path, every: int) -> list[str]:
    """The places in a checkpoint's files at which a flipped bit is not noticed; the card's prose,
    which is written anew by others, left out."""
    missed = []
    for file in sorted(folder.iterdir()):
        if file.name == store.CARD:
            continue
        before = file.read_bytes()
        for at in range(0, len(before), every):
            file.write_bytes(spoil.spoilt(before, ("flip", at, 1 << at % 8)))
            why = checkpoint.fault(folder)
            missed += [] if why else [f"{file.name}:{at}"]
        file.write_bytes(before)
    return missed


@pytest.mark.parametrize("every", [997, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_noticed_wherever_it_is(saved: Path, tmp_path: Path, every: int) -> None:
    folder = copied(saved, tmp_path / "run")
    assert not checkpoint.fault(folder) and flips(folder, every) == []
    assert not checkpoint.fault(folder)
