"""Rows know their file and line; whatever cannot be read is named with file, line and column."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.data.read import HELD_OUT, Faults, Source, locate, read_rows
from lorafit.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sources(source: Source) -> list[str]:
    return [row.source for row in source.rows(Faults())]


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
    with pytest.raises(DataError, match=r"no data file for the split 'dev'.\nIt holds: categories"):
        read_rows(tmp_path, split="dev")


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"t": 1}')
    write(tmp_path, "b.csv", "t\n1\n")
    with pytest.raises(DataError, match=r"several kinds: a.jsonl, b.csv"):
        read_rows(tmp_path)


def test_packed_files_of_a_folder_count_as_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path, "train-1.jsonl.gz", gzip.compress(b'{"t": 1}', mtime=0))
    write(tmp_path, "train-2.ndjson", '{"t": 2}')
    write(tmp_path, ".train-3.jsonl", "what another system left behind")
    assert [source for _, source in read(tmp_path)] == ["train-1.jsonl.gz:1", "train-2.ndjson:1"]
    write(tmp_path, "train-1.jsonl", '{"t": 1}')
    with pytest.raises(
        DataError, match=r"a file packed and unpacked: train-1\.jsonl, train-1\.jsonl\.gz"
    ):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["dataset_infos.json", "data/train-1.jsonl", "data/test-1.jsonl"], "test", ["test-1"]),
        (["train/one.jsonl", "train/two.jsonl", "dev/one.jsonl"], "train", ["one", "two"]),
        (["text/a.jsonl", "empty/README.md"], "train", ["a"]),
        (["a.jsonl", "old/train.jsonl"], "train", ["a"]),
        (["my_train.jsonl", "my-val.jsonl"], "train", ["my_train"]),
        (["my_train.jsonl", "my-val.jsonl"], "validation", ["my-val"]),
        (["val.jsonl", "validation.jsonl"], "validation", ["validation"]),
        (["a.jsonl", "a_test.jsonl"], "train", "split 'train'.\nIt holds: a.jsonl, a_test.jsonl"),
        (["en/train.jsonl", "fr/train.jsonl"], "train", "several folders of data: en/train"),
        (["en/a.jsonl", "fr/a.jsonl"], "train", "several folders of data: en/a"),
        (["data/train-1.jsonl"], "dev", "split 'dev'.\nIt holds: data/train-1.jsonl"),
        (["one/two/train.jsonl"], "train", "no data file .*\nIt holds: one."),
    ],
)
def test_a_folder_may_lie_in_the_folder(
    tmp_path: Path, names: list[str], split: str, found: list[str] | str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, '{"t": 1}')
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            locate(tmp_path, split=split)
    else:
        assert sources(locate(tmp_path, split=split)) == [f"{name}.jsonl:1" for name in found]


def test_sources_start_afresh_and_know_their_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write(folder, "train.jsonl", '{"t": 1}\n{"t": 2}')
        write(folder, "test.jsonl", '{"t": 1}\n{"t": 2}')
    source = locate(first)
    assert source.label == str(first)
    assert sources(source) == sources(source) == ["train.jsonl:1", "train.jsonl:2"]
    assert len(source.fingerprint()) == 64
    assert source.fingerprint() == locate(second).fingerprint()
    assert source.fingerprint() != locate(second, split="test").fingerprint()
    write(second, "train.jsonl", '{"t": 1}\n{"t": 3}')
    assert source.fingerprint() != locate(second).fingerprint()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: this is neither a file nor a folder"):
        locate(tmp_path / "pipe")


# Standard input


@pytest.mark.parametrize("content", ['{"t": 1}\n{"t": 2}\n', '[{"t": 1},\n{"t": 2}]'])
def test_standard_input_is_kept(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    source = locate("-")
    assert source.label == "-"
    assert sources(source) == sources(source) == ["stdin.jsonl:1", "stdin.jsonl:2"]
    assert len(source.fingerprint()) == 64


def test_a_terminal_gives_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(DataError, match="standard input is a terminal"):
            locate("-")


def test_several_processes_have_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"2 processes were started.*\n.*a file"):
        locate("-")


def test_nothing_is_left_of_standard_input(tmp_path: Path) -> None:
    code = "from lorafit.data import read; from pathlib import Path; import os; " + (
        "read.read_rows('-'); print(len(list(Path(os.environ['TMPDIR']).iterdir())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='{"t": 1}',
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1" and not list(tmp_path.iterdir())


# Objects


def test_a_list_of_dicts_is_a_source() -> None:
    source = locate([{"t": 1}, "two", {"t": 3}])
    with pytest.raises(DataError, match=r"list:row 2: a row must be an object, .* a string"):
        sources(source)
    faults = Faults(skip=True)
    assert [row.source for row in source.rows(faults)] == ["list:row 1", "list:row 3"]
    assert faults.count == 1
    assert source.fingerprint() == locate(({"t": 1}, {"t": 3})).fingerprint()
    assert source.fingerprint() != locate([{"t": 1}, {"t": 4}]).fingerprint()


def test_long_arrays_of_a_list_are_told_apart() -> None:
    import numpy

    ones = numpy.ones(5_000)
    other = ones.copy()
    other[2_500] = 2
    assert locate([{"ids": ones}]).fingerprint() == locate([{"ids": ones.copy()}]).fingerprint()
    assert locate([{"ids": ones}]).fingerprint() != locate([{"ids": other}]).fingerprint()


def test_objects_of_datasets_are_sources() -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"t": [1]}, {"t": [2]}])
    for given in (data, data.to_iterable_dataset(), data.with_format("numpy")):
        source, name = locate(given), type(given).__name__
        assert source.label == name
        for _ in range(2):
            rows = list(source.rows(Faults()))
            assert [row.source for row in rows] == [f"{name}:row 1", f"{name}:row 2"]
            assert [row.fields for row in rows] == [{"t": [1]}, {"t": [2]}]
        assert source.fingerprint() == locate(given).fingerprint()
        fewer = data.select([1]) if isinstance(given, Dataset) else given.skip(1)
        assert source.fingerprint() != locate(fewer).fingerprint()
    both = DatasetDict(train=data, test=data.select([1]))
    assert [row.fields for row in locate(both, split="test").rows(Faults())] == [{"t": [2]}]
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        locate(both, split="dev")


@pytest.mark.parametrize("given", [None, 7, object(), b"train.jsonl"])
def test_what_is_no_data_is_named(given: object) -> None:
    with pytest.raises(DataError, match=f"this is no data set, but a {type(given).__name__}"):
        locate(given)


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"t": 1}, {"t": 2}])
    data.save_to_disk(tmp_path / "one")
    assert sources(locate(tmp_path / "one")) == [f"{tmp_path}/one:row {n}" for n in (1, 2)]
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert len(sources(locate(tmp_path / "two", split="test"))) == 1
    prints = {locate(tmp_path / "two", split=split).fingerprint() for split in ("train", "test")}
    assert len(prints) == 2
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        sources(locate(tmp_path / "two", split="dev"))
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.write_bytes(b"")
    with pytest.raises(DataError, match="saved by datasets, is damaged: "):
        sources(locate(tmp_path / "one"))


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

    def load(name: str, configuration: str | None, **options: object) -> object:
        asked.append((name, configuration, options.get("split")))
        return [{"text": "one"}] if "split" in options else {"test": [{"text": "two"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.source for row in read_rows("owner/na.me", split="test")] == ["owner/na.me:row 1"]
    assert read_rows("gsm8k")[0].fields == {"text": "one"}
    assert read_rows("gsm8k:main", split="train[:9%]")[0].fields == {"text": "one"}
    held = locate("gsm8k", split=HELD_OUT).rows(Faults())
    assert [row.fields for row in held] == [{"text": "two"}]
    assert asked == [
        ("owner/na.me", None, "test"),
        ("gsm8k", None, "train"),
        ("gsm8k", "main", "train[:9%]"),
        ("gsm8k", None, None),
    ]


def test_what_the_hub_gave_before_is_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"t": 1}, {"t": 2}])
    kept = tmp_path / "owner___name" / "main" / "0.0.0" / "1234"
    data.save_to_disk(tmp_path / "made")
    kept.mkdir(parents=True)
    (tmp_path / "made/data-00000-of-00001.arrow").rename(kept / "name-test.arrow")
    about = {
        "features": data.features.to_dict(),
        "dataset_name": "name",
        "config_name": "main",
        "splits": {"test": {"name": "test", "num_examples": 2, "dataset_name": "name"}},
    }
    (kept / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name in ("owner/name", "owner/name:main"):
        assert sources(locate(name, split=HELD_OUT)) == [f"{name}:row {n}" for n in (1, 2)]
        assert len(sources(locate(name, split="test"))) == 2
    with pytest.raises(DataError, match=r"owner/name:other: neither a file .* nor .*: ") as raised:
        sources(locate("owner/name:other"))
    assert "['main']" in raised.value.what


def test_hub_data_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, *_: object, **__: object) -> datasets.Dataset:
        asked.append(name)
        return datasets.Dataset.from_list([{"t": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = locate("owner/name")
    assert not asked
    assert sources(source) == sources(source) == ["owner/name:row 1"]
    assert source.fingerprint() == source.fingerprint()
    assert asked == ["owner/name"]


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


def test_rows_are_known_beforehand_where_that_is_cheap(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"t": 1}, {"t": 2}])
    rows.to_parquet(tmp_path / "a.parquet")
    write(tmp_path, "a.jsonl", '{"t": 1}\n{"t": 2}\n')
    write(tmp_path, "a.json", '[{"t": 1}]')
    given = [str(tmp_path / "a.parquet"), str(tmp_path / "a.jsonl"), rows, [{"t": 1}, {"t": 2}]]
    assert [locate(one).count() for one in given] == [2] * 4
    unknown = [str(tmp_path / "a.json"), rows.to_iterable_dataset()]
    assert [locate(one).count() for one in unknown] == [None] * 2


def test_a_hash_of_rows_sees_all_of_them() -> None:
    """Every number of an array, dates, bytes; the same in every process."""
    import datetime

    import numpy as np
    import torch

    from lorafit.data.read import Row, _hash_rows

    def told(value: object) -> str:
        return _hash_rows([Row({"x": value}, "x:1")])

    long = np.arange(5000)
    other = long.copy()
    other[2500] = 0
    ragged = np.array([long, other[:7]], dtype=object)
    values = (
        long, other, torch.tensor([1.5]), datetime.date(2026, 1, 1), datetime.date(2026, 1, 2),
        b"a", b"b", np.array(["a", "b"]), np.array(["a", "c"]), ragged, ragged[::-1],
        np.array(["2026-01-01"], dtype="datetime64[D]"), 1 + 2j,
    )  # fmt: skip
    assert len({told(value) for value in values}) == len(values)
    assert told(long) == told(long.copy())
