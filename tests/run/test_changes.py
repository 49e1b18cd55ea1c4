"""Every knob is classed once, and a difference is told by its class."""

import pytest
from tests import pages

from lorafit.arguments import PANELS
from lorafit.errors import ConfigError
from lorafit.run import changes
from lorafit.run.changes import CHANGES, FACTS, HARMLESS, ROUNDING, SHOWN, class_of, said, since

KNOBS = [name for panel in PANELS for name in panel.knobs]
CLASSED = [*HARMLESS, *ROUNDING, *CHANGES, *(n for names in SHOWN.values() for n in names)]


def test_every_knob_is_classed_once() -> None:
    assert sorted(CLASSED) == sorted(KNOBS)


def test_what_shows_a_knob_is_a_fact() -> None:
    assert set(SHOWN) <= set(FACTS)
    assert {class_of(name) for name in KNOBS} == {"harmless", "rounding", "changes"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("save_steps", "harmless"), ("token_budget", "rounding"), ("learning_rate", "changes"),
        ("data.rows", "changes"), ("base.path", "harmless"), ("base.headers_sha256", "changes"),
        ("base.parameters", "impossible"), ("machine.threads", "rounding"),
        ("optimizer.kind", "impossible"), ("nobody.knows", "changes"),
    ],
)  # fmt: skip
def test_classes(name: str, kind: str) -> None:
    assert class_of(name) == kind
    found = since({name: 1}, {name: 2})
    told = {k: vars(found)[k] for k in ("rounding", "changes", "impossible")}
    assert told == {k: ((f"{name}=2 (was 1)",) if k == kind else ()) for k in told}


def test_what_is_not_known_is_not_compared() -> None:
    found = since({"learning_rate": None, "seed": 3}, {"learning_rate": 1, "seed": None, "bf16": 1})
    assert found == changes.Changes((), (), ())


def test_what_changes_the_run_must_be_accepted() -> None:
    kept, now = {"seed": 1, "layout": "packed"}, {"seed": 2, "layout": "as_given"}
    with pytest.raises(ConfigError, match=r"(?s)seed=2 \(was 1\).*--accept"):
        said(kept, now, accepted=False)
    changed, rounded = said(kept, now, accepted=True)
    assert "seed=2 (was 1)" in changed and "layout" not in changed
    assert "layout='as_given' (was 'packed')" in rounded
    assert said(kept, kept, accepted=False) == []


def test_what_is_impossible_is_refused_even_so() -> None:
    with pytest.raises(ConfigError, match="cannot go on with optimizer"):
        said({"optimizer.kind": "SGD"}, {"optimizer.kind": "AdamW"}, accepted=True)


def test_a_checkpoints_text_is_escaped() -> None:
    (line,) = since({"seed": "\x1b[31m" * 40}, {"seed": 1}).changes
    assert "\x1b" not in line and len(line) < 150


def test_the_page_says_so() -> None:
    page = (pages.DOCS / "resuming.md").read_text(encoding="utf-8")
    assert page == pages.resuming_page(), "run python -m tests.pages"


def test_what_keeps_the_step_over_other_processes_is_said() -> None:
    kept = {"step.examples": 16, "machine.processes": 2, "per_device_train_batch_size": 2}
    now = kept | {"step.examples": 8, "machine.processes": 1}
    hint = "gradient_accumulation_steps=8 keeps 16 examples a step with 1 process"
    assert said(kept, now, accepted=True)[-1] == hint
    with pytest.raises(ConfigError, match=hint):
        said(kept, now, accepted=False)
    for other in ({"machine.processes": 3}, {"step.examples": 16}, {"machine.processes": 2}):
        assert "keeps" not in str(said(kept, now | other, accepted=True))
