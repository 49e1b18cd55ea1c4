"""What may be opened of a folder that a stranger made, and what its settings may ask for.

Owns what a name means (a folder or a Hub id) and the refusals that come before transformers, peft
or safetensors read anything. Imports none of them, nor torch. Which code may run is decided in
`tokens`, which knows where code would come from.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import foreign
from lorafit.errors import ModelError, nearest

TEMPLATES = "additional_chat_templates"
CODE = ("auto_map", "auto_mapping", "parent_library", "megatron_core", "megatron_config",
        "_attn_implementation_internal", "_experts_implementation_internal", "tokenizer_kwargs",
        "trust_remote_code")  # fmt: skip
"""Settings by which a file has had code imported, in one library or another."""

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
            "_experts_implementation")  # fmt: skip
"""Those that name an implementation, or a repository that holds one."""

_TRUST = "Take the files from their author's own page; where you wrote this yourself, remove it."


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file: its dtype as that format has it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def folder_of(name: str) -> Path | None:
    """The folder that `name` means; None where it can only be a Hub id."""
    if not name:
        raise ModelError("No model is named.", fix="Give a folder or a Hub id.")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # Path raises for names that no file can have
        return path
    if os.path.isfile(path):
        raise ModelError(
            f"{name} is a file; a model is a folder with config.json and *.safetensors.",
            fix=f"Give the folder: {path.parent}",
        )
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not (
        "/" in name and os.path.isdir(path.parent)
    ):
        return None
    raise ModelError(
        f"There is no folder {name:.200}.{nearest_folder(path)}",
        fix="Give a folder with config.json and *.safetensors, or a Hub id such as org/name.",
    )


def nearest_folder(path: Path) -> str:
    """` Did you mean X?` for a folder beside `path` with a name close to its own; else empty."""
    parent = path.parent
    if not os.path.isdir(parent):
        return ""
    return nearest(path.name, sorted(entry.name for entry in parent.iterdir() if entry.is_dir()))


def check_entries(folder: Path) -> None:
    """Nothing, if every file in `folder` is one: no pipe, no device, no link that leads out of it.

    Raises:
        ModelError: naming the first that is not.
    """
    templates = folder / TEMPLATES
    inside = sorted(templates.iterdir()) if templates.is_dir() else []
    for entry in [*sorted(folder.iterdir()), *inside]:
        what = _oddity(entry)
        if what:
            raise ModelError(
                f"{entry}: this is {what}.",
                why="Files of a model are read by several libraries, each of which would follow it "
                "or wait for it.",
                fix="Copy the file itself into the folder, or remove it.",
            )


def _oddity(entry: Path) -> str:
    is_folder = entry.is_dir()
    if is_folder and entry.name != TEMPLATES:
        return ""
    try:
        if entry.is_symlink() and foreign.leads_out(entry):
            return f"a link that leads out of its folder, to {entry.resolve()}"
    except (OSError, RuntimeError):
        return "a link that leads to itself"
    return "" if is_folder or entry.is_file() or not entry.exists() else "a pipe or a device"


def read_json(file: Path, *, once: bool = True) -> dict[str, Any]:
    """The JSON object in `file`.

    Args:
        once: Refuse a key that stands twice.

    Raises:
        ModelError: it cannot be read, or is not one.
    """
    try:
        if foreign.leads_out(file):
            raise ValueError(f"it is a link that leads out of its folder, to {file.resolve()}")
        return foreign.read_json(file, once=once)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{file} cannot be read: {reason}.") from error


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in a model's or tokenizer's `file`; `auto_map` may stand at its top.

    Raises:
        ModelError: as `read_json`, or it asks for code to be run in a way that nobody agreed to.
    """
    settings = read_json(file, once=False)  # the libraries take the last of two, as this does
    for path, key, value in _walk(settings):
        asks = key in CODE and value and path != "auto_map"
        fetches = key in _KERNELS and "/" in str(value)
        leaves = key == "transformers_weights" and Path(str(value)).suffix != ".safetensors"
        if asks or fetches or leaves:
            raise ModelError(
                f"{file}: {path}={value!r:.80} is refused.",
                why="It names weights that are a pickle, which can run code."
                if leaves
                else "It names code to import or to fetch, and no settings file may do that.",
                fix=_TRUST,
            )
    return settings


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            yield below, str(key), item
            yield from _walk(item, below)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, f"{path}[]")


def header(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name; no value is read.

    Raises:
        ModelError: the header is none, or says a thing twice, or what cannot be.
    """
    try:
        if foreign.leads_out(file):
            raise ValueError(f"it is a link that leads out of its folder, to {file.resolve()}")
        with foreign.opened(file) as stream:
            room = os.fstat(stream.fileno()).st_size - 8
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(room, foreign.MOST_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {room + 8:,}")
            entries = foreign.json_object(stream.read(length))
        entries.pop("__metadata__", None)
        return {
            name: _stored(entry, first=8 + length, last=8 + room) for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{file}: its weights cannot be read: {reason}.",
            why="The file is damaged, or was made to be read in two ways.",
            fix="Fetch it again from where it came.",
        ) from error


def _stored(entry: Mapping[str, Any], *, first: int, last: int) -> Stored:
    start, end = entry["data_offsets"]
    numbers = [start, end, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("an offset or a size is not a whole number")
    if not first <= first + start <= first + end <= last:
        raise ValueError("a tensor lies outside the file")
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    bits = int((re.findall(r"\d+", dtype) or [8])[0])  # BOOL has a byte
    beyond = math.prod(max(edge, 1) for edge in shape) >= 1 << 62
    if beyond or math.prod(shape) * bits != 8 * (end - start):
        raise ValueError("a tensor has other bytes than its shape says")
    return Stored(dtype, shape, first + start, first + end)
