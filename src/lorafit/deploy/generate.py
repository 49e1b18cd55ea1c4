"""Prompts -> answers, by the base or with its adapter. Knows no files and draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.data.template import prompt_ids, stop_ids, try_prompts
from lorafit.engine.precision import home
from lorafit.errors import UsageError
from lorafit.model.adapters import Tuned, load_tuned, without_adapter
from lorafit.model.base import context_length, place, undisturbed

BATCH = 16
"""Prompts answered at once, neighbours in length."""

PAD = 0
"""Fills up a batch on the left. Masked, so any id that every vocabulary has will do."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at `temperature` 0, else drawn with `seed`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


GREEDY = Sampling()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Answer:
    """A decoded answer, `tokens` long without its stop id; `stopped`: it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def open_adapter(
    folder: str,
    *,
    base: str = "",
    accept: bool = False,
    trust_remote_code: str = "",
    quantize: str = "",
) -> Tuned:
    """The adapter in `folder` over its base (or over `base`), on the accelerator if there is one.

    Args, Raises: see `adapters.load_tuned`.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or CPU
    tuned = load_tuned(
        Path(folder),
        base=base,
        accept=accept,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        home=home(device),
    )
    place(tuned.model, device)
    return tuned


def answer(tuned: Tuned, prompts: Sequence[str], *, sampling: Sampling = GREEDY) -> list[Answer]:
    """What the tuned model answers, prompted and stopped as its contract says.

    An adapter without contract is asked as a chat where its tokenizer has a chat template.
    """
    tokenizer, contract = tuned.tokenizer, tuned.contract
    shape = contract.get("shape") or ("chat" if tokenizer.chat_template else "raw")
    is_chat = shape == "chat"
    return generate(
        tuned.model,
        tokenizer,
        prompts=prompts,
        is_chat=is_chat,
        stops=contract.get("stop_ids") or stop_ids(tokenizer, is_chat=is_chat),
        sampling=sampling,
    )


def answer_with_base(
    tuned: Tuned, prompts: Sequence[str], *, sampling: Sampling = GREEDY
) -> list[Answer]:
    """The same from the base alone, asked in the same way."""
    with without_adapter(tuned.model):
        return answer(tuned, prompts, sampling=sampling)


def generate(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[str],
    is_chat: bool,
    stops: Sequence[int],
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """One answer for each prompt, in their order.

    The model's own generation settings (penalties, beams) are set aside, so that base and tuned
    model are asked in the same way. Mode and random state are as before afterwards.

    Args:
        model: A transformers causal model, with a PEFT adapter or without.
        is_chat: Whether a prompt is a user's message, written by the tokenizer's chat template,
            or text to go on from.
        stops: Ids that end an answer.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the model's context.
    """
    if is_chat:
        try_prompts(tokenizer, prompts)
    rows = [prompt_ids(tokenizer, prompt, is_chat=is_chat) for prompt in prompts]
    _check_room(rows, context_length(model))
    answers: dict[int, Answer] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with undisturbed(model):
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            within = [rows[index] for index in batch]
            grown = go_on(model, within, stops=stops, sampling=sampling)
            for index, new in zip(batch, grown, strict=True):
                answers[index] = _answer(tokenizer, new, stops=stops)
    return [answers[index] for index in range(len(rows))]


def _check_room(rows: Sequence[Sequence[int]], context: int | None) -> None:
    for number, row in enumerate(rows, start=1):
        if not row:
            raise UsageError(f"Prompt {number} is empty.", fix="Give it at least one word.")
        if context is not None and len(row) >= context:
            raise UsageError(
                f"Prompt {number} has {len(row)} tokens; the model's context is {context}.",
                why="There is no room left for an answer.",
                fix="Shorten the prompt.",
            )


def go_on(
    model: Any, rows: Sequence[Sequence[int]], *, stops: Sequence[int], sampling: Sampling
) -> list[list[int]]:
    """The new ids of each row of ids, whatever follows its stop id included."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    longest = width + sampling.max_new_tokens
    drawn = sampling.temperature > 0
    device = next(model.parameters()).device
    whole: Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_length=min(longest, context_length(model) or longest),
        max_new_tokens=None,
        do_sample=drawn,
        temperature=sampling.temperature if drawn else 1.0,
        top_k=0 if drawn else 50,
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=list(stops) or None,
        pad_token_id=PAD,
        use_cache=True,
    )
    return whole[:, width:].tolist()


def _answer(tokenizer: Any, new: Sequence[int], *, stops: Sequence[int]) -> Answer:
    end = next((index for index, token in enumerate(new) if token in stops), None)
    kept = list(new[:end])
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)
