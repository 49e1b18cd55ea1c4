"""What one pass of native.cpp costs beside torch's several, and ways of computing attention.

    python benchmarks/kernels.py

One thread, processor time, best of 20; rows as SmolLM2-135M has them (1,024 tokens, 576 wide, 1,536
feed-forward, 9 heads of 64). Only the ratios are to be trusted. Writes results/kernels.txt.
"""

import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lorafit.kernels import attention, cross_entropy, elementwise, native, products
from lorafit.kernels.attention import Documents, Look, attend
from lorafit.kernels.cross_entropy import Head

T, D, F, H, G, E, V = 1024, 576, 1536, 9, 3, 64, 49152
RESULTS = Path(__file__).parent / "results" / "kernels.txt"


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Processor time of the fastest of so many calls."""
    call()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return 1000 * min(times)


def passes(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each pass on rows of `dtype`."""
    x, dy, weight = (
        torch.randn(T, D).to(dtype),
        torch.randn(T, D).to(dtype),
        torch.ones(D).to(dtype),
    )
    both, dh = torch.randn(T, 2 * F).to(dtype), torch.randn(T, F).to(dtype)
    heads, rstd = torch.randn(T, H + G, E).to(dtype), torch.ones(T)
    angles, counters = (torch.rand(T, E), torch.rand(T, E)), (torch.arange(T), torch.arange(T))
    logits, targets = torch.randn(128, V).to(dtype), torch.randint(V, (128,))
    norm = {"weight_D": weight, "rstd_T": rstd, "residual_TD": x}
    return {
        "norm": lambda: elementwise.rms_norm(x, weight, eps=1e-5, dtype=dtype),
        "norm, backward": lambda: elementwise.rms_norm_backward(dy, x, **norm),
        "rotary embedding": lambda: elementwise.rotate_(heads, angles),
        "SwiGLU": lambda: elementwise.swiglu(both),
        "SwiGLU, backward": lambda: elementwise.swiglu_backward_(both, dh),
        "LoRA's dropout": lambda: elementwise.dropped(x, counters, share=0.1),
        "cross entropy, 128 rows": lambda: cross_entropy._nats_(
            logits, targets, head=Head(logits[:1])
        ),
    }


def multiplied(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Products with what an adapter of rank 16 adds, and sums over rows."""
    sizes = {"q, k, v": (960, D), "gate and up": (2 * F, D), "down": (D, F)}
    made: dict[str, Callable[[], Any]] = {}
    for name, (out, into) in sizes.items():
        x, dy, weight, a, b = (
            torch.randn(size).to(dtype)
            for size in ((T, into), (T, out), (out, into), (16, into), (out, 16))
        )
        xa = torch.randn(T, 16).to(dtype)
        made[name] = partial(products.linear, x, weight, low=(xa, b))
        made[f"{name}, backward"] = partial(products.linear_backward, dy, weight, low=(xa, a))
        made[f"{name}, gradient of B"] = partial(products.over_rows, dy, xa)
    return made


def documents(length: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of one document's attention."""
    qkv = [torch.randn(length, heads, E).to(dtype).requires_grad_() for heads in (H, G, G)]
    dout = torch.randn(length, H, E).to(dtype)
    how = {"documents": Documents((length,)), "look": Look(E**-0.5)}
    return lambda: attend((qkv[0], qkv[1], qkv[2]), **how).backward(dout)


def lines() -> Iterator[str]:
    """The table, line by line."""
    yield f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.machine()}, "
    yield f"{torch.backends.cpu.get_cpu_capability()}, one thread, milliseconds of processor time"
    for dtype in (torch.float32, torch.bfloat16):
        plain_calls, calls = passes(dtype), passes(dtype)
        for name, call in calls.items():
            ours = milliseconds(call)
            with mock.patch.object(native, "function", return_value=None):
                plain = milliseconds(plain_calls[name])
            yield _beside(dtype, name, ours=ours, plain=plain)
    owns = products.is_own(torch.empty(0), torch.float32)
    for dtype in (torch.float32, torch.bfloat16) if owns else ():
        for name, call in multiplied(dtype).items():
            ours = milliseconds(call)
            with mock.patch.object(products, "_is_own", return_value=False):
                plain = milliseconds(call)
            yield _beside(dtype, name, ours=ours, plain=plain)
    ways = [(torch.float32, "torch's flash", "_prefers_flash")]
    if owns:
        ways += [(dtype, "attention.cpp", "_is_own") for dtype in (torch.float32, torch.bfloat16)]
    for dtype, name, choice in ways:
        for length in (128, 200, 350, 512, 1024):
            found = {}
            for taken in (False, True):
                chosen = {"_is_own": False, "_prefers_flash": False, choice: taken}
                with mock.patch.multiple(attention, **{k: _always(v) for k, v in chosen.items()}):
                    found[taken] = milliseconds(documents(length, dtype), repeats=6)
            yield (
                f"{str(dtype)[6:]:9} attention, {length:4} tokens   products {found[False]:7.2f}  "
                f"{name} {found[True]:7.2f}  {found[False] / found[True]:5.2f}x"
            )


def _beside(dtype: torch.dtype, name: str, *, ours: float, plain: float) -> str:
    return (
        f"{str(dtype)[6:]:9} {name:28} native {ours:7.2f}  torch {plain:7.2f}  {plain / ours:5.1f}x"
    )


def _always(answer: bool) -> Callable[..., bool]:
    return lambda *_: answer


def main() -> None:
    """Measure, show and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = list(lines())
    text = "\n".join([table[0] + table[1], *table[2:]]) + "\n"
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
