"""Adapters, bases and tokenizers with one thing changed at random: loaded, or refused in words. No
other exception, no crash, no wait, no memory to speak of; nothing run, written or asked of others.

The corpus of known attacks is `test_malicious.py`; configurations in YAML are in `test_config.py`.
"""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from lorafit.arguments import ModelArguments
from lorafit.errors import LorafitError
from lorafit.model import adapters, base, tokens
from tests.faults import spoil

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="each is tried in a fork")

SECONDS, BYTES = 60, 6 << 30
"""What one file may take of time and, beyond what the process has, of address space."""
Where = strategies.SearchStrategy[tuple[str, str, spoil.Change]]


def files(kind: str, *names: str) -> Where:
    """A file of an adapter or a base, and what is done to it."""
    return strategies.sampled_from(names).flatmap(
        lambda name: strategies.tuples(
            strategies.just(kind),
            strategies.just(name),
            spoil.changes_of_tensors()
            if name.endswith(".safetensors")
            else spoil.changes_of_json(),
        )
    )


ANY = files("adapter", adapters.ADAPTER_CONFIG, adapters.ADAPTER, adapters.CONTRACT) | files(
    "base", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    "tokenizer.json",
)  # fmt: skip


def harms(event: str, given: tuple[Any, ...]) -> bool:
    """What an audit hook hears that nobody but an attacker brings about."""
    if event == "open" and isinstance(given[0], str | bytes):
        writes = isinstance(given[1], str) and bool(set(given[1]) & set("wax+"))
        return "canary" in os.fsdecode(given[0]) or (writes and given[0] != os.devnull)
    if event == "import":
        return "canary" in str(given[0])
    if event == "subprocess.Popen":  # ours: patterns and templates that are tried out
        return given[1][1] != "-I" and "sandbox" not in given[1][1]
    return event.startswith(("os.system", "os.exec", "os.spawn", "os.posix_spawn", "socket.conn"))


def outcome(load: Callable[[], object]) -> str:
    """What comes of `load` in a process of its own: "loaded", "refused", or what it was instead."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:

        def watch(event: str, given: tuple[Any, ...]) -> None:
            if harms(event, given):
                os.write(tell, f"HARM {event} {given!r}"[:500].encode())
                os._exit(3)

        terminal = os.open(os.devnull, os.O_WRONLY)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
        sys.addaudithook(watch)
        try:
            load()
            said = "loaded"
        except LorafitError as error:
            said = "refused" if error.what else "without words"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(tell, said[:500].encode("utf-8", "replace"))
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as answer:
        said = answer.read().decode()
    _, status = os.waitpid(pid, 0)
    return said or f"ended with {os.waitstatus_to_exitcode(status)}"


@pytest.fixture(scope="module")
def homes(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter with all its files, and its base."""
    stories, home = shared / "models" / "stories260K", tmp_path_factory.mktemp("strangers")
    given = ModelArguments(model=str(stories), lora_r=4, lora_alpha=8)
    made = adapters.attach(base.load_model(given), given)
    contract = {
        "base": {"name": str(stories), "path": str(stories)}, "shape": "chat", "stop_ids": [2],
        "chat_template": "{{ messages[0].content }}", "metrics": {"step": 1},
    }  # fmt: skip
    adapters.save_adapter(made, home / "adapter", contract=contract)
    shutil.copytree(stories, home / "base")
    for path in (home / "base").iterdir():
        path.chmod(0o644)
    (home / "base" / "canary_module.py").write_text("open('canary', 'w')")
    return {"adapter": home / "adapter", "base": home / "base", "over": stories}


def tried(homes: dict[str, Path], to: Path, how: tuple[str, str, spoil.Change]) -> str:
    kind, name, change = how
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(homes[kind], to)
    (to / name).chmod(0o644)
    (to / name).write_bytes(spoil.spoilt((to / name).read_bytes(), change))

    def load() -> None:
        if kind == "adapter":
            adapters.load_tuned(to, base=str(homes["over"]))
        elif not name.startswith("tokenizer"):
            base.load_model(ModelArguments(model=str(to)))
        else:
            tokens.load_tokenizer(str(to))

    return outcome(load)


EXAMPLES: dict[str, Any] = {
    "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture],
}  # fmt: skip


@settings(max_examples=15, **EXAMPLES)
@given(how=ANY)
def test_a_strangers_file_is_loaded_or_refused(
    homes: dict[str, Path], tmp_path: Path, how: tuple[str, str, spoil.Change]
) -> None:
    assert tried(homes, tmp_path / "x", how) in ("loaded", "refused")


@pytest.mark.slow
@settings(max_examples=400, **EXAMPLES)
@given(how=ANY)
def test_many_are(
    homes: dict[str, Path], tmp_path: Path, how: tuple[str, str, spoil.Change]
) -> None:
    assert tried(homes, tmp_path / "x", how) in ("loaded", "refused")
