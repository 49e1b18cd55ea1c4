"""What quantising a base costs: the loss of some rows over it, and over the same base in full.

Owns the second copy, which is loaded only where memory allows and let go at once. Both copies run
without adapter, by their own forward, products of the quantised one being those that training has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.amounts import shown
from lorafit.arguments import ModelArguments
from lorafit.engine.evaluation import exact
from lorafit.engine.layout import moved
from lorafit.engine.precision import Precision
from lorafit.errors import ModelError
from lorafit.kernels.cross_entropy import summed_nats, supervised_tokens
from lorafit.model import adapters, base, quantised


@dataclass(frozen=True)
class Gap:
    """Nats per supervised token, of `tokens`, over the base as it is quantised and in full."""

    quantised: float
    whole: float
    tokens: int

    @property
    def nats(self) -> float:
        """How much higher the loss is for it."""
        return self.quantised - self.whole

    def __str__(self) -> str:
        return (
            f"quantising the base costs {self.nats:+.4f} nats per token: {self.quantised:.4f}, "
            f"{self.whole:.4f} in full ({self.tokens:,} supervised tokens)"
        )


def loss_gap(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    precision: Precision,
    free: int,
    trust_remote_code: str = "",
) -> Gap | str:
    """The difference, or a line that says why it was not measured.

    Args:
        model: Quantised, with an adapter or without.
        batches: Ids, mask and labels, as a collator makes them.
        free: Bytes that a second copy may take, here and on the device.
    """
    beneath, device = base.unwrap(model), precision.device
    if quantised.scheme(beneath) == "none":
        return "the base is not quantised: there is no difference to measure"
    trained, every = adapters.trainable_share(model)
    dtype = base.weights_dtype(model)
    needed = (every - trained) * dtype.itemsize
    if needed > free:
        return f"the base in full takes {shown(needed)}, and {shown(max(free, 0))} are free"
    name, revision = base.source_of(model)
    wanted = ModelArguments(
        model=name,
        revision=revision,
        dtype=str(dtype).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
    )
    try:
        second = base.load_model(wanted)
    except ModelError as error:
        return f"the base in full cannot be loaded: {error.what}"
    if quantised.scheme(second) != "none":
        return "the base's own files are quantised: there is nothing to compare with"
    with adapters.without_adapter(model):
        ours, tokens = _nats(model, batches, precision=precision)
    theirs, _ = _nats(base.place(second, device), batches, precision=precision)
    return Gap(ours / tokens, theirs / tokens, tokens) if tokens else "no row carries loss"


@torch.no_grad()
def _nats(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, precision: Precision
) -> tuple[float, int]:
    """Nats summed over the supervised tokens, and how many these are."""
    nats, tokens = 0.0, 0
    with base.undisturbed(model), quantised.exactly(model), base.without_cache(model):
        for batch in batches:
            inputs = moved(dict(batch), precision.device)
            labels = inputs["labels"]
            with precision.autocast():
                logits = model(**{n: inputs[n] for n in inputs if n != "labels"})["logits"]
            nats += float(exact(summed_nats(logits.float(), labels)))
            tokens += int(supervised_tokens(labels, shifted=True))
    return nats, tokens
