"""What a base is, whatever its files are called and however they are cut.

Owns the fingerprint of a base's tensors, from its files or from memory, what is kept of large files
between runs, and the refusal of an adapter over another base than its own.

The fingerprint is blake2b over the sorted, distinct digests of the tensors. A tensor's digest is
blake2b over its number format, shape, place (its layer's number and the last two parts of its name;
nothing where it stands in no layer) and bytes: all of them up to 64 KiB, else 16 windows of 4 KiB
at equal distances, the first and the last included. So names of files, prefixes and tied copies do
not count. A base that differs outside every window would pass; `files_sha256` is exact.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from lorafit.data.cache import root
from lorafit.errors import ModelError
from lorafit.model import guard, quantised
from lorafit.model.base import INDEX, files_here, unwrap
from lorafit.model.guard import Stored

_WHOLE, _WINDOWS, _WIDTH = 65_536, 16, 4_096
_TRIED = 4
_ADDED = re.compile(r"\b(lora_|modules_to_save\.)")
"""Parameters that peft put into the base's tree; and the names it put around the base's own."""
_AROUND = re.compile(r"\b(base_layer|original_module)\.")
_FORMATS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
     "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
     "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
     "BOOL": torch.bool}
)  # fmt: skip


def identity(model: nn.Module) -> dict[str, str]:
    """What must be the same for a run to go on, or an adapter to fit: the part of `described` that
    no move, new cut or new name of the files changes. What is unknown is left out, and so is the
    fingerprint of a model without adapter, which training changes. That of a quantised base is its
    files', so that it is the same base as before, quantised."""
    base = unwrap(model)
    known = _facts(base)
    if any(_ADDED.search(name) for name, _ in model.named_parameters()):
        whole = known["quantisation"] == "none"
        known["fingerprint"] = _in_memory(base) if whole else described(base)["fingerprint"]
    names = ("model_type", "parameters", "dtype", "quantisation", "fingerprint")
    return {name: str(known[name]) for name in names if known.get(name) is not None}


def described(model: nn.Module | str | Path) -> dict[str, Any]:
    """The base for people and for `check_same`.

    Reads the whole of its files at the first look (a second for a gigabyte), and milliseconds
    later, until their size or times change.

    Args:
        model: A module (adapters are left out of its numbers), or a folder.

    Returns:
        `name` as given, `path` (absolute, of a local folder), `model_type`, `parameters`, `dtype`
        (of what is not quantised), `quantisation` (see `quantised.scheme`),
        `revision` (a Hub commit), `headers_sha256` (names, formats and shapes of all tensors in its
        files), `files_sha256`, and `fingerprint`: that of its files where its tensors came from
        them, else of its tensors as they are. None where unknown.
    """
    names = ("name", "path", "model_type", "parameters", "dtype", "quantisation", "revision",
             "headers_sha256", "files_sha256", "fingerprint")  # fmt: skip
    known: dict[str, Any] = dict.fromkeys(names)
    if not isinstance(model, nn.Module):
        folder = Path(model).expanduser()
        return known | {"name": str(model)} | _of_folder(folder, local=True)
    base = unwrap(model)
    facts = _facts(base)
    name = str(facts["name"])
    folder, local = files_here(name, facts["revision"]), Path(name).expanduser().is_dir()
    with suppress(ModelError):  # files that are gone by now, or no safetensors: tensors remain
        if folder and _came_from(base, _tensors(folder)):
            return known | _of_folder(folder, local=local) | facts
    return known | facts | {"fingerprint": _in_memory(base)}


def _facts(base: nn.Module) -> dict[str, Any]:
    config = getattr(base, "config", None)
    own = [value for key, value in base.named_parameters() if not _ADDED.search(key)]
    return {
        "name": str(getattr(base, "name_or_path", "")),
        "model_type": getattr(config, "model_type", None),
        "parameters": sum(map(quantised.numel, own)),
        "dtype": str(own[0].dtype).removeprefix("torch.") if own else None,
        "quantisation": quantised.scheme(base),
        "revision": getattr(config, "_commit_hash", None),
    }


def check_same(folder: Path, *, recorded: Mapping[str, Any], base: str) -> None:
    """Nothing, if `base` is the base that the adapter in `folder` was trained over, or if either
    cannot be told.

    Args:
        recorded: What `described` said of it then.

    Raises:
        ModelError: it is another one.
    """
    place = files_here(base)
    wanted = recorded.get("fingerprint")
    if not place or not wanted or not (files := _weights(place)):
        return
    if not all(file.is_file() for file in files):  # who loads it says so
        return
    if wanted == _fingerprint(digest for file in files for digest in _known(file)["tensors"]):
        return
    same = recorded.get("headers_sha256") == _headers_sha256(_tensors(place))
    what = "numbers in its tensors" if same else "tensors, by name, shape or number format,"
    trained = recorded.get("path") or recorded.get("name") or "a base that has no name"
    raise ModelError(
        f"The adapter {folder} was trained over another base than {base}: the {what} differ from "
        f"those of {trained}.",
        why="An adapter corrects the very numbers it was trained over; over others it answers like "
        "no model that was ever trained.",
        fix="Give the base it was trained over: --base FOLDER_OR_ID; or to go on: --accept",
    )


# ---- files -------------------------------------------------------------------------------------


def _weights(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        placed = guard.read_json(folder / INDEX).get("weight_map")
        names = placed.values() if isinstance(placed, dict) else ()
        return [folder / Path(name).name for name in sorted(set(map(str, names)))]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _tensors(folder: Path) -> dict[str, tuple[Path, Stored]]:
    return {
        name: (file, tensor)
        for file in _weights(folder)
        for name, tensor in guard.header(file).items()
    }


def _of_folder(folder: Path, *, local: bool) -> dict[str, Any]:
    """What the files say: nothing where there are none."""
    if not (folder / "config.json").is_file():
        return {}
    config = guard.read_json(folder / "config.json", once=False)
    tensors, known = _tensors(folder), [_known(file, whole=True) for file in _weights(folder)]
    whole = "".join(sorted(one["sha256"] for one in known))
    return {
        "path": str(folder.resolve()) if local else None,
        "model_type": config.get("model_type"),
        "parameters": sum(math.prod(tensor.shape) for _, tensor in tensors.values()),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantisation": quantised.scheme_of(config.get("quantization_config") or {}),
        "headers_sha256": _headers_sha256(tensors),
        "files_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "fingerprint": _fingerprint(digest for one in known for digest in one["tensors"]),
    }


def _headers_sha256(tensors: Mapping[str, tuple[Path, Stored]]) -> str:
    said = {name: (tensor.dtype, tensor.shape) for name, (_, tensor) in tensors.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _known(file: Path, *, whole: bool = False) -> dict[str, Any]:
    """The digests of a file's tensors, and its sha256 if `whole`; those that were kept, unless the
    file has changed since."""
    about = file.stat()
    at = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:24]
    place = root() / "bases" / f"{name}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(place.read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) and known.get("at") == at else {"at": at}
    missing = {"tensors"} | ({"sha256"} if whole else set())
    if missing <= known.keys():
        return known
    with file.open("rb") as stream:
        if "tensors" not in known:
            header = guard.header(file)
            known["tensors"] = [
                _digest(name, (tensor.dtype, tensor.shape), read=_from(stream.fileno(), tensor))
                for name, tensor in header.items()
            ]
        if whole:
            known["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    with suppress(OSError):
        _keep(place, known)
    return known


def _keep(place: Path, known: Mapping[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as beside:
        json.dump(known, beside)
    Path(beside.name).replace(place)


def _from(descriptor: int, tensor: Stored) -> Callable[[int, int], bytes]:
    return lambda start, length: os.pread(descriptor, length, tensor.start + start)


# ---- tensors -----------------------------------------------------------------------------------


def _fingerprint(digests: Iterable[str]) -> str:
    return hashlib.blake2b("".join(sorted(set(digests))).encode(), digest_size=16).hexdigest()


def _digest(
    name: str, kind: tuple[str, Iterable[int]], *, read: Callable[[int, int], bytes]
) -> str:
    """The digest of a tensor of that format and shape; `read` gives bytes by start and length."""
    dtype, shape = kind
    size = math.prod(shape) * _FORMATS[dtype].itemsize if dtype in _FORMATS else 0
    parts = name.split(".")
    place = ".".join([*filter(str.isdigit, parts), *parts[-2:]])
    place = place if any(map(str.isdigit, parts)) else ""
    made = hashlib.blake2b(f"{dtype} {list(shape)} {place}".encode(), digest_size=16)
    if size <= _WHOLE:
        made.update(read(0, size))
    else:
        for window in range(_WINDOWS):
            made.update(read((size - _WIDTH) * window // (_WINDOWS - 1), _WIDTH))
    return made.hexdigest()


def _own(base: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by their names in its files, without what peft put there."""
    state = base.state_dict()
    return {_AROUND.sub("", name): state[name] for name in state if not _ADDED.search(name)}


def _in_memory(base: nn.Module) -> str | None:
    """The fingerprint of the base as it is; None where training changes it, or it is not here."""
    formats = {dtype: name for name, dtype in _FORMATS.items()}
    own = _own(base)
    if _trained(base) or not all(
        t.device.type != "meta" and t.dtype in formats for t in own.values()
    ):
        return None
    return _fingerprint(
        _digest(name, (formats[tensor.dtype], tensor.shape), read=_of(tensor))
        for name, tensor in own.items()
    )


def _trained(base: nn.Module) -> set[str]:
    """The base's own parameters that are trained beside an adapter; none where there is none, as a
    whole model is told by the numbers that it has."""
    named = dict(base.named_parameters())
    if not any(map(_ADDED.search, named)):
        return set()
    own = {name: p for name, p in named.items() if not _ADDED.search(name)}
    return {_AROUND.sub("", name) for name, p in own.items() if p.requires_grad}


def _of(tensor: Tensor) -> Callable[[int, int], bytes]:
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return lambda start, length: flat[start : start + length].cpu().numpy().tobytes()


def _came_from(base: nn.Module, tensors: Mapping[str, tuple[Path, Stored]]) -> bool:
    """Whether the frozen tensors of `base` hold the numbers of those in its files, as far as a few
    can be compared: a model may carry the name of a folder whose configuration alone was used."""
    trained, prefix = _trained(base), f"{getattr(base, 'base_model_prefix', '')}."
    pairs: list[tuple[Tensor, tuple[Path, Stored]]] = []
    for name, tensor in _own(base).items():
        found = tensors.get(name) or tensors.get(name.removeprefix(prefix))
        known = found and found[1].dtype in _FORMATS and found[1].shape == tuple(tensor.shape)
        if found and known and name not in trained and tensor.is_floating_point():
            pairs.append((tensor, found))
    pairs.sort(key=lambda pair: -pair[0].ndim)  # norms begin alike in every model
    tables = [pair for pair in pairs if pair[0].ndim > 1] or pairs
    return all(_begin_alike(*pair) for pair in tables[:: max(1, len(tables) // _TRIED)])


def _begin_alike(tensor: Tensor, stored: tuple[Path, Stored]) -> bool:
    file, entry = stored
    if tensor.device.type == "meta":
        return True
    dtype = _FORMATS[entry.dtype]
    count = min(tensor.numel(), _WIDTH // dtype.itemsize)
    with file.open("rb") as stream:
        data = bytearray(_from(stream.fileno(), entry)(0, count * dtype.itemsize))
    there = torch.frombuffer(data, dtype=dtype).to(tensor.dtype)
    here = tensor.detach().reshape(-1)[:count].cpu()
    return torch.equal(here, there)
