"""The exceptions lorafit raises. Owns their tree and their three-part wording; knows nothing else.

::

    LorafitError                     what is wrong, why it matters, what to type
    ├── UsageError                   the user's own mistake: the command line exits 2, no traceback
    │   ├── ConfigError              a value, or a set of values, that cannot be run (ValueError)
    │   │   ├── UnknownNameError     a key, flag or keyword that does not exist (TypeError too)
    │   │   └── MissingMetricError   metric_for_best_model is not among the metrics (KeyError too)
    │   ├── DataError                a file, row or field of the data set (ValueError)
    │   ├── ModelError               a base model, tokenizer or adapter (ValueError)
    │   └── OutputError              the folder to write into (OSError)
    ├── MissingPackageError          an optional package that this setting needs (ImportError)
    ├── OutOfMemoryError             the smallest part of a step is too large (MemoryError)
    ├── NonFiniteError               loss or gradients stayed NaN or infinite (FloatingPointError)
    ├── TrainingInterrupted          SIGTERM while training; what was saved is named
    └── ElsewhereError               another of several processes has failed, and says why
"""

from collections.abc import Sequence
from difflib import get_close_matches


class LorafitError(Exception):
    """An error for people, in three parts. Each is one line, or a sequence of lines: what people's
    files and names bring along cannot begin another, nor reach the terminal as it is (`shown`).

    Args:
        what: What is wrong, with the value seen and where (`file:line`).
        why: Why it matters; may be empty where it is obvious.
        fix: What to type or change.
    """

    def __init__(
        self,
        what: str | Sequence[str],
        *,
        why: str | Sequence[str] = "",
        fix: str | Sequence[str] = "",
    ) -> None:
        self.what, self.why, self.fix = _lines(what), _lines(why), _lines(fix)
        super().__init__(str(self))

    def __str__(self) -> str:
        # not what it was made with: one that comes from another process is made anew of that
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)


class UsageError(LorafitError):
    """The user's own mistake; the command line prints it and exits with status 2."""


class ConfigError(UsageError, ValueError):
    """A value, or a combination of values, that cannot be run."""


class UnknownNameError(ConfigError, TypeError):
    """A key, flag or keyword argument that does not exist."""


class MissingMetricError(ConfigError, KeyError):
    """`metric_for_best_model` names a metric that no evaluation gave."""


class DataError(UsageError, ValueError):
    """A data file, row or field that cannot be used."""


class ModelError(UsageError, ValueError):
    """A base model, tokenizer or adapter that cannot be used."""


class OutputError(UsageError, OSError):
    """An output folder that cannot be written, or that holds somebody's work."""


class MissingPackageError(LorafitError, ImportError):
    """An optional package that the chosen setting needs is not installed."""


class NonFiniteError(LorafitError, FloatingPointError):
    """Loss or gradients stayed NaN or infinite for several steps in a row."""


class OutOfMemoryError(LorafitError, MemoryError):
    """Memory does not hold the smallest part of a step; what was saved is named."""


class TrainingInterrupted(LorafitError):
    """Training was asked to stop (SIGTERM); the message says what was saved and how to resume."""


class ElsewhereError(LorafitError):
    """Another of the processes that train together has failed or ended."""

    def __init__(self, why: str | Sequence[str] = "", *, fix: str | Sequence[str] = "") -> None:
        super().__init__(
            "Another of the processes that train together has ended.", why=why, fix=fix
        )


def shown(text: str, *, keep: str = "") -> str:
    """`text` with what a terminal would obey or hide written out: `\\x1b`, `\\n`, `\\u202e`.

    Args:
        keep: Characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def _lines(part: str | Sequence[str]) -> str:
    return "\n".join(map(shown, [part] if isinstance(part, str) else part))


def nearest(name: str, names: list[str]) -> str:
    """` Did you mean X?` for the closest of `names`, or an empty string where none is close."""
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
