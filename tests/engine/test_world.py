"""One process, or a refusal."""

import pytest

from lorafit.engine.world import check_alone
from lorafit.errors import ConfigError


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "", "1"):
        monkeypatch.setenv("WORLD_SIZE", size or "")
        if size is None:
            monkeypatch.delenv("WORLD_SIZE")
        check_alone()


def test_several_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4.*\n.*\n.*python instead of torchrun"):
        check_alone()
