"""What stands in a notebook while a run goes, and what a real one keeps of it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lorafit.events import PROBE, Evaluated, Logged, Notice, RunStarted
from lorafit.run import notebook
from lorafit.run.notebook import Cell

ROOT = Path(__file__).parents[2]
STARTED = RunStarted(1200, 16, 4, 4, 1, 75, 0, 1.0, 100, 10_000, "cpu", "fp32", "as_given")


def read(name: str, step: int, loss: float) -> Evaluated:
    return Evaluated(name, step, step / 75, loss, 9, 8, 0.1, "reading")


def table(html: str) -> list[list[str]]:
    """The cells of each row, the head's first."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_a_row_for_each_step_that_was_logged_or_read() -> None:
    shown: list[str] = []
    cell = Cell(STARTED, shown.append)
    assert table(shown[-1]) == [] and "step 0 of 75" in shown[-1]
    for event, mean in [
        (read("eval", 0, 5.5), None),
        (read(PROBE, 0, 5.25), None),
        (Logged(10, 10 / 75, 4.0, 1.0, 1e-3), 4.125),
        (read("eval", 15, 3.5), 3.75),
        (Logged(20, 20 / 75, math.nan, 1.0, 1e-3), math.nan),
    ]:
        before = len(shown)
        assert cell.takes(event, mean) and len(shown) == before + 1
    assert table(shown[-1]) == [
        ["step", "epoch", "training loss", "evaluation loss", "probe loss"],
        ["0", "0.00", "", "5.5000", "5.2500"],
        ["10", "0.13", "4.0000", "", ""],
        ["15", "0.20", "3.7500", "3.5000", ""],
        ["20", "0.27", "nan", "", ""],
    ]


def test_what_has_no_place_in_the_table_is_left_to_the_console() -> None:
    cell = Cell(STARTED, lambda _: None)
    assert not cell.takes(Notice("said"), 1.0)
    cell.stop()
    assert not cell.takes(read("eval", 75, 1.0), None)


def test_the_bar_moves_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "_SECONDS", 0.0)
    shown: list[str] = []
    cell = Cell(STARTED, shown.append)
    cell.update(0, completed=30, description="loss 1.25 <b>")
    assert "value='30' max='75'" in shown[-1] and "step 30 of 75 loss 1.25 &lt;b&gt;" in shown[-1]
    assert re.search(r" · \d+ s left", shown[-1])
    cell.takes(Logged(30, 0.4, 1.25, 1.0, 1e-3), None)
    cell.stop()
    assert "progress" not in shown[-1] and len(table(shown[-1])) == 2


def test_steps_between_two_drawings_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "_SECONDS", 1e9)
    shown: list[str] = []
    cell = Cell(STARTED, shown.append)
    for step in range(1, 11):
        cell.update(0, completed=step, description="")
    assert len(shown) == 1
    cell.takes(Logged(10, 0.1, 1.25, 1.0, 1e-3), None)
    assert len(shown) == 2 and "step 10 of 75" in shown[-1]


def test_names_are_escaped_and_long_tables_cut() -> None:
    shown: list[str] = []
    cell = Cell(STARTED, shown.append)
    for step in range(205):
        cell.takes(read("eval_<i>", step, 1.0), None)
    head, first, *rest, foot = table(shown[-1])
    assert head == foot == ["step", "epoch", "eval_&lt;i&gt; loss"]
    assert first[0] == "5" and len(rest) == 199
    assert "5 earlier rows are in the journal" in shown[-1]


TRAIN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "src")!r}]
from pathlib import Path
from tests import tiny

def train(folder, disable_tqdm):
    trainer = tiny.make(
        Path(folder), data=tiny.plain(240), eval_dataset=tiny.plain(16), max_steps=60,
        logging_steps=20, eval_strategy="steps", eval_steps=15, save_strategy="steps",
        save_steps=30, disable_tqdm=disable_tqdm,
    )
    trainer.train()
"""


def executed(folder: Path, *cells: str) -> list[Any]:
    """What each cell has put out in the end, as a real kernel and client keep it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbclient.NotebookClient(
        made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [
        [out["data"]["text/html"] for out in cell["outputs"] if out["output_type"] != "stream"]
        for cell in made["cells"]
    ]


@pytest.mark.slow
def test_a_real_notebook_keeps_one_table_and_the_lines(tmp_path: Path) -> None:
    _, live, plain = executed(tmp_path, TRAIN, "train('live', None)", "train('plain', True)")
    tables = [html for html in live if "<table>" in html]
    assert len(tables) == 1 and "<progress" not in "".join(live)
    want: dict[int, dict[str, float]] = {}
    window: list[float] = []
    for line in (tmp_path / "live" / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "StepEnd":
            window.append(event["loss"])
        elif event["event"] in ("Logged", "Evaluated"):
            mean = {"training": sum(window) / len(window)} if window else {}
            row = want.setdefault(event["step"], mean)
            row[event.get("name", "training")] = event["loss"]
            window = [] if event["event"] == "Logged" else window
    names = ("training", "eval", PROBE)
    assert table(tables[0])[1:] == [
        [
            f"{step}", f"{step / 60:.2f}",
            *(f"{row[name]:.4f}" if name in row else "" for name in names),
        ]
        for step, row in want.items()
    ]  # fmt: skip
    assert list(want) == [15, 20, 30, 40, 45, 60]
    assert sum("saved" in html for html in live) == 2 and "finished after 60 steps" in live[-1]
    assert not any("eval loss" in html for html in live)
    # asked to draw nothing, it says all of it in lines
    assert "<table" not in "".join(plain) and sum("eval loss" in html for html in plain) == 4
