"""What a trainer keeps of a run and takes up again: checkpoints, which stay, which is best.

Owns what a checkpoint is made with and how a refused save ends a run; when one is made is the
trainer's to decide. Knows no loop.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lorafit.engine import moments
from lorafit.engine.optim import Reached
from lorafit.errors import ConfigError, ElsewhereError, OutputError
from lorafit.events import Saved
from lorafit.hooks import Hooks
from lorafit.model import adapters, identity
from lorafit.run import changes, checkpoint, circumstances, record, store
from lorafit.run.checkpoint import Kept
from lorafit.run.observers import watching_gradients
from lorafit.run.report import Page
from lorafit.session import Session


class Keeping(Hooks):
    """The part of a Trainer that writes checkpoints and reads them."""

    def _made_with(self) -> dict[str, Any]:
        """What a checkpoint of this run is made with: see `run/changes.py`."""
        arguments, laid = self._settings, self._packing
        knobs = arguments.to_sanitized_dict()
        with checkpoint.random_state_kept():
            rows = circumstances.of_rows(self.train_dataset)
        facts = {
            "data": rows,
            "base": identity.identity(self.model),
            "adapter": adapters.scaling_of(self.model),
            "template": {"chat": self.contract.get("chat_template")},
            "step": {"examples": arguments.effective_batch_size},
            "optimizer": moments.told(self.optimizer),
            "laid_out": {
                "layout": laid.layout, "tokens": laid.budget, "rows": arguments.train_batch_size
            },
            "machine": circumstances.of_machine(self._device),
            "versions": circumstances.of_versions(),
        }  # fmt: skip
        return {
            **self.panels,
            **{name: knobs[name] for name in arguments.knobs},
            **circumstances.flat(facts),
        }

    def _check_alike(self, run: Session) -> None:
        """Nothing, if all processes run the same.

        Raises:
            ConfigError: their bases or output folders differ.
        """
        base = {
            n: v for n, v in run.made_with.items() if n.startswith("base.") and n != "base.path"
        }
        for what, own in {"base": base, "output_dir": run.arguments.output_dir}.items():
            if not self._world.agrees(own):
                raise ConfigError(
                    f"The processes have not the same {what}.",
                    why="Each takes a share of one run.",
                    fix="Name the same everywhere; draw what is drawn (new embeddings, a time in "
                    "a name) from a seed, or in the first process alone.",
                )

    def _resume(self, run: Session, kept: Kept) -> list[str]:
        """Take up the run that a checkpoint kept; what is to be said of it.

        Raises:
            ConfigError: what has changed since makes that impossible, or another run.
        """
        said = changes.said(kept.state.made_with, run.made_with, accepted=run.arguments.accept)
        run.resume(kept, self.model)
        lost = self._callbacks.resume(kept.folder / "trainer_state.json")
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        return [f"resuming {kept.folder} at step {run.position.step}", *said, *lost]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        # By the name and parameters that subclasses know, who save more beside it.
        if self._running is None:
            raise ConfigError(
                "Trainer._save_checkpoint: no training is going on, so there is no step to keep.",
                fix="Call trainer.save_model(folder), or save from a callback while it trains.",
            )
        self._keep(self._running, whole=not self._running.arguments.save_only_model)

    def _keep(self, run: Session, *, whole: bool) -> None:
        self._check_finite()
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{run.position.step}"
        if self.state.best_global_step == run.position.step:
            self.state.best_model_checkpoint = str(folder)

        def write_files(partial: Path) -> None:
            self.save_model(str(partial), _internal_call=True)
            if self._overrides().any_of("save_model", "_save"):
                # resuming needs ours, whatever that wrote
                adapters.save_adapter(self.model, partial)
            self._callbacks.keep_state(partial / "trainer_state.json")

        if not self._world.is_first:
            run.is_saved(folder, whole=whole)
            return
        with self._saying_what_is_whole(run):
            store.check_space(folder.parent, run.checkpoint_bytes)
            size = run.save(folder, write_files, whole=whole)
        self.observers.tell(Saved(str(folder), run.position.step, size))
        self._rotate(run, folder)

    @contextmanager
    def _observing(self, run: Session) -> Generator[None]:
        """Inside, the first process writes journal and page, and sees whether gradients arrive."""
        if run.journal is None:
            yield
            return
        page = Page(Path(run.arguments.output_dir), say=self.observers.say)
        arriving = watching_gradients(self.observers, Reached(self.model))
        with self.observers.writing(run.journal, page), arriving:
            yield

    def _tidy(self, run: Session, kept: Kept | None) -> None:
        """Rotate after the checkpoint `kept` that is resumed, as a kill may have come before; what
        is the best so far is in the journal."""
        folder = Path(run.arguments.output_dir)
        if not kept or kept.folder.parent.resolve() != folder.resolve():
            return
        if run.arguments.stop_when_memorising:
            run.lowest = self._world.first(lambda: record.read(folder).verdict.best)
        if self._world.is_first:
            self._rotate(run, kept.folder)

    def _rotate(self, run: Session, last: Path) -> None:
        if run.arguments.save_total_limit:
            best = self.state.best_model_checkpoint
            kept = {Path(best)} if best else set[Path]()
            lowest = self._lowest(run)
            kept |= {lowest} if lowest else set()
            store.rotate(last, keep=run.arguments.save_total_limit, protected=kept)

    def _best(self, run: Session) -> Path | None:
        """The checkpoint that a run ends with, where it is not to end with its last step."""
        if run.arguments.load_best_model_at_end and self.state.best_model_checkpoint:
            return Path(self.state.best_model_checkpoint)
        return self._lowest(run)

    def _lowest(self, run: Session) -> Path | None:
        """That of the lowest evaluation loss, where memorising is watched for and it is there."""
        folder = Path(run.arguments.output_dir) / f"checkpoint-{run.lowest}"
        return folder if folder.is_dir() else None

    @contextmanager
    def _saying_what_is_whole(self, run: Session) -> Generator[None]:
        """A save that the system refuses ends the run: it could not be resumed from here."""
        try:
            yield
        except OutputError as error:
            raise OutputError(
                error.what,
                why=f"Training stopped at step {run.position.step} of {run.plan.steps}; "
                f"{run.saved_in or 'No checkpoint'} is whole and the last. {error.why}",
                fix=(*error.fix.splitlines(), f"Then resume: {self.resume_command}"),
            ) from error

    def _left_alone(self, run: Session, error: ElsewhereError) -> NoReturn:
        """Save at the last finished step, and raise: another process has ended."""
        run.abandon_step()
        self.observers.tell(*run.progress.read())
        if self._world.is_first and run.position.step and run.saved_at != run.position.step:
            self._keep(run, whole=True)
        self.observers.tell(run.ended_event("left alone"))
        saved = f"; {run.saved_in or 'no checkpoint'} is whole and the last"
        raise ElsewhereError(
            f"It has said why. Training stopped at step {run.position.step} of {run.plan.steps}"
            f"{saved if self._world.is_first else ''}.",
            fix=f"Resume: {self.resume_command}",
        ) from error
