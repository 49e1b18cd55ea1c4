"""Rows know their file and line; whatever cannot be read is named with file, line and column."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.data.read import read_rows
from lorafit.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[tuple[dict[str, object], str]]:
    return [(dict(row.fields), row.source) for row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "content", "sources"),
    [
        ("a.jsonl", '{"t": 1}\n\n  {"t": 2}', ["a.jsonl:1", "a.jsonl:3"]),
        ("a.jsonl", '\ufeff{"t": 1}\r\n{"t": 2}\r\n\r\n', ["a.jsonl:1", "a.jsonl:2"]),
        ("a.json", '\ufeff[{"t":\n1}, \r\n{"t": 2}]\n', ["a.json:1", "a.json:3"]),
        ("a.json", '\n{"t": 1}\n{"t": 2}\n', ["a.json:2", "a.json:3"]),
    ],
)
def test_json_rows_know_their_lines(
    tmp_path: Path, name: str, content: str, sources: list[str]
) -> None:
    assert read(write(tmp_path, name, content)) == [
        ({"t": number}, source) for number, source in enumerate(sources, start=1)
    ]


def test_line_separators_inside_json_strings_cut_nothing(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.jsonl", '{"t": "a\u2028b\x85c"}\n'))[0][0] == {
        "t": "a\u2028b\x85c"
    }


def test_csv_fields_may_hold_newlines_quotes_and_whole_documents(tmp_path: Path) -> None:
    long = "x" * 200_000
    content = f'\ufefftext,label\r\n"a, ""b""\r\nc",1\r\n\r\n{long},2'
    assert read(write(tmp_path, "a.csv", content)) == [
        ({"text": 'a, "b"\r\nc', "label": "1"}, "a.csv:2"),
        ({"text": long, "label": "2"}, "a.csv:5"),
    ]


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.txt", " one \r\n\n   \ntwo")) == [
        ({"text": " one "}, "a.txt:1"),
        ({"text": "two"}, "a.txt:4"),
    ]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        ({"text": "one"}, "a.parquet:row 1"),
        ({"text": "two"}, "a.parquet:row 2"),
    ]
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_rows(write(tmp_path, "b.parquet", "PAR"))


def test_a_folder_is_read_by_split_or_whole(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl"):
        write(tmp_path, name, '{"t": 1}')
    write(tmp_path, "categories.json", "[]")
    assert [row.source for row in read_rows(tmp_path)] == [
        "train-00000.jsonl:1",
        "train-00001.jsonl:1",
    ]
    assert [row.source for row in read_rows(tmp_path, split="test")] == ["test.jsonl:1"]
    with pytest.raises(DataError, match=r"no data file for the split 'dev'.\nIt holds: test.jsonl"):
        read_rows(tmp_path, split="dev")


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"t": 1}')
    write(tmp_path, "b.csv", "t\n1\n")
    with pytest.raises(DataError, match=r"several kinds: a.jsonl, b.csv"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "this data set is empty"),
        ("a.csv", "text,label\n", "this data set is empty"),
        ("a.csv", "", "this data set is empty"),
        ("a.json", " [] ", "this data set is empty"),
        ("a.jsonl", '{"t": 1}\n{"t": }\n', r"a.jsonl:2:7: this is not valid JSON"),
        ("a.jsonl", '{"t": 1}\n {"t": 1} {"t": 2}\n', r"a.jsonl:2:10: .* more follows"),
        ("a.jsonl", '{"t": 1}\n{"t": "cut o', r"a.jsonl:2:7: .*Unterminated string"),
        ("a.jsonl", "\n[1, 2]", r"a.jsonl:2: a row must be an object, but this is an array"),
        ("a.jsonl", "\n3", r"a.jsonl:2: a row must be an object, but this is a number"),
        ("a.jsonl", '{"t": 1}\n{"t": NaN}', r"a.jsonl:2: .* NaN is not a JSON value"),
        ("a.jsonl", '{"t": -Infinity}', r"a.jsonl:1: .* -Infinity is not a JSON value"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl:1: this is not valid JSON"),
        ("a.json", '[{"t": 1},\n {"t": 2]', r"a.json:2:9: this is not valid JSON"),
        ("a.json", '[{"t": 1},\n {"t": NaN}]', r"a.json:2: .* NaN"),
        ("a.json", '[{"t": 1},\n\n "b"]', r"a.json:3: a row must be an object, .* a string"),
        ("a.json", '[{"t": 1},\n {"t": 2}\n', r"a.json:3: .*the array is not closed"),
        ("a.json", '[{"t": 1}]\n[{"t": 2}]', r"a.json:1: .*more follows the array"),
        ("a.jsonl", b'{"t": 1}\n{"t": "\xff"}', r"a.jsonl:2:8: byte 0xff is not UTF-8"),
        ("a.jsonl", b'\xef\xbb\xbf{"t": "\xe4"}', r"a.jsonl:1:8: byte 0xe4 is not UTF-8"),
        ("a.txt", "é".encode()[:1], r"a.txt:1:1: byte 0xc3 is not UTF-8"),
        ("a.csv", 'a,b\n"1\n",2\n3\n', r"a.csv:4: 1 fields where the header names 2"),
        ("a.csv", "a,b\n1,2,3\n", r"a.csv:2: 3 fields where the header names 2"),
        ("a.csv", 'a,b\n1,2\n"1"x,2\n', r"a.csv:3: this is not valid csv"),
        ("a.csv", 'a,b\n1,"2\n', r"a.csv:2: this is not valid csv"),
        ("a.csv", "\na,a\n1,2\n", r"a.csv:2: the header has an empty or a repeated name: a, a"),
        ("a.xls", "x", r"a.xls: what this file holds cannot be told"),
        ("a", "x", r"a: what this file holds cannot be told"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, content))


def test_a_missing_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "train.jsonl", "{}")
    monkeypatch.chdir(tmp_path)
    for name in (
        "data/trian.jsonl",
        "./data/trian.jsonl",
        tmp_path / "data/trian.jsonl",
    ):
        with pytest.raises(DataError, match=r"does not exist\. Did you mean train\.jsonl\?"):
            read_rows(name)
    with pytest.raises(DataError, match="does not exist"):
        read_rows("data/trian")
    for name in ("nowhere/train.jsonl", "no/such/folder/train.jsonl"):
        with pytest.raises(DataError, match="Nor does its folder"):
            read_rows(name)
    with pytest.raises(DataError, match="does not exist"):
        read_rows("train.jsonl")


def test_a_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, **options: object) -> list[dict[str, str]]:
        asked.append((name, options["split"]))
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.source for row in read_rows("owner/na.me", split="test")] == ["owner/na.me:row 1"]
    assert read_rows("gsm8k")[0].fields == {"text": "one"}
    assert asked == [("owner/na.me", "test"), ("gsm8k", "train")]


def test_a_hub_name_that_cannot_be_had_is_an_error_for_people() -> None:
    with pytest.raises(DataError, match="neither a file here nor a data set that the Hub gives"):
        read_rows("lorafit-nobody/nothing")


def test_files_are_read_without_importing_datasets(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "t\n1\n")
    code = f"import sys; from lorafit.data import read; read.read_rows({str(file)!r}); " + (
        "print({'datasets', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
