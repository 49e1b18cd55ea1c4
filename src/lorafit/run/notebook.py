"""A run inside a notebook: one output that stays in its place, with a bar and a table of readings.

Owns that output's html and what its rows are. Knows no other event: their lines are the console's.
"""

import time
from collections.abc import Callable
from html import escape
from importlib import import_module

from lorafit.amounts import duration
from lorafit.events import PROBE, Evaluated, Event, Logged, RunStarted

_ROWS, _SEEN, _SECONDS, _TRAINED = 200, 10, 0.5, "training"
_TITLES = ((_TRAINED, "training loss"), ("eval", "evaluation loss"), (PROBE, "probe loss"))
# rows from the bottom: drawn again, a box that scrolls would stand at its beginning
_BOX = (
    "max-height:24em;overflow:auto;display:flex;flex-direction:column-reverse;"
    "align-items:flex-start"
)
_CAPTION = (
    "nats per token; training loss: the mean of the steps since the last log; "
    "probe: training examples, evaluated like the evaluation set"
)


def output() -> Callable[[str], None]:
    """Shows html below the cell that runs; called again, in the place of what it has shown."""
    page = import_module("IPython.display")  # there in every notebook, and wanted nowhere else
    handle = page.display(page.HTML(""), display_id=True)
    return lambda html: handle.update(page.HTML(html))


class Cell:
    """Stands where a terminal has its bar, and is moved like it.

    Args:
        show: Shows html in the place of what it has shown.
    """

    def __init__(self, run: RunStarted, show: Callable[[str], None]) -> None:
        self._run, self._show = run, show
        self._began = time.monotonic()
        self._rows = dict[int, dict[str, float]]()
        self._epochs = dict[int, float]()
        self._bar = _bar(run.first_step, run.steps)
        self._draw()

    def update(self, _task: object, *, completed: int, description: str) -> None:
        """Move the bar to a step, with a text; drawn twice a second at most."""
        done, left = completed - self._run.first_step, self._run.steps - completed
        time_left = duration(left * (time.monotonic() - self._began) / max(done, 1))
        self._bar = _bar(completed, self._run.steps, text=f"{description} · {time_left} left")
        if time.monotonic() - self._drawn >= _SECONDS:
            self._draw()

    def stop(self) -> None:
        """Take the bar away; the table stays."""
        self._bar = ""
        self._draw()

    def takes(self, event: Event, mean: float | None) -> bool:
        """Whether the event now stands in the table, in its step's row. `mean` is the training loss
        of the steps since the last log, which a row between two logs has."""
        if not self._bar or not isinstance(event, Logged | Evaluated):
            return False
        row = self._rows.setdefault(event.step, {} if mean is None else {_TRAINED: mean})
        row[_TRAINED if isinstance(event, Logged) else event.name] = event.loss
        self._epochs[event.step] = event.epoch
        self._draw()
        return True

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._show(self._bar + (self._table() if self._rows else ""))

    def _table(self) -> str:
        used = {name: f"{name} loss" for row in self._rows.values() for name in row}
        columns = {name: title for name, title in _TITLES if name in used}
        columns |= {name: title for name, title in used.items() if name not in columns}
        heads = "".join(
            f"<th>{escape(title)}</th>" for title in ("step", "epoch", *columns.values())
        )
        lines = list[str]()
        for step in list(self._rows)[-_ROWS:]:
            losses = [self._rows[step].get(name) for name in columns]
            told = "".join("<td></td>" if x is None else f"<td>{x:.4f}</td>" for x in losses)
            lines.append(f"<tr><td>{step:,}</td><td>{self._epochs[step]:.2f}</td>{told}</tr>")
        hidden = len(self._rows) - len(lines)
        more = f"{hidden:,} earlier rows are in the journal; " if hidden else ""
        # where the head has left the box; kept at its top, it would need a theme's colours
        foot = f"<tfoot><tr>{heads}</tr></tfoot>" if len(lines) > _SEEN else ""
        return (
            f"<div style='{_BOX}'><table><caption>{more}{_CAPTION}</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>{foot}</table></div>"
        )


def _bar(step: int, steps: int, *, text: str = "") -> str:
    return (
        f"<div><progress value='{step}' max='{steps}'></progress> "
        f"step {step:,} of {steps:,} {escape(text)}</div>"
    )
