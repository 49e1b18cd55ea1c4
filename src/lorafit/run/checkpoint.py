"""Run state to disk and back: complete, checked, no pickle.

A checkpoint is the adapter in its own format plus what resuming needs: optimiser, schedule, every
random generator, position, what it was made with. Tensors are safetensors, the rest JSON. Knows
folders through `store` and nothing of models: the trainer hands over the adapter's writer.
"""

import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit import foreign
from lorafit.errors import ConfigError
from lorafit.run import store

STATE, TENSORS = "run_state.json", "run_state.safetensors"
FORMAT = 3
_TREES = ("optimizer", "scaler", "random_state", "epoch_began")
_PLAIN = {"sums": dict, "read_at": list, "journal": int, "made_with": dict}
_BIGGEST = 1 << 62
"""Beyond all numbers of a run: what counts from there overflows."""


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
    `read_at` are the steps whose automatic reading was taken, `journal` the bytes of it that lie on
    disk, `made_with` the arguments and other facts that `changes` compares."""

    position: Position
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    sums: dict[str, float]
    random_state: dict[str, Any]
    epoch_began: dict[str, Any] | None
    read_at: list[int]
    journal: int
    made_with: dict[str, Any]


def save(
    folder: Path, write_files: Callable[[Path], None], *, state: RunState | None = None
) -> int:
    """Write a whole checkpoint to `folder`; its bytes. A folder of that name which is not ours is
    set aside under another name first, whole.

    Args:
        write_files: Puts adapter, trainer_state.json and so on into the folder it is given.
        state: None for `save_only_model`: weights that cannot be resumed.
    """
    if folder.exists() and not (folder / store.MANIFEST).is_file():
        folder.rename(_free_name(folder))
    with store.whole_folder(folder) as partial:
        write_files(partial)
        if state is not None:
            _write_state(partial, state)
    return store.bytes_of(folder)


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.not-lorafits-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _write_state(folder: Path, state: RunState) -> None:
    tensors: dict[str, Tensor] = {}
    described = {
        "format": FORMAT,
        "position": asdict(state.position),
        **{part: vars(state)[part] for part in _PLAIN},
        "schedule": _split(plain(state.schedule), "schedule", tensors=tensors),
        **{part: _split(vars(state)[part], part, tensors=tensors) for part in _TREES},
    }
    save_file(tensors, folder / TENSORS)
    store.write_json(folder / STATE, described)


def fault(folder: Path) -> str:
    """Why `folder` cannot be resumed; empty where it can."""
    return _tried(folder)[1]


def load(folder: Path) -> RunState:
    """The state that `save` wrote.

    Raises:
        ConfigError: the folder is not a complete checkpoint of lorafit's.
    """
    state, why = _tried(folder)
    if state is None:
        raise ConfigError(
            f"Can't find a valid checkpoint at {folder}: {why}.",
            why="A checkpoint that is not whole would resume another run than the one saved.",
            fix="Write --resume-from-checkpoint auto (resume_from_checkpoint='auto') for the "
            "newest whole one.",
        )
    return state


def _tried(folder: Path) -> tuple[RunState | None, str]:
    """The state in `folder`, or None and the reason."""
    if os.path.isdir(folder) and not os.path.lexists(folder / store.MANIFEST):
        return None, f"it has no {store.MANIFEST}: not lorafit's, or not whole"
    why = store.fault(folder)
    if why:
        return None, why
    if not (folder / STATE).exists():
        return None, "it was saved with save_only_model, without the state of the run"
    if not {folder / STATE, folder / TENSORS} <= set(store.named(folder)):
        return None, f"{store.MANIFEST} does not name {STATE} and {TENSORS}"
    try:
        return _read(folder), ""
    except _OtherFormat as other:
        return None, f"format {other!s:.20} of another lorafit, not {FORMAT}"
    except UNFIT as broken:
        return None, f"its state cannot be read ({type(broken).__name__}: {str(broken)!r:.80})"


UNFIT = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    SafetensorError,
)
"""What comes of state that is none, in the many hands that it goes through."""


class _OtherFormat(Exception): ...


def _read(folder: Path) -> RunState:
    described = foreign.json_object((folder / STATE).read_bytes(), once=False)
    if described.get("format") != FORMAT:
        raise _OtherFormat(repr(described.get("format")))
    tensors = load_file(folder / TENSORS)
    for part, kind in _PLAIN.items():
        if not isinstance(described[part], kind):
            raise TypeError(f"{part} is no {kind.__name__}")
    position = Position(**described["position"])
    counts = [*asdict(position).values(), described["journal"], *described["read_at"]]
    if not all(type(count) is int and 0 <= count < _BIGGEST for count in counts):
        raise ValueError("a count is none")
    state = RunState(
        position=position,
        schedule=_join(described["schedule"], tensors),
        **{part: described[part] for part in _PLAIN},
        **{part: _join(described[part], tensors) for part in _TREES},
    )
    with random_state_kept():
        for drawn in (state.epoch_began or state.random_state, state.random_state):
            set_random_state(drawn)
    return state


def fits(kept: Any, fresh: Any) -> bool:
    """Whether `kept` may stand where `fresh` does: a number for a number, a text for a text, all of
    their like in lists and mappings; anything for None, and in what is empty."""
    match fresh:
        case bool() | str():
            return type(kept) is type(fresh)
        case int():
            return type(kept) in (int, float) and -1 <= kept < _BIGGEST
        case float():
            return type(kept) is float or (type(kept) is int and abs(kept) < _BIGGEST)
        case Mapping():
            return isinstance(kept, Mapping) and all(
                name in fresh and fits(item, fresh[name]) for name, item in kept.items() if fresh
            )
        case Sequence():
            return isinstance(kept, Sequence) and all(
                any(fits(item, one) for one in fresh) for item in kept if fresh
            )
        case _:
            return True


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
        ConfigError: True, and there is none; a path, and it is none; "auto", and all that is there
            is somebody else's.
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
    there = [path for _, path in store.checkpoints(folder)]
    if there and not any((path / store.MANIFEST).is_file() for path in there):
        raise ConfigError(
            [f"The checkpoints in {folder} are not lorafit's.", *skipped],
            why="They hold no state that a run could go on from, and another run beside them would "
            "be taken for theirs.",
            fix="Give the run a folder of its own: output_dir='...' (--output-dir ...), or move "
            "them out of this one.",
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
    random.setstate((version, tuple(words), None if gauss is None else float(gauss)))
    kind, keys, position, has_gauss, cached = state["numpy"]
    words32 = numpy.asarray(keys).astype("uint32")
    if not 0 <= position <= len(words32):  # numpy does not look, and reads what lies there
        raise ValueError("the position of NumPy's generator lies outside its state")
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


def plain(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's state without its functions, which its constructor makes again."""
    return {
        name: [None] * len(value) if name == "lr_lambdas" else value
        for name, value in schedule.items()
        if not callable(value)
    }
