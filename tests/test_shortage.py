"""Memory runs out, at every operation of a step, of an evaluation: the numbers stay the same.

What an allocator would refuse is refused here by torch's own dispatcher: the k-th operation on
tensors inside a step raises what CUDA or the CPU's allocator raise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafit.engine import limits, room
from lorafit.engine.room import Full, Room
from lorafit.errors import OutOfMemoryError
from lorafit.events import OutOfMemory
from tests.test_packing import far, model_of, trained
from tests.tiny import adapter, events_of, plain, same

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB."
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError(CUDA),
    lambda: RuntimeError(f"{CPU}you tried to allocate 8589934592 bytes."),
    MemoryError,
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
]
GIVEN = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "num_train_epochs": 1}


class Refusing(TorchDispatchMode):
    """Counts operations on tensors; refuses number `at`, once."""

    def __init__(self, at: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise self.error()
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing(
    patch: pytest.MonkeyPatch, at: int, error: Callable[[], Exception], *, doing: str
) -> Iterator[Refusing]:
    """Inside, operation `at` of all that steps (or evaluations) do is refused."""
    mode, attempt = Refusing(at, error), Room._attempt

    def attempted(self: Room, run: Any, parts: Any) -> Any:
        if self.doing != doing:
            return attempt(self, run, parts)
        return attempt(self, lambda given: _under(mode, run, given), parts)

    with patch.context() as inner:
        inner.setattr(Room, "_attempt", attempted)
        yield mode


def _under(mode: Refusing, run: Any, parts: Any) -> Any:
    with mode:
        return run(parts)


WAYS: dict[str, dict[str, Any]] = {
    "fused": {"name": "llama", "token_budget": 64},
    "own": {"name": "gemma", "token_budget": 64},
    "padded": {"name": "llama", "layout": "as_given"},
}


def run_of(folder: Path, way: str, **given: Any) -> Any:
    """In float64, where what is left of a difference is one of numbers, not of their rounding."""
    values = {**GIVEN, **WAYS[way], **given}
    return trained(folder, model_of(values.pop("name"), dropout=0.1).double(), **values)


@pytest.mark.parametrize(
    ("way", "points"),
    [*((way, 4) for way in WAYS), *(pytest.param(way, 80, marks=pytest.mark.slow) for way in WAYS)],
)
def test_a_step_is_tried_again_wherever_memory_ran_out(
    way: str, points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing(monkeypatch, 0, MemoryError, doing="step") as counted:
        whole = run_of(tmp_path, way)
    every = range(1, counted.count + 1)
    ends = {"again": 0, "stopped": 0}
    for number, at in enumerate(every[:: -(-len(every) // points)]):
        error = ERRORS[number % len(ERRORS)]
        with refusing(monkeypatch, at, error, doing="step"), suppress(OutOfMemoryError):
            tried = run_of(tmp_path / str(at), way)
            ends["again"] += 1
        if sum(ends.values()) == number:  # in an update, which is never taken twice
            ends["stopped"] += 1
            continue
        loss, weights = far(whole, tried)
        assert loss < 1e-6 and weights < 1e-6, (at, loss, weights)
    assert ends["again"] >= 3 * ends["stopped"], ends


def test_an_update_cut_short_stops_the_run_at_the_last_good_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known how much of it was applied: nothing is saved, and the run resumes to the
    same bits from the checkpoint before."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = run_of(tmp_path / "whole", "fused")

    def cut(self: Any, *_: Any) -> Any:
        if len(list((tmp_path / "cut").glob("checkpoint-*"))) == 2:
            next(iter(self.param_groups[0]["params"])).data.add_(1)
            raise torch.OutOfMemoryError(CUDA)
        return step(self)

    step = torch.optim.AdamW.step
    with monkeypatch.context() as inner:
        inner.setattr(torch.optim.AdamW, "step", cut)
        with pytest.raises(OutOfMemoryError, match="checkpoint-2 is whole and the last"):
            run_of(tmp_path / "cut", "fused", **saving)
    assert not (tmp_path / "cut" / "checkpoint-3").exists()
    resumed = run_of(tmp_path / "cut", "fused", resume="auto", **saving)
    assert same(adapter(whole), adapter(resumed))


@pytest.mark.parametrize("way", WAYS)
def test_an_evaluation_is_tried_again(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_of(tmp_path, way)
    whole = trainer.evaluate()["eval_loss"]
    assert trainer._reads.forget == trainer._packing.forget, "a second attempt has what a step held"
    with refusing(monkeypatch, 0, MemoryError, doing="evaluation") as counted:
        trainer.evaluate()
    for at in range(1, counted.count + 1, max(1, counted.count // 6)):
        trainer._reads._now = 0
        with refusing(monkeypatch, at, ERRORS[1], doing="evaluation"), events_of(trainer) as told:
            assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)
        assert sum(isinstance(event, OutOfMemory) for event in told) == 1
    assert trainer._reads.tokens < 100, "what did not fit is not tried each time"


def test_the_event_says_what_ran_and_what_runs_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_of(tmp_path, "fused", train=False)
    with refusing(monkeypatch, 60, ERRORS[0], doing="step"), events_of(trainer) as told:
        trainer.train()
    (event,) = (event for event in told if isinstance(event, OutOfMemory))
    assert (event.step, event.doing, event.recompute) == (1, "step", "")
    assert event.budget == event.tokens // 2 < 64
    assert event.rows > 1 and event.message.startswith("CUDA out of memory.")


def test_where_parts_cannot_be_smaller_less_is_kept_then_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single example that is too long: every level of recomputation is tried, then what was
    trained is saved."""
    rows = [*plain(8), {k: v * 6 for k, v in plain(1)[0].items()}]
    too_long = max(len(row["input_ids"]) for row in rows)
    attempt = Room._attempt

    def refuse_long(self: Room, run: Any, parts: Any) -> Any:
        def counted(given: Any) -> Any:
            if any(part.positions >= too_long - 4 for part in given):
                while given[self.passed].positions < too_long - 4:
                    self.passed += 1
                raise torch.OutOfMemoryError(CUDA)
            return run(given)

        return attempt(self, counted, parts)

    trainer = run_of(
        tmp_path, "fused", train=False, train_dataset=rows, train_sampling_strategy="sequential"
    )
    monkeypatch.setattr(Room, "_attempt", refuse_long)
    with events_of(trainer) as told, pytest.raises(OutOfMemoryError) as stopped:
        trainer.train()
    tried = [event.recompute for event in told if isinstance(event, OutOfMemory)]
    assert tried == ["mlp", "half", "layer", ""], "the last: once more, with what was handed back"
    assert (tmp_path / "checkpoint-2").is_dir()
    assert "Training stopped at step 2 of 3" in str(stopped.value)
    assert "--max-length" in str(stopped.value)


def test_a_larger_size_is_tried_again_later() -> None:
    held = Room(most=1024, divides=True)
    held._now = 256
    for _ in range(2 * room.PATIENCE):
        held.held(lambda tokens: [_Part(tokens)], len, step=1)  # type: ignore[arg-type]
    assert held.tokens == 1024


def test_resident_memory_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts shrink before they would reach the limit, by what a token is known to keep."""
    told: list[OutOfMemory] = []
    back: list[str] = []
    held = Room(
        most=1000, divides=True, forget=lambda: back.append("handed back"),
        tell=told.append, limit=10_000, per_token=10,
    )  # fmt: skip
    monkeypatch.setattr(limits, "peak", lambda: 2_000)
    ran = held.held(lambda tokens: [_Part(tokens)], lambda parts: parts[0].positions, step=1)  # type: ignore[arg-type]
    assert ran == 500 and told[0].message == "resident memory would reach 12.0 kB of 10.0 kB"
    assert back == ["handed back"]
    assert held.held(lambda _: [_Part(700)], len, step=2) == 1, "what is known not to grow"  # type: ignore[arg-type]
    with pytest.raises(Full):
        held.held(lambda _: [_Part(5000, divides=False)], len, step=2)  # type: ignore[arg-type]


def test_other_errors_are_not_taken_for_it() -> None:
    assert room.shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert room.shortage(OSError("No space left on device")) is None
    for make in ERRORS:
        assert room.shortage(make())


class _Part:
    """As much of a micro-batch as a room looks at."""

    def __init__(self, positions: int, *, divides: bool = True) -> None:
        self.positions, self.divides, self.rows = positions, divides, 2
