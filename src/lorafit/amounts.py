"""Amounts of memory and time as people write and read them. Knows no machine.

Bytes are counted in thousands, as disks and `8GB` do; `8GiB` counts in 1,024s.
"""

import re
from types import MappingProxyType
from typing import Any, Final

_UNITS: Final = MappingProxyType(
    {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
     "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
)  # fmt: skip
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|(?:([KMGT]I?)?B?))", re.IGNORECASE)


def bytes_of(amount: Any, whole: int) -> int:
    """The bytes that `amount` asks for: `8GB`, `800MiB`, `75%` of `whole`, or a number of bytes.

    Raises:
        ValueError: it asks for nothing, or for more than all; in words.
    """
    found = _AMOUNT.fullmatch(str(amount).strip())
    if not found or isinstance(amount, bool):
        raise ValueError("is no amount of memory, such as 8GB, 800MiB or 75%")
    number, share = float(found[1]), found[2] == "%"
    if share and number > 100:
        raise ValueError("is more than all the memory there is")
    made = int(number / 100 * whole if share else number * _UNITS[(found[3] or "").upper()])
    if made <= 0:
        raise ValueError("leaves no memory at all; write 8GB, 800MiB or 75%")
    return made


def complaint(amount: Any) -> str:
    """What is wrong with `amount`, as `bytes_of` says it; empty if nothing is."""
    try:
        bytes_of(amount, 1 << 50)
    except ValueError as error:
        return str(error)
    return ""


def shown(count: float) -> str:
    """`0.93 GB` is `930 MB`; three digits, the largest unit that leaves some before the point."""
    unit, scale = next((u for u in _SHOWN if abs(count) >= u[1]), _SHOWN[-1])
    value = count / scale
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f} {unit}"


_SHOWN: Final = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def duration(seconds: float) -> str:
    """ "2 h 05 min", "12 min", "3 min 20 s", "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 600:
        return f"{whole // 60} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
