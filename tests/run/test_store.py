"""Folders are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from lorafit.errors import OutputError
from lorafit.run import store


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    final = folder / f"checkpoint-{step}"
    with store.whole_folder(final) as partial:
        (partial / "a.txt").write_text(text)
    return final


def test_a_whole_folder_verifies_and_leaves_nothing_beside(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 3)
    assert store.fault(made) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_failed_one_leaves_the_old(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 3)
    with pytest.raises(RuntimeError):
        write_half(made)
    assert (made / "a.txt").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def write_half(folder: Path) -> None:
    with store.whole_folder(folder) as partial:
        (partial / "a.txt").write_text("half")
        raise RuntimeError


def test_replacing_takes_the_new(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    assert (checkpoint(tmp_path, 3, "new") / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_newest_skips_what_is_damaged_and_names_it(tmp_path: Path, damage: str) -> None:
    good, bad = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    target = bad / ("MANIFEST.json" if damage == "manifest" else "a.txt")
    match damage:
        case "flip":
            target.write_text("weightz")
        case "cut":
            target.write_text("wei")
        case "remove":
            target.unlink()
        case _:
            target.write_text("{")
    found, skipped = store.newest(tmp_path)
    assert found == good
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint-10 skipped: ")


def test_rotation_keeps_best_last_and_strangers(tmp_path: Path) -> None:
    made = [checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    (tmp_path / "checkpoint-0").mkdir()
    store.rotate(made[-1], keep=2, protected={made[0]})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-0", "checkpoint-1", "checkpoint-4"]


def test_a_folder_that_cannot_be_removed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [checkpoint(tmp_path, step) for step in (1, 2)]

    def broken(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", broken)
        with pytest.raises(OutputError, match="Input/output error"):
            store.rotate(made[1], keep=1)
    assert [path.name for _, path in store.checkpoints(tmp_path)] == ["checkpoint-2"]
    store.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"], "gone at the next start"


def test_output_folders_are_judged_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        store.check_writable(tmp_path / "file" / "run")
    store.check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    store.check_free(tmp_path)
    checkpoint(tmp_path, 1)
    with pytest.raises(OutputError, match="already holds a run"):
        store.check_free(tmp_path)
    store.clear_run(tmp_path)
    store.check_free(tmp_path)
