"""Run state to disk and back: complete, checked, no pickle.

A checkpoint is the adapter in its own format plus what resuming needs: optimiser, schedule, every
random generator, position. Tensors are safetensors, the rest JSON. Knows folders through `store`
and nothing of models: the trainer hands over the adapter's writer.
"""

import json
import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.run import store

STATE, TENSORS = "run_state.json", "run_state.safetensors"
FORMAT = 2
_TREES = ("optimizer", "scaler", "random_state", "epoch_began")


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimiser steps done, `rows` rows of `epoch` used. Rows, not
    steps, so that a run may go on with another batch size and meet each row once."""

    step: int
    epoch: int
    rows: int


@dataclass(frozen=True)
class RunState:
    """Everything but the weights. Optimiser, schedule and scaler as their `state_dict`s;
    `sums` are the trainer's running numbers, `random_state` what `random_state()` returned, and
    `epoch_began` the same at the epoch's beginning, None where `position` is that beginning.
    `arguments` are the training arguments by name."""

    position: Position
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    sums: dict[str, float]
    random_state: dict[str, Any]
    epoch_began: dict[str, Any] | None
    arguments: dict[str, Any]


def save(
    folder: Path, write_files: Callable[[Path], None], *, state: RunState | None = None
) -> int:
    """Write a whole checkpoint to `folder`; its bytes.

    Args:
        write_files: Puts adapter, trainer_state.json and so on into the folder it is given.
        state: None for `save_only_model`: weights that cannot be resumed.
    """
    with store.whole_folder(folder) as partial:
        write_files(partial)
        if state is not None:
            _write_state(partial, state)
    return store.bytes_of(folder)


def _write_state(folder: Path, state: RunState) -> None:
    tensors: dict[str, Tensor] = {}
    described = {
        "format": FORMAT,
        "position": asdict(state.position),
        "sums": state.sums,
        "arguments": state.arguments,
        "schedule": _split(_plain(state.schedule), "schedule", tensors=tensors),
        **{part: _split(vars(state)[part], part, tensors=tensors) for part in _TREES},
    }
    save_file(tensors, folder / TENSORS)
    store.write_json(folder / STATE, described)


def fault(folder: Path) -> str:
    """Why `folder` cannot be resumed; empty where it can."""
    why = store.fault(folder)
    if why:
        return why
    if not (folder / STATE).is_file():
        return "it was saved with save_only_model, without the state of the run"
    written = json.loads((folder / STATE).read_text(encoding="utf-8")).get("format")
    return "" if written == FORMAT else f"format {written} of another lorafit, not {FORMAT}"


def load(folder: Path) -> RunState:
    """The state that `save` wrote.

    Raises:
        ConfigError: the folder is not a complete checkpoint of lorafit's.
    """
    why = fault(folder)
    if why:
        raise ConfigError(
            f"Can't find a valid checkpoint at {folder}: {why}.",
            why="A checkpoint that is not whole would resume another run than the one saved.",
            fix="Write --resume-from-checkpoint auto (resume_from_checkpoint='auto') for the "
            "newest whole one.",
        )
    described = json.loads((folder / STATE).read_text(encoding="utf-8"))
    tensors = load_file(folder / TENSORS)
    return RunState(
        position=Position(**described["position"]),
        sums=described["sums"],
        arguments=described["arguments"],
        schedule=_join(described["schedule"], tensors),
        **{part: _join(described[part], tensors) for part in _TREES},
    )


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is whole, and the state of the run in it."""

    folder: Path
    state: RunState


def to_resume(folder: Path, wanted: bool | str | None) -> tuple[Kept | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` means, and one line for each that was skipped.

    Args:
        folder: The run's output folder.
        wanted: True for the newest whole one there, a path, "auto" for True or None; None or False
            to start afresh.

    Raises:
        ConfigError: True, and there is none; a path, and it is none.
    """
    if not wanted:
        return None, []
    if wanted is not True and wanted != "auto":
        return Kept(Path(str(wanted)), load(Path(str(wanted)))), []
    found, skipped = store.newest(folder, fault=fault)
    if found is None and wanted is True:
        raise ConfigError(
            [f"No valid checkpoint found in output directory ({folder}).", *skipped],
            fix="resume_from_checkpoint='auto' starts afresh where there is none.",
        )
    return Kept(found, load(found)) if found else None, skipped


def random_state() -> dict[str, Any]:
    """The state of every global random generator: Python's, NumPy's, torch's on each device."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` took, or what a checkpoint kept of it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    words32 = numpy.asarray(keys).astype("uint32")
    numpy.random.set_state((kind, words32, position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        # as many as there are here: the run may have been saved where more were visible
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


@contextmanager
def random_state_kept() -> Generator[None]:
    """Whatever is drawn inside leaves the global random generators as they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


_TENSOR, _INTEGER_KEYS = "tensor:", "integer keys"


def _split(value: Any, name: str, *, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors` and named where they stood."""
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(value.astype("int64"))
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().cpu().clone()
        return _TENSOR + name
    if isinstance(value, Mapping):
        integers = any(isinstance(key, int) for key in value)
        split = {
            str(key): _split(item, f"{name}.{key}", tensors=tensors) for key, item in value.items()
        }
        return {_INTEGER_KEYS: split} if integers else split
    if isinstance(value, list | tuple):
        return [
            _split(item, f"{name}.{index}", tensors=tensors) for index, item in enumerate(value)
        ]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        if value.keys() == {_INTEGER_KEYS}:
            return {int(key): _join(item, tensors) for key, item in value[_INTEGER_KEYS].items()}
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def _plain(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's state without its functions, which its constructor makes again."""
    return {
        name: [None] * len(value) if name == "lr_lambdas" else value
        for name, value in schedule.items()
        if not callable(value)
    }
