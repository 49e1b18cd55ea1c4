"""What is asked of a tokenizer, and texts -> ids with it.

Tokenizers come in from outside; this file names what of them is used. Knows no templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lorafit.errors import DataError, ModelError


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every one of transformers' does."""

    @property
    def bos_token_id(self) -> int | None:
        """What it puts before a text, if anything."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """What ends a text."""
        ...

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """jinja source, or several by name, of which "default" is used."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that stand for themselves, each with whether it is `special`."""
        ...

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """What templates know by name: bos_token, eos_token, ..."""
        ...

    def __len__(self) -> int:
        """Ids that it knows, added ones included."""
        ...

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """`input_ids`: a list of ids for each text; `encodings`: where each token stands in its
        text, None where a tokenizer does not know."""
        ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """The text of the ids."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[Mapping[str, Any]] | None,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any:
        """The conversation as text."""
        ...


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text as it stands, with nothing put before or behind."""
    # verbose=False: what is longer than the model's window is examples.build's to report
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of the ids as it stands."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], *, place: str) -> None:
    """Nothing, if the tokenizer knows all of these ids.

    Raises:
        DataError: it does not.
    """
    if not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise DataError(
            f"{place}: the ids lie between {min(ids)} and {max(ids)}, and the tokenizer has those "
            f"below {len(tokenizer)}.",
            why="They were made with another tokenizer, and mean other text here.",
            fix="Give the base whose tokenizer made them, or the text itself.",
        )


def eos_of(tokenizer: Tokenizer) -> int:
    """The end-of-text id.

    Raises:
        ModelError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end-of-text token (eos_token).",
            why="The tuned model could not learn to stop.",
            fix="Set tokenizer.eos_token to a token of its vocabulary that never occurs in text.",
        )
    return tokenizer.eos_token_id


def opening(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer begins its texts with it, else []."""
    ids = tokenizer(["x"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def opened(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`ids` behind the tokenizer's own beginning, which stands there once."""
    first = opening(tokenizer)
    return ids if first and ids[:1] == first else first + ids
