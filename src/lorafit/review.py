"""Settings -> the examples of a run, and the report on them; no weight is read.

Shared by `check`, which ends here, and `job`, which goes on. Imports neither torch nor peft, so
that a report takes a second or two and not ten.
"""

from typing import Any

from lorafit.config import Settings
from lorafit.data import audit, sets, template
from lorafit.data.audit import Audit
from lorafit.data.read import Source
from lorafit.data.sets import Sets
from lorafit.model import tokens
from lorafit.run.console import counting
from lorafit.run.workers import spread


def make_sets(settings: Settings, given: tuple[Source, Source] | None = None) -> tuple[Sets, Any]:
    """The examples, and the tokenizer that made them; no weight is read.

    Raises:
        UsageError: something in data or tokenizer cannot be used.
    """
    chosen = settings.model
    tokenizer = tokens.load_tokenizer(
        chosen.model, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code
    )
    # a plain template travels with the adapter, as the tokenizer's own does
    tokenizer.chat_template = tokenizer.chat_template or template.chat_template_of(tokenizer)
    with counting("rows") as moved:
        maker = sets.Maker(
            settings.data,
            tokenizer,
            identity=tokens.tokenizer_identity(tokenizer),
            limit=tokens.context_of(chosen, tokenizer),
            moved=moved,
            spread=spread,
        )
        return sets.make(maker, seed=settings.training.seed, given=given), tokenizer


def check(settings: Settings) -> tuple[Audit, tuple[str, ...]]:
    """The report on the data that a run with these settings would learn from, and its notices.

    Raises:
        UsageError: something in data or tokenizer cannot be used.
    """
    data, tokenizer = make_sets(settings)
    return audited(data, tokenizer, settings=settings), settings.notices


def audited(data: Sets, tokenizer: Any, *, settings: Settings) -> Audit:
    """The report on these sets, as `check` gives it and a run begins with it."""
    size = settings.training.per_device_train_batch_size
    return audit.audit(data, tokenizer, batch_size=size)
