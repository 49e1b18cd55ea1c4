"""Each way in which a data file can be broken: named with its place, or skipped and counted."""

import gzip
import sys
from pathlib import Path

import pytest
import zstandard

from lorafit.data import parse
from lorafit.data.parse import Faults
from lorafit.data.read import locate, read_rows
from lorafit.errors import DataError, MissingPackageError

LINES = b'{"t": "one"}\n{"t": "two"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12\n"
PAGE = b"\n <!DOCTYPE html>\n<html><title>Sign in</title></html>"


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def between(bad: bytes) -> bytes:
    """A file of three lines, of which the second is bad."""
    return b'{"t": "one"}\n' + bad + b'\n{"t": "three"}\n'


# The second of three lines of jsonl: what it holds, where the fault stands, what is said
LINES_OF_JSON = [
    (b'{"t": "\xff"}', "2:8", "byte 0xff is not UTF-8"),
    (b'{"t": "\xe2\x82', "2:8", "byte 0xe2 is not UTF-8"),
    (b'{"t": "\xc3\xa9\0"}', "2:9", "a NUL byte"),
    (b'{"t": "x', "2:7", "JSON: Unterminated string."),
    (b'{"t": }', "2:7", "Expecting value"),
    (b'{"t": "\t"}', "2:8", "Invalid control character"),
    (b"{} {}", "2:3", "more follows the object"),
    (b'{"t": NaN}', "2", "NaN is not a JSON value"),
    (b'{"t": -Infinity}', "2", "-Infinity is not a JSON value"),
    (b'{"t": 1, "t": 2}', "2", "the key 't' stands twice"),
    (b'{"t": [{"u": {"v": 1, "v": 1}}]}', "2", "the key 'v' stands twice"),
    (b'{"t": "\\ud83d"}', "2:8", r"\ud83d is half a character: a lone surrogate"),
    (b'{"\\\\ud83d": "\\uD83D\\uDE00\\uDE00"}', "2:26", r"\uDE00 is half a character"),
    (b"[1, 2]", "2", "but this is an array"),
    (b"null", "2", "but this is null"),
    (b"7.5", "2", "but this is a number"),
    (b"[" * 9_000, "2", "nested too deep"),
    (b'{"t": "%s"}' % (b"x" * 10_000), "2", "longer than 10,000 bytes"),
]

# One row of another kind: file, place, what is said, the lines of the rows that are left
ROWS = [
    ("a.ndjson.gz", gzip.compress(between(b"{"), mtime=0), "2:2", "property name", [1, 3]),
    ("a.jsonl.zst", zstandard.compress(between(b"{")), "2:2", "property name", [1, 3]),
    ("a.txt", b"one\n\xe9\nthree", "2:1", "byte 0xe9 is not UTF-8", [1, 3]),
    ("a.txt", b"one\n\0\0\nthree", "2:1", "a NUL byte", [1, 3]),
    ("a.csv", b"t,u\n1,2\n3\n4,5", "3", "1 fields where the header names 2", [2, 4]),
    ("a.tsv", b"t\tu\n1\t2\n3\t4\t5\n", "3", "3 fields where the header names 2", [2]),
    ("a.csv", b't,u\n1,2\n"a\n\xe9\n",3\n4,5', "4:1", "byte 0xe9 is not UTF-8", [2, 6]),
    ("a.csv", b"t,u\n1,2\n3,\0\n4,5", "3:3", "a NUL byte", [2, 4]),
    ("a.json", b'[{"t": 1},\n"b",\n{"t": 2}]', "2", "but this is a string", [1, 3]),
    ("a.json", b'[{"t": 1},\n{"t":\n "\\udc00"},\n{"t": 2}]', "3:3", r"\udc00 is half", [1, 4]),
]

# The rest of the file cannot be trusted: name, content, place, what is said
WHOLE = [
    ("a.jsonl", POINTER, "1:1", "Git LFS pointer"),
    ("a.jsonl.gz", POINTER, "1:1", "Git LFS pointer"),
    ("a.parquet", POINTER, "1:1", "Git LFS pointer"),
    ("a.jsonl", PAGE, "1:1", "an HTML page"),
    ("a.jsonl.zst", PAGE, "1:1", "an HTML page"),
    ("a.csv", b"\xef\xbb\xbf<html lang=en>", "1:1", "an HTML page"),
    ("a.jsonl", gzip.compress(LINES, mtime=0), "1:1", "gzip data"),
    ("a.csv", zstandard.compress(LINES), "1:1", "zstd data"),
    ("a.jsonl.gz", zstandard.compress(LINES), "1:1", "zstd data"),
    ("a.csv", b"PK\3\4\x14\0\6\0", "1:1", "a zip archive, as .xlsx files are"),
    ("a.txt", b"BZh91AY&SY", "1:1", "bz2 or xz data"),
    ("a.jsonl", b"PAR1\x15\4\x15", "1:1", "parquet data"),
    ("a.jsonl", '{"t": 1}'.encode("utf-16"), "1:1", "UTF-16, not UTF-8"),
    ("a.csv", b"\xfe\xff\0t\0,\0u", "1:1", "UTF-16, not UTF-8"),
    ("a.csv.gz", gzip.compress("t,u".encode("utf-16"), mtime=0), "1:1", "UTF-16, not UTF-8"),
    ("a.txt", "one".encode("utf-32"), "1:1", "UTF-32, not UTF-8"),
    ("a.json", b'[{"t": 1},\n{"t": "\xff"}]', "2:8", "0xff is not UTF-8"),
    ("a.json", b'[{"t": 1},\n{"t": "\0"}]', "2:8", "a NUL byte"),
    ("a.json", b'[{"t": 1},\n{"t": }]', "2:7", "Expecting value"),
    ("a.json", b'[{"t": 1},\n{"t": NaN}]', "2", "NaN is not a JSON value"),
    ("a.json", b'[{"t": 1},\n{"t": 1, "t": 2}]', "2", "'t' stands twice"),
    ("a.json", b'[{"t": 1},\n{"t": 2}\n', "3", "the array is not closed"),
    ("a.json", b'[{"t": 1}]\n{"t": 2}', "1", "more follows the array"),
    ("a.json", b"\n" + b'[{"t":' + b"[" * 9_000, "2", "nested too deep"),
    ("a.json", b'{"t": 1}\n{"t": ', "2:7", "Expecting value"),
    ("a.jsonl", b'[\n {"t": 1},\n {"t" 2}\n]', "3:7", "Expecting ':'"),
    ("a.csv", b't,u\n1,2\n3,"4\n5,6\n', "3", "a quote is never closed"),
    ("a.csv", b't,u\n1,2\n"3"4,5\n', "3", "',' expected after '\"'"),
    ("a.csv", b"t,u\r1,2\r3,4\r", "1", "new-line character seen in unquoted field"),
    (
        "a.csv",
        b't,u\n1,"%s\n"' % (b"x\n" * 6_000),
        "2",
        "a quote is not closed, or a field larger than",
    ),
    ("a.csv", b"t,u\n1,%s\n" % (b"x" * 10_000), "2", "longer than"),
    ("a.csv", b"t,u,\n1,2,3\n", "1", "an empty or a repeated name"),
    ("a.csv", b"t, \n1,2\n", "1", "an empty or a repeated name"),
    ("a.csv", b"\nt,t\n1,2\n", "2", "an empty or a repeated name: t, t"),
    ("a.csv", b"t,\xe9\n1,2\n", "1:3", "0xe9 is not UTF-8"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "1", "end-of-stream marker"),
    ("a.jsonl.gz", LINES, "1", "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0) + b"more", "1", "Not a gzipped file"),
    ("a.txt.gz", gzip.compress(LINES, mtime=0)[:10] + b"\xff" * 9, "1", "Error -3"),
    ("a.jsonl.zst", zstandard.compress(LINES)[:-1], "2", "the last frame is not complete"),
    ("a.jsonl.zst", LINES, "1", "Unknown frame descriptor"),
    ("a.jsonl.zst", zstandard.compress(LINES) + b"more", "1", "Unknown frame descriptor"),
]


@pytest.fixture(autouse=True)
def _short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "LONGEST_LINE", 10_000)


def fault(path: Path) -> DataError:
    with pytest.raises(DataError) as found:
        list(locate(path).rows(Faults()))
    return found.value


@pytest.mark.parametrize(
    ("name", "content", "place", "words", "left"),
    [("a.jsonl", between(bad), *told, [1, 3]) for bad, *told in LINES_OF_JSON] + ROWS,
)
def test_a_broken_row_is_named_or_skipped(
    tmp_path: Path, name: str, content: bytes, place: str, words: str, left: list[int]
) -> None:
    path = write(tmp_path, name, content)
    error = fault(path)
    assert error.what.startswith(f"{path}:{place}: ") and words in error.what
    assert error.fix
    faults = Faults(skip=True)
    rows = list(locate(path).rows(faults))
    assert [row.source for row in rows] == [f"{name}:{line}" for line in left]
    assert (faults.count, faults.named) == (1, [error.what])


@pytest.mark.parametrize(("name", "content", "place", "words"), WHOLE)
def test_a_broken_file_is_named_even_where_rows_are_skipped(
    tmp_path: Path, name: str, content: bytes, place: str, words: str
) -> None:
    path = write(tmp_path, name, content)
    error = fault(path)
    assert error.what.startswith(f"{path}:{place}: ") and words in error.what
    assert error.fix
    with pytest.raises(DataError) as again:
        list(locate(path).rows(Faults(skip=True)))
    assert again.value.what == error.what


def test_text_of_another_encoding_comes_with_the_line_that_converts_it(tmp_path: Path) -> None:
    path = write(tmp_path, "my rows.csv", "t".encode("utf-16"))
    assert "iconv -f UTF-16 -t UTF-8 'my rows.csv' > 'utf8-my rows.csv'" in fault(path).fix
    path = write(tmp_path, "a.txt.gz", gzip.compress(b"\x93", mtime=0))
    assert "iconv -f WINDOWS-1252 -t UTF-8 'a.txt' >" in fault(path).fix


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\r\n  \n\n"])
def test_a_blank_file_is_empty_not_broken(tmp_path: Path, kind: str, content: bytes) -> None:
    for name, data in (
        (f"a.{kind}", content),
        (f"a.{kind}.gz", gzip.compress(content, mtime=0) if content else content),
        (f"a.{kind}.zst", zstandard.compress(content) if content else content),
    ):
        assert not list(locate(write(tmp_path, name, data)).rows(Faults()))
        with pytest.raises(DataError, match="this data set is empty"):
            read_rows(tmp_path / name)


def test_a_missing_unpacker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingPackageError, match="pip install zstandard"):
        list(locate(write(tmp_path, "a.txt.zst", b"")).rows(Faults()))


def test_a_forbidden_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", LINES)

    def forbid(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)  # root may read whatever its mode
    assert fault(path).what == f"{path}: this cannot be read: Permission denied."
    with pytest.raises(DataError, match="Permission denied"):
        locate(path).fingerprint()
    monkeypatch.setattr(Path, "is_file", forbid)
    with pytest.raises(DataError, match="Permission denied"):
        locate(path)


def test_what_was_skipped_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b"1\n" * 7 + LINES)
    faults = Faults(skip=True)
    assert [row.fields["t"] for row in locate(path).rows(faults)] == ["one", "two"]
    told = str(faults)
    assert told.startswith(f"7 rows skipped: {path}:1: a row must be an object") and told.endswith(
        f"{path}:5: a row must be an object, but this is a number. And 2 more."
    )
    assert str(Faults(skip=True, count=1, named=["x"])) == "1 row skipped: x"
