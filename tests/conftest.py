"""What every test may lean on: no network, and the shared real data where it lies."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
# models of a few thousand parameters: a second thread only waits at barriers, and on a busy machine
# for long. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# examples are kept in the user's own cache otherwise
os.environ["LORAFIT_CACHE"] = tempfile.mkdtemp(prefix="lorafit-tests-")
atexit.register(shutil.rmtree, os.environ["LORAFIT_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parent.parent


def shared_folder() -> Path:
    """Where the shared data should be."""
    return Path(os.environ.get("LORAFIT_SHARED") or ROOT.parent / "shared").resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models: LORAFIT_SHARED, else ../shared beside the repository.

    Absent, its tests are skipped; with LORAFIT_REQUIRE_SHARED=1, as in .ci/run, they fail.
    """
    folder = shared_folder()
    if folder.is_dir():
        return folder
    reason = f"no shared data at {folder}: set LORAFIT_SHARED to its folder"
    if os.environ.get("LORAFIT_REQUIRE_SHARED") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tiny_llama(shared: Path) -> Path:
    """A really pretrained Llama of 260,032 parameters, with its tokenizer."""
    return shared / "models" / "stories260K"
