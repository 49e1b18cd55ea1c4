"""Tokenizers, and what can be known of a base before any weight is read.

Owns finding and loading a tokenizer. Imports transformers, but neither torch nor a model, so that
data can be looked at within a second.
"""

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging
from transformers.utils.hub import cached_file

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError
from lorafit.model import guard
from lorafit.model.guard import folder_of, nearest_folder


def load_tokenizer(name: str, *, revision: str = "", trust_remote_code: str = "") -> Any:
    """The tokenizer of a folder or Hub id: one of transformers', which all answer alike.

    Args:
        trust_remote_code: As `runs_code`.

    Raises:
        ModelError: there is no such folder, no tokenizer in it, or as `runs_code`.
    """
    folder = folder_of(name)
    trusted = runs_code(name, revision=revision, repository=trust_remote_code)
    with quiet(), explained(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            str(folder or name), revision=revision or "main", trust_remote_code=trusted
        )


def runs_code(name: str, *, revision: str = "", repository: str = "") -> bool:
    """Whether the author's Python code is to run when the folder or Hub id `name` is loaded.

    It runs where `repository` names the Hub repository that holds it, and nowhere else; code that
    lies in a folder here never runs. Where transformers has code of its own for the model, that is
    used instead and nothing is refused.

    Raises:
        ModelError: code is needed and not agreed to, other code than was agreed to is named, or a
            file asks for code to be run in another way.
    """
    folder = folder_of(name)
    if folder:
        guard.check_entries(folder)
    code: set[str] = set()
    needed: list[str] = []
    for file in _settings_files(name, folder, revision=revision):
        settings = guard.read_settings(file)
        named = _strings(settings.get("auto_map"))
        code |= {one.partition("--")[0] if "--" in one else name for one in named}
        needed += [file.name] if named and not _is_known(settings) else []
    if not code or (not repository and not needed):
        return False
    if code == {repository} and not (folder and name in code):
        return True
    raise ModelError(
        f"{name} brings Python code of its own, from {', '.join(sorted(code))} "
        f"(auto_map in {' and '.join(needed) or 'its settings'})"
        + (f", and not from {repository}." if repository else "."),
        why="Loading it would run that code on this machine, with all that you may do.",
        fix="Code in a folder is never run. Where you have read it and trust its author, give the "
        "Hub id it came from: --model ORG/REPO --trust-remote-code ORG/REPO"
        if folder and name in code
        else "Where you have read it and trust its author, name where it lies: "
        f"--trust-remote-code {min(code)}",
    )


def _settings_files(name: str, folder: Path | None, *, revision: str) -> list[Path]:
    """The files of a base or adapter in which code may be named; those that are there."""
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    if folder:
        return [folder / file for file in names if (folder / file).exists()]
    with explained(name, "model"):
        found = [
            cached_file(
                name, file, revision=revision or "main", _raise_exceptions_for_missing_entries=False
            )
            for file in names
        ]
    return [Path(file) for file in found if file]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _is_known(settings: Mapping[str, Any]) -> bool:
    """Whether transformers can do without the code that a model's or tokenizer's settings name."""
    kind, tokenizer = settings.get("model_type"), settings.get("tokenizer_class")
    return str(kind) in CONFIG_MAPPING or (
        isinstance(tokenizer, str) and tokenizer_class_from_name(tokenizer) is not None
    )


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of everything that decides which ids a text gets; the chat template is not in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    named = f"{type(tokenizer).__name__}{sorted(tokenizer.special_tokens_map.items())}"
    return hashlib.sha256((named + vocabulary).encode()).hexdigest()


def context_of(arguments: ModelArguments, tokenizer: Any) -> int | None:
    """The most tokens the base can look back on, read before any weight; None where nobody says."""
    name = str(folder_of(arguments.model) or arguments.model)
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=arguments.revision or "main",
            trust_remote_code=runs_code(
                arguments.model,
                revision=arguments.revision,
                repository=arguments.trust_remote_code,
            ),
        )
    except ModelError:
        raise
    except (OSError, ValueError):  # a folder that holds a tokenizer alone
        said = tokenizer.model_max_length
        return said if said < UNSAID_LENGTH else None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


UNSAID_LENGTH = 10**9
"""transformers gives tokenizers that name no longest text one far above this."""


@contextmanager
def quiet() -> Generator[None]:
    """transformers' progress bars and advice, off; what matters is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(name: str, what: str) -> Generator[None]:
    """Turns what transformers and safetensors raise while reading into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # no common root: a stranger's file can fail anywhere in them
        reason = str(error).strip().split("\n")[0]
        if os.path.isdir(name):
            raise ModelError(
                f"The {what} in {name} cannot be read: {reason}",
                fix="Fetch it again from where it came, or give another folder.",
            ) from error
        offline = " while offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
        raise ModelError(
            f"{name} is no folder here, and no {what} of that name could be had from the Hub"
            f"{offline}.{nearest_folder(Path(name))}",
            why=reason,
            fix=f"Download it first (hf download {name}), or give a folder.",
        ) from error
