"""Files spoilt on purpose: one change of a real one, told by a few draws so that it can be shrunk.

JSON is changed by a value, a key or its text, safetensors by their header or their numbers, any
file by bytes.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies

from lorafit.run import store

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**62, 10**40, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "tensor:x", "tensor:", "integer keys", "\0", "../../x", "/dev/zero",
    "\ud800", "\x1b[2J", "x" * 100_000, [], {}, [1], [[]], {"a": 1}, {"integer keys": {"x": 1}},
    {"integer keys": 3}, [None], [1e308, -1], ["tensor:x"], [0] * 700, [2**40] * 700,
]  # fmt: skip
KEYS = ["x", "", "0", "__class__", "step", "optimizer", "get_lr", "integer keys", "\ud800", "../x"]
DTYPES = ["F64", "F16", "BF16", "F32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "x"]

Change = tuple[str, int, Any]
"""What is done, where, and with what."""


def changes_of_json() -> strategies.SearchStrategy[Change]:
    """One change of a JSON file."""
    where = strategies.integers(0, 9_999)
    return strategies.one_of(
        strategies.tuples(strategies.just("value"), where, strategies.sampled_from(VALUES)),
        strategies.tuples(strategies.just("cut"), where, strategies.none()),
        strategies.tuples(strategies.just("key"), where, strategies.sampled_from(KEYS)),
        strategies.tuples(strategies.just("more"), where, strategies.sampled_from(VALUES)),
        strategies.tuples(strategies.just("twice"), where, strategies.none()),
        strategies.tuples(strategies.just("deep"), where, strategies.sampled_from([50, 900, 9**5])),
        changes_of_bytes(),
    )


def changes_of_bytes() -> strategies.SearchStrategy[Change]:
    """One change of any file."""
    return strategies.tuples(
        strategies.sampled_from(["flip", "short", "insert", "fill"]),
        strategies.integers(0, 10**6),
        strategies.integers(0, 255),
    )


def changes_of_tensors() -> strategies.SearchStrategy[Change]:
    """One change of a safetensors file."""
    where = strategies.integers(0, 9_999)
    return strategies.one_of(
        changes_of_json().map(lambda change: ("header", 0, change)),
        strategies.tuples(strategies.just("dtype"), where, strategies.sampled_from(DTYPES)),
        strategies.tuples(strategies.just("shape"), where, strategies.integers(0, 5)),
        strategies.tuples(
            strategies.just("numbers"), where, strategies.sampled_from([0, 127, 255])
        ),
        strategies.tuples(strategies.just("rename"), where, strategies.sampled_from(KEYS)),
        changes_of_bytes(),
    )


def spoilt(data: bytes, change: Change) -> bytes:
    """`data`, changed."""
    kind, where, value = change
    match kind:
        case "flip" | "short" | "insert" | "fill":
            return _bytes(data, kind, where % (len(data) or 1), value)
        case "header":
            return _with_header(data, spoilt(_header(data), value))
        case "dtype" | "shape" | "numbers" | "rename":
            return _tensor(data, change)
        case "deep":
            made = json.loads(data)
            _at(made, where, lambda: "HERE")
            deep = "[" * value + "]" * value
            return json.dumps(made).replace('"HERE"', deep, 1).encode()
        case "twice":
            text = json.dumps(json.loads(data))
            places = [n for n in range(len(text)) if text.startswith('": ', n)]
            at = places[where % len(places)] if places else 0
            begin = text.rfind('"', 0, at)
            key = text[begin : at + 3]
            return (text[:begin] + key + "1, " + text[begin:]).encode()
        case _:
            return _json(data, change)


def _bytes(data: bytes, kind: str, at: int, value: int) -> bytes:
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ (value or 1)]) + data[at + 1 :] if data else b"x"
        case "short":
            return data[:at]
        case "insert":
            return data[:at] + bytes([value]) + data[at:]
        case _:
            return data[:at] + bytes([value]) * min(64, len(data) - at) + data[at + 64 :]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index)."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, item in list(items):
        yield tree, key
        # of a long list of numbers a few will do
        if isinstance(item, dict | list) and not (isinstance(key, int) and key > 20):
            yield from _places(item)


def _at(tree: Any, where: int, make: Any) -> None:
    places = [(c, k) for c, k in _places(tree) if not (isinstance(k, int) and k > 20)]
    if places:
        container, key = places[where % len(places)]
        container[key] = make()


def _json(data: bytes, change: Change) -> bytes:
    kind, where, value = change
    tree = json.loads(data)
    if where % 50 == 49 and kind == "value":
        return json.dumps(value).encode()
    places = [(c, k) for c, k in _places(tree) if not (isinstance(k, int) and k > 20)]
    container, key = places[where % len(places)] if places else ([None], 0)
    match kind:
        case "value":
            container[key] = value
        case "cut":
            del container[key]
        case "key" if isinstance(container, dict):
            container[value] = container.pop(key)
        case _:
            if isinstance(container, dict):
                container[KEYS[where % len(KEYS)]] = value
            else:
                container.insert(key, value)
    return json.dumps(tree).encode()


def _header(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _with_header(data: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data[8 + len(_header(data)) :]


def _tensor(data: bytes, change: Change) -> bytes:
    kind, where, value = change
    header = json.loads(_header(data))
    names = [name for name in header if name != "__metadata__"]
    name = names[where % len(names)]
    entry = header[name]
    if kind == "numbers":
        first = 8 + len(_header(data)) + entry["data_offsets"][0]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        return data[:first] + bytes([value]) * size + data[first + size :]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    if kind == "rename":
        header[value] = header.pop(name)
    elif kind == "dtype":  # as many bytes, so that the file itself is right
        entry["dtype"] = value
        width = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "F32": 4}.get(value, 1)
        entry["shape"] = [size // width]
    else:
        count = size
        for edge in entry["shape"]:
            count = count // edge if edge else 0
        whole = size // (count or 1)
        entry["shape"] = [
            [whole], [1, whole], [*entry["shape"], 1], [0], [whole, 0, 2**40], [2**40, 2**40],
        ][value]  # fmt: skip
    return _with_header(data, json.dumps(header).encode())


def reseal(folder: Path) -> None:
    """Give a checkpoint whose files were changed a manifest that says so."""
    described = json.loads((folder / store.MANIFEST).read_text())
    for name in described["files"]:
        file = folder / name
        described["files"][name] = {"bytes": file.stat().st_size, "sha256": store.sha256(file)}
    del described["sha256"]
    (folder / store.MANIFEST).write_text(store.sealed(described))
