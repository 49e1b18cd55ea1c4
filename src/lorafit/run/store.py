"""Folders on disk that are whole or not there: written beside, synced, described, renamed.

Owns atomic folders, their manifest, checkpoint names, rotation, what killed writers left, and the
check of an output folder before anything is created. Does not know what the files mean. Nothing
that a manifest of ours does not name is ever deleted, and no symbolic link is followed.
"""

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from lorafit import foreign
from lorafit.errors import OutputError

MANIFEST, CARD = "MANIFEST.json", "README.md"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
JOURNAL, SETTINGS, REPORT = "journal.jsonl", "config.yaml", "report.html"
_ADAPTER = "adapter"
_OURS = "|".join([CHECKPOINT.pattern, _ADAPTER, *map(re.escape, (JOURNAL, SETTINGS, REPORT))])
_BESIDE = re.compile(rf"\.({_OURS})\.(partial|replaced|deleted)-(\d+)")
_MADE_WITH = ("lorafit", "torch", "transformers", "peft")


# ---- writing -----------------------------------------------------------------------------------


@contextmanager
def whole_folder(final: Path, *, about: Mapping[str, Any] | None = None) -> Generator[Path]:
    """A temporary sibling of `final` to write into; it becomes `final` when the block ends well.

    Files and folders are synced and a manifest with sizes, sha256 and versions is written last,
    before the rename; a folder that stood there is replaced, and what of it was not ours is kept
    beside it as `NAME.kept`. If the block fails, nothing is left behind.

    Args:
        about: More for the manifest, plain JSON: fingerprints of data and base.

    Raises:
        OutputError: the system refuses to write: no space, input/output error, read-only.
    """
    make_folder(final.parent)
    partial = _beside(final, "partial")
    with writing(final):
        try:
            partial.mkdir()
            yield partial
            _write_manifest(partial, about or {})
            _put_in_place(partial, final)
        except BaseException:
            with suppress(OSError):
                tidy(final.parent)
            raise


@contextmanager
def whole_files(folder: Path) -> Generator[Path]:
    """A temporary folder to write into; its files, synced, move into `folder` when the block ends
    well, each whole and over an older one of its name. If the block fails, `folder` is as it was.

    Raises:
        OutputError: as of `whole_folder`; or a folder inside is a link to elsewhere.
    """
    make_folder(folder)
    tidy(folder)
    partial = _beside(folder / _ADAPTER, "partial")
    with writing(folder):
        try:
            partial.mkdir()
            yield partial
            _sync_all(partial)
            for path in _files(partial):
                target = folder / path.relative_to(partial)
                make_folder(target.parent)
                _check_inside(folder, target.parent)
                path.replace(target)
                _sync(target.parent)
            _sync_all(partial)  # where they are no longer
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """`content` in the place of whatever `path` held: a kill leaves the old or the new, synced.

    Raises:
        OutputError: as of `whole_folder`.
    """
    beside = _beside(path, "partial")
    with writing(path):
        try:
            beside.write_bytes(content)
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Generator[None]:
    """What the system refuses inside comes out as a `refusal`."""
    try:
        yield
    except Exception as error:
        if _number(error) not in _REFUSALS:
            raise
        raise refusal(path, error) from error


def refusal(path: Path, error: Exception) -> OutputError:
    """What the system refused, with `path` and, where it is full, what is free there."""
    number, elsewhere = _number(error), "another folder with --output-dir (output_dir=...)."
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(
        f"{path} cannot be written: {os.strerror(number)}.",
        why=f"{_free(path)} bytes are free there." if full else "",
        fix=f"Free some space, or choose {elsewhere}" if full else f"Mend that, or use {elsewhere}",
    )


_REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE),
)


def _number(error: Exception) -> int:
    """The system's number of an error, which libraries written in Rust have in their message; 0 if
    it is none of the system's."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}")


def _put_in_place(partial: Path, final: Path) -> None:
    journal = final.parent / JOURNAL
    if journal.is_file():  # a checkpoint never outlives the lines that tell of its steps
        _sync(journal)
        _sync(final.parent)
    replaced = _beside(final, "replaced")
    if not os.path.lexists(final):
        partial.rename(final)
    else:
        # under this name it is recovered, whichever of the two it is at a kill
        partial.rename(replaced)
        if not _exchange(replaced, final):
            replaced.rename(partial)
            final.rename(replaced)
            partial.rename(final)
    _sync(final.parent)
    if os.path.lexists(replaced):
        _dissolve(replaced, final)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one operation; False where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, synced."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync_all(folder: Path) -> None:
    for path in (*_files(folder), *_folders(folder)):
        _sync(path)


def _sync(path: Path) -> None:
    if sys.platform == "win32":  # opens no folder, and syncs nothing that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """The regular files below `folder`; what links lead to is not below it."""
    return sorted(path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode))


def _folders(folder: Path) -> list[Path]:
    """`folder` and those below it, the deepest first."""
    below = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    return [*sorted(below, reverse=True), folder]


def bytes_of(folder: Path) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.lstat().st_size for path in _files(folder))


# ---- the manifest ------------------------------------------------------------------------------


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in _files(folder)
    }
    _sync_all(folder)
    listed = {"files": files, "versions": versions_of(_MADE_WITH), **about}
    (folder / MANIFEST).write_text(sealed(listed), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed: a source tree alone has none."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def sealed(listed: Mapping[str, Any]) -> str:
    """The manifest's text, its own sha256 in it: of a changed byte, it says so itself."""
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return json.dumps({**listed, "sha256": digest}, indent=2) + "\n"


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of `folder` says, whole or not.

    Raises:
        OSError, ValueError: it is not there, or is no object with files.
    """
    listed = foreign.json_object(_regular(folder, MANIFEST).read_bytes(), once=False)
    if not isinstance(listed.get("files"), dict):
        raise ValueError("it lists no files")
    return listed


def _regular(folder: Path, name: str) -> Path:
    path = folder / name
    _check_inside(folder, path)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{name!a} is no file")
    return path


def _check_inside(folder: Path, path: Path) -> None:
    """Raises ValueError where `..` or a link lead out of `folder`, or elsewhere in it."""
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        raise ValueError(f"{str(path.relative_to(folder))!a} leads elsewhere")


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder: Path) -> str:
    """Why `folder` is not a complete checkpoint, or an empty string where its manifest holds."""
    try:
        listed = _manifest(folder)
        unsealed = {key: value for key, value in listed.items() if key != "sha256"}
        if (folder / MANIFEST).read_bytes() != sealed(unsealed).encode():
            return f"{MANIFEST} does not match its sha256"
        for name, entry in listed["files"].items():
            if name == CARD:  # prose, which peft's save_pretrained writes anew
                continue
            path = _regular(folder, name)
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename or folder).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as broken:
        return f"{MANIFEST} cannot be read ({broken})"
    return ""


# ---- checkpoints in an output folder -----------------------------------------------------------


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
        why = "it is a link: name what it leads to" if path.is_symlink() else fault(path)
        if not why:
            return path, skipped
        skipped.append(f"{path.name} skipped: {why}")
    return None, skipped


def rotate(last: Path, *, keep: int, protected: Collection[Path] = ()) -> None:
    """Delete the oldest checkpoints of ours beside `last` beyond `keep`.

    `last`, which was just written, and `protected` ones always stay, and all do unless `last`
    verifies. A folder without our manifest is somebody else's and is never touched; of what is
    deleted, files that its manifest does not name stay. Age is when it was written: an earlier run
    in the same folder may have come further.
    """
    written = {path: _written(path) for _, path in checkpoints(last.parent)}
    ours = sorted((path for path in written if written[path]), key=lambda path: written[path])
    safe = {last.name, *(path.name for path in protected)}
    surplus = max(0, len(ours) - max(keep, 1))
    condemned = [path for path in ours if path.name not in safe][:surplus]
    if condemned and not fault(last):
        for path in condemned:
            _delete(path)


def _written(folder: Path) -> int:
    """When a checkpoint of ours was written, in ns; 0 for what is none."""
    try:
        _manifest(folder)
    except (OSError, ValueError):
        return 0
    return 0 if folder.is_symlink() else (folder / MANIFEST).stat().st_mtime_ns


def _delete(folder: Path) -> None:
    condemned = _beside(folder, "deleted")
    with writing(folder):
        folder.rename(condemned)
        _sync(folder.parent)
        _dissolve(condemned, folder)


def _dissolve(folder: Path, name: Path) -> None:
    """Delete of `folder` what its manifest names. If anything is left it is somebody else's: it
    goes back to `name`, or to `NAME.kept` where that is taken."""
    if not folder.is_symlink():
        for path in named(folder):
            path.unlink(missing_ok=True)
        below = _folders(folder)
        for path in below:
            _sync(path)
        (folder / MANIFEST).unlink(missing_ok=True)  # last, as it says what is ours
        for path in below:
            if not any(path.iterdir()):
                path.rmdir()
    if os.path.lexists(folder):
        folder.rename(next(path for path in _spare(name) if not os.path.lexists(path)))
        _sync(name.parent)


def _spare(name: Path) -> Iterator[Path]:
    yield name
    yield name.with_name(f"{name.name}.kept")
    yield from (name.with_name(f"{name.name}.kept-{number}") for number in count(2))


def named(folder: Path) -> Iterator[Path]:
    """The files of `folder` that its manifest names and that lie there; none where it has none."""
    try:
        names = list(_manifest(folder)["files"])
    except (OSError, ValueError):
        return
    for name in names:
        with suppress(OSError, ValueError, RuntimeError):
            yield _regular(folder, name)


def tidy(folder: Path) -> None:
    """Finish or undo what writers that are gone left half done in `folder`.

    A replaced checkpoint whose successor never came is put back; the rest goes. What cannot be
    changed now stays for the next time.
    """
    found = [(match, path) for path in folder.iterdir() if (match := _BESIDE.fullmatch(path.name))]
    # the replaced first, so that what was replaced is there before its successor goes
    for match, path in sorted(found, key=lambda pair: pair[0][3], reverse=True):
        final, pid = folder / match[1], int(match[4])
        if pid != os.getpid() and psutil.pid_exists(pid):
            continue
        with suppress(OSError):
            if match[3] == "partial":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif match[3] == "replaced" and not os.path.lexists(final):
                path.rename(final)
            else:
                _dissolve(path, final)


# ---- the output folder before and after a run --------------------------------------------------


def holds_run(folder: Path) -> bool:
    """Whether a run of ours, or checkpoints, lie in `folder`."""
    return (folder / JOURNAL).is_file() or bool(checkpoints(folder))


def check_writable(folder: Path) -> None:
    """Nothing, if `folder` can be created or written; nothing is created here.

    Raises:
        OutputError: it, or the folder it would be made in, cannot be written, or is a file.
    """
    _check_name(folder)
    existing = _existing(folder)
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


def _check_name(folder: Path) -> None:
    """Raises OutputError where nothing can lie, or nothing can be made, under that name."""
    try:
        str(folder).encode()  # safetensors reads no other
        folder.stat()
        return
    except NotADirectoryError:
        return  # told by the name of the file
    except FileNotFoundError:
        if not folder.is_symlink():
            return
        reason = "it is a link to what is not there"
    except OSError as error:
        reason = os.strerror(error.errno or 0)
    except ValueError:
        reason = "its name is not UTF-8, or holds a NUL"
    raise OutputError(
        f"The output folder {folder!s:.200} cannot be made: {reason}.",
        fix="Choose another folder with --output-dir.",
    )


def check_space(folder: Path, needed: int) -> None:
    """Nothing, if `needed` bytes are free where `folder` is or will be.

    Raises:
        OutputError: they are not.
    """
    free = _free(folder)
    if free < needed:
        raise OutputError(
            f"{folder} has room for {free} bytes, and {needed} are needed to save this run.",
            fix="Free some, keep fewer checkpoints (save_total_limit=1), or choose another folder "
            "with --output-dir (output_dir=...).",
        )


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def make_folder(folder: Path) -> Path:
    """`folder`, made with its parents if it was not there, and synced into its parent.

    Raises:
        OutputError: it cannot be made.
    """
    _check_name(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            _sync(path.parent)
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
        if _written(path):
            _delete(path)
    with writing(folder):
        (folder / JOURNAL).unlink(missing_ok=True)
