"""report.html: everything there, everything escaped, nothing fetched, the same bytes again."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorafit.events import (
    DataAudited,
    Evaluated,
    Event,
    MemoryPeak,
    Notice,
    RunEnded,
    RunStarted,
    Sampled,
    StepEnd,
    StepSkipped,
)
from lorafit.run import report
from lorafit.run.journal import Journal
from lorafit.run.practice import Change, Finding, Practice, forecast
from lorafit.run.record import read

ASSETS = Path(report.__file__).parents[1] / "assets" / "uplot"
PAGE = Path(report.__file__).parent / "page"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
TURNS = (3.0, 2.0, 1.6, 1.4, 1.3, 1.25, 1.22, 1.20, 1.21, 1.22, 1.25, 1.29, 1.34, 1.4, 1.46)


def events(*, steps: int = 280, ended: bool = True) -> list[Event]:
    told: list[Event] = [
        Notice(f"note {HOSTILE}"),
        DataAudited((f"rows {HOSTILE}",), (f"harm {HOSTILE}",), ((f"ask {HOSTILE}", False),)),
        RunStarted(9, 4, 2, 2, 1, 280, 0, 14.0, 1, 2, "cpu", "fp32", "packed"),
    ]  # fmt: skip
    for n in range(steps + 1):
        if n:
            told.append(StepEnd(n, n / 20, 3 * 0.99**n, 1.0, 1e-4, 100, 50, 0.5))
        if n % 20 == 0:
            loss = TURNS[n // 20]
            nats, tokens = tuple(9 * loss + 0.1 * k for k in range(10)), (9,) * 10
            told.append(Evaluated("eval", n, n / 20, loss, 90, 10, 1.0, "asked", nats, tokens))
            told.append(Evaluated("probe", n, n / 20, 3 * 0.98**n, 90, 10, 1.0, "asked"))
            told.append(Sampled(n, f"asked {HOSTILE}", f"told {HOSTILE}", f"right {HOSTILE}"))
            told.append(MemoryPeak(n, 3_000_000_000, 4_000_000_000))
    told.append(StepSkipped(7, float("nan"), 1.0, (1, 2)))
    return [*told, *([RunEnded(steps, 14.0, 1.0, 200.0, "finished")] if ended else [])]


def write(folder: Path, told: list[Event]) -> Path:
    journal = Journal(folder)
    for event in told:
        journal(event)
    journal.close()
    (folder / "config.yaml").write_text(f"# Data\ndata: {HOSTILE}  # --data\nseed: 1  # default\n")
    return folder


def page(folder: Path) -> str:
    return report.render([read(folder)])


class Seen(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data


def told(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="told" type="application/json">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_the_verdict_comes_first_and_all_is_there(tmp_path: Path) -> None:
    seen = Seen(page(write(tmp_path / "run", events())))
    assert seen.text.index("memorising since step 140") < seen.text.index("best evaluation loss")
    for words in (
        *(
            "Evaluation loss rose 0.260 ±",
            "try fewer epochs".capitalize(),
            "finished after step 280",
        ),
        *("Learning rate", "Gradient norm", "Memory", "What it answers", "What it learns from"),
        *("Settings", "Environment", "step 7 was not applied: loss nan", "The numbers as a table"),
    ):
        assert words in seen.text, words
    assert ("html", {"lang": "en"}) in seen.tags


def test_many_answers_are_folded(tmp_path: Path) -> None:
    def asked(steps: range) -> Seen:
        folder = tmp_path / str(len(steps))
        return Seen(page(write(folder, [Sampled(n, "why?", f"as {n}") for n in steps])))

    few, many = asked(range(3)), asked(range(1, 6))
    assert [few.text.count(f"as {n}") for n in range(3)] == [1, 1, 1]
    assert "All 5 answers" in many.text and "answers" not in few.text.split("as 2")[1]
    # the first and the last stand outside as well
    assert [many.text.count(f"as {n}") for n in range(1, 6)] == [2, 1, 1, 1, 2]


def test_nothing_of_the_data_becomes_markup(tmp_path: Path) -> None:
    text = page(write(tmp_path / "a<b>", events()))
    seen = Seen(text)
    scripts = [attributes for tag, attributes in seen.tags if tag == "script"]
    assert len(scripts) == 3 and "<img" not in text and "alert(1)</script>" not in text
    assert seen.text.count(HOSTILE) >= 8


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = page(write(tmp_path / "run", events()))
    seen = Seen(text)
    named = [a[n] for _, a in seen.tags for n in ("src", "href", "action", "data") if n in a]
    assert named == ["data:,"] and "@import" not in text and "url(" not in text
    policy = next(a["content"] for _, a in seen.tags if a.get("http-equiv"))
    assert policy and "default-src 'none'" in policy and policy.count("'sha256-") == 2


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", events())
    report.write([folder], folder / "report.html")
    first = (folder / "report.html").read_bytes()
    report.write([folder], folder / "report.html")
    assert (folder / "report.html").read_bytes() == first and len(first) < 400_000


def test_it_refreshes_until_the_run_has_ended(tmp_path: Path) -> None:
    running = page(write(tmp_path / "a", events(ended=False)))
    assert "running, or killed, at step 280 of 280" in running
    assert told(running)["ended"] is False and 'http-equiv="refresh"' in running
    ended = page(write(tmp_path / "b", events()))
    assert told(ended)["ended"] is True and 'http-equiv="refresh"' not in ended


def test_the_figures_hold_the_numbers(tmp_path: Path) -> None:
    figures = {f["id"]: f for f in told(page(write(tmp_path / "run", events())))["figures"]}
    loss = figures["loss"]
    drawn = {s["label"]: s["values"] for s in loss["series"]}
    assert [v for v in drawn["evaluation"] if v is not None] == list(TURNS)
    assert loss["marks"] == [{"from": 140, "to": 280, "label": "best 140, then memorising"}]
    at = loss["x"].index(280)
    assert loss["band"]["low"][at] <= 1.46 <= loss["band"]["high"][at]
    assert [s["label"] for s in figures["memory"]["series"]] == ["peak", "planned"]


def test_long_runs_are_thinned_and_their_tables_too(tmp_path: Path) -> None:
    told_: list[Event] = [events()[2]]
    told_ += [StepEnd(n, 0.1, 1.0, 1.0, 1e-4, 100, 50, 0.5) for n in range(1, 5001)]
    text = page(write(tmp_path / "run", told_))
    (rate,) = (f for f in told(text)["figures"] if f["id"] == "lr")
    assert len(rate["x"]) <= 750 and rate["x"][-1] == 5000
    assert "Each point is the mean of 7 steps." in text and text.count("<tr>") < 400


@pytest.mark.parametrize("content", ["", '{"event": "RunSt', "{}\n", '{"event": "Odd"}\n'])
def test_a_journal_that_says_little_still_gives_a_page(tmp_path: Path, content: str) -> None:
    (tmp_path / "journal.jsonl").write_text(content)
    seen = Seen(page(tmp_path))
    assert "too few points to say" in seen.text and "nothing to draw" in seen.text
    assert "the journal is empty" in seen.text or "left out" in seen.text


def test_runs_side_by_side(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", events()), write(tmp_path / "two", events(steps=120))
    (two / "config.yaml").write_text("# Data\ndata: other  # --data\nseed: 1  # default\n")
    text = report.render([read(one), read(two)])
    seen = Seen(text)
    assert "2 runs side by side" in seen.text and "Settings that differ" in seen.text
    assert "seed" not in seen.text
    labels = [s["label"] for s in told(text)["figures"][0]["series"]]
    assert labels == ["one: evaluation", "two: evaluation"]


# ---- while the run goes ------------------------------------------------------------------------


def test_the_page_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    written: list[str] = []

    def keep(folders: list[Path], target: Path) -> None:
        clock[0] += 2.0  # what a page costs
        written.append(target.name)

    monkeypatch.setattr(report, "write", keep)
    follower = report.Page(tmp_path, say=said.append)
    every = events(steps=40)
    for event in every:
        clock[0] += 1.0
        follower(event)
    assert len(written) == 2  # at the start and at the end: in between it would cost over 1%
    clock[0] += 200
    follower(next(event for event in every if isinstance(event, StepEnd)))
    assert len(written) == 2, "steps are read with the log or the reading after them"
    follower(next(event for event in every if isinstance(event, Evaluated)))
    assert len(written) == 3 and said == []


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    follower = report.Page(tmp_path / "nowhere", say=said.append)
    for event in events(steps=3):
        follower(event)
    assert len(said) == 1 and said[0].startswith("report.html is not kept up to date: ")


# ---- how it looks ------------------------------------------------------------------------------


def test_the_library_is_the_one_that_was_published() -> None:
    digests = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, digest in digests.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
    assert f"(v{report.PLOTTING})" in (ASSETS / "uPlot.iife.min.js").read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_can_be_told_apart(mode: str) -> None:
    """WCAG 2.2 AA: 4.5 for text on both grounds, 3 for lines."""
    style = (PAGE / "report.css").read_text(encoding="utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    chosen = light if mode == "light" else dark.split("\n}\n")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", chosen))
    for text in ("ink", "soft", "link", "good", "warn", "bad", "calm"):
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    lines = (
        "smooth",
        "probe",
        "eval",
        "lr",
        "norm",
        "speed",
        "memory",
        *map("run-{}".format, range(6)),
    )
    for line in lines:
        assert contrast(colours[line], colours["paper"]) >= 3, line
    # the steps themselves are the ground that the mean is drawn on
    assert contrast(colours["step"], colours["paper"]) >= 2.5


PRACTISED = Practice(
    findings=(Finding("loss", "good", HOSTILE), Finding("stopping", "stop", HOSTILE, HOSTILE)),
    pieces=((HOSTILE, True),),
    curve=(3.0, 2.0, 1.5),
    time=forecast([(3, 1.0)], steps_to_come=5, besides=0.0),
    disk=1,
    facts=(HOSTILE,),
    change=Change(3.0, 2.0, 0.1, 8),
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("look", ["light", "dark", "phone", "side", "practice"])
def test_a_browser_draws_it_without_a_complaint(tmp_path: Path, look: str) -> None:
    folders = [write(tmp_path / name, events()) for name in ("one", "two")]
    target = tmp_path / "report.html"
    if look == "practice":
        target.write_text(report.render_practice(PRACTISED), encoding="utf-8")
    else:
        report.write(folders if look == "side" else folders[:1], target)
    size = "500,900" if look == "phone" else "1200,900"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    done = subprocess.run(
        [
            *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", "--enable-logging=stderr", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"),
            *("--virtual-time-budget=3000", *(dark if look == "dark" else [])),
            target.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # a request would be one too: the page's policy allows none, and says so there
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    figures = told(target.read_text(encoding="utf-8"))["figures"]
    assert done.stdout.count("<canvas") == len(figures) >= (1 if look == "practice" else 3)
    wide = re.findall(r'<canvas[^>]*style="[^"]*width: (\d+)px', done.stdout)
    assert all(int(pixels) <= int(size.split(",")[0]) for pixels in wide)
