"""Three panels -> a Trainer ready to run. Shared by train and demo, so that cli.py only parses.

Everything that can be wrong in a user's settings, files and folders is found here, before anything
is written. Knows the order of the rooms, not what happens inside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from lorafit import compat
from lorafit.arguments import DataArguments
from lorafit.config import Settings, dump
from lorafit.data import examples, formats, read, template
from lorafit.data.collate import PadCollator
from lorafit.data.examples import Truncation
from lorafit.data.read import Row
from lorafit.data.template import Supervise
from lorafit.errors import ConfigError
from lorafit.model import adapters, base
from lorafit.run import store
from lorafit.trainer import Trainer


@dataclass(frozen=True)
class Rows:
    """What a run trains on and evaluates on, all of one shape; `note` says where it came from."""

    train: Sequence[Row]
    evaluation: Sequence[Row]
    shape: formats.Shape
    note: str


@dataclass(frozen=True)
class Job:
    """A trainer, and lines for a person about what was learnt on the way to it."""

    trainer: Trainer
    settings: Settings
    notes: tuple[str, ...]

    def run(self) -> Path:
        """Train, with config.yaml beside the journal, and save the final adapter; its folder."""
        arguments = self.settings.training
        folder = Path(arguments.output_dir)
        if arguments.overwrite:
            store.clear_run(folder)
        store.make_folder(folder)
        (folder / "config.yaml").write_text(dump(self.settings), encoding="utf-8")
        self.trainer.observers.say(*self.notes)
        self.trainer.train(arguments.resume_from_checkpoint)
        self.trainer.save_model(str(folder))
        return folder


def prepare(settings: Settings, rows: Rows | None = None) -> Job:
    """Read, encode, load, attach.

    Args:
        rows: The data, where it does not come from files.

    Raises:
        UsageError: whatever the user got wrong, before anything is written.
    """
    check_folder(settings)
    base.check_base(settings.model.model)
    data, chosen = settings.data, settings.model
    rows = rows or read_rows(data, seed=settings.training.seed)
    _check_evaluation(rows, settings)
    shape = rows.shape
    tokenizer = base.load_tokenizer(
        chosen.model, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code
    )
    stops = template.stop_ids(tokenizer, is_chat=shape.is_chat)
    # a plain template travels with the adapter, as the tokenizer's own does
    tokenizer.chat_template = template.chat_template_of(tokenizer)
    model = base.load_model(chosen)
    limit = data.max_length or base.context_length(model)
    train = _encoded(rows.train, shape, tokenizer=tokenizer, data=data, limit=limit)
    held = rows.evaluation
    evaluation = (
        _encoded(held, shape, tokenizer=tokenizer, data=data, limit=limit) if held else None
    )
    # the adapter's first weights are drawn here, before the trainer seeds its own run
    compat.set_seed(settings.training.seed, deterministic=settings.training.full_determinism)
    trainer = Trainer(
        model=adapters.attach(model, chosen),
        args=settings.training,
        data_collator=PadCollator(stops[0], side=tokenizer.padding_side),
        train_dataset=_features(train.examples),
        eval_dataset=_features(evaluation.examples) if evaluation else None,
        processing_class=tokenizer,
    )
    trainer.contract |= {
        "shape": "chat" if shape.is_chat else "raw",
        "chat_template": tokenizer.chat_template,
        "stop_ids": list(stops),
        "data": {"rows": rows.note, **_fingerprint(data.data)},
        "lorafit": version("lorafit"),
    }
    notes = (
        f"{rows.note}; {shape}",
        f"train: {train.report}",
        f"evaluation: {evaluation.report if evaluation else 'none'}",
        *settings.notices,
    )
    return Job(trainer, settings, notes)


def _check_evaluation(rows: Rows, settings: Settings) -> None:
    if not rows.evaluation and settings.training.eval_strategy != "no":
        raise ConfigError(
            "eval_share=0 holds nothing back, and eval_strategy="
            f"{settings.training.eval_strategy!r} needs an evaluation set.",
            why="Without one nobody can say when the adapter begins to memorise.",
            fix="Leave --eval-share out, name --eval-data, or write --eval-strategy no.",
        )


def _fingerprint(name: str) -> dict[str, str]:
    """The hash of a data file; nothing for folders and Hub names."""
    file = Path(name)
    return {"sha256": store.sha256(file)} if file.is_file() else {}


def check_folder(settings: Settings) -> None:
    """Nothing, if the run may be written where it is asked to be.

    Raises:
        OutputError: the folder cannot be written, or holds a run that is not to be resumed.
    """
    folder = Path(settings.training.output_dir)
    store.check_writable(folder)
    if not (settings.training.overwrite or settings.training.resume_from_checkpoint):
        store.check_free(folder)


def read_rows(data: DataArguments, *, seed: int) -> Rows:
    """The rows that `data` names; some are held back where it names none to evaluate on."""
    rows = read.read_rows(data.data, split=data.split)
    held = read.read_rows(data.eval_data, split=data.split) if data.eval_data else []
    shape = formats.detect(
        [*rows, *held],
        wanted=data.shape,
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
    )
    where = data.data
    if held:
        where += f", evaluated on {data.eval_data}"
    elif data.eval_share:
        rows, held = examples.hold_out(rows, share=data.eval_share, seed=seed)
        where += ", some held back to evaluate on"
    rows, held = rows[: data.max_rows or None], held[: data.max_eval_rows or None]
    return Rows(rows, held, shape, f"{len(rows):,} + {len(held):,} rows of {where}")


def _encoded(
    rows: Sequence[Row],
    shape: formats.Shape,
    *,
    tokenizer: Any,
    data: DataArguments,
    limit: int | None,
) -> examples.Built:
    return examples.build(
        [formats.sample(row, shape) for row in rows],
        tokenizer,
        max_length=limit,
        truncation=cast(Truncation, data.truncation),
        supervise=cast(Supervise, data.supervise),
    )


def _features(built: Sequence[examples.Example]) -> list[dict[str, Any]]:
    return [{"input_ids": example.ids, "labels": example.labels} for example in built]
