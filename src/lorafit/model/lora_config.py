"""What an adapter's configuration may say: each setting known, of its type, and within reason.

Knows peft's settings by name, not peft: `adapters` hands over its usual values and makes the
configuration of what comes back.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lorafit.errors import ModelError, nearest
from lorafit.model.guard import CODE
from lorafit.panel import fits, spoken

_NAMES = list[str] | str | None
_SOME = list[str] | None
KINDS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "task_type": str | None, "base_model_name_or_path": str | None, "revision": str | None,
        "r": int, "lora_alpha": float, "lora_dropout": float, "bias": str,
        "target_modules": _NAMES, "exclude_modules": _NAMES, "modules_to_save": _SOME,
        "target_parameters": _SOME, "layers_pattern": _NAMES,
        "layers_to_transform": list[int] | int | None,
        "rank_pattern": dict | None, "alpha_pattern": dict | None, "fan_in_fan_out": bool,
        "trainable_token_indices": list[int] | dict | None, "ensure_weight_tying": bool,
        "use_rslora": bool, "use_dora": bool, "lora_bias": bool, "init_lora_weights": bool | str,
    }
)  # fmt: skip
"""What is taken over. Anything else must be as peft has it unless somebody sets it."""

_SAID_ELSEWHERE = ("peft_type", "peft_version", "inference_mode", "auto_mapping", "runtime_config")
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""First weights that leave the base as it is; an adapter that is loaded has others anyway."""

MOST_ALPHA, MOST_RANK, SECONDS = 10_000, 8_192, 3
_PLAIN = re.compile(r"(?:[^*+?{}\\]|\\\.)*")


def checked(written: Mapping[str, Any], *, usual: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What `file` says and peft is to be told.

    Args:
        written: The file's settings by name.
        usual: peft's own values by name.

    Raises:
        ModelError: with everything that is wrong.
    """
    kind = written.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{file.parent} holds a {kind!r:.40} adapter; lorafit loads LoRA.")
    faults = [
        fault for name, value in written.items() if (fault := _fault(name, value, usual=usual))
    ]
    if faults:
        raise ModelError(
            f"{file} is refused: {'; '.join(faults)}.",
            why="A setting that is not understood makes another model than was trained, and some "
            "have run their author's code.",
            fix="Take the adapter from its author's own page, or train it again.",
        )
    taken = {name: value for name, value in written.items() if name in KINDS and value is not None}
    return {**taken, "init_lora_weights": True}


def _fault(name: str, value: Any, *, usual: Mapping[str, Any]) -> str:
    shown = f"{name}={value!r:.80}"
    if name in KINDS:
        if not fits(value, KINDS[name]):
            return f"{shown} is not {spoken(KINDS[name])}"
        return "; ".join(f"{shown} {what}" for what in _beyond(name, value))
    says_nothing = value in (None, False, "", [], {}) or (name in usual and value == usual[name])
    if says_nothing or (name in _SAID_ELSEWHERE and not (name in CODE and _imports(value))):
        return ""
    if name in CODE:
        return f"{shown} names code to import"
    if name == "layer_replication":
        return f"{shown} would multiply the base's layers"
    return f"{shown} is not read here" if name in usual else _unknown(name, [*KINDS, *usual])


def _unknown(name: str, known: list[str]) -> str:
    return f"there is no setting {name:.80}.{nearest(name[:80], known)}".rstrip("?.")


def _imports(mapping: Any) -> bool:
    """Whether peft's note on the base's class is more than that: peft writes one where no task is
    set, of transformers' own classes for a base of theirs. It is not followed here at all."""
    if not isinstance(mapping, dict) or mapping.keys() > {"base_model_class", "parent_library"}:
        return True
    library = str(mapping.get("parent_library", ""))
    return not re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", library)


def _beyond(name: str, value: Any) -> Iterator[str]:
    ranks, alphas = ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")
    most = MOST_RANK if name in ranks else MOST_ALPHA
    numbers = value.values() if isinstance(value, dict) else () if value is None else (value,)
    if name in ranks and not all(fits(n, int) and 1 <= n <= most for n in numbers):
        yield f"is not between 1 and {most:,}"
    if name in alphas and not all(fits(n, float) and 0 < n <= most for n in numbers):
        yield f"is not above 0 and at most {most:,}"
    if name == "lora_dropout" and not all(0 <= n < 1 for n in numbers):
        yield "is not from 0 to below 1"
    if name == "bias" and value not in ("none", "all", "lora_only"):
        yield "is not none, all or lora_only"
    if name == "init_lora_weights" and value not in _STARTS:
        yield "changes the base itself before training, and what it was then is not known"


def check_patterns(settings: Mapping[str, Any], names: Iterable[str], *, file: Path) -> None:
    """Nothing, if the patterns that choose modules by `names` are patterns, and find them in
    seconds: those that could take for ever are tried in a child process first.

    Raises:
        ModelError: they are not, or do not.
    """
    given = [settings.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [one for one in given if isinstance(one, str)]
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        patterns += () if isinstance(settings.get(name), str) else settings.get(name) or ()
    try:
        for pattern in patterns:
            re.compile(pattern)
        if not all(map(_PLAIN.fullmatch, patterns)):
            subprocess.run(
                [sys.executable, "-I", "-c", _TRIAL],
                input=json.dumps([patterns, list(names)]),
                text=True, capture_output=True, check=True, timeout=SECONDS,
            )  # fmt: skip
    except (re.error, OverflowError, RecursionError, subprocess.SubprocessError) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        reason = f"it takes more than {SECONDS} s" if slow else "it is no pattern"
        raise ModelError(
            f"{file} is refused: a pattern that names modules cannot be used, {reason}: "
            f"{'; '.join(patterns):.200}.",
            fix="Name the modules one by one.",
        ) from error


_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name), re.match(rf"(.*\\.)?({pattern})$", name)
        re.match(rf".*\\.[^.]*{pattern}\\.(\\d+)\\.", name)
"""
