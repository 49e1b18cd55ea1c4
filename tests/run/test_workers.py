"""Work by several processes comes out as by one: in order, errors too, to the last byte on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorafit.arguments import DataArguments
from lorafit.data import examples, sets
from lorafit.errors import DataError, LorafitError
from lorafit.run import workers
from lorafit.run.workers import spread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")

# leaves the thinking out of all answers but the last
TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>"
    "{{ one.reasoning_content if one.reasoning_content and loop.last else '' }}"
    "{{ one.content }}{{ eos_token if one.role == 'assistant' else '' }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)
BAD = {23: "{", 61: '{"messages": 5}', 88: "[]", 89: '{"messages": []}', 120: '{"text": "x"}'}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 2)


def here(number: int) -> tuple[int, int]:
    return number, os.getpid()


def test_what_is_made_comes_in_order_from_as_many_processes_as_there_are_cores() -> None:
    made = list(spread(here, range(50)))
    assert [number for number, _ in made] == list(range(50))
    few = {process for _, process in made[: workers._FEW]}
    assert few == {os.getpid()} and not few & {process for _, process in made[workers._FEW :]}
    assert len({process for _, process in made}) == 3
    assert [process for _, process in spread(here, range(workers._FEW))] == list(few) * workers._FEW


def test_one_core_has_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 1)
    assert {process for _, process in spread(here, range(20))} == {os.getpid()}


@pytest.mark.parametrize(("bad", "last"), [(20, 30), (40, 30), (29, 29), (31, 30)])
def test_an_error_comes_in_its_turn(bad: int, last: int) -> None:
    def items() -> Iterator[int]:
        yield from range(last)
        raise DataError("read", fix="less")

    def work(number: int) -> int:
        if number == bad:
            raise DataError("worked", fix="less")
        return number

    made: list[int] = []
    with pytest.raises(DataError) as raised:
        made.extend(spread(work, items()))
    assert (raised.value.what, raised.value.fix) == ("worked" if bad < last else "read", "less")
    assert made == list(range(min(bad, last)))


def test_a_process_that_is_killed_is_named() -> None:
    def work(number: int) -> None:
        if number == 15:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LorafitError, match="was killed"):
        list(spread(work, range(30)))


def test_processes_end_with_their_parent_and_leave_interrupts_to_it() -> None:
    code = (
        "import itertools, os, signal\n"
        "from lorafit.run import workers\n"
        "workers._cores = lambda: 2\n"
        "running = workers.spread(lambda _: os.getpid(), itertools.count())\n"
        "for made in [next(running) for _ in range(10)][8:]:\n"
        "    os.kill(made, signal.SIGINT)\n"
        "    print(made, flush=True)\n"
        "assert [next(running) for _ in range(2)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = ran.stdout.split()
    assert len(left) == 2 and not ran.stderr
    for _ in range(200):
        if not any(map(lives, left)):
            return
        time.sleep(0.05)
    pytest.fail("a process outlived its parent")


def lives(number: str) -> bool:
    try:
        return bool(Path("/proc", number, "cmdline").read_bytes())  # empty once it has ended
    except OSError:
        return False


def rows(file: Path) -> None:
    """Conversations of one to three answers with thoughts, and bad ones among them."""
    with file.open("w") as out:
        for number in range(240):
            turns = [
                turn
                for n in range(1 + number % 3)
                for turn in (
                    {"role": "user", "content": f"what {number} {n}"},
                    {"role": "assistant", "content": f"so {n}", "reasoning_content": f"hm {n} "},
                )
            ]
            out.write(BAD.get(number, json.dumps({"messages": turns})) + "\n")


@pytest.mark.parametrize("skip", [True, False])
def test_examples_are_those_of_one_process_to_the_last_byte(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    monkeypatch.setattr(examples, "_CHUNK", 15)
    monkeypatch.setattr(workers, "_FEW", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    rows(tmp_path / "rows.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    data = DataArguments(
        data=str(tmp_path / "rows.jsonl"), skip_bad_rows=skip, max_length=60, eval_share=0
    )
    outcomes = []
    for given in (map, spread):
        monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / str(len(outcomes))))
        maker = sets.Maker(data, tokenizer, identity="", limit=None, spread=given)
        if skip:
            (read,) = sets.make(maker, seed=0).reads
            assert read.report.unrolled and read.report.cut and read.skipped[0] >= len(BAD)
            files = sorted(file for file in read.stored.folder.iterdir() if file.name != "key.json")
            outcomes.append([(file.name, file.read_bytes()) for file in files])
        else:
            with pytest.raises(DataError) as raised:
                sets.make(maker, seed=0)
            outcomes.append((str(raised.value), vars(raised.value)))
    assert outcomes[0] == outcomes[1]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_what_cannot_be_sent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    with pytest.raises(LorafitError, match="cannot go to another process"):
        list(workers.spread(len, [[lambda: 0]] * 20))
