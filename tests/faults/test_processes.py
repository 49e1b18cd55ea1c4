"""Other processes: many that start on one folder, data workers that are killed or signalled."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import lorafit
from lorafit.errors import LorafitError, OutputError
from lorafit.run import checkpoint, store
from tests import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


@pytest.mark.parametrize("starters", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_of_many_starters_one_trains_and_the_others_name_it(tmp_path: Path, starters: int) -> None:
    """All wait for one word; who trains does so until all others have said what they met."""
    begin, release = os.pipe()
    told, tell = os.pipe()
    free, last = os.pipe()

    class Waits(lorafit.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            os.read(free, 1)  # until the parent closes the other end

    trainer = tiny.make(tmp_path / "run", callbacks=[Waits()], max_steps=1)
    children = []
    for _ in range(starters):
        children.append(os.fork())
        if children[-1] == 0:
            for end in (release, told, last):
                os.close(end)
            os.read(begin, 1)
            try:
                trainer.train()
                said = "trained"
            except OutputError as error:
                said = error.what
            except BaseException as error:
                said = repr(error)
            os.write(tell, f"{os.getpid()} {said}\n".encode())
            os._exit(0)
    for end in (begin, tell, free, release):
        os.close(end)
    with os.fdopen(told) as answers:
        lines = [answers.readline() for _ in range(starters - 1)]
        os.close(last)
        lines += answers.readlines()
    for child in children:
        os.waitpid(child, 0)
    (winner,) = [line.split()[0] for line in lines if line.endswith(" trained\n")]
    refused = [line for line in lines if not line.endswith(" trained\n")]
    expected = (
        rf"\d+ {re.escape(str(tmp_path))}/run is being trained into by process {winner} on .*"
    )
    assert len(refused) == starters - 1
    assert all(re.match(expected, line) for line in refused), refused
    assert not list((tmp_path / "run").glob(".*"))


class Rows(Dataset[Any]):
    """Twelve rows; the data worker is killed once the folder `fatal` is there, and hears at row
    `signalled` what the whole group is sent."""

    def __init__(self, *, fatal: Path | None = None, signalled: int = -1) -> None:
        self.rows, self.fatal, self.signalled = tiny.plain(12), fatal, signalled

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info():
            if self.fatal and self.fatal.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if index == self.signalled:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
        return self.rows[index]


def run(folder: Path, data: Any, *, resume: bool = False, kind: Any = lorafit.Trainer) -> Any:
    trainer = tiny.make(
        folder, model=tiny.llama(dropout=0.3), data=data, kind=kind, dataloader_num_workers=1,
        dataloader_prefetch_factor=1, num_train_epochs=2, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_a_killed_data_worker_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    whole = tiny.adapter(run(tmp_path / "whole", Rows()))
    with pytest.raises(LorafitError, match=r"(?s)data worker was killed.*num_workers.*resume_from"):
        run(tmp_path / "part", Rows(fatal=tmp_path / "part" / "checkpoint-2"))
    saved = store.checkpoints(tmp_path / "part")
    assert saved and not any(checkpoint.fault(path) for _, path in saved)
    assert not list((tmp_path / "part").glob(".*"))
    assert tiny.same(whole, tiny.adapter(run(tmp_path / "part", Rows(), resume=True)))


def test_workers_of_a_scripts_own_loader_leave_signals_to_their_parent(tmp_path: Path) -> None:
    begun = []

    class Own(lorafit.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(
                self.train_dataset, 2, collate_fn=tiny.collate, num_workers=1,
                worker_init_fn=begun.append,
            )  # fmt: skip

    with_signals = run(tmp_path / "a", Rows(signalled=5), kind=Own)
    assert tiny.same(
        tiny.adapter(with_signals), tiny.adapter(run(tmp_path / "b", Rows(), kind=Own))
    )
