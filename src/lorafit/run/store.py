"""Folders on disk that are whole or not there: written beside, synced, described, renamed.

Owns atomic folders, their manifest, checkpoint names, rotation and the check of an output folder
before anything is created. Does not know what the files mean.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import OutputError

MANIFEST, CARD = "MANIFEST.json", "README.md"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
JOURNAL = "journal.jsonl"


@contextmanager
def whole_folder(final: Path) -> Generator[Path]:
    """A temporary sibling of `final` to write into; it becomes `final` when the block ends well.

    Files and folders are synced and a manifest with sizes and sha256 is written last, before the
    rename; a folder that stood there is replaced. If the block fails, nothing is left behind.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _write_manifest(partial)
        replaced = final.with_name(f".{final.name}.replaced-{os.getpid()}")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        _sync(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"files": entries})
    for directory in {folder, *(path.parent for path in files)}:
        _sync(directory)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, synced."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(folder: Path) -> str:
    """Why `folder` is not a complete checkpoint, or an empty string where its manifest holds."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in listed.items():
            if name == CARD:  # prose, which peft's save_pretrained writes anew
                continue
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename or folder).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as broken:
        return f"{MANIFEST} cannot be read ({broken})"
    return ""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every `checkpoint-N` in `folder`, by step."""
    if not folder.is_dir():
        return []
    named = ((CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in named if match)


def newest(folder: Path, *, fault: Callable[[Path], str] = fault) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without a `fault`, and one line for each that was skipped."""
    skipped: list[str] = []
    for _, path in reversed(checkpoints(folder)):
        why = fault(path)
        if not why:
            return path, skipped
        skipped.append(f"{path.name} skipped: {why}")
    return None, skipped


def rotate(folder: Path, *, keep: int, protected: set[Path]) -> None:
    """Delete the oldest checkpoints of ours beyond `keep`; `protected` ones always stay.

    A folder without our manifest is somebody else's and is never touched. Age is when it was
    written: an earlier run in the same folder may have come further.
    """
    manifests = [path / MANIFEST for _, path in checkpoints(folder) if (path / MANIFEST).is_file()]
    ours = [file.parent for file in sorted(manifests, key=lambda file: file.stat().st_mtime_ns)]
    surplus = max(0, len(ours) - max(keep, 1))
    safe = {path.resolve() for path in protected}
    for path in [path for path in ours[:-1] if path.resolve() not in safe][:surplus]:
        condemned = path.with_name(f".{path.name}.deleted-{os.getpid()}")
        path.rename(condemned)
        shutil.rmtree(condemned, ignore_errors=True)


def bytes_of(folder: Path) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def holds_run(folder: Path) -> bool:
    """Whether a run of ours, or checkpoints, lie in `folder`."""
    return (folder / JOURNAL).is_file() or bool(checkpoints(folder))


def check_writable(folder: Path) -> None:
    """Nothing, if `folder` can be created or written; nothing is created here.

    Raises:
        OutputError: it, or the folder it would be made in, cannot be written, or is a file.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(
            f"The output folder {folder} cannot be made: {existing} is a file.",
            fix="Choose another folder with --output-dir.",
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"The output folder {folder} cannot be written: no permission on {existing}.",
            why="Checkpoints and the adapter would have nowhere to go.",
            fix="Choose another folder with --output-dir.",
        )


def make_folder(folder: Path) -> Path:
    """`folder`, made with its parents if it was not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output folder {folder} cannot be made: {error.strerror}.",
            fix="Choose another folder with --output-dir.",
        ) from error
    return folder


def check_free(folder: Path) -> None:
    """Nothing, if no run lies in `folder`.

    Raises:
        OutputError: one does, with the three ways on.
    """
    if holds_run(folder):
        raise OutputError(
            f"{folder} already holds a run.",
            why="Training into it would mix two runs.",
            fix=(
                "Continue it: --resume-from-checkpoint auto",
                "Replace it:  --overwrite",
                f"Keep it:     --output-dir {folder}-2",
            ),
        )


def clear_run(folder: Path) -> None:
    """Remove what a run of ours wrote in `folder`: checkpoints with our manifest, the journal."""
    for _, path in checkpoints(folder):
        if (path / MANIFEST).is_file():
            shutil.rmtree(path)
    (folder / JOURNAL).unlink(missing_ok=True)
