"""Three panels -> a Trainer ready to run. Shared by train and demo, so that cli.py only parses.

Everything that can be wrong in a user's settings, files and folders is found here, before anything
is written. Knows the order of the rooms, not what happens inside them.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafit import compat, packing, rehearsal, review, world
from lorafit.config import Settings, dump, load
from lorafit.data.collate import PadCollator
from lorafit.data.read import Source
from lorafit.data.sets import Sets
from lorafit.engine import room
from lorafit.engine.precision import Precision, home
from lorafit.errors import ConfigError
from lorafit.events import DataAudited, Event, RunEnded, RunStarted
from lorafit.model import adapters, base
from lorafit.rehearsal import Helpers
from lorafit.run import store
from lorafit.run.gap import loss_gap
from lorafit.run.practice import PRACTICE, Finding, Practice, forecast_kept
from lorafit.trainer import Trainer

_AROUND = 1.5
"""Times its bytes that a second copy of the base may need while it is loaded and run."""


@dataclass(frozen=True)
class Job:
    """A trainer, and lines for a person about what was learnt on the way to it; `audited` is what
    the journal keeps of the data report."""

    trainer: Trainer
    settings: Settings
    notes: tuple[str, ...]
    audited: DataAudited

    def run(self) -> Path:
        """Train, with config.yaml beside the journal, and save the final adapter; its folder."""
        arguments = self.settings.training
        folder = Path(arguments.output_dir)
        with self.trainer.holding_output():
            if self.trainer.is_world_process_zero():
                if arguments.overwrite:
                    store.clear_run(folder)
                self.trainer.observers += [self._keep_settings, self._hold_to_forecast]
            self.trainer.observers.say(*self.notes)
            self.trainer.train(arguments.resume_from_checkpoint)
            self.trainer.save_model(str(folder))
        world.leave()
        return folder

    def practise(self, *, find_lr: bool = False) -> Practice:
        """Try it all on a few hundred rows; interrupted in another process, and loaded again over
        a second copy of the base, and held against one that is not quantised, where memory allows.

        Args:
            find_lr: Whether the learning rate's range test is made too.
        """
        self.trainer.observers.say(*self.notes)
        found = tuple(Finding("data", "note", harm) for harm in self.audited.harms)
        helpers = Helpers(self._killed, self._reloaded, self._gap, found)
        return self.trainer.practice(helpers, find_lr=find_lr)

    def _killed(self, checkpoint: Path, folder: Path, *, steps: int) -> bool:
        """Let a process go on from `checkpoint` in `folder`, and kill it once it has saved."""
        file = folder.parent / "settings.yaml"
        store.write_whole(file, dump(self.settings).encode())
        words = [sys.executable, "-m", __name__, *map(str, (file, checkpoint, folder, steps))]
        with (folder.parent / "child.log").open("wb") as log:
            child = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            try:
                while child.poll() is None and not store.checkpoints(folder):
                    time.sleep(0.05)
            finally:
                child.kill()
                child.wait()
        return bool(store.checkpoints(folder))

    def _reloaded(self, folder: Path, ids: Tensor) -> Tensor | None:
        """The logits of `ids` over a fresh copy of the base; None where memory holds no other."""
        needed = sum(p.numel() * p.element_size() for p in self.trainer.model.parameters())
        if packing.free_bytes(self.settings.training) < _AROUND * needed:
            return None
        tuned = adapters.load_tuned(folder)
        return base.logits_of(base.place(tuned.model, self.settings.training.device), ids)

    def _gap(self, batches: Sequence[Any], precision: Precision) -> tuple[float | None, str]:
        """What quantising the base costs on these, in nats per token, and a line about it."""
        try:
            found = loss_gap(
                self.trainer.model,
                batches,
                precision=precision,
                free=int(packing.free_bytes(self.settings.training) / _AROUND),
                trust_remote_code=self.settings.model.trust_remote_code,
            )
        except (RuntimeError, MemoryError) as error:
            short = room.shortage(error)
            if short is None:
                raise
            return None, short
        finally:
            room.release()
        return (None, found) if isinstance(found, str) else (found.nats, str(found))

    def _hold_to_forecast(self, event: Event) -> None:
        """Say how the practice run's forecast compares with what the whole run took."""
        file = Path(self.settings.training.output_dir) / PRACTICE
        if isinstance(event, RunEnded) and event.reason == "finished" and file.is_file():
            said = forecast_kept(file.read_text(encoding="utf-8"), event.seconds)
            self.trainer.observers.say(said)

    def _keep_settings(self, event: Event) -> None:
        """Once it is sure that they are run: a run that is not resumed leaves all as it was."""
        if isinstance(event, RunStarted):
            file = Path(self.settings.training.output_dir) / store.SETTINGS
            store.write_whole(file, dump(self.settings).encode())
            self.trainer.observers.tell(self.audited)


def prepare(settings: Settings, given: tuple[Source, Source] | None = None) -> Job:
    """Read, encode, load, attach.

    Args:
        given: Training and evaluation data, where they do not come from files.

    Raises:
        UsageError: whatever the user got wrong, before anything is written.
    """
    check_folder(settings)
    base.check_base(settings.model.model)
    place = home(settings.training.device)
    base.check_quantised(settings.model, place)
    # the first process encodes, the others find what it has kept
    with world.join(settings.training.device).first_ahead():
        data, tokenizer = review.make_sets(settings, given)
    _check_evaluation(data, settings)
    report = review.audited(data, tokenizer, settings=settings)
    packing.check_fits(settings, data.train)
    model = base.load_model(settings.model, place)
    # the adapter's first weights are drawn here, before the trainer seeds its own run
    compat.set_seed(settings.training.seed, deterministic=settings.training.full_determinism)
    trainer = Trainer(
        model=adapters.attach(model, settings.model),
        args=settings.training,
        data_collator=PadCollator(data.stops[0], side=tokenizer.padding_side),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
    )
    trainer.panels = {**asdict(settings.model), **asdict(settings.data)}
    trainer.contract |= {
        "shape": "chat" if data.shape.is_chat else "raw",
        "chat_template": tokenizer.chat_template,
        "stop_ids": list(data.stops),
        "data": {"sources": list(report.sources), "sha256": data.fingerprint},
        "lorafit": store.versions_of(["lorafit"]).get("lorafit"),
    }
    said = tuple(text for text in report.summary() if not text.startswith("would hurt: "))
    audited = DataAudited(said, report.harms, report.shown)
    return Job(trainer, settings, (*report.summary(), *settings.notices), audited)


def _check_evaluation(data: Sets, settings: Settings) -> None:
    if not data.evaluation and settings.training.eval_strategy != "no":
        raise ConfigError(
            "eval_share=0 holds nothing back, and eval_strategy="
            f"{settings.training.eval_strategy!r} needs an evaluation set.",
            why="Without one nobody can say when the adapter begins to memorise.",
            fix="Leave --eval-share out, name --eval-data, or write --eval-strategy no.",
        )


def check_folder(settings: Settings) -> None:
    """Nothing, if the run may be written where it is asked to be.

    Raises:
        OutputError: the folder cannot be written, or holds a run that is not to be resumed.
    """
    folder = Path(settings.training.output_dir)
    store.check_writable(folder)
    if not (settings.training.overwrite or settings.training.resume_from_checkpoint):
        store.check_free(folder)


def be_killed(*words: str) -> None:
    """The process that `Job.practise` starts and kills."""
    file, checkpoint, folder, steps = words
    prepared = prepare(load(Path(file), {}))
    rehearsal.go_on_from(prepared.trainer, Path(checkpoint), folder=Path(folder), steps=int(steps))


if __name__ == "__main__":
    be_killed(*sys.argv[1:])
