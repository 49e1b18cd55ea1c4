"""Files and Hub names -> rows, each with the file and line it came from.

Owns reading and its complaints; the only door to `datasets`, which is imported when a parquet file
or a Hub name is read and never before. Knows nothing of what the fields of a row mean.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from lorafit.errors import DataError, nearest

_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
_SPLITS = ("train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval")
_HUB_NAME = re.compile(r"[\w-]+|\w[\w.-]*/\w[\w.-]*")
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class Row:
    """The user's record: its fields, and where it stands ("train.jsonl:12")."""

    fields: Mapping[str, Any]
    source: str


def read_rows(path: str | Path, *, split: str = "train") -> list[Row]:
    """The rows of a file, of a folder of files of one kind, or of a data set on the Hub.

    Reads jsonl, json (an array of objects, or objects one after the other), csv with a header, txt
    (a row `{"text": line}` for each line that is not empty) and parquet. A byte-order mark, CRLF,
    empty lines and a missing last newline are fine. In a folder whose files are named after
    splits (train.csv, test-00000-of-00002.parquet), those of `split` are read.

    Args:
        path: A file, a folder, or a Hub name ("word" or "owner/name").
        split: The Hub's split, or which of a folder's files; a single file is read whole.

    Raises:
        DataError: nothing there, no rows, or a line that cannot be read, with file:line[:column].
    """
    place = Path(path)
    if place.is_dir():
        rows = [row for file in _files(place, split) for row in _read_file(file)]
    elif place.is_file():
        rows = list(_read_file(place))
    elif _is_hub_name(str(path)):
        rows = _read_datasets(str(path), str(path), split=split)
    else:
        _missing(place)
    if not rows:
        raise DataError(f"{path}: this data set is empty.", fix="Give a file that holds rows.")
    return rows


def _is_hub_name(name: str) -> bool:
    # "data/trian" beside a folder "data" is a slip of the pen, not somebody's repository
    parent = Path(name).parent
    return bool(_HUB_NAME.fullmatch(name)) and (
        parent == Path() or not (Path(name).suffix in _SUFFIXES or parent.is_dir())
    )


def _missing(path: Path) -> NoReturn:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    folder = "" if path.parent.is_dir() else f" Nor does its folder {path.parent}."
    raise DataError(
        f"{path}: this file does not exist.{folder}{nearest(path.name, beside)}",
        fix="Give a jsonl, json, csv, txt or parquet file, a folder of one kind, or a Hub name.",
    )


def _files(folder: Path, split: str) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in _SUFFIXES)
    by_split = {file: re.split(r"[-_.]", file.stem.lower())[0] for file in files}
    if named := [file for file in files if by_split[file] in _SPLITS]:
        files = [file for file in named if by_split[file] == split]
    names = ", ".join(file.name for file in files or named or sorted(folder.iterdir()))
    if not files:
        raise DataError(
            f"{folder}: this folder holds no data file for the split {split!r}.",
            why=f"It holds: {names or 'nothing'}.",
            fix="Give the file itself, or a folder of jsonl, json, csv, txt or parquet files.",
        )
    if len({file.suffix.lower() for file in files}) > 1:
        raise DataError(
            f"{folder}: this folder holds data files of several kinds: {names}.",
            why="Which of them are the data set cannot be told.",
            fix="Give one of the files, or a folder with files of one kind.",
        )
    return files


def _read_file(path: Path) -> Iterable[Row]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_datasets("parquet", path.name, split="train", file=path)
    if kind not in _SUFFIXES:
        raise DataError(
            f"{path}: what this file holds cannot be told from its name.",
            fix=f"Give it the suffix of its kind: {', '.join(_SUFFIXES)}.",
        )
    text = _text(path)
    if kind == ".csv":
        return _read_csv(text, path)
    if kind == ".json":
        return _read_json(text, path)
    return _read_lines(text, path, is_json=kind == ".jsonl")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8 text.",
            why="The file has another encoding, or was cut off.",
            fix=f"Convert it: iconv -f ISO-8859-1 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _read_lines(text: str, path: Path, *, is_json: bool) -> Iterator[Row]:
    # not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), start=1):
        source = f"{path.name}:{number}"
        if not line.strip():
            continue
        if not is_json:
            yield Row({"text": line.removesuffix("\r")}, source)
            continue
        value, end = _decode(line, len(line) - len(line.lstrip()), path=path, line=number)
        if line[end:].strip():
            _bad_json(f"{path}:{number}:{end + 1}", "more follows the object")
        yield Row(_fields(value, f"{path}:{number}"), source)


def _read_json(text: str, path: Path) -> Iterator[Row]:
    """Decodes value by value, so that each row knows its line and a bad one is named alone."""
    start = _skip_blank(text, 0)
    is_array = text.startswith("[", start)
    end = _skip_blank(text, start + is_array)
    line, counted = 1, 0
    while end < len(text) and not (is_array and text[end] == "]"):
        line, counted = line + text.count("\n", counted, end), end
        value, end = _decode(text, end, path=path)
        yield Row(_fields(value, f"{path}:{line}"), f"{path.name}:{line}")
        end = _skip_blank(text, end)
        if is_array and text.startswith(",", end):
            end = _skip_blank(text, end + 1)
    if is_array and text[end:].rstrip() != "]":
        line = text.count("\n", 0, end) + 1
        cut_off = end == len(text)
        message = "the array is not closed" if cut_off else "more follows the array"
        _bad_json(f"{path}:{line}", message)


def _skip_blank(text: str, start: int) -> int:
    found = _BLANK.match(text, start)
    return found.end() if found else start


def _decode(text: str, start: int, *, path: Path, line: int = 1) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends; `line` is that of `text[0]`."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        _bad_json(f"{path}:{line + error.lineno - 1}:{error.colno}", error.msg)
    except (ValueError, RecursionError) as error:
        _bad_json(f"{path}:{line + text.count(chr(10), 0, start)}", str(error))


def _bad_json(place: str, message: str) -> NoReturn:
    raise DataError(
        f"{place}: this is not valid JSON: {message}.",
        fix="Correct it. A jsonl file has one whole object per line; a json file, one array.",
    )


def _fields(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    raise DataError(
        f"{place}: a row must be an object, but this is {names.get(type(value), 'a number')}.",
        why="Without names it cannot be told which part is the answer.",
        fix='Write each row as an object, as in {"prompt": "...", "completion": "..."}.',
    )


def _read_csv(text: str, path: Path) -> Iterator[Row]:
    (line, names), *records = _csv_records(text, path) or [(1, [])]
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}:{line}: the header has an empty or a repeated name: {', '.join(names)}.",
            why="Two columns under one name would hide each other.",
            fix="The first line of a csv file names its columns, each once.",
        )
    for line, cells in records:
        if len(cells) != len(names):
            raise DataError(
                f"{path}:{line}: {len(cells)} fields where the header names {len(names)}.",
                why=f"The columns are: {', '.join(names)}.",
                fix='Put fields that hold a comma or a newline in double quotes: "a, b".',
            )
        yield Row(dict(zip(names, cells, strict=True)), f"{path.name}:{line}")


def _csv_records(text: str, path: Path) -> list[tuple[int, list[str]]]:
    """The records that are not blank, each with the line on which it begins."""
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    records, line = [], 1
    try:
        reader = csv.reader(StringIO(text, newline=""), strict=True)
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: this is not valid csv: {error}.",
            fix='A double quote inside a quoted field is written twice: "say ""hi""".',
        ) from error
    finally:
        csv.field_size_limit(limit)
    return records


def _read_datasets(name: str, source: str, *, split: str, file: Path | None = None) -> list[Row]:
    from datasets import load_dataset  # half a second to import, and jsonl, json, csv never need it

    try:
        # a local file is streamed: otherwise `datasets` would first copy it into its cache
        data = load_dataset(
            name, data_files=file and str(file), split=split, streaming=file is not None
        )
        return [Row(dict(row), f"{source}:row {n}") for n, row in enumerate(data, start=1)]
    except Exception as error:  # its errors have no common root: network, gone, no such split, ...
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if file:
            raise DataError(f"{file}: this is not a readable parquet file: {reason}") from error
        raise DataError(
            f"{name}: neither a file here nor a data set that the Hub gives: {reason}",
            fix=f"Check the name, the split ({split!r}) and the network; or download the files and "
            "give their folder.",
        ) from error
