"""NEFTune: uniform noise on the embeddings while training. Owns the two hooks that add it."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model.base import unwrap


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Generator[None]:
    """Add noise in [-m, m], m = alpha / sqrt(tokens x hidden size), while `model` trains.

    Jain et al. 2023 (NEFTune). Departs from transformers in `tokens`: each document's own length,
    not the padded length of its batch, so that padding does not change the noise.
    """
    if not alpha:
        yield
        return
    base = unwrap(model)
    embedding: nn.Module = base.get_input_embeddings()
    lengths: list[Tensor | None] = [None]

    # torch calls hooks by position
    def remember(_module: nn.Module, *call: Any) -> None:
        mask = call[1].get("attention_mask")
        lengths[0] = None if mask is None else mask.sum(dim=1)

    def add(module: nn.Module, *call: Any) -> Tensor:
        output_BTD: Tensor = call[1]
        if not module.training:
            return output_BTD
        _, tokens, width = output_BTD.shape
        if lengths[0] is None:
            bound = torch.full(output_BTD.shape[:1], alpha / math.sqrt(tokens * width))
        else:
            bound = alpha / (lengths[0] * width).clamp(min=1).sqrt()
        noise_BTD = torch.empty_like(output_BTD).uniform_(-1, 1)
        return output_BTD + noise_BTD * bound.to(output_BTD)[:, None, None]

    hooks = [
        base.register_forward_pre_hook(remember, with_kwargs=True),
        embedding.register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
