"""docs/arguments.md, compat.md and the table of resuming.md, made from the panels and the tables.

`python -m tests.pages` rewrites them; test_arguments.py, test_compat.py and run/test_changes.py
hold them to it.
"""

from collections.abc import Iterable
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from lorafit.arguments import ONCE, PANELS, PYTHON_ONLY, TrainingArguments
from lorafit.names import ALIASES, DIFFERENT, NO_OPS, OLD_VALUES, REFUSED
from lorafit.panel import Knob, spoken
from lorafit.run import changes
from tests.drop_in_table import ARGUMENTS, HABITS, TRAINER

DOCS = Path(__file__).parents[1] / "docs"


def arguments_page() -> str:
    """docs/arguments.md: every knob with default, recipe, range and help."""
    parts = [
        "# Arguments",
        "Made from `src/lorafit/arguments.py` by `python -m tests.pages`; do not edit.",
        "A knob is a flag (`--learning-rate`), a key of a YAML file (`learning_rate: 2e-4`) and a "
        "keyword in Python. Python starts from *default*, which is transformers' own; the command "
        "line and `TrainingArguments.recipe(...)` start from *recipe*. Flags win over the file. A "
        "configuration file is one flat mapping: no sections, anchors or tags, each key once.",
        f"Knobs under *{PYTHON_ONLY}* serve scripts; those under *{ONCE}* are left out of the "
        "`config.yaml` that a run writes.",
    ]
    for panel in PANELS:
        parts += [f"## {panel.__name__}", (panel.__doc__ or "").splitlines()[0]]
        for group, knobs in groupby(panel.knobs.values(), key=lambda knob: knob.group):
            head = ("knob", "holds", "default", "recipe", "what it does")
            parts += [f"### {group}", table(head, map(_knob_row, knobs))]
    return "\n\n".join(parts) + "\n"


def compat_page() -> str:
    """docs/compat.md: what becomes of transformers' Trainer and of every training argument."""
    import transformers

    current = [field.name for field in fields(transformers.TrainingArguments)]
    ours = [name for name in TrainingArguments.knobs if name not in current]
    dropped = [name for name in {**ALIASES, **NO_OPS, **REFUSED} if name not in current]
    head = ("transformers", "here", "how")
    values = ((f"`{name}={old!r}`", "alias", f"`{new!r}`")
              for (name, old), new in OLD_VALUES.items())  # fmt: skip
    return "\n\n".join(
        [
            "# transformers' Trainer in lorafit",
            "Made from `src/lorafit/names.py` and `tests/drop_in_table.py` by `python -m "
            "tests.pages`; do not edit. Scripts of every kind run under both in "
            "`tests/parity/scripts`, and what they leave is compared.",
            "*same*: name, meaning and default are transformers'. *better*, *different*: honoured, "
            "but not as there. *alias*: taken as another name. *no effect*: accepted, and one line "
            "says why nothing is lost. *refused*: an error with the reason, unless the value asks "
            "for nothing (`push_to_hub=False`). *absent*: there is no such name.",
            "## The Trainer",
            table(head, TRAINER),
            "## What scripts rely on",
            table(head, HABITS),
            "## Methods of TrainingArguments",
            table(head, ARGUMENTS),
            f"## The {len(current)} fields of transformers 5.23",
            table(head, map(_name_row, current)),
            "## Names that transformers dropped since 4.40, and Seq2SeqTrainingArguments' own",
            table(head, [*map(_name_row, dropped), *values]),
            "## lorafit's own",
            ", ".join(f"`{name}`" for name in ours) + ": see [arguments](arguments.md).",
        ]
    ) + "\n"  # fmt: skip


CLASSES = "<!-- classes: made by python -m tests.pages -->"


def resuming_page() -> str:
    """docs/resuming.md as it stands, with the classes of knobs and facts as they are."""
    before, _, rest = (DOCS / "resuming.md").read_text(encoding="utf-8").partition(CLASSES)
    _, _, after = rest.partition(CLASSES)
    facts = {kind: [n for n, of in changes.FACTS.items() if of == kind] for kind in KINDS}
    knobs = {
        "harmless": changes.HARMLESS, "rounding": changes.ROUNDING, "changes": changes.CHANGES,
        "impossible": (),
    }  # fmt: skip
    rows = [(f"*{kind}*", *(_names(of[kind]) for of in (knobs, facts))) for kind in KINDS]
    shown = [(f"`{fact}`", _names(names)) for fact, names in changes.SHOWN.items()]
    tables = [
        table(("class", "arguments", "facts"), rows),
        "These arguments are not compared themselves, but what they make:",
        table(("fact", "arguments"), shown),
    ]
    return before + CLASSES + "\n\n" + "\n\n".join(tables) + "\n\n" + CLASSES + after


KINDS = ("harmless", "rounding", "changes", "impossible")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _knob_row(knob: Knob) -> tuple[str, ...]:
    recipe = "" if knob.recipe == knob.default else _value(knob.recipe)
    return f"`{knob.name}`", _holds(knob), _value(knob.default), recipe, knob.help


def _holds(knob: Knob) -> str:
    if knob.choices:
        return ", ".join(f"`{choice}`" for choice in knob.choices if choice)
    low, high = knob.span
    limits = f"from {low:g}" if low is not None else ""
    limits += f" to below {high:g}" if high is not None else ""
    return ", ".join(part for part in (spoken(knob.kind), limits, knob.unit) if part)


def _value(value: Any) -> str:
    return "" if value in (None, "") else f"`{value}`"


def _name_row(name: str) -> tuple[str, ...]:
    """Exactly one of the tables, or the panel, has the name."""
    if name in ALIASES:
        alias = ALIASES[name]
        pairs = (f"`{old!r}` is `{new!r}`" for old, new in alias.values if new is not None)
        return f"`{name}`", "alias", "; ".join([f"`{alias.to}`", *pairs])
    if name in NO_OPS:
        return f"`{name}`", "no effect", NO_OPS[name].why
    if name in REFUSED:
        return f"`{name}`", "refused", f"{REFUSED[name].why} {REFUSED[name].instead}"
    return f"`{name}`", *(("different", DIFFERENT[name]) if name in DIFFERENT else ("same", ""))


if __name__ == "__main__":
    DOCS.mkdir(exist_ok=True)
    (DOCS / "arguments.md").write_text(arguments_page(), encoding="utf-8")
    (DOCS / "compat.md").write_text(compat_page(), encoding="utf-8")
    (DOCS / "resuming.md").write_text(resuming_page(), encoding="utf-8")
