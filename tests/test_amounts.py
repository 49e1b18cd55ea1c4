"""Amounts of memory as people write and read them."""

import pytest

from lorafit.amounts import bytes_of, complaint, shown


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("8GB", 8 * 10**9), ("8gib", 8 << 30), (" 800 MiB ", 800 << 20), ("1.5G", 1_500_000_000),
        ("75%", 750), ("100%", 1000), (4096, 4096), ("12", 12), ("3kb", 3000),
    ],
)  # fmt: skip
def test_what_is_written_is_meant(written: object, meant: int) -> None:
    assert bytes_of(written, 1000) == meant
    assert not complaint(written)


@pytest.mark.parametrize(
    "written", ["lots", "-1", -1, 0, "0GB", "0%", "101%", "8GBB", "", "G", True, "8,5GB", "nan"]
)
def test_nonsense_is_refused(written: object) -> None:
    assert complaint(written)


@pytest.mark.parametrize(
    ("count", "said"),
    [(930e6, "930 MB"), (1.234e9, "1.23 GB"), (23.8e9, "23.8 GB"), (705_720, "706 kB"),
     (1234.5e9, "1,234 GB"), (12, "0.01 kB")],
)  # fmt: skip
def test_bytes_for_people(count: float, said: str) -> None:
    assert shown(count) == said
