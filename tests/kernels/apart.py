"""A programme in a process of its own: Triton reads how it is to run when it is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(programme: str, **environment: str) -> None:
    """Run `programme`, which may import lorafit and tests; what it dies of fails the test."""
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    surroundings = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    surroundings |= {"PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        [sys.executable, "-c", programme], env=surroundings, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
