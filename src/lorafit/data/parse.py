"""The bytes of one file -> rows, each with the line on which it begins.

Owns the kinds of text files, packed or not, and the name of each way in which one can be broken;
`Faults` says what becomes of a broken row. Knows no folder, no Hub and no parquet (`read` does),
and nothing of what the fields of a row mean.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lorafit.errors import DataError, MissingPackageError, shown

LONGEST_LINE = (
    50_000_000  # bytes: no row, but text that lost its newlines; also csv's longest field
)
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
_PACKED = (".gz", ".zst")
_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 10  # a block of zstd, 4 bytes at the least, may unpack to 128 KiB
_FAULTS_NAMED = 5
_BOM = b"\xef\xbb\xbf"
_ICONV = "Convert the text: iconv -f {} -t UTF-8 '{}' > 'utf8-{}'"
_RENAME = "Say so in its name: mv '{0}' '{0}%s'"
_STRANGERS = (  # how they begin, in lower case; what they are; what to type
    ((b"version https://git-lfs",), "a Git LFS pointer, not the data", "Fetch it: git lfs pull"),
    ((b"\x1f\x8b",), "gzip data", _RENAME % ".gz"),
    ((b"\x28\xb5\x2f\xfd",), "zstd data", _RENAME % ".zst"),
    ((b"par1\x15",), "parquet data", _RENAME % ".parquet"),
    ((b"pk\3\4",), "a zip archive, as .xlsx files are", "Unpack it, or export it as csv."),
    ((b"bzh91ay", b"\xfd7zxz\0"), "bz2 or xz data", "Unpack it: bunzip2 or unxz"),
    ((b"<!doctype", b"<html"), "an HTML page, as failed downloads leave", "Download it again."),
    ((b"\xff\xfe\0\0",), "UTF-32, not UTF-8", _ICONV.replace("{}", "UTF-32", 1)),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16, not UTF-8", _ICONV.replace("{}", "UTF-16", 1)),
)
_BLANK = re.compile(r"\s*")
# whole pairs and other escapes first, so that group 1 is half a pair and nothing else
_ESCAPE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.")


@dataclass(frozen=True)
class Row:
    """The user's record: its fields, and where it stands ("train.jsonl:12")."""

    fields: Mapping[str, Any]
    source: str


@dataclass
class Faults:
    """What becomes of rows that cannot be used: the first is an error, or all are left out.

    As text, what was left out: "2 rows skipped: train.jsonl:12: ... train.jsonl:80: ...".

    Attributes:
        skip: Whether they are left out and counted.
        count: How many were.
        named: What was wrong with the first five.
    """

    skip: bool = False
    count: int = 0
    named: list[str] = field(default_factory=list[str])

    def found(self, error: DataError) -> None:
        """Raises `error`, or counts it where faults are skipped."""
        if not self.skip:
            raise error
        self.count += 1
        if len(self.named) < _FAULTS_NAMED:
            self.named.append(error.what)

    def add(self, other: "Faults") -> None:
        """Count what the other counted."""
        self.count += other.count
        self.named = [*self.named, *other.named][:_FAULTS_NAMED]

    def __str__(self) -> str:
        more = [f"And {self.count - _FAULTS_NAMED:,} more."] * (self.count > _FAULTS_NAMED)
        rows = "row" if self.count == 1 else "rows"
        return " ".join([f"{self.count:,} {rows} skipped:", *self.named, *more])


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, its packing left out; empty where none does."""
    name = _unpacked_name(path)
    kind = Path(name).suffix.lower().replace(".ndjson", ".jsonl")
    is_read = kind in SUFFIXES and (kind != ".parquet" or name == path.name)
    return kind if is_read else ""


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in _PACKED else path.name


def rows_of(path: Path, *, faults: Faults) -> Iterator[Row]:
    """The rows of a text file, read as they are asked for.

    Reads jsonl, csv and tsv with a header, and txt (a row `{"text": line}` for each line that is
    not blank) with no more than a line or a record in memory. json (an array of objects, or objects
    one after the other) is held whole; so is a jsonl file that turns out to be one array.
    A byte-order mark, CRLF, empty lines and a missing last newline are fine.

    Args:
        path: A file with one of `SUFFIXES`, parquet excepted; .gz or .zst may follow.
        faults: What becomes of a row that is broken without harm to those after it.

    Raises:
        DataError: what cannot be read, with file:line[:column].
        MissingPackageError: a zst file without the package `zstandard`.
    """
    kind = kind_of(path)
    if kind == ".json" or (kind == ".jsonl" and _begins_array(path)):
        yield from _json(path, faults=faults)
    elif kind in (".jsonl", ".txt"):
        yield from _lined(path, is_json=kind == ".jsonl", faults=faults)
    elif kind in (".csv", ".tsv"):
        usual = "," if kind == ".csv" else "\t"
        yield from _csv(path, delimiter=_delimiter(path, usual), faults=faults)
    else:
        raise DataError(
            f"{path}: what this file holds cannot be told from its name.",
            fix=f"Give it the suffix of its kind: {', '.join(SUFFIXES)}; packed text: .jsonl.gz",
        )


def rows_in(path: Path) -> int | None:
    """About how many rows a plain file of lines or records holds, by its newlines; else None."""
    kind = "" if path.name != _unpacked_name(path) else kind_of(path)
    if kind in ("", ".json") or (kind == ".jsonl" and _begins_array(path)):
        return None
    # between quotes a newline is part of a cell; no text holds a NUL
    rows, quoted, quote = 0, 0, b'"' if kind in (".csv", ".tsv") else b"\0"
    for chunk in _chunks(path):
        pieces = chunk.split(quote)
        rows += sum(piece.count(b"\n") for piece in pieces[quoted::2])
        quoted = (quoted + len(pieces) - 1) % 2
    return rows


# Bytes


def check_start(start: bytes, path: Path) -> None:
    """Nothing, if a file with these first bytes may be data.

    Raises:
        DataError: a pointer of Git LFS, a web page, or text in UTF-16 or UTF-32.
    """
    name = _unpacked_name(path)
    for begins, what, fix in _STRANGERS:
        is_named_so = fix == _RENAME % path.suffix.lower()
        if start.lstrip().lower().startswith(begins) and not is_named_so:
            raise DataError(f"{path}:1:1: this is {what}.", fix=fix.format(name, name))


def unreadable(path: Path, error: OSError) -> DataError:
    """The operating system's complaint about `path`, for people."""
    fix = f"See who may read it: ls -ld '{path}'"
    return DataError(f"{path}: this cannot be read: {error.strerror}.", fix=fix)


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked, about a megabyte at a time, without the byte-order mark."""
    line, bom = 1, _BOM
    try:
        for chunk in _unpacked(path):
            if bom:
                chunk, bom = chunk.removeprefix(bom), b""
                check_start(chunk, path)
            line += chunk.count(b"\n")
            yield chunk
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, not the unpacker's
            raise unreadable(path, error) from error
        raise DataError(
            f"{path}:{line}: about here this {path.suffix} file is cut off or damaged: {error}.",
            why="The rest cannot be unpacked, so that no row of it can be skipped either.",
            fix=f"Fetch it again; or drop {path.suffix} from its name, if it is not packed at all.",
        ) from error


def _unpacked(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        check_start(file.peek(_CHUNK), path)  # such a page may well be called train.jsonl.gz
        if path.suffix.lower() == ".zst":
            yield from _unpack_zstd(file, path)
        else:
            stream = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
            yield from iter(partial(stream.read, _CHUNK), b"")


def _unpack_zstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        import zstandard  # optional, and few files need it
    except ImportError as error:
        what = f"{path}: unpacking it needs the package zstandard, which is not installed."
        raise MissingPackageError(what, fix="Type: pip install zstandard") from error
    begin = zstandard.ZstdDecompressor().decompressobj
    frame, held = begin(), bytearray()
    try:
        for block in iter(partial(file.read, _ZSTD_CHUNK), b""):
            while block:  # a file may hold several frames
                frame = begin() if frame.eof else frame
                held += frame.decompress(block)
                block = frame.unused_data
            if len(held) >= _CHUNK:
                yield bytes(held)
                held.clear()
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    yield bytes(held)
    if file.tell() and not frame.eof:
        raise EOFError("the last frame is not complete")


# Lines


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line's number and bytes; of one that is too long, the beginning, for `_text`."""
    number, held, is_cut = 1, b"", False
    for chunk in chain(_chunks(path), (b"\n",)):
        # not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if not is_cut:
                yield number, line
            number, is_cut = number + 1, False
        if len(held) > LONGEST_LINE and not is_cut:
            yield number, held
            is_cut = True
        held = b"" if is_cut else held


def _text(data: bytes, path: Path, *, line: int = 0) -> str:
    """The text of the line with this number, or of a whole file."""
    if line and len(data) > LONGEST_LINE:
        raise DataError(
            f"{path}:{line}: this line is longer than {LONGEST_LINE:,} bytes.",
            why="No row is that long: its newlines are lost, or it is not text.",
            fix="Write each row on its own line. One array of rows may be a single line of a .json",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        place = _place(before, len(before), path=path, line=line)
        raise DataError(
            f"{place}: byte 0x{data[error.start]:02x} is not UTF-8 text.",
            why="The file has another encoding, or was cut off.",
            fix=_ICONV.format("WINDOWS-1252", *[_unpacked_name(path)] * 2)
            + "\nOr fetch it again, where its end is missing.",
        ) from error
    if (position := text.find("\0")) >= 0:
        raise DataError(
            f"{_place(text, position, path=path, line=line)}: this is a NUL byte, not text.",
            why="It comes from a crash or a full disk, UTF-16, or a file that is no text at all.",
            fix="Write the file again from its source.",
        )
    return text


def _place(text: str, position: int, *, path: Path, line: int) -> str:
    """file:line:column of a position in the text of a line, or of a whole file (0)."""
    column = position - text.rfind("\n", 0, position)
    return f"{path}:{(line or 1) + text.count(chr(10), 0, position)}:{column}"


def _lined(path: Path, *, is_json: bool, faults: Faults) -> Iterator[Row]:
    """A row of each line that is not blank."""
    for number, data in _lines(path):
        try:
            text = _text(data, path, line=number)
            if not text.strip():
                continue
            text = text.removesuffix("\r")
            fields = _json_line(text, path, line=number) if is_json else {"text": text}
        except DataError as error:
            faults.found(error)
        else:
            yield Row(fields, f"{shown(path.name)}:{number}")


# JSON


def as_fields(value: Any, place: str) -> dict[str, Any]:
    """The fields of a row that stands at `place`.

    Raises:
        DataError: `value` is no object.
    """
    if isinstance(value, Mapping):
        return dict(value)
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    names |= dict.fromkeys((int, float), "a number")
    kind = names.get(type(value), f"a {type(value).__name__}")
    raise DataError(
        f"{place}: a row must be an object, but this is {kind}.",
        why="Without names it cannot be told which part is the answer.",
        fix='Write each row as an object, as in {"prompt": "...", "completion": "..."}.',
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; one value would be lost")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)


def value_of(text: str, place: str) -> Any:
    """What `text`, a field or turn that stands at `place`, says as JSON.

    Raises:
        DataError: it is no JSON, says NaN, or a key twice in one object.
    """
    try:
        return _DECODER.decode(text)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DataError(
            f"{place}: {text!r:.60} is not JSON: {reason}.",
            why="Tools, their calls, and conversations in a text field are written as JSON.",
            fix="Correct it, or leave such rows out: --skip-bad-rows.",
        ) from error


def _begins_array(path: Path) -> bool:
    # of objects, or empty: "[1, 2]" would be a line of its own, and no row
    return bool(re.match(rb"\s*\[\s*[{\]]", next(_chunks(path), b"")))


def _json_line(text: str, path: Path, *, line: int) -> dict[str, Any]:
    value, end = _decode(text, _skip_blank(text, 0), path=path, line=line)
    if text[end:].strip():
        _bad_json(_place(text, end, path=path, line=line), "more follows the object")
    _check_pairs(text, (0, end), path=path, line=line)
    return as_fields(value, f"{path}:{line}")


def _json(path: Path, *, faults: Faults) -> Iterator[Row]:
    """Decodes value by value, so that each row knows its line and a bad one is named alone."""
    text = _text(b"".join(_chunks(path)), path)
    start = _skip_blank(text, 0)
    is_array = text.startswith("[", start)
    end = _skip_blank(text, start + is_array)
    line, counted = 1, 0
    while end < len(text) and not (is_array and text[end] == "]"):
        start, (value, end) = end, _decode(text, end, path=path)
        line, counted = line + text.count("\n", counted, start), start
        try:
            _check_pairs(text, (start, end), path=path)
            yield Row(as_fields(value, f"{path}:{line}"), f"{shown(path.name)}:{line}")
        except DataError as error:
            faults.found(error)
        end = _skip_blank(text, end)
        if is_array and text.startswith(",", end):
            end = _skip_blank(text, end + 1)
    if is_array and text[end:].rstrip() != "]":
        message = "the array is not closed" if end == len(text) else "more follows the array"
        _bad_json(f"{path}:{text.count(chr(10), 0, end) + 1}", message)


def _skip_blank(text: str, start: int) -> int:
    found = _BLANK.match(text, start)
    return found.end() if found else start


def _decode(text: str, start: int, *, path: Path, line: int = 0) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at").removesuffix(" starting")
        _bad_json(_place(text, error.pos, path=path, line=line), message)
    except (ValueError, RecursionError) as error:
        message = "nested too deep" if isinstance(error, RecursionError) else str(error)
        _bad_json(f"{path}:{(line or 1) + text.count(chr(10), 0, start)}", message)


def _check_pairs(text: str, span: tuple[int, int], *, path: Path, line: int = 0) -> None:
    """Nothing, if each surrogate escape in this part of `text` has its other half."""
    if text.find("\\ud", *span) < 0 and text.find("\\uD", *span) < 0:
        return
    if half := next((found for found in _ESCAPE.finditer(text, *span) if found[1]), None):
        place = _place(text, half.start(), path=path, line=line)
        raise DataError(
            f"{place}: {half[1]} is half a character: a lone surrogate.",
            why="No tokenizer can read it; text that was cut inside an emoji holds such halves.",
            fix="Write the row again from its source, or remove it.",
        )


def _bad_json(place: str, message: str) -> NoReturn:
    raise DataError(
        f"{place}: this is not valid JSON: {message}.",
        fix="Correct it. A jsonl file has one whole object per line; a json file, one array.",
    )


# csv


def _csv(path: Path, *, delimiter: str, faults: Faults) -> Iterator[Row]:
    records = _records(path, delimiter=delimiter)
    line, names, fault = next(records, (1, [], None))
    if fault:
        raise fault
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise DataError(
            f"{path}:{line}: the header has an empty or a repeated name: {', '.join(names)}.",
            why="Two columns under one name would hide each other.",
            fix="The first line names the columns, each once; pandas: to_csv(..., index=False).",
        )
    for line, cells, fault in records:
        if not fault and len(cells) != len(names):
            fault = DataError(
                f"{path}:{line}: {len(cells)} fields where the header names {len(names)}.",
                why=f"The columns are: {', '.join(names)}.",
                fix='Put fields that hold a comma or a newline in double quotes: "a, b".',
            )
        if fault:
            faults.found(fault)
        else:
            yield Row(dict(zip(names, cells, strict=True)), f"{shown(path.name)}:{line}")


def _delimiter(path: Path, usual: str) -> str:
    """What parts the columns: `usual`, or what the header has in its place; spreadsheets write a
    semicolon where the comma is the decimal mark."""
    header = next((data for _, data in _lines(path) if data.strip()), b"").decode(errors="replace")
    return next((mark for mark in (usual, *",;\t|") if mark in header), usual)


def _records(path: Path, *, delimiter: str) -> Iterator[tuple[int, list[str], DataError | None]]:
    """The records that are not blank: first line, cells, and what is wrong with their bytes."""
    broken: list[DataError] = []
    reader = csv.reader(_csv_lines(path, broken), strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        # everybody's, so changed for one record only; the default refuses fields above 128 KiB
        limit = csv.field_size_limit(LONGEST_LINE)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = str(error).replace("unexpected end of data", "a quote is never closed")
            message = message.replace("field larger", "a quote is not closed, or a field larger")
            raise DataError(
                f"{path}:{line}: this is not valid csv: {message.partition(' - ')[0]}.",
                why="Where the next record begins cannot be told.",
                fix='A quote inside quotes is doubled: "say ""hi""". A line ends in \\n or \\r\\n.',
            ) from error
        finally:
            csv.field_size_limit(limit)
        if len(cells) > 1 or (cells and not cells[0].isspace()):
            yield line, cells, next(iter(broken), None)
        broken.clear()


def _csv_lines(path: Path, broken: list[DataError]) -> Iterator[str]:
    """All lines, whatever they hold: one left out could take a quote with it."""
    for number, data in _lines(path):
        try:
            text = _text(data, path, line=number)
        except DataError as error:
            if len(data) > LONGEST_LINE:  # its end is lost, so that nothing after it is sure
                raise
            broken.append(error)
            text = data.decode("utf-8", errors="replace")
        yield text + "\n"
