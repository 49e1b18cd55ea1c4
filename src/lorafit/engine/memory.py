"""Bytes before a run: what a token keeps for backward. Arithmetic alone; imports no torch.

The numbers are those of docs/numerics.md: the two halves of a layer keep x twice, q, k, v,
attention's output, gate and up. Knows no device.
"""

from dataclasses import dataclass

OWN_FORWARD = 4
"""A model's own forward is taken to keep so many times as much: of transformers' Llama with PEFT,
autograd saves 1.8 times as much in fp32 and 2.8 to 3.3 in bf16, and there are other models."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder: `queries` and `keys` are all heads together, `products` the bytes of a number
    in matrix products, `stream` in the residual stream."""

    layers: int
    hidden: int
    queries: int
    keys: int
    feed_forward: int
    products: int
    stream: int


def kept_bytes(shape: Shape, *, recompute: str = "none") -> int:
    """What one token keeps over all layers until backward has passed, in bytes."""
    rows = 2 * shape.hidden * shape.stream
    attention = shape.queries * shape.products
    heads = (shape.queries + 2 * shape.keys) * shape.products
    mlp = 2 * shape.feed_forward * shape.products
    kept = {
        "none": rows + attention + heads + mlp,
        "mlp": rows + attention + heads,
        "half": rows + attention,
        "layer": shape.hidden * shape.stream,
    }
    return shape.layers * kept[recompute]


def token_budget(free: int, per_token: int, *, most: int) -> int:
    """Tokens that half of the `free` bytes hold: a power of two from 256 to `most`.

    The other half is left to the optimiser, the loss and what else is not counted.
    """
    fitting = max(1, free // 2 // per_token)
    return max(256, min(most, 1 << (fitting.bit_length() - 1)))
