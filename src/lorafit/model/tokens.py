"""Tokenizers, and what can be known of a base before any weight is read.

Owns finding and loading a tokenizer, and what a name means: a folder or a Hub id. Imports
transformers, but neither torch nor a model, so that data can be looked at within a second.
"""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError, nearest


def load_tokenizer(name: str, *, revision: str = "", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id: one of transformers', which all answer alike.

    Raises:
        ModelError: there is no such folder, or no tokenizer in it.
    """
    folder = folder_of(name)
    with quiet(), explained(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            str(folder or name), revision=revision or "main", trust_remote_code=trust_remote_code
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
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, ValueError):  # a folder that holds a tokenizer alone
        said = tokenizer.model_max_length
        return said if said < UNSAID_LENGTH else None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


UNSAID_LENGTH = 10**9
"""transformers gives tokenizers that name no longest text one far above this."""


def folder_of(name: str) -> Path | None:
    """The folder that `name` means; None where it can only be a Hub id."""
    if not name:
        raise ModelError("No model is named.", fix="Give a folder or a Hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{name} is a file; a model is a folder with config.json and *.safetensors.",
            fix=f"Give the folder: {path.parent}",
        )
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not ("/" in name and path.parent.is_dir()):
        return None
    raise ModelError(
        f"There is no folder {name}.{nearest_folder(path)}",
        fix="Give a folder with config.json and *.safetensors, or a Hub id such as org/name.",
    )


def nearest_folder(path: Path) -> str:
    """` Did you mean X?` for a folder beside `path` with a name close to its own; else empty."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    return nearest(path.name, sorted(entry.name for entry in parent.iterdir() if entry.is_dir()))


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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if Path(name).is_dir():
            raise ModelError(f"The {what} in {name} cannot be read: {reason}") from error
        offline = " while offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
        raise ModelError(
            f"{name} is no folder here, and no {what} of that name could be had from the Hub"
            f"{offline}.{nearest_folder(Path(name))}",
            why=reason,
            fix=f"Download it first (hf download {name}), or give a folder.",
        ) from error
