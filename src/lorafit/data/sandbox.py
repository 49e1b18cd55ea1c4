"""A chat template tried on a conversation in a child process with limits on time and memory.

A template comes with a model from the Hub and is a programme; jinja's sandbox keeps it from files
and objects, not from looping for ever or filling the memory. Owns the limits and the child's side,
which is this file run as a script: it imports jinja alone. Knows no tokenizer.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

SECONDS, BYTES, CHARACTERS, TIMES = 5, 1 << 30, 100_000, 20
"""Processor time and address space that rendering may take; characters that it may write beside so
many times those it was given."""


class Breach(Exception):
    """The template took more than it may; the message says what of."""


def try_out(template: str, conversations: Sequence[Mapping[str, Any]]) -> None:
    """Nothing, if each conversation is written, or refused by the template, within the limits.

    Args:
        conversations: The template's variables: messages, tools, special tokens.

    Raises:
        Breach: one is not.
    """
    asked = json.dumps(
        {
            "template": template,
            "conversations": list(conversations),
            "seconds": SECONDS,
            "bytes": BYTES,
            "characters": CHARACTERS,
            "times": TIMES,
        }
    )
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            input=asked,
            capture_output=True,
            text=True,
            timeout=4 * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Breach(f"it was still running after {4 * SECONDS} s") from error
    if done.returncode == 0:
        return
    ran_over = done.returncode < 0  # killed by the limit of time
    raise Breach(
        f"it ran for over {SECONDS} s of processor time"
        if ran_over
        else f"it asked for over {BYTES >> 30} GiB of memory"
        if "MemoryError" in done.stderr
        else done.stderr.strip().rpartition("\n")[2]
    )


def _limit(seconds: int, size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _refuse(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _draw(*_: Any) -> NoReturn:
    sys.exit("it draws random numbers")


def _as_json(
    value: Any,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _main() -> None:
    """The child: render each conversation as transformers would."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    asked = json.load(sys.stdin)
    _limit(asked["seconds"], asked["bytes"])
    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    # chance would let a template behave here and not later; such a one is no template to trust
    environment.filters["random"] = environment.globals["lipsum"] = _draw
    try:
        template = environment.from_string(asked["template"])
    except TemplateError as error:
        sys.exit(f"it cannot be read: {error}")
    for conversation in asked["conversations"]:
        most = asked["characters"] + asked["times"] * len(json.dumps(conversation))
        try:
            pieces = template.generate(**conversation)
            if any(written > most for written in accumulate(map(len, pieces))):
                sys.exit("it wrote far more than the conversation it was given")
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
            continue  # the row's own affair, told with its line where it is encoded


if __name__ == "__main__":
    _main()
