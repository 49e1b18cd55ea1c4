"""Rows come one by one, from text packed or not, with the lines they stand on and no more memory
than a line takes. What cannot be read is in tests/faults/test_bad_data.py."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data import parse
from lorafit.data.parse import Faults, kind_of, rows_in, rows_of
from lorafit.errors import DataError

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACK.get(path.suffix, bytes)(data))
    return path


def read(path: Path) -> list[tuple[dict[str, object], str]]:
    return [(dict(row.fields), row.source) for row in rows_of(path, faults=Faults())]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b.NDJSON", ".jsonl"),
        ("a.csv.gz", ".csv"),
        ("a.Tsv.ZST", ".tsv"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", ""),
        ("a.gz", ""),
        ("jsonl", ""),
        (".jsonl", ""),
        ("a.jsonl.bak", ""),
    ],
)
def test_a_name_says_the_kind(name: str, kind: str) -> None:
    assert kind_of(Path("data.csv") / name) == kind


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_each_kind_may_be_packed(tmp_path: Path, packing: str) -> None:
    for name, content, lines in [
        ("a.jsonl", '{"t": "1"}\n{"t": "2"}', [1, 2]),
        ("a.ndjson", '{"t": "1"}\r\n\r\n{"t": "2"}\r\n', [1, 3]),
        ("a.json", '\ufeff[\n{"t": "1"},\n{"t": "2"}]', [2, 3]),
        ("a.csv", "\ufefft\n1\n2", [2, 3]),
        ("a.tsv", "t\r\n1\r\n2\r\n", [2, 3]),
    ]:
        path = write(tmp_path, name + packing, content)
        assert read(path) == [({"t": str(n)}, f"{path.name}:{ln}") for n, ln in enumerate(lines, 1)]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_may_lie_end_to_end(tmp_path: Path, packing: str) -> None:
    half = PACK[packing](b'{"t": 1}\n')
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(half + half)
    assert [source for _, source in read(path)] == [f"{path.name}:1", f"{path.name}:2"]


def test_much_text_is_unpacked_in_pieces(tmp_path: Path) -> None:
    lines = [f"{'café ' * 20}{n}" for n in range(40_000)]
    for packing in PACK:
        path = write(tmp_path, f"a.txt{packing}", "\n".join(lines))
        assert [row.fields["text"] for row in rows_of(path, faults=Faults())] == lines


def test_json_under_the_other_name_is_read_where_that_is_sure(tmp_path: Path) -> None:
    array = '\n [\n {"t": 1},\n {"t": 2}]'
    assert read(write(tmp_path, "a.jsonl", array)) == [
        ({"t": 1}, "a.jsonl:3"),
        ({"t": 2}, "a.jsonl:4"),
    ]
    assert read(write(tmp_path, "b.jsonl", " [ ] ")) == []
    lines = '{"t": 1}\n\n{"t":\n 2}'
    assert [source for _, source in read(write(tmp_path, "a.json", lines))] == [
        "a.json:1",
        "a.json:3",
    ]


def test_pairs_of_surrogates_are_one_character(tmp_path: Path) -> None:
    content = r'{"t": "\ud83d\ude00 \uD83D\uDE00 \\ud83d \u00e9"}'
    assert read(write(tmp_path, "a.jsonl", content))[0][0] == {"t": "😀 😀 \\ud83d é"}


def test_csv_records_know_the_line_on_which_they_begin(tmp_path: Path) -> None:
    content = 't,u\n\n"a\n\n""b""",1\r\n   \n"",2\n"\u2028",3'
    assert read(write(tmp_path, "a.csv.gz", content)) == [
        ({"t": 'a\n\n"b"', "u": "1"}, "a.csv.gz:3"),
        ({"t": "", "u": "2"}, "a.csv.gz:7"),
        ({"t": "\u2028", "u": "3"}, "a.csv.gz:8"),
    ]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_whose_columns_have_another_mark_between(tmp_path: Path, mark: str) -> None:
    content = f'\ufeff\na{mark}b\n1,5{mark}"{mark}"\n'
    assert read(write(tmp_path, "a.csv", content)) == [({"a": "1,5", "b": mark}, "a.csv:3")]
    assert read(write(tmp_path, "b.csv", "a;b,c\n1,2\n"))[0][0] == {"a;b": "1", "c": "2"}


def test_the_csv_limit_of_others_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f't\n{"x" * 200_000}\n2\n"3')
    before = csv.field_size_limit()
    rows = rows_of(path, faults=Faults())
    assert len(next(rows).fields["t"]) == 200_000
    assert csv.field_size_limit() == before
    next(rows)
    with pytest.raises(DataError, match="never closed"):
        next(rows)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz", "a.csv.zst"])
def test_rows_come_before_the_rest_is_read(tmp_path: Path, name: str) -> None:
    first = {"j": '{"t": "1"}\n', "c": "t\n1\n", "t": "1\n"}[name[2]]
    rows = rows_of(write(tmp_path, name, first.encode() + b"\xff\n"), faults=Faults())
    assert list(next(rows).fields.values()) == ["1"]
    with pytest.raises(DataError, match="not UTF-8"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"t": "' + "x" * 100_000, "longer than 1,000 bytes"),
        ("a.txt.gz", "x" * 100_000, "longer than 1,000 bytes"),
        ("a.csv", "t\n" + "x" * 100_000, "longer than 1,000 bytes"),
        ("a.csv", 't\n"' + "x\n" * 50_000, "field larger than field limit"),
    ],
)
def test_what_has_no_end_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    monkeypatch.setattr(parse, "LONGEST_LINE", 1_000)
    monkeypatch.setattr(parse, "_CHUNK", 64)
    unpack, held = parse._unpacked, []

    def counted(path: Path) -> Iterator[bytes]:
        for chunk in unpack(path):
            held.append(len(chunk))
            yield chunk

    monkeypatch.setattr(parse, "_unpacked", counted)
    with pytest.raises(DataError, match=message):
        list(rows_of(write(tmp_path, name, content), faults=Faults()))
    # a csv field is counted in characters, without the newline that is yet to come
    assert max(held) == 64 and sum(held) <= 1_000 + 4 * 64


def test_a_line_that_is_skipped_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "LONGEST_LINE", 1_000)
    monkeypatch.setattr(parse, "_CHUNK", 64)
    path = write(tmp_path, "a.txt", "one\n" + "x" * 5_000 + "\nthree\n" + "y" * 1_001)
    lines = list(parse._lines(path))
    assert [number for number, _ in lines] == [1, 2, 3, 4]
    assert max(len(line) for _, line in lines) <= 1_000 + 64
    faults = Faults(skip=True)
    assert [row.source for row in rows_of(path, faults=faults)] == ["a.txt:1", "a.txt:3"]
    assert faults.count == 2


fields = st.dictionaries(st.text(), st.text() | st.lists(st.text(), max_size=2), max_size=3)


@given(
    rows=st.lists(fields, max_size=6),
    blanks=st.lists(st.sampled_from(["", " ", "\t"]), min_size=6, max_size=6),
    newline=st.sampled_from(["\n", "\r\n"]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    packing=st.sampled_from(sorted(PACK)),
    ends=st.booleans(),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, object]],
    blanks: list[str],
    newline: str,
    ascii_only: bool,
    bom: bool,
    packing: str,
    ends: bool,
) -> None:
    lines, numbers = [], []
    for row, blank in zip(rows, blanks, strict=False):
        lines += [blank] if blank else []
        lines.append(blank + json.dumps(row, ensure_ascii=ascii_only))
        numbers.append(len(lines))
    text = "\ufeff" * bom + newline.join(lines) + newline * ends
    path = write(tmp_path_factory.mktemp("rows"), f"a.jsonl{packing}", text)
    assert read(path) == [(row, f"{path.name}:{n}") for row, n in zip(rows, numbers, strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.jsonl", '{"a": "\\n\\"b"}\n{"a": "\\""}\n', 2),
        ("a.csv", 'a,b\n"1\n2 ""three""\n",4\n5,6\n', 3),
        ("a.txt", 'one "\ntwo\n', 2),
        ("a.jsonl", '[{"a": 1}]\n', None),
        ("a.json", '[{"a": 1}]\n', None),
        ("a.jsonl.gz", '{"a": 1}\n', None),
    ],
)
def test_rows_are_counted_by_their_newlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, count: int | None
) -> None:
    monkeypatch.setattr(parse, "_CHUNK", 5)  # quotes stay open from one chunk to the next
    assert rows_in(write(tmp_path, name, content)) == count
