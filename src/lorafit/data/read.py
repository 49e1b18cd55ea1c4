"""Files, folders, Hub names and objects -> sources of rows; each row with where it came from.

Owns finding the data; the only door to `datasets`, which is imported when parquet, a folder that
it saved or a Hub name is read and never before. What a file holds is for `parse`; what the fields
of a row mean, for `shapes` and `formats`.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from lorafit import processes
from lorafit.data import parse
from lorafit.data.parse import Faults, Row
from lorafit.errors import DataError, nearest, shown

_SPLITS = (  # names that say the same
    ("train", "training"),
    ("test", "testing"),
    ("valid", "validation", "val", "dev", "eval"),
)
_WORDS = tuple(name for names in _SPLITS for name in names)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_NAME = re.compile(r"([\w-]+|\w[\w.-]*/\w[\w.-]*)(:[\w.-]+)?")
HELD_OUT = ("validation", "test", "train")
"""The splits of evaluation data, where none is named: the first that is there."""
Splits = str | tuple[str, ...]
_FIX = "Give a jsonl, json, csv, tsv, txt or parquet file, a folder of one kind, or a Hub name."


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        label: What it is called in messages: a path, a Hub name, the type of an object.
        rows: Starts afresh at each call and reads as it is asked; DataError where it cannot. None
            at all is no error here.
        fingerprint: Changes with the rows: the sha256 of the files' names and bytes, or of the
            rows (a stream is read through); the fingerprint that `datasets` gives its own.
        count: About how many rows there are; None where only reading them would tell.
    """

    label: str
    rows: Callable[[Faults], Iterator[Row]]
    fingerprint: Callable[[], str]
    count: Callable[[], int | None]


def read_rows(path: str | Path, *, split: str = "train") -> list[Row]:
    """All the rows of what `locate` finds, none of them broken.

    Raises:
        DataError: nothing there, no rows, or a row that cannot be read, with file:line[:column].
    """
    rows = list(locate(path, split=split).rows(Faults()))
    if not rows:
        raise DataError(f"{path}: this data set is empty.", fix="Give a file that holds rows.")
    return rows


def locate(given: Any, *, split: Splits = "train") -> Source:
    """The source of rows that `given` means.

    Args:
        given: A file of a kind that `parse` reads, or parquet; a folder of such files of one kind,
            in it or one level down; a folder saved by `datasets`; a Hub name ("word" or
            "owner/name", with ":configuration" where it has several); "-" for standard
            input (jsonl, or one JSON array), which is kept in a temporary file; a Dataset,
            IterableDataset or DatasetDict; a list of dicts.
        split: The Hub's split, which of a folder's files where these are named after splits
            (train.csv, data/test-00000-of-00002.parquet), or which of a DatasetDict; a single file
            is read whole. Of several the first that is there.

    Raises:
        DataError: nothing there, or several things of which one must be chosen.
    """
    label = type(given).__name__
    if isinstance(given, str | Path):
        return _named(str(given), split)
    if isinstance(given, Mapping):
        return locate(_chosen(given, split, label=label))
    if isinstance(given, list | tuple):
        rows = partial(_listed, given, label=label)
        return Source(label, rows, lambda: _hash_rows(rows(Faults(skip=True))), partial(len, given))
    if any(base.__module__.startswith("datasets.") for base in type(given).__mro__):
        # rows as plain values, whatever set_format() asked for
        return _loaded(label, partial(given.with_format, None), failed=f"{label}: cannot be read")
    what = f"{given!r:.60}: this is no data set, but a {label}."
    raise DataError(what, fix=f"{_FIX} In Python: a list of dicts, or an object of `datasets`.")


def given(rows: Sequence[Mapping[str, Any]], places: Sequence[str], *, label: str) -> Source:
    """Rows in memory as a source; `places` says where each stands."""
    made = [Row(fields, place) for fields, place in zip(rows, places, strict=True)]
    return Source(label, lambda _: iter(made), lambda: _hash_rows(made), partial(len, made))


# Names


def _named(name: str, split: Splits) -> Source:
    place = Path(name)
    try:
        if name == "-" or place.is_file():
            return _of_files(name, [_keep_stdin() if name == "-" else place])
        if place.is_dir() and not _is_saved(place):
            return _of_files(name, _files(place, split))
        if not place.exists() and not _is_hub_name(name):
            _missing(place)
    except OSError as error:
        raise parse.unreadable(place, error) from error
    if place.exists() and not place.is_dir():
        raise DataError(
            f"{name}: this is neither a file nor a folder.",
            why="Data is read more than once, and a pipe or a device gives it once.",
            fix="Copy it to a file, or send it to standard input and give - as the name.",
        )
    load = partial(_load, name, split)
    if place.is_dir():
        return _loaded(name, load, failed=f"{name}: this folder, saved by datasets, is damaged")
    return _loaded(
        name,
        load,
        failed=f"{name}: neither a file here nor a data set that the Hub gives",
        fix=f"Check the name, the split ({_either(split)}) and the network; or download the files "
        "and give their folder. One of several configurations: owner/name:configuration",
    )


def _keep_stdin() -> Path:
    if processes.count() > 1:
        what = f"-: {processes.count()} processes were started, and standard input is not each's."
        raise DataError(what, fix="Write it to a file, and name that.")
    if sys.stdin is None or sys.stdin.isatty():
        what = "-: standard input is a terminal, from which no data comes."
        raise DataError(what, fix="Send it data: zcat rows.jsonl.gz | lorafit train --data -")
    folder = Path(tempfile.mkdtemp(prefix="lorafit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = folder / "stdin.jsonl"  # `parse` sees for itself where it is an array
    with kept.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return kept


def _is_hub_name(name: str) -> bool:
    # "data/trian" beside a folder "data" is a slip of the pen, not somebody's repository
    parent = Path(name).parent
    return bool(_HUB_NAME.fullmatch(name)) and (
        parent == Path() or not (parse.kind_of(Path(name)) or parent.is_dir())
    )


def _missing(path: Path) -> NoReturn:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    folder = "" if path.parent.is_dir() else f" Nor does its folder {path.parent}."
    what = f"{path}: this file does not exist.{folder}{nearest(path.name, beside)}"
    raise DataError(what, fix=_FIX)


# Files


def _of_files(label: str, files: Sequence[Path]) -> Source:
    def rows(faults: Faults) -> Iterator[Row]:
        for file in files:
            is_parquet = parse.kind_of(file) == ".parquet"
            yield from _parquet(file) if is_parquet else parse.rows_of(file, faults=faults)

    return Source(label, rows, partial(_hash_files, files), partial(_count, files))


def _count(files: Sequence[Path]) -> int | None:
    count = _parquet_rows if parse.kind_of(files[0]) == ".parquet" else parse.rows_in
    counts = [count(file) for file in files]
    return None if None in counts else sum(rows or 0 for rows in counts)


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise parse.unreadable(file, error) from error
        digest.update(os.fsencode(file.name) + b"\0" + content)
    return digest.hexdigest()


def _files(folder: Path, split: Splits) -> list[Path]:
    """The data files in `folder`, or else one level down, that are the split's."""
    inside = sorted(folder.iterdir())
    files = _data_files(folder) or [f for sub in inside if sub.is_dir() for f in _data_files(sub)]
    inside = files or inside
    if named := [file for file in files if _split_of(file, folder)]:
        by_split = {word: [f for f in named if _split_of(f, folder) == word] for word in _WORDS}
        wanted = [word for one in _each(split) for word in (one, *_same(one))]
        files = next((by_split[word] for word in wanted if by_split.get(word)), [])
    names = ", ".join(str(file.relative_to(folder)) for file in files or inside)
    if not files:
        raise DataError(
            f"{folder}: this folder holds no data file for the split {_either(split)}.",
            why=f"It holds: {names or 'nothing'}.",
            fix=_FIX,
        )
    unpacked = {file.name.lower().removesuffix(".gz").removesuffix(".zst") for file in files}
    several = (
        ("data files of several kinds", len({parse.kind_of(file) for file in files}) > 1),
        ("several folders of data", len({file.parent for file in files}) > 1),
        ("a file packed and unpacked", len(unpacked) < len(files)),
    )
    for what in (what for what, is_so in several if is_so):
        raise DataError(
            f"{folder}: this folder holds {what}: {names}.",
            why="Which of them are the data set cannot be told.",
            fix="Give one of them, or a folder with files of one kind.",
        )
    return files


def _each(split: Splits) -> tuple[str, ...]:
    return (split,) if isinstance(split, str) else split


def _either(split: Splits) -> str:
    return " or ".join(map(repr, _each(split)))


def _same(split: str) -> tuple[str, ...]:
    return next((names for names in _SPLITS if split in names), ())


def _data_files(folder: Path) -> list[Path]:
    kept = [f for f in folder.iterdir() if parse.kind_of(f) and not f.name.startswith(".")]
    return sorted(file for file in kept if file.name not in _ABOUT and file.is_file())


def _split_of(file: Path, folder: Path) -> str:
    """The split after which a file, or else the folder that it is in, is named; "" if none."""
    names = [file.name] if file.parent == folder else [file.name, file.parent.name]
    words = [word for name in names for word in re.split(r"[-_. ]", name.lower())]
    return next((word for word in words if word in _WORDS), "")


# Objects


def _listed(given: Iterable[Any], faults: Faults, *, label: str) -> Iterator[Row]:
    for number, value in enumerate(given, start=1):
        try:
            row = Row(parse.as_fields(value, f"{label}:row {number}"), f"{label}:row {number}")
        except DataError as error:
            faults.found(error)
        else:
            yield row


def _hash_rows(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, default=_plainly).encode() + b"\n")
    return digest.hexdigest()


def _plainly(value: Any) -> Any:
    """What JSON has no word for, in words of its own: all of an array, which repr() shortens."""
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind in "biuf":
        return array.tolist()
    return list(value) if array.ndim else repr(value)


def _chosen(given: Mapping[Any, Any], split: Splits, *, label: str) -> Any:
    return given[_there(list(given), split, label=label)]


def _there(names: Sequence[Any], split: Splits, *, label: str) -> str:
    found = [one for one in _each(split) if one in names]
    if not found:
        there = ", ".join(map(str, names))
        what = f"{label}: there is no split {_either(split)}; there are: {there}."
        raise DataError(what, fix="Give one of these: --split, or --eval-split to evaluate.")
    return found[0]


# The door to `datasets`: half a second to import, and most files never need it


def _loaded(label: str, load: Callable[[], Any], *, failed: str, fix: str = "") -> Source:
    """A source of what `load` gives, which is called once, when first needed."""
    load = cache(load)

    def rows(_: Faults) -> Iterator[Row]:
        try:
            for number, row in enumerate(load(), start=1):
                yield Row(dict(row), f"{shown(label)}:row {number}")
        except DataError:
            raise
        except Exception as error:  # no common root: network, gone, no such split, ...
            # a second line names the configurations that there are
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise DataError(f"{failed}: {reason}", fix=fix) from error

    def fingerprint() -> str:
        from datasets import IterableDataset

        next(rows(Faults()), None)  # loads it, or says why that cannot be
        if isinstance(data := load(), IterableDataset):  # has none
            return _hash_rows(rows(Faults()))
        return data._fingerprint

    def count() -> int | None:
        return len(data) if isinstance(data := load(), Sized) else None

    return Source(label, rows, fingerprint, count)


def _is_saved(folder: Path) -> bool:
    saved = ("dataset_info.json", "state.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / f).is_file() for f in saved)


def _load(name: str, split: Splits) -> Any:
    from datasets import load_dataset, load_from_disk

    if not Path(name).is_dir():
        hub_name, _, configuration = name.partition(":")
        if isinstance(split, str):  # datasets' own words for it too, such as train[:10%]
            return load_dataset(hub_name, configuration or None, split=split)
        return _chosen(load_dataset(hub_name, configuration or None), split, label=name)
    data = load_from_disk(name)
    return _chosen(data, split, label=name) if isinstance(data, Mapping) else data


def _parquet(path: Path) -> Iterator[Row]:
    def load() -> Any:
        from datasets import load_dataset

        with path.open("rb") as file:
            parse.check_start(file.read(512), path)
        # streamed: otherwise `datasets` would first copy the file into its cache
        return load_dataset("parquet", data_files=str(path), split="train", streaming=True)

    failed = f"{path}: this is not a readable parquet file"
    return _loaded(path.name, load, failed=failed).rows(Faults())


def _parquet_rows(path: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows
