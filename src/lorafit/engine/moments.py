"""The moments that AdamW and Lion keep, whichever member of the family holds them, and how a run
goes on under another.

torch's AdamW and bitsandbytes' AdamW and Lion: in 32 bits, in 8 (blocks of 256 and a dynamic map;
Dettmers et al. 2022), paged or not. What one has saved the others load, by bitsandbytes' own
blockwise functions: from 8 bits to 32 nothing is lost, from 32 to 8 what 8 bits round away. Saved
state is plain: a mapping of named tensors and numbers for each parameter. Knows no gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a tensor's state; smaller ones stay on the GPU."""

_BLOCK = 256
_TORCH = ("exp_avg", "exp_avg_sq")
_NESTED = "__bnb_optimizer_quant_state__"
"""Under which bitsandbytes' state_dict hides its tensors from FSDP."""


def told(optimizer: Optimizer) -> dict[str, str | None]:
    """What a resumed run is compared by: `kind`, one for a whole family, and `state`, how its
    moments are kept (paging changes no number); None of an optimiser that no other can follow."""
    kind = type(optimizer)
    if type(optimizer) is AdamW:
        return {"kind": _name(AdamW), "state": "32-bit"}
    if not _is_bitsandbytes(optimizer):
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "state": None}
    held: Any = optimizer
    state = f"{held.args.optim_bits}-bit, bitsandbytes'"
    if kind.__name__.removeprefix("Paged").startswith("AdamW"):
        return {"kind": _name(AdamW), "state": state}
    return {"kind": f"bitsandbytes' {held.optimizer_name}", "state": state}


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def state_bytes(sizes: Sequence[int], *, name: str) -> tuple[int, int]:
    """Bytes of state that the optimiser `name` of these numbers of elements keeps, and how many of
    them paging could move off a GPU."""
    each = (1 if "lion" in name else 2) * (1 if "8bit" in name else 4)
    small = 4096 if "8bit" in name else 0  # bitsandbytes keeps those in 32 bits
    held = [(size, size * (each if size >= small else 4 * each)) for size in sizes]
    return sum(b for _, b in held), sum(b for size, b in held if size >= PAGED_FROM)


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's `state_dict`, its tensors under their own names."""
    state = optimizer.state_dict()
    for of in state["state"].values():
        of.update(of.pop(_NESTED, {}) if isinstance(of, dict) else {})
    return state


def load(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put what `saved` gave into `optimizer`: bit for bit where it was saved by its like,
    converted where it was another of the family.

    Raises:
        ValueError: it is of other parameters.
    """
    theirs = any("state1" in of for of in state["state"].values())
    if not _is_bitsandbytes(optimizer) and not (theirs and type(optimizer) is AdamW):
        optimizer.load_state_dict(dict(state))
        return
    _check(optimizer, state)
    if not _is_bitsandbytes(optimizer):
        moments = {key: _as_torch(of) for key, of in state["state"].items()}
        own = optimizer.state_dict()["param_groups"]
        groups = [a | _rates(b) for a, b in zip(own, state["param_groups"], strict=True)]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return
    # not its own load_state_dict: that moves paged state onto the GPU, where it stays
    optimizer.state.clear()
    for group, kept in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group |= _rates(kept)
    held: Any = optimizer
    for parameter, of, place in _pairs(optimizer, state):
        held.init_state(held.param_groups[place[0]], parameter, *place)
        made = optimizer.state[parameter]
        made["step"] = int(of["step"])
        for number in (1, 2):
            if f"state{number}" in made:
                _fill(made, of, number=number)


def _is_bitsandbytes(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.optim")


def _rates(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in ("lr", "initial_lr") if name in group}


def _pairs(
    optimizer: Optimizer, state: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Mapping[str, Any], tuple[int, int]]]:
    """Each parameter with what was saved of it, and its place in the groups."""
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    for group, (own, kept) in enumerate(groups):
        for index, (parameter, key) in enumerate(zip(own["params"], kept["params"], strict=True)):
            if key in state["state"]:
                yield parameter, state["state"][key], (group, index)


def _check(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    for parameter, of, _ in _pairs(optimizer, state):
        for number in (1, 2) if _held(of, 2) is not None else (1,):
            held = _held(of, number)
            if held is None or held.shape != parameter.shape:
                shape = None if held is None else [*held.shape]
                raise ValueError(f"moments of shape {shape} for a tensor {[*parameter.shape]}")


def _held(of: Mapping[str, Any], number: int) -> Tensor | None:
    return of.get(f"state{number}", of.get(_TORCH[number - 1]))


def _whole(of: Mapping[str, Any], number: int) -> Tensor:
    """A moment in float32."""
    held = _held(of, number)
    assert held is not None
    if held.dtype != torch.uint8:
        return held.float()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(
        held, absmax=of[f"absmax{number}"], code=of[f"qmap{number}"], blocksize=_BLOCK
    )


def _as_torch(of: Mapping[str, Any]) -> dict[str, Tensor]:
    moments = {name: _whole(of, number) for number, name in enumerate(_TORCH, start=1)}
    return {"step": torch.tensor(float(of["step"])), **moments}


def _fill(made: dict[str, Any], of: Mapping[str, Any], *, number: int) -> None:
    """Put a saved moment into the buffers that the optimiser has made for it."""
    buffer, held = made[f"state{number}"], _held(of, number)
    scales = f"absmax{number}"
    if held is not None and held.dtype == buffer.dtype:
        parts = {f"state{number}": held} | ({scales: of[scales]} if scales in made else {})
    elif buffer.dtype != torch.uint8:
        parts = {f"state{number}": _whole(of, number)}
    else:
        from bitsandbytes.functional import quantize_blockwise

        code = made[f"qmap{number}"].cpu()
        codes, kept = quantize_blockwise(_whole(of, number), code=code, blocksize=_BLOCK)
        parts = {f"state{number}": codes, scales: kept.absmax}
    for name, tensor in parts.items():
        made[name].copy_(tensor)
