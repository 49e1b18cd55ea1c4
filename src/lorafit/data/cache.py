"""Examples on disk, memory-mapped: made once, found again by everything that made them.

Owns the files of a stored set and the folder they are kept in. Opening one costs nothing, and an
example is found by its number without reading others. Knows no rows, templates or models: the
parts of a key are given by name, so that a rebuild can say which of them has changed.
"""

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.data.examples import Example
from lorafit.data.shapes import IGNORE
from lorafit.errors import DataError

_ABOUT, _SOURCES = "about.json", "sources.txt"
_TYPES = {"ids": "i4", "learned": "u1", "ends": "i8", "rows": "i4", "wholes": "u8", "prompts": "u8"}
_BLOCK = 50_000
_KEPT = 4
"""Versions kept of each data set; the oldest goes."""


class Stored(Sequence[dict[str, list[int]]]):
    """A set of examples that `store` wrote; each is `input_ids` and `labels`.

    Attributes:
        about: What was noted beside it.
        ends: Where each example ends in the arrays of tokens.
        rows: The number of the row that each example comes from.
        tokens: All ids, which of them are learned, and `ends`.
        wholes, prompts: A hash of each example's ids; of those before its first supervised one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        parts = {
            name: np.memmap(folder / f"{name}.{kind}", dtype=kind, mode="r")
            for name, kind in _TYPES.items()
        }
        self._ids, self._learned = parts["ids"], parts["learned"]
        self.tokens = self._ids, self._learned, parts["ends"]
        self.ends, self.rows = parts["ends"], parts["rows"]
        self.wholes, self.prompts = parts["wholes"], parts["prompts"]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """The example of that number."""
        start, end = (int(self.ends[index - 1]) if index else 0), int(self.ends[index])
        ids, learned = np.array(self._ids[start:end]), self._learned[start:end].astype(bool)
        return {"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORE).tolist()}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.ends, prepend=0)

    @property
    def supervised(self) -> np.ndarray:
        """Tokens of each example that carry loss; the first never does."""
        starts = np.concatenate(([0], self.ends[:-1]))
        totals = np.empty(len(self), np.int64)
        for some, part in self.blocks():
            first = starts[some] - part.start
            totals[some] = np.add.reduceat(self._learned[part], first, dtype=np.int64)
        return totals - self._learned[starts]

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Examples, and where their tokens lie, some at a time: counting them all in one go took
        a gigabyte for a million."""
        for first in range(0, len(self), _BLOCK):
            last = min(first + _BLOCK, len(self))
            start = int(self.ends[first - 1]) if first else 0
            yield slice(first, last), slice(start, int(self.ends[last - 1]))

    def sources(self) -> list[str]:
        """The file and line of each example's row."""
        return (self.folder / _SOURCES).read_text(encoding="utf-8").split("\n")


class Chosen(Sequence[dict[str, list[int]]]):
    """Some examples of one or several stored sets, one after the other.

    Args:
        parts: Each set with the numbers of its examples that are in.
    """

    def __init__(self, parts: Sequence[tuple[Stored, np.ndarray]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(numbers) for _, numbers in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.concatenate([stored.lengths[numbers] for stored, numbers in self.parts])

    def __getitem__(self, index: Any) -> Any:
        """The example at that place."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        stored, numbers = self.parts[part]
        return stored[int(numbers[index - (self._ends[part - 1] if part else 0)])]


def store(folder: Path, examples: Iterable[Example], *, about: Callable[[], Any]) -> None:
    """Write a set into `folder`, which does not exist yet; whole or not at all.

    Args:
        about: Asked at the end for what is to be noted beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        columns = {name: array(_CODES[name]) for name in ("ends", "rows", "wholes", "prompts")}
        with (
            (partial / f"ids.{_TYPES['ids']}").open("wb") as ids,
            (partial / f"learned.{_TYPES['learned']}").open("wb") as learned,
            (partial / _SOURCES).open("w", encoding="utf-8", errors="backslashreplace") as sources,
        ):
            last, row, end = "", -1, 0
            for example in examples:
                marks = np.array(example.labels) != IGNORE
                tokens = array("i", example.ids).tobytes()
                ids.write(tokens)
                learned.write(marks.tobytes())
                sources.write(example.source if row < 0 else f"\n{example.source}")
                row += example.source != last or row < 0
                last, end = example.source, end + len(marks)
                columns["ends"].append(end)
                columns["rows"].append(row)
                columns["wholes"].append(_hash(tokens))
                columns["prompts"].append(_hash(tokens[: 4 * _first(marks)]))
        for name, values in columns.items():
            (partial / f"{name}.{_TYPES[name]}").write_bytes(values.tobytes())
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        noted = json.dumps({"sizes": sizes, **about()}, indent=1, ensure_ascii=False)
        (partial / _ABOUT).write_text(noted, encoding="utf-8", errors="backslashreplace")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


_CODES = {"ends": "q", "rows": "i", "wholes": "Q", "prompts": "Q"}


def _first(marks: np.ndarray) -> int:
    return int(marks.argmax()) if marks.any() else len(marks)


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def root() -> Path:
    """Where sets are kept: LORAFIT_CACHE, else lorafit's folder in the user's cache."""
    given = os.environ.get("LORAFIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "lorafit"


def kept(label: str, key: Mapping[str, str], *, make: Callable[[Path], None]) -> tuple[Stored, str]:
    """The set of this key: the one that is kept, else made and kept; with a line that says which.

    Args:
        label: The data set's name; its versions lie together.
        key: Everything that made it, by name.
        make: Writes it into the folder it is given.

    Raises:
        DataError: the folder cannot be written.
    """
    home = root() / _digest({"label": label})
    folder = home / _digest(key)
    if _is_whole(folder):
        os.utime(folder / _ABOUT)  # what is used is not the oldest
        return Stored(folder), f"examples found again in {folder}"
    why = _changed(home, key)
    try:
        make(folder)
        (folder / "key.json").write_text(json.dumps(dict(key), indent=1), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{folder}: the examples cannot be kept there: {error.strerror}.",
            fix="Make room, or name another folder in the environment: LORAFIT_CACHE=/elsewhere.",
        ) from error
    for old in _newest_first(home)[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return Stored(folder), why


def _digest(key: Mapping[str, str]) -> str:
    return blake2b(json.dumps(sorted(key.items())).encode(), digest_size=12).hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _newest_first(home: Path) -> list[Path]:
    kept_ones = [file.parent for file in home.glob(f"*/{_ABOUT}")]
    return sorted(kept_ones, key=lambda folder: -(folder / _ABOUT).stat().st_mtime)


def _changed(home: Path, key: Mapping[str, str]) -> str:
    """What is different now from the newest version that is kept; empty where there is none."""
    for folder in _newest_first(home):
        try:
            before = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        names = [name for name in key if before.get(name) != key[name]]
        return f"examples made again: {', '.join(names) or 'the kept ones were damaged'} changed"
    return ""
