"""Scripts of every kind, run with transformers' Trainer and again with its import changed.

Each leaves an `outcome`: logs, files, order of calls. All of it must be the same, numbers to
rounding; what is meant to differ is taken out here, by name.
"""

import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

LONG = ("optimisers", "resume", "streaming", "subclass")
SCRIPTS = [
    pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path
    for path in sorted((Path(__file__).parent / "scripts").glob("*.py"))
]
IMPORT = "from transformers import Trainer, TrainingArguments\n"
OF_THE_CLOCK = re.compile(r".*_(runtime|per_second|runtime_.*)$")


def outcome_of(script: Path, folder: Path, *, ours: bool) -> Any:
    """What the script leaves when it is run in `folder`."""
    text = script.read_text()
    assert text.count(IMPORT) == 1
    folder.mkdir()
    copy = folder / script.name
    copy.write_text(
        text.replace(IMPORT, IMPORT.replace("transformers", "lorafit")) if ours else text
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path(str(copy))["outcome"]


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Each place in which two outcomes differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        missing = [f"{where}: only one has {key}" for key in theirs.keys() ^ ours.keys()]
        shared = [key for key in theirs if key in ours and not OF_THE_CLOCK.match(str(key))]
        return missing + [
            line for key in shared for line in differences(theirs[key], ours[key], f"{where}/{key}")
        ]
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        if len(theirs) != len(ours):
            return [f"{where}: {theirs!r} against {ours!r}"]
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}/{i}")]
    if isinstance(theirs, float) and isinstance(ours, int | float):
        near = math.isclose(theirs, ours, rel_tol=1e-4, abs_tol=1e-6)
        return [] if near else [f"{where}: {theirs!r} against {ours!r}"]
    return [] if theirs == ours else [f"{where}: {theirs!r} against {ours!r}"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="below 5.17 transformers divides by another count of tokens",
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_the_same(script: Path, tmp_path: Path) -> None:
    theirs = outcome_of(script, tmp_path / "theirs", ours=False)
    ours = outcome_of(script, tmp_path / "ours", ours=True)
    assert len(theirs) > 1
    assert differences(theirs, ours) == []
